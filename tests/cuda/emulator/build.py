"""Compiles kernels for the emulator, into shared libraries for this machine."""

import os
import shlex
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

EMULATOR = Path(__file__).parent
ROOT = EMULATOR.parents[2]
# With the address sanitizer, which has to be preloaded (make sanitize).
SANITIZES = os.environ.get("LORA_KERNELS_SANITIZE") == "1"
BUILT = ROOT / "build" / ("emulated-sanitized" if SANITIZES else "emulated")
PROBES = sorted(EMULATOR.glob("probe*.cpp"))
RUNTIME = sorted({*EMULATOR.glob("*.cpp")} - {*PROBES})

FLAGS = [
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"),
    *("-DLORA_EMULATE", "-DLORA_KERNELS_CUDA"),
    *(f"-I{ROOT / 'csrc'}", f"-I{EMULATOR}"),
]
# In kernels; tests/cuda/emulator/checks.cpp makes errors of a launch out of them.
CHECKS = [
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
]
# In kernels and in the copies they ask for. Not on stacks: threads are given up, not unwound.
ADDRESS = ["-fsanitize=address", "--param=asan-stack=0", "--param=asan-globals=0"]


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def build(name: str, sources: list[Path], flags: list[str] = ()) -> Path:
    """The shared library ``name`` of these sources and the emulator; up to date when it returns.

    Kernels (``.cu``, and the emulator's probes) are compiled with checks. An object is compiled
    again when a file that it includes, or its command, has changed; two at a time. Raises
    RuntimeError with what the compiler says.
    """
    BUILT.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILT / "lock"):
        commands = [_command(source, flags) for source in [*RUNTIME, *sources]]
        with ThreadPoolExecutor(2) as pool:
            fresh = any(list(pool.map(_compile, commands)))
        library = BUILT / name
        objects = [command[-1] for command in commands]
        address = ADDRESS[:1] if SANITIZES else []
        link = [compiler(), "-shared", *address, "-pthread", *objects, "-ldl", "-o", str(library)]
        if fresh or not library.exists() or _recorded(library) != link:
            # A new file: the old one may be loaded somewhere.
            library.unlink(missing_ok=True)
            _call(link)
            _record(library, link)
    return library


def _command(source: Path, flags: list[str]) -> list[str]:
    checks = CHECKS if source.suffix == ".cu" or source in PROBES else []
    if SANITIZES and (checks or source.name == "copies.cpp"):
        checks = [*checks, *ADDRESS]
    # The kernels for processors are only along for the ride.
    mine = ["-O1"] if source.parent.name == "cpu" else []
    if source.name == "products.cpp":
        mine = ["-O3"]
    kernels = ["-x", "c++"] if source.suffix == ".cu" else []
    target = BUILT / (str(source.relative_to(ROOT)).replace("/", "-") + ".o")
    return [
        *(compiler(), *FLAGS, *mine, *checks, *flags),
        *("-MMD", "-MF", f"{target}.d", *kernels, "-c", str(source), "-o", str(target)),
    ]


def _compile(command: list[str]) -> bool:
    """Whether it had to."""
    target = Path(command[-1])
    if target.exists() and _recorded(target) == command:
        built = target.stat().st_mtime
        if all(map(lambda path: path.exists() and path.stat().st_mtime < built, _used(target))):
            return False
    target.unlink(missing_ok=True)
    began = time.time()
    _call(command)
    os.utime(target, (began, began))  # a source may change while it is compiled
    _record(target, command)
    return True


def _used(target: Path) -> list[Path]:
    """The files that an object was made of."""
    rule = Path(f"{target}.d").read_text().replace("\\\n", " ")
    return [Path(path) for path in rule.split(":", 1)[1].split()]


def _record(target: Path, command: list[str]) -> None:
    Path(f"{target}.command").write_text(shlex.join(command))


def _recorded(target: Path) -> list[str] | None:
    record = Path(f"{target}.command")
    return shlex.split(record.read_text()) if record.exists() else None


def _call(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
