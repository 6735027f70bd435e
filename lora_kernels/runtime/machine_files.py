"""The machine's state, and what was found out on it, kept from process to process in files.

The files lie in the user's cache directory (``LORA_KERNELS_CACHE``, else ``lora_kernels`` in
``XDG_CACHE_HOME``, ``~/.cache``, macOS's ``~/Library/Caches`` or Windows' ``LOCALAPPDATA``), one of
each sort for a state. A state is all that may change what a kernel does or how long it takes:
devices, driver, torch, Triton, its assembler, the extension and the sources of the kernels.
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
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from lora_kernels.runtime import cpu_extension
from lora_kernels.runtime.device_limits import DeviceLimits, limits_of

_SCHEMA = 1
_PACKAGE = Path(__file__).parents[1]

Content = TypeVar("Content")


# --- the state of the machine ----------------------------------------------------------------


def kind_of(device: torch.device) -> str:
    """Devices of one kind run the same code: a GPU's model and limits, a CPU's name and level."""
    if device.type == "cpu":
        interpreted = ", interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else ""
        return f"{cpu_extension.cpu_name()}, level {cpu_extension.level()}{interpreted}"
    return kind_of_gpu(limits_of(device))


def kind_of_gpu(limits: DeviceLimits) -> str:
    return (
        f"{limits.name}, sm_{limits.capability}, {limits.multiprocessors} SMs, "
        f"{limits.shared_memory} B of shared memory"
    )


@functools.cache
def machine_state() -> dict[str, str]:
    """What verdicts and times depend on. Starts no CUDA context: a later fork must find none."""
    return {
        **cpu_state(),
        "gpus": _gpus(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES", "all"),
        "cuda": str(torch.version.cuda),
        "triton": _triton(),
    }


@functools.cache
def cpu_state() -> dict[str, str]:
    """The part of it that calls on a CPU depend on; asks no driver and imports no Triton."""
    return {
        "schema": str(_SCHEMA),
        "cpu": kind_of(torch.device("cpu")),
        "torch": str(torch.__version__),
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
        done = subprocess.run(command, capture_output=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not answer"
    return done.stdout.strip()


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    from triton import knobs

    # Assemblers that the user put in their place change every kernel.
    found = []
    for name in ("ptxas", "ptxas_blackwell"):
        try:
            found.append(f"{name} {getattr(knobs.nvidia, name).version}")
        except Exception as error:  # whatever Triton says of one that is not there, or does not run
            found.append(f"{name}: {type(error).__name__}")
    return ", ".join([triton.__version__, *found])


def _digest_of_kernels() -> str:
    files = [*_PACKAGE.glob("ops/**/*.py"), *_PACKAGE.glob("runtime/*.py")]
    extension = getattr(cpu_extension.extension(), "__file__", None)
    digest = hashlib.sha256()
    for path in [*sorted(files), *([Path(extension)] if extension else [])]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# --- files -----------------------------------------------------------------------------------


def cache_directory() -> Path:
    if named := os.environ.get("LORA_KERNELS_CACHE"):
        return Path(named)
    try:
        home = Path.home()
    except RuntimeError:  # a user without one: nothing can be kept
        home = Path(os.devnull)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(base) / "lora_kernels"


def file_of(sort: str, state: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
    return cache_directory() / f"{sort}-{digest}.json"


# What could not be written holds for this process.
_of_this_process: dict[Path, dict] = {}


def has_any(sort: str) -> bool:
    """Whether there is a file of this sort for any state: to ask a driver for the state takes
    longer than a call."""
    try:
        written = any(cache_directory().glob(f"{sort}-*.json"))
    except OSError:
        written = False
    return written or any(path.name.startswith(f"{sort}-") for path in _of_this_process)


def read(path: Path, parse: Callable[[dict], Content], empty: Content) -> Content:
    """What ``parse`` makes of a file. One that cannot be read is put aside, and is as if empty."""
    if path in _of_this_process:  # newer than what could not be replaced
        return parse(_of_this_process[path])
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except OSError:  # it is not there, most of all
        return empty
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        aside = path.with_suffix(".corrupt")
        with contextlib.suppress(OSError):
            os.replace(path, aside)
        warnings.warn(
            f"lora_kernels: {path} cannot be read ({type(error).__name__}: {error}); it is kept as "
            f"{aside.name}",
            stacklevel=2,
        )
        return empty


def write(path: Path, content: dict) -> bool:
    """Whole or not at all; False where the directory cannot be written to."""
    _of_this_process[path] = content
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.stem, suffix=".draft", delete=False, encoding="utf-8"
        ) as file:
            draft = file.name
            json.dump(content, file, indent=1, sort_keys=True)
        os.chmod(draft, 0o644)  # others may share the directory
        os.replace(draft, path)
    except OSError:
        if draft is not None:
            with contextlib.suppress(OSError):
                os.unlink(draft)
        return False
    _of_this_process.pop(path, None)
    return True


@contextlib.contextmanager
def held(path: Path, seconds: float) -> Iterator[bool]:
    """Hold what one process holds at a time; False where another has held it longer than that.

    True also where no file can be made, and so no other process be waited for.
    """
    import filelock  # which starts asyncio

    lock = path.with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        mine = filelock.FileLock(lock)
        mine.acquire(timeout=seconds)
    except filelock.Timeout:
        yield False
        return
    except (OSError, NotImplementedError):  # as of a file system without locks
        yield True
        return
    try:
        yield True
    finally:
        mine.release()
