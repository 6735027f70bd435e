"""What kernels have shown of themselves on this machine, kept from process to process.

A *family* is what can be switched off alone: a backend of one operation. Its verdict is ``proven``
(every check passed), ``broken`` (a result was wrong, or a kernel raised, hung or killed its
process), ``unproven`` (nothing was shown: the test could not start, or had no time for the family)
or ``absent`` (the family does not run there).

A file ``self-test-<digest>.json`` per state of the machine lies in the user's cache directory
(``LORA_KERNELS_CACHE``, else ``lora_kernels`` in ``XDG_CACHE_HOME``, ``~/.cache``, macOS's
``~/Library/Caches`` or Windows' ``LOCALAPPDATA``). The state is all that may change what a kernel
does: devices, driver, torch, Triton, its assembler, the extension and the sources of the kernels.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lora_kernels.runtime import cpu_extension
from lora_kernels.runtime.device_limits import limits_of

PROVEN, BROKEN, UNPROVEN, ABSENT = "proven", "broken", "unproven", "absent"

# What is unproven is tried again after so long: the GPU may have been full, or in use by one alone.
RETRY_SECONDS = 3600

_SCHEMA = 1
_PACKAGE = Path(__file__).parents[1]


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


# --- the state of the machine ----------------------------------------------------------------


def kind_of(device: torch.device) -> str:
    """Devices of one kind run the same code: a GPU's model and limits, a CPU's name and level."""
    if device.type == "cpu":
        interpreted = ", interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else ""
        return f"{cpu_extension.cpu_name()}, level {cpu_extension.level()}{interpreted}"
    limits = limits_of(device)
    return (
        f"{limits.name}, sm_{limits.capability}, {limits.multiprocessors} SMs, "
        f"{limits.shared_memory} B of shared memory"
    )


@functools.cache
def machine_state() -> dict[str, str]:
    """What the verdicts depend on. Starts no CUDA context: a later fork must find none."""
    return {
        "schema": str(_SCHEMA),
        "gpus": _gpus(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES", "all"),
        "cpu": kind_of(torch.device("cpu")),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "triton": _triton(),
        "kernels": _digest_of_kernels(),
    }


def _gpus() -> str:
    """Each GPU's name, compute capability, driver and MIG mode; empty where there are none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    fields = "name,compute_cap,driver_version,mig.mode.current"
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not answer"
    return done.stdout.strip()


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    from triton import knobs

    # An assembler that the user put in its place changes every kernel.
    assembler = getattr(getattr(knobs, "nvidia", None), "ptxas", None)
    return f"{triton.__version__}, ptxas {getattr(assembler, 'version', 'unknown')}"


def _digest_of_kernels() -> str:
    files = [*_PACKAGE.glob("ops/**/*.py"), *_PACKAGE.glob("runtime/*.py")]
    extension = getattr(cpu_extension.extension(), "__file__", None)
    digest = hashlib.sha256()
    for path in [*sorted(files), *([Path(extension)] if extension else [])]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# --- the file --------------------------------------------------------------------------------


def cache_directory() -> Path:
    if named := os.environ.get("LORA_KERNELS_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lora_kernels"


def file_of(state: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
    return cache_directory() / f"self-test-{digest}.json"


# Where the file cannot be written the verdicts hold for this process.
_of_this_process: dict[Path, Verdicts] = {}


def _verdict_of(fields: dict) -> Verdict:
    """From JSON, which has lists for tuples."""
    verdict = Verdict(**fields)
    return replace(verdict, dtypes=tuple(verdict.dtypes))


def load(path: Path) -> Verdicts:
    """The verdicts in a file. One that cannot be read is put aside, and nothing is known."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            kind: {family: _verdict_of(fields) for family, fields in families.items()}
            for kind, families in content["verdicts"].items()
        }
    except OSError:  # it is not there, most of all
        return _of_this_process.get(path, {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        aside = path.with_suffix(".corrupt")
        warnings.warn(
            f"lora_kernels: {path} holds no verdicts ({error}); it is kept as {aside.name}",
            stacklevel=2,
        )
        with contextlib.suppress(OSError):
            os.replace(path, aside)
        return {}


def store(path: Path, state: dict[str, str], verdicts: Verdicts) -> bool:
    """Write whole or not at all; False where the directory cannot be written to."""
    _of_this_process[path] = verdicts
    content = {
        "state": state,
        "verdicts": {
            kind: {family: asdict(verdict) for family, verdict in families.items()}
            for kind, families in verdicts.items()
        },
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.stem, suffix=".draft", delete=False, encoding="utf-8"
        ) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return False
    return True


@functools.cache
def known() -> Verdicts:
    """The verdicts that stand for the present state, read once; :func:`forget` after a change."""
    return load(file_of(machine_state()))


def forget() -> None:
    known.cache_clear()


def verdict(family: str, device: torch.device) -> Verdict:
    """What is known of a family on a device."""
    untested = Verdict(UNPROVEN, "it was not tested here: python -m lora_kernels self-test")
    of_device = known().get(kind_of(device)) or known().get(ANY, {})
    return of_device.get(family, untested)
