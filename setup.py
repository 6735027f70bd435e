"""Builds ``lora_kernels._native`` from ``csrc``, its CUDA part where nvcc is.

All metadata is in pyproject.toml. Without a C++17 compiler, or if it fails, the install is pure
Python and works; without nvcc, or if that fails, the extension has the CPU kernels only. Why is
written beside the package's modules (``_native_error.txt``, ``_native_cuda_error.txt``), where
``python -m lora_kernels doctor`` reads it. What the environment says:

    LORA_KERNELS_BUILD=0       builds nothing
    LORA_KERNELS_CUDA          0: never the CUDA part; 1: it must be there, or a loud message says
                               why not; not set: where nvcc is (CUDA_HOME, CUDA_PATH, PATH)
    LORA_KERNELS_CUDA_ARCHS    what for, 8.0;9.0a;10.0 if not set; the newest is added as PTX, which
                               newer GPUs compile; 80,90a,100 means the same
    LORA_KERNELS_SANITIZE=1    with the address and undefined-behaviour sanitizers
    MAX_JOBS                   compilers at once, one per core if not set

Neither torch's headers nor its libraries are used: the extension takes addresses, or tensors that
it reads through DLPack's C functions; the CUDA runtime is linked statically. All compilers run in
threads of this process; for a dozen files ninja gains nothing.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

ERROR_FILE, CUDA_ERROR_FILE = "_native_error.txt", "_native_cuda_error.txt"
SOURCES = sorted(map(str, [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")]))
CUDA_SOURCES = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
HEADERS = sorted(map(str, [*Path("csrc").glob("*.h"), *Path("csrc/cpu").glob("*.h")]))
CUDA_HEADERS = sorted(map(str, [*Path("csrc").glob("*.h"), *Path("csrc/cuda").glob("*.*h")]))
# Contraction off: a product and a sum are fused where the source says so, in every level alike.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-Wno-maybe-uninitialized",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-pthread",
]
SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc"]
ARCHS = "8.0;9.0a;10.0"
# Not in setuptools' temporary folder: a wheel, an editable install and the tests share them.
CUDA_OBJECTS = Path("build/cuda")


def jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the CUDA part


class NoCuda(Exception):
    """The CUDA part is not built; the message says why."""


def asked_for_cuda() -> bool:
    return os.environ.get("LORA_KERNELS_CUDA") == "1"


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: str  # "13.0"
    libraries: Path  # where libcudart_static.a is
    archs: tuple[str, ...]  # "80", "90a", ...: those asked for that this nvcc knows

    @staticmethod
    def find() -> "Toolkit":
        if os.environ.get("LORA_KERNELS_CUDA") == "0":
            raise NoCuda("LORA_KERNELS_CUDA=0 was set when it was installed")
        if not CUDA_SOURCES:
            raise NoCuda("csrc/cuda holds no kernels")
        nvcc = find_nvcc()
        if nvcc is None:
            raise NoCuda("nvcc was not there when it was installed")
        found = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
        version = re.search(r"release (\d+\.\d+)", found.stdout)
        if version is None:
            raise NoCuda(
                f"{nvcc} --version names no release: {found.stdout} {found.stderr}".strip()
            )
        return Toolkit(nvcc, version[1], runtime_of(nvcc), known_archs(nvcc))

    @property
    def ptx(self) -> str:
        """The newest as PTX: without the instructions of one architecture alone."""
        return str(max(int(arch.rstrip("af")) for arch in self.archs))

    @property
    def described(self) -> str:
        """What the extension was built for, as lora_kernels/runtime/cuda_extension.py reads it."""
        return " ".join([f"cuda_{self.version}", *map("sm_{}".format, self.archs),
                         f"compute_{self.ptx}"])  # fmt: skip

    def objects(self) -> list[str]:
        """The compiled CUDA sources, in their order."""
        CUDA_OBJECTS.mkdir(parents=True, exist_ok=True)
        at_once = min(jobs(), len(CUDA_SOURCES))
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda each: self._compile(each, jobs() // at_once), CUDA_SOURCES))

    def _compile(self, source: str, threads: int) -> str:
        """The object of one source; not again where it was compiled from the same files before."""
        gencodes = []
        for arch in self.archs:
            code = f"[sm_{arch},compute_{arch}]" if arch == self.ptx else f"sm_{arch}"
            gencodes.append(f"-gencode=arch=compute_{arch},code={code}")
        if self.ptx not in self.archs:
            gencodes.append(f"-gencode=arch=compute_{self.ptx},code=compute_{self.ptx}")
        command = [self.nvcc, *NVCC_FLAGS, *gencodes]
        digest = hashlib.sha256(" ".join([self.version, *command]).encode())
        for path in (source, *CUDA_HEADERS):
            digest.update(Path(path).read_bytes())
        built = CUDA_OBJECTS / f"{Path(source).stem}-{digest.hexdigest()[:16]}.o"
        if not built.exists():
            draft = built.with_name(f"{os.getpid()}-{built.name}")
            said = run_nvcc([*command, f"--threads={threads}", "-c", source, "-o", str(draft)])
            built.with_suffix(".txt").write_text(said)
            os.replace(draft, built)
        return str(built)


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if variable in os.environ:
            found = shutil.which("nvcc", path=os.path.join(os.environ[variable], "bin"))
            if found:
                return found
    return shutil.which("nvcc")


def runtime_of(nvcc: str) -> Path:
    """Where nvcc itself looks for the CUDA runtime; beside it if it does not say."""
    said = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull],
        capture_output=True, text=True,
    ).stderr  # fmt: skip
    libraries = next((line for line in said.splitlines() if "LIBRARIES=" in line), "")
    top = Path(nvcc).resolve().parents[1]
    folders = [Path(folder) for folder in re.findall(r'-L([^"]+)', libraries)]
    folders += [top / "lib64", top / "lib", *top.glob("targets/*/lib")]
    for folder in folders:
        if (folder / "libcudart_static.a").exists():
            return folder.resolve()
    raise NoCuda(f"there is no libcudart_static.a beside {nvcc}")


def known_archs(nvcc: str) -> tuple[str, ...]:
    """The architectures asked for, as nvcc spells them, without those that it does not know."""
    asked = re.split(r"[;,\s]+", os.environ.get("LORA_KERNELS_CUDA_ARCHS", ARCHS).strip(";, "))
    known = []
    for name in asked:
        spelt = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)(?:\+PTX)?", name)
        if spelt is None:
            raise NoCuda(f"LORA_KERNELS_CUDA_ARCHS: expected names like 9.0a or 90a, got {name!r}")
        arch = "".join(spelt.groups())
        option = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [nvcc, "--dryrun", option, "-c", "-x", "cu", os.devnull, "-o", os.devnull]
        if subprocess.run(command, capture_output=True).returncode == 0:
            known.append(arch)
        else:
            print(f"lora_kernels: {nvcc} does not know sm_{arch}, which is left out")
    if not known:
        raise NoCuda(f"{nvcc} knows none of the architectures {', '.join(asked)}")
    return tuple(dict.fromkeys(known))


def run_nvcc(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise NoCuda("nvcc failed:\n" + "\n".join(done.stdout.strip().splitlines()[-15:]))
    return done.stdout


# ---- the extension


class BuildOptionally(build_ext):
    """Records why an extension or its CUDA part was not built, and lets the install go on."""

    def run(self) -> None:
        super().run()
        if self.inplace:  # it was built elsewhere and copied; so are the reasons
            for name in (ERROR_FILE, CUDA_ERROR_FILE):
                built, here = Path(self.build_lib, "lora_kernels", name), Path("lora_kernels", name)
                if built.exists():
                    shutil.copyfile(built, here)
                else:
                    here.unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.get_ext_fullpath(ext.name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        error_file, cuda_error_file = folder / ERROR_FILE, folder / CUDA_ERROR_FILE
        try:
            if os.environ.get("LORA_KERNELS_BUILD") == "0":
                raise CompileError("LORA_KERNELS_BUILD=0 was set when it was installed")
            ext.include_dirs.append(pybind11_include())
            reason = self._compile(ext, had_cuda=not cuda_error_file.exists())
        except Exception as error:
            error_file.write_text(f"{error or type(error).__name__}\n")
            cuda_error_file.unlink(missing_ok=True)
            raise CompileError(str(error)) from error
        error_file.unlink(missing_ok=True)
        cuda_error_file.unlink(missing_ok=True)
        if reason is not None:
            cuda_error_file.write_text(f"{reason}\n")

    def _compile(self, ext: Extension, had_cuda: bool) -> str | None:
        """Compiles the extension, with the CUDA part if that can be; returns why it cannot."""
        toolkit, reason = None, None
        try:
            toolkit = Toolkit.find()
        except (NoCuda, OSError) as error:
            reason = str(error)
        built = self.get_ext_fullpath(ext.name)
        if (toolkit is not None) != had_cuda or newer_group([*ext.sources, *ext.depends], built):
            self.force = True
        link_args = list(ext.extra_link_args)
        if self.force and toolkit is not None:
            try:
                add_cuda(ext, toolkit)
            except NoCuda as error:
                reason = str(error)
        if reason is not None:
            tell(reason)
        self.compiler.compile = in_parallel(self.compiler.compile)
        try:
            super().build_extension(ext)
        except Exception as error:
            if not ext.extra_objects:
                raise
            reason = f"the extension did not compile or link with it: {error}"
            tell(reason)
            ext.extra_objects, ext.define_macros, ext.extra_link_args = [], [], link_args
            super().build_extension(ext)
        return reason

    def get_outputs(self) -> list[str]:
        """What is there: an extension that failed is not."""
        return [path for path in super().get_outputs() if Path(path).exists()]


def add_cuda(ext: Extension, toolkit: Toolkit) -> None:
    """Compiles the CUDA sources, and has the extension take them in."""
    ext.extra_objects += toolkit.objects()
    ext.define_macros.append(("LORA_KERNELS_CUDA", f'"{toolkit.described}"'))
    # The runtime's names stay inside: torch brings a runtime of its own into the process.
    ext.extra_link_args += [
        f"-L{toolkit.libraries}", "-lcudart_static", "-lrt", "-ldl", "-Wl,--exclude-libs,ALL",
    ]  # fmt: skip


def in_parallel(compile: Callable) -> Callable:
    """A compiler's ``compile`` with its sources shared among threads."""

    def compile_all(sources: list[str], *args, **options) -> list[str]:
        with ThreadPoolExecutor(jobs()) as pool:
            each = pool.map(lambda source: compile([source], *args, **options), sources)
            return [built for objects in each for built in objects]

    return compile_all


def pybind11_include() -> str:
    """pybind11's headers; torch's copy where the package is not and cannot be installed."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return pybind11.get_include()
    torch = importlib.util.find_spec("torch")  # found, not imported
    if torch is not None and torch.origin is not None:
        include = Path(torch.origin).parent / "include"
        if (include / "pybind11" / "pybind11.h").exists():
            return str(include)
    raise CompileError("pybind11 was not there when it was installed")


def tell(reason: str) -> None:
    """A line; a box where the CUDA part was asked for."""
    message = f"lora_kernels: built without its CUDA part: {reason}"
    if asked_for_cuda():
        rule = "!" * 100
        message = f"{rule}\nLORA_KERNELS_CUDA=1, but {message}\n{rule}"
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sanitize = SANITIZE if os.environ.get("LORA_KERNELS_SANITIZE") == "1" else []
    setup(
        ext_modules=[
            Extension(
                "lora_kernels._native",
                SOURCES,
                depends=sorted({*HEADERS, *CUDA_HEADERS, *CUDA_SOURCES}),
                include_dirs=["csrc"],
                extra_compile_args=[*FLAGS, *sanitize],
                extra_link_args=["-pthread", "-ldl", *sanitize],
                language="c++",
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildOptionally},
    )
