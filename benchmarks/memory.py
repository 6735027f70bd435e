"""Memory of a step: the exact bytes that autograd keeps for backward, and the peak.

Peak on Linux: the kernel's high-water mark of resident memory (VmHWM), reset right before the
step by writing 5 to /proc/self/clear_refs. In a process started with `STABLE_MALLOC` every tensor
of 64 KiB or more is its own mapping, given back when it is freed, so that the mark follows the
live tensors and not what malloc has kept.
"""

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

STABLE_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}


@dataclass(frozen=True)
class SavedStorage:
    """A storage kept alive for backward. bytes: of the whole storage, which is what it holds."""

    name: str
    bytes: int


def describe(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}[{','.join(str(size) for size in tensor.shape)}]"


def saved_for_backward(
    forward: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    name_of: Callable[[Tensor], str] = describe,
) -> list[SavedStorage]:
    """Runs `forward`; returns each storage that autograd saved, once, largest first.

    parameters: tensors that live anyway; what shares their storage is not counted.
    name_of: what to call a saved tensor, by default its dtype and shape.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    # Holding the tensors keeps their addresses from being used again while we count.
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address and address not in excluded:
            saved.setdefault(address, tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    storages = [
        SavedStorage(name_of(tensor), tensor.untyped_storage().nbytes())
        for tensor in saved.values()
    ]
    return sorted(storages, key=lambda storage: -storage.bytes)


@dataclass(frozen=True)
class PeakMemory:
    """peak_bytes: of the whole process (on CUDA: of the allocator). step_bytes: the part above
    what was resident right before the step. method: how it was read."""

    peak_bytes: int
    step_bytes: int
    method: str


def peak_of(step: Callable[[], object], device: torch.device) -> PeakMemory:
    """Peak memory of one call of `step`, which must have run before (warm-up)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return PeakMemory(peak, peak - before, "torch.cuda.max_memory_allocated")

    _give_back_free_memory()
    before = _status_bytes("VmRSS")
    if before is not None and _reset_high_water_mark():
        step()
        peak = _status_bytes("VmHWM")
        return PeakMemory(peak, peak - before, "VmHWM after reset")
    step()
    peak = _lifetime_peak_bytes()
    # The lifetime's peak includes building the model, so the difference can only be too large.
    return PeakMemory(peak, max(0, peak - (before or 0)), "ru_maxrss of the process")


def _give_back_free_memory() -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where it is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int | None:
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _reset_high_water_mark() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as clear_refs:
            clear_refs.write("5")
    except OSError:
        return False
    # A kernel or a sandbox may accept the write and ignore it: then the mark is still far above.
    mark, resident = _status_bytes("VmHWM"), _status_bytes("VmRSS")
    return mark is not None and mark <= resident + (16 << 20)


def _lifetime_peak_bytes() -> int:
    if os.name == "nt":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
