"""What the CUDA kernels use, read off the objects that the installation is made of.

The table of registers and shared memory beside this file is made by

    python tests/cuda/cubins.py > tests/cuda/resources.json
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("resources.json")
ARCHS = ("80", "90a", "100")
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    registers: int  # per thread
    stack: int  # bytes per thread: local arrays
    local: int  # bytes per thread: spills
    shared: int  # bytes per block beside those that a launch asks for
    instructions: str  # mnemonics, one a line

    def has(self, mnemonic: str) -> bool:
        """Whether an instruction begins with it, or is it where it is a pattern."""
        return re.search(rf"^{mnemonic}", self.instructions, re.M) is not None


@functools.cache
def setup_script():
    """setup.py as a module; its paths are relative to the root."""
    spec = spec_from_file_location("lora_kernels_setup", ROOT / "setup.py")
    module = module_from_spec(spec)
    with chdir(ROOT):
        spec.loader.exec_module(module)
    return module


@functools.cache
def nvcc() -> str | None:
    return setup_script().find_nvcc()


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@functools.cache
def cuobjdump() -> str | None:
    """nvcc's, or the one that Triton's wheel brings along."""
    beside = Path(nvcc()).resolve().with_name("cuobjdump")
    triton = find_spec("triton")
    brought = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    found = [path for path in (beside, brought) if path is not None and path.exists()]
    return shutil.which("cuobjdump") or (str(found[0]) if found else None)


@functools.cache
def compiled() -> tuple[str, dict[str, tuple[Path, str]]]:
    """nvcc's version, and source -> its object and what nvcc said. The same as an installation's:
    nothing is compiled after one."""
    with chdir(ROOT), mock.patch.dict(os.environ):
        for name in ("LORA_KERNELS_CUDA", "LORA_KERNELS_CUDA_ARCHS"):
            os.environ.pop(name, None)
        toolkit = setup_script().Toolkit.find()
        setup_script().run_ninja("cuda.ninja", {"cuda.ninja": toolkit.build_file()})
        found = [(ROOT / built, Path(built).with_suffix(".txt").read_text())
                 for built in toolkit.objects]  # fmt: skip
    return toolkit.version, dict(zip(SOURCES, found, strict=True))


@functools.cache
def kernels_of(source: str, arch: str) -> dict[str, Kernel]:
    """name -> kernel, of one source; names as in C++."""
    built, _ = compiled()[1][source]
    usage = _run(cuobjdump(), "-arch", f"sm_{arch}", "-res-usage", str(built))
    listing = _run(cuobjdump(), "-arch", f"sm_{arch}", "-sass", str(built))
    instructions = {}
    for part in listing.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body)
        instructions[name.strip()] = "\n".join(found)
    kernels = {}
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, registers, stack, shared, local in re.findall(pattern, usage):
        kernels[readable(name)] = Kernel(
            int(registers), int(stack), int(local), int(shared), instructions[name]
        )
    return kernels


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def readable(mangled: str) -> str:
    """``decode_linear_kernel<bf16, 8, true>``: enough of demangling for our own templates."""
    name, arguments = re.search(r"\d([a-z]\w*_kernel)I(.*?)EEv", mangled).groups()
    name = re.sub(r"^.*?\d+(?=[a-z_]+_kernel$)", "", name)
    found, first = [], None
    for type_, number, flag in re.findall(
        r"(6__half|13__nv_bfloat16|S\d*_|f)|Li(\d+)E|Lb([01])", arguments
    ):
        if type_:
            kinds = {"6__half": "fp16", "13__nv_bfloat16": "bf16", "f": "fp32"}
            found.append(kinds.get(type_, first))  # S3_ and the like: the first one again
            first = first or found[0]
        else:
            found.append(number or ("true" if flag == "1" else "false"))
    return f"{name}<{', '.join(found)}>"


def table() -> dict:
    """Registers and static shared memory of every kernel."""
    kernels = {
        arch: {
            name: [kernel.registers, kernel.shared]
            for source in SOURCES
            for name, kernel in sorted(kernels_of(source, arch).items())
        }
        for arch in ARCHS
    }
    return {"nvcc": compiled()[0], "registers and shared bytes": kernels}


if __name__ == "__main__":
    if nvcc() is None or cuobjdump() is None:
        sys.exit("nvcc and cuobjdump are needed")
    text = json.dumps(table(), indent=1)
    print(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text))
