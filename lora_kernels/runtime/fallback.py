"""What happens when a kernel that nobody asked for by name cannot be started: composed serves.

A kernel may fail on a machine that it was not tried on: no compiler for its launcher, an assembler
that refuses it, more shared memory than there is. That is no reason to end a run which needs no
kernel of ours. An error that leaves CUDA unusable is: it is raised with the name of the family, and
remembered, so that the next process does without.
"""

import warnings

import torch

from lora_kernels.runtime import verdicts
from lora_kernels.runtime.capture import is_captured


def note_failure(family: str, device: torch.device, error: Exception) -> None:
    """Mark a family broken on a device, for what one of its launches raised; warns once.

    Returns where composed can serve the call instead.

    Raises:
        error: memory is full, or a CUDA graph is captured: what was captured before cannot be
            taken back.
        RuntimeError: CUDA cannot be used any more in this process.
    """
    if isinstance(error, torch.OutOfMemoryError) or is_captured(device):
        raise error
    what = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        verdicts.mark_broken(family, device, f"CUDA failed with it: {what}", keep=True)
        raise RuntimeError(
            f"lora_kernels: CUDA cannot be used any more in this process after a launch of the "
            f"kernels {family!r} ({what}). The next process does without them; "
            "`python -m lora_kernels self-test --again` tries them again"
        ) from error
    if verdicts.broken(family, device) is None:
        verdicts.mark_broken(family, device, what, keep=not _is_of_this_process(error))
        warnings.warn(
            f"lora_kernels: the kernels {family!r} cannot be started on {device} ({what}); the "
            "composed backend serves from now on",
            stacklevel=3,
        )


def _is_of_this_process(error: Exception) -> bool:
    """Whether the next process may well do better: with a compiler in its path, say."""
    return isinstance(error, OSError) or "C compiler" in str(error)
