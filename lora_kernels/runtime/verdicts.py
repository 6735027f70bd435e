"""What kernels have shown of themselves on this machine, kept from process to process.

A *family* is what can be switched off alone: a backend of one operation. Its verdict is ``proven``
(every check passed), ``broken`` (a result was wrong, or a kernel raised, hung or killed its
process), ``unproven`` (nothing was shown: the test could not start, or had no time for the family)
or ``absent`` (the family does not run there). A file ``self-test-<digest>.json`` holds them
(``machine_files.py``).
"""

import functools
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lora_kernels.runtime import machine_files
from lora_kernels.runtime.machine_files import kind_of
from lora_kernels.runtime.plan import forget_plans

PROVEN, BROKEN, UNPROVEN, ABSENT = "proven", "broken", "unproven", "absent"

# What is unproven is tried again after so long: the GPU may have been full, or in use by one alone.
RETRY_SECONDS = 3600

DTYPES = ("bfloat16", "float16", "float32")  # that kernels take

PATIENCE = 5.0  # seconds for another process that holds the file, where one is called


@dataclass(frozen=True)
class Verdict:
    state: str  # PROVEN, BROKEN, UNPROVEN or ABSENT
    detail: str = ""  # why, for people
    seconds: float = 0.0  # that the checks took
    time: float = 0.0  # when, in seconds since 1970
    dtypes: tuple[str, ...] = ()  # of the activations that were tried: bfloat16, ...

    def stands_for(self, dtypes: Iterable[str]) -> bool:
        """Whether there is nothing to be tried again for activations of these dtypes."""
        if self.state == BROKEN:
            return True
        recent = self.state != UNPROVEN or time.time() - self.time < RETRY_SECONDS
        return recent and set(dtypes) <= set(self.dtypes)


Verdicts = dict[str, dict[str, Verdict]]  # by kind of device, by family

ANY = "any device"  # the kind where a test did not come so far as to name them


def file_of(state: dict[str, str]) -> Path:
    return machine_files.file_of("self-test", state)


def load(path: Path) -> Verdicts:
    """The verdicts in a file."""
    return machine_files.read(path, _of_content, {})


def _of_content(content: dict) -> Verdicts:
    return {
        kind: {family: _verdict_of(fields) for family, fields in families.items()}
        for kind, families in content["verdicts"].items()
    }


def _verdict_of(fields: dict) -> Verdict:
    """From JSON, which has lists for tuples."""
    verdict = Verdict(**fields)
    numbers = isinstance(verdict.seconds, (int, float)) and isinstance(verdict.time, (int, float))
    if verdict.state not in (PROVEN, BROKEN, UNPROVEN, ABSENT) or not numbers:
        raise ValueError(f"no verdict: {fields}")
    return replace(verdict, dtypes=tuple(verdict.dtypes))


def store(path: Path, state: dict[str, str], verdicts: Verdicts) -> bool:
    """Whether they are in the file; if not they hold for this process."""
    fields = {
        kind: {family: asdict(verdict) for family, verdict in families.items()}
        for kind, families in verdicts.items()
    }
    return machine_files.write(path, {"state": state, "verdicts": fields})


@functools.cache
def known() -> Verdicts:
    """The verdicts that stand for the present state, read once; :func:`forget` after a change."""
    if not machine_files.has_any("self-test"):
        return {}
    return load(file_of(machine_files.machine_state()))


def forget() -> None:
    known.cache_clear()
    forget_plans()


def verdict(family: str, device: torch.device) -> Verdict:
    """What is known of a family on a device."""
    kind = kind_of(device)
    if (seen := _broken_here.get((kind, family))) is not None:
        return seen
    untested = Verdict(UNPROVEN, "it was not tested here: python -m lora_kernels self-test")
    of_device = known().get(kind) or known().get(ANY, {})
    return of_device.get(family, untested)


def broken(family: str, device: torch.device) -> str | None:
    """Why nothing of a family may be launched on a device; None where it may."""
    found = verdict(family, device)
    return f"its kernels are broken here: {found.detail}" if found.state == BROKEN else None


def why_not_proven(family: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a family has not shown yet that it is right on a device; None where it has."""
    found, name = verdict(family, device), str(dtype).removeprefix("torch.")
    if found.state == BROKEN:
        return broken(family, device)
    if found.state != PROVEN:
        return f"its kernels are {found.state} here: {found.detail}"
    if name not in found.dtypes:
        return f"its kernels were not tested with {name}: python -m lora_kernels self-test"
    return None


# Families that have failed in this process, by kind of device and name.
_broken_here: dict[tuple[str, str], Verdict] = {}


def mark_broken(family: str, device: torch.device, why: str, *, kept_as: str) -> None:
    """Nothing of the family is launched on such a device any more in this process.

    kept_as: what other processes of this machine's state find: BROKEN, until the self-test is asked
    for again, or UNPROVEN, which is tested again after a while.
    """
    kind, state = kind_of(device), machine_files.machine_state()
    _broken_here[kind, family] = Verdict(BROKEN, why, 0.0, time.time())
    path = file_of(state)
    with machine_files.held(path, PATIENCE):
        verdicts = load(path)
        verdicts.setdefault(kind, {})[family] = Verdict(kept_as, why, 0.0, time.time(), DTYPES)
        store(path, state, verdicts)
    forget()
