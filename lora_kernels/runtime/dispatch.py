"""Which backend serves a call, and why.

Here is what ``auto`` takes where nothing is measured and nothing proven: on a CPU ``native`` where
the compiled extension is there, with AVX2 at least (for bf16 with AVX-512-BF16: below that it was
slower than oneDNN's narrow GEMMs where it was measured); on the other devices of
:data:`DISPATCH_KEYS` ``composed``, which needs nothing but torch's own operations. What is measured
and proven each operation knows itself (``choice.py`` in its folder). Devices that are not there are
refused. ``native`` is the extension's C++ kernels on a CPU and its CUDA kernels on a GPU, where it
leaves to Triton's what they do not cover.
``LORA_KERNELS_BACKEND`` replaces ``auto`` for the whole process, so that the kernels can be
switched off without touching a program; it is read once, at import.
"""

import functools
import os
from typing import NamedTuple

import torch

from lora_kernels.runtime import cpu_extension, cuda_extension
from lora_kernels.runtime.dtypes import short_name

BACKENDS = ("reference", "composed", "triton", "native")

# The device types that the operations are registered for, and the dispatcher's name of each. HPUs
# and the backends of others (PrivateUse1) are not among them: the generator of the dropout needs
# 64-bit integers, which not all of them have.
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}

_CPU = torch.device("cpu")  # to compare with it takes a fifth of the time of device.type


class Choice(NamedTuple):
    """A backend and the reason it was taken."""

    backend: str
    reason: str


def _process_default() -> str:
    name = os.environ.get("LORA_KERNELS_BACKEND", "auto")
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"LORA_KERNELS_BACKEND: expected auto or one of {BACKENDS}, got {name!r}")
    return name


PROCESS_DEFAULT = _process_default()


def requested(backend: str) -> str:
    """The backend a caller asked for, with ``auto`` replaced by the process-wide override."""
    if backend == "auto":
        return PROCESS_DEFAULT
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {backend!r}")
    return backend


def unserved(device: torch.device) -> str | None:
    """Why no operation runs on ``device``; None where they do, or only shapes are computed."""
    kind = device.type
    if kind in DISPATCH_KEYS or kind == "meta":
        return None
    return f"there is no kernel for {kind!r} devices, only for {', '.join(DISPATCH_KEYS)}"


def unavailable(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why ``backend`` cannot run on ``device`` (for activations of ``dtype``); None when it can."""
    if backend == "reference":
        return None
    if backend == "composed":
        return unserved(device)
    if backend == "triton":
        return _triton_unavailable(device, dtype)
    if device.type == "cpu":
        return _native_unavailable(dtype)
    return _native_unavailable_on_cuda(device, dtype)


# As in cpu_extension.py: a compiled graph takes the answer for a constant, and asks no device.
unavailable._dynamo_marked_constant = True


@functools.cache
def _triton_unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if dtype == torch.float64:
        return "the Triton kernels accumulate in fp32 and do not take float64"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "on a CPU the Triton kernels run only in the interpreter (TRITON_INTERPRET=1)"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 products wrongly"
        return triton_missing()
    if device.type != "cuda" or torch.version.cuda is None:
        return f"no triton kernel of this operation exists for {device.type!r} devices yet"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability 8.0 or newer is needed, this device has {capability}"
    return triton_missing()


def _native_unavailable(dtype: torch.dtype | None) -> str | None:
    if dtype is not None and dtype not in cpu_extension.DTYPES:
        return f"the compiled kernels accumulate in fp32 and do not take {dtype}"
    return cpu_extension.missing()


@functools.cache
def _native_unavailable_on_cuda(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return f"no native kernel of this operation exists for {device.type!r} devices yet"
    if dtype is not None and dtype not in cuda_extension.DTYPES:
        return f"the CUDA kernels take bfloat16 and float16, not {short_name(dtype)}"
    if reason := cuda_extension.missing(device):
        return reason
    # Calls for which there is no CUDA kernel go to Triton's.
    if reason := _triton_unavailable(device, dtype):
        return f"the CUDA kernels leave part of each operation to Triton's: {reason}"
    return None


@functools.cache
def _on_a_cpu(dtype: torch.dtype | None) -> Choice:
    """What ``auto`` takes on a CPU: known from the dtype alone, so that fake tensors agree."""
    reason = _native_unavailable(dtype)
    if reason is not None:
        return Choice("composed", reason)
    level = cpu_extension.LEVELS[cpu_extension.level()]
    least = cpu_extension.AVX512_BF16 if dtype == torch.bfloat16 else cpu_extension.AVX2
    if cpu_extension.level() < least:
        return Choice(
            "composed",
            f"the compiled kernels ({level}), unmeasured here: where they were, the vendor's "
            f"narrow GEMMs were faster for {dtype}",
        )
    return Choice(
        "native",
        f"the compiled kernels ({level}), unmeasured here: where they were measured they were as "
        "fast as the vendor's narrow GEMMs or faster, and with dropout faster",
    )


def triton_missing() -> str | None:
    """Why no kernel of Triton's can be compiled; None where that may work."""
    try:
        import triton
    except ImportError:
        return "the package triton is not installed"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"triton 3.6 or newer is needed, {triton.__version__} is installed"
    return None


def choose(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
    """Resolve ``backend`` for a call on ``device``; a named backend that cannot serve raises."""
    backend = requested(backend)
    if device == _CPU or device.type == "cpu":
        return _on_a_cpu(dtype) if backend == "auto" else _named(backend, _CPU, dtype)
    if backend == "auto":
        if reason := unserved(device):
            raise ValueError(f"no backend but 'reference' can serve this call: {reason}")
        return Choice(
            "composed",
            f"no kernel has a recorded measurement on {device.type!r} devices that beats the "
            "vendor's GEMMs",
        )
    return _named(backend, device, dtype)


def _named(backend: str, device: torch.device, dtype: torch.dtype | None) -> Choice:
    reason = unavailable(backend, device, dtype)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot serve this call: {reason}")
    return Choice(backend, "asked for by the caller or by LORA_KERNELS_BACKEND")
