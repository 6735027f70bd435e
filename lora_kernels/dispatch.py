"""Which backend serves a call, and why.

``auto`` never takes a kernel that has not been measured on the device kind at hand, correctness
and time; until a table under ``tuned/`` says otherwise it is ``composed``, which runs anywhere.
``LORA_KERNELS_BACKEND`` replaces ``auto`` for the whole process, so that the kernels can be
switched off without touching a program; it is read once, at import.
"""

import os
from typing import NamedTuple

import torch

BACKENDS = ("reference", "composed", "triton", "native")


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


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run on ``device``; None when it can."""
    if backend in ("reference", "composed"):
        return None
    return f"no {backend} kernel of this operation exists for {device.type!r} devices yet"


def choose(backend: str, device: torch.device) -> Choice:
    """Resolve ``backend`` for a call on ``device``; a named backend that cannot serve raises."""
    backend = requested(backend)
    if backend == "auto":
        return Choice(
            "composed",
            f"no kernel has a recorded measurement on {device.type!r} devices that beats the "
            "vendor's GEMMs",
        )
    reason = unavailable(backend, device)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot serve this call: {reason}")
    return Choice(backend, "asked for by the caller or by LORA_KERNELS_BACKEND")
