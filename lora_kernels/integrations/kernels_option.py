"""``kernels=`` of a model: which of our kernels its layers may take, and what is known of them."""

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from lora_kernels.runtime import dispatch, machine_files, tables, verdicts
from lora_kernels.runtime.dtypes import short_name

KERNELS = ("auto", "off")


def backend_for(kernels: str, model: nn.Module) -> str:
    """The backend that ``kernels=`` of a model stands for; with ``auto`` kernels are tested first,
    once per state of a machine that has a CUDA device, wherever the model is now.

    Raises:
        ValueError: ``kernels`` is neither ``auto`` nor ``off``.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels: expected one of {KERNELS}, got {kernels!r}")
    if kernels == "off":
        return "composed"
    if dispatch.PROCESS_DEFAULT == "auto" and may_run_kernels():
        from lora_kernels import self_test  # which a CPU has no need of

        try:
            self_test.ensure(_dtypes_of(model))
        except Exception as error:  # of a machine that nobody has thought of: composed serves there
            warnings.warn(
                f"lora_kernels: kernels could not be tested ({type(error).__name__}: {error})",
                stacklevel=3,
            )
    return "auto"


def may_run_kernels() -> bool:
    """Whether a CUDA device and what compiles kernels for it are there; starts no CUDA."""
    if torch.version.cuda is None or torch.cuda.device_count() == 0:
        return False
    return dispatch.triton_missing() is None


def _dtypes_of(model: nn.Module) -> list[torch.dtype]:
    """Of its activations, as far as its parameters tell: fp32 ones may be under autocast."""
    every = (torch.bfloat16, torch.float16, torch.float32)
    present = {tensor.dtype for tensor in model.parameters()}
    halves = present & {torch.bfloat16, torch.float16}
    return [dtype for dtype in every if dtype in present] if halves else list(every)


def standing(
    devices: Iterable[torch.device],
    dtypes: Iterable[torch.dtype] = (),
    *,
    proofs_on_cpu: bool = False,
) -> list[str]:
    """What decides about our kernels on these devices, as lines of text, and what would change it.

    dtypes: of activations; for these it is said what a CPU takes where nothing is measured.
    proofs_on_cpu: also what the self-test has seen on a CPU, where nothing depends on it.
    """
    ours = [device for device in devices if device.type in ("cpu", "cuda")]
    lines = []
    for kind, device in {machine_files.kind_of(each): each for each in ours}.items():
        lines.append(f"kernels on {kind}:")
        if device.type == "cuda" or proofs_on_cpu:
            lines += _proofs(kind, device)
        if device.type == "cpu":
            for dtype in dtypes:
                choice = dispatch.choose("auto", device, dtype)
                lines.append(f"  {short_name(dtype)}: {choice.backend}: {choice.reason}")
        lines.append(_measured(device))
    return lines


def _proofs(kind: str, device: torch.device) -> list[str]:
    known = verdicts.known()
    of_device = known.get(kind) or known.get(verdicts.ANY, {})
    found = {name: verdicts.verdict(name, device) for name in of_device}
    tried = {name: each for name, each in found.items() if each.state != verdicts.ABSENT}
    if not tried:
        return ["  not tested here: python -m lora_kernels self-test"]
    path = verdicts.file_of(machine_files.machine_state())
    lines = [f"  {name}: {each.state}, {each.detail}" for name, each in tried.items()]
    return [f"  tested by the self-test ({path}):", *lines]


def _measured(device: torch.device) -> str:
    cells = {name: tables.cells_of(name, device) for name in ("lora_linear", "routed_lora")}
    counts = [f"{len(found)} of {name}" for name, found in cells.items() if found]
    if counts:
        return f"  measured by tune: cells: {', '.join(counts)} ({tables.file_for(device)})"
    return "  nothing is measured: lora_kernels.tune(model) measures its shapes"
