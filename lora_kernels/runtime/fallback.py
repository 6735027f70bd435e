"""What happens when a kernel that nobody asked for by name cannot be started: composed serves.

A kernel may fail on a machine that it was not tried on: no compiler for its launcher, an assembler
that refuses it, more shared memory than there is. That is no reason to end a run which needs no
kernel of ours. An error that leaves CUDA unusable is: it is raised with the name of the family, and
remembered, so that the next process does without.
"""

import warnings
from types import ModuleType
from typing import Any, ClassVar

import torch

from lora_kernels.runtime import verdicts
from lora_kernels.runtime.capture import is_captured


class Guarded:
    """A backend's kernels, in whose place composed serves once they cannot be started.

    Also in place: only the last launch of a call writes to what is there, so that nothing is
    written where one cannot be started.
    """

    _composed: ClassVar[ModuleType]  # of the operation

    def __init__(self, family: str, device: torch.device, kernels: Any) -> None:
        self._family, self._device = family, device
        self._kernels, self._failed = kernels, False

    def _serve(self, step: str, call, *others):
        if not self._failed:
            try:
                return getattr(self._kernels, step)(call, *others)
            except Exception as error:
                note_failure(self._family, self._device, error)
            # For the backwards of graphs that are there; new calls are not planned for the family.
            self._failed = True
        return getattr(self._composed, step)(self._for_composed(call), *others)

    def _for_composed(self, call):
        """The call with all that composed reads of it."""
        return call


def note_failure(family: str, device: torch.device, error: Exception) -> None:
    """Mark a family broken on a device, for what one of its launches raised; warns once.

    Returns where composed can serve the call instead.

    Raises:
        error: memory is full, a kernel before has failed an assertion, or a CUDA graph is captured:
            what was captured before cannot be taken back.
        RuntimeError: CUDA cannot be used any more in this process.
    """
    if is_captured(device) or _is_nothing_of_the_kernel(error):
        raise error
    what = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        verdicts.mark_broken(
            family, device, f"CUDA failed with it: {what}", kept_as=verdicts.BROKEN
        )
        raise RuntimeError(
            f"lora_kernels: CUDA cannot be used any more in this process after a launch of the "
            f"kernels {family!r} ({what}). The next process does without them; "
            "`python -m lora_kernels self-test --again` tries them again"
        ) from error
    if verdicts.broken(family, device) is None:
        # Another call may have been too much for it, or another process have what is missing.
        verdicts.mark_broken(family, device, what, kept_as=verdicts.UNPROVEN)
        warnings.warn(
            f"lora_kernels: the kernels {family!r} cannot be started on {device} ({what}); the "
            "composed backend serves from now on",
            stacklevel=3,
        )


# What a launch is told of, and has not done.
_OF_OTHERS = ("out of memory", "ALLOC_FAILED", "device-side assert")


def _is_nothing_of_the_kernel(error: Exception) -> bool:
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return full or any(words in str(error) for words in _OF_OTHERS)
