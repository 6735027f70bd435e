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
it reads through DLPack's C functions; the CUDA runtime is linked statically.

ninja runs the compilers, by files in ``build/native`` that work by hand too: what has changed is
compiled, and wheels, editable installs, builds in place and the tests share the objects. setuptools
links them. Without ninja setuptools compiles too, every file each time.
"""

import copy
import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ERROR_FILE, CUDA_ERROR_FILE = "_native_error.txt", "_native_cuda_error.txt"
BINDING = sorted(map(str, Path("csrc").glob("*.cpp")))  # what knows Python
KERNELS = sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
CUDA_SOURCES = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
# Contraction off: a product and a sum are fused where the source says so, in every level alike.
FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-Wno-maybe-uninitialized", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-pthread"),
]
SANITIZES = os.environ.get("LORA_KERNELS_SANITIZE") == "1"
SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc"]
ARCHS = "8.0;9.0a;10.0"
BUILT = Path("build/native")


# ---- ninja

HEAD = f"# Written by setup.py. By hand: ninja -f FILE, where setup.py is.\nbuilddir = {BUILT}\n"
CXX_RULE = """
rule cxx
  command = {compiler} $python -Icsrc -MMD -MF $out.d -c $in -o $out {flags}
  depfile = $out.d
  deps = gcc
  description = $in
"""
NVCC_RULE = """
rule nvcc
  command = {nvcc} --threads=$${{NVCC_THREADS:-1}} -MMD -MF $out.d -c $in -o $out > $said 2>&1 $
      || {{ cat $said; false; }}
  depfile = $out.d
  deps = gcc
  description = $in
"""


class NoNinja(Exception):
    """ninja is not there or does not run; the message says which."""


class Failed(CompileError):
    """A compiler failed. The message is the first that it said; ``what`` was not compiled."""

    def __init__(self, what: str, said: list[str]):
        errors = [number for number, line in enumerate(said) if "error" in line]
        first = errors[0] if errors else max(0, len(said) - 15)
        super().__init__("\n".join(said[first : first + 15]))
        self.what = what


def jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quoted(words: list[str]) -> str:
    """A command for the shell, as a build file spells it."""
    return shlex.join(words).replace("$", "$$")


def run_ninja(name: str, files: dict[str, str]) -> None:
    """Writes build files, and brings everything that one of them names up to date."""
    # The environment's own first, activated or not: another version would not read its log.
    ninja = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
    if ninja is None:
        raise NoNinja("it was not found")
    import fcntl  # not on Windows

    command = [ninja, "-f", str(BUILT / name), "-j", str(jobs()), "-k", "0"]
    threads = max(1, jobs() // max(1, len(CUDA_SOURCES)))
    environment = os.environ | {"NINJA_STATUS": "[%f/%t] ", "NVCC_THREADS": str(threads)}
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ninja's log has room for one writer
        for path, text in ((BUILT / each, text) for each, text in files.items()):
            # To ninja a file is as new as its date.
            if not path.exists() or path.read_text() != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        try:
            running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, text=True)  # fmt: skip
        except OSError as error:
            raise NoNinja(str(error)) from error
        said = ""
        with running:
            for line in running.stdout:
                said += line
                logging.info(line.rstrip())
    if running.returncode:
        # "FAILED: object", its command and what that said, until the next one ends.
        parts = re.split(r"^(?=\[\d+/\d+\] |FAILED: |ninja: )", said, flags=re.M)
        failed = [part.splitlines() for part in parts if part.startswith("FAILED: ")]
        if not failed:
            raise NoNinja(said.strip() or f"it ended with {running.returncode}")
        raise Failed(failed[0][0], failed[0][2:])


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

    @property
    def objects(self) -> list[str]:
        """What the CUDA sources are compiled to, in their order."""
        folder = BUILT / self.described.replace(" ", "-")
        return [str(folder / f"{Path(source).stem}.o") for source in CUDA_SOURCES]

    @property
    def command(self) -> list[str]:
        gencodes = []
        for arch in self.archs:
            code = f"[sm_{arch},compute_{arch}]" if arch == self.ptx else f"sm_{arch}"
            gencodes.append(f"-gencode=arch=compute_{arch},code={code}")
        if self.ptx not in self.archs:
            gencodes.append(f"-gencode=arch=compute_{self.ptx},code=compute_{self.ptx}")
        return [self.nvcc, *NVCC_FLAGS, *gencodes]

    def build_file(self) -> str:
        lines = [HEAD, NVCC_RULE.format(nvcc=quoted(self.command))]
        for source, built in zip(CUDA_SOURCES, self.objects, strict=True):
            said = Path(built).with_suffix(".txt")  # by ptxas, for the tests
            lines.append(f"\nbuild {built} | {said}: nvcc {source}\n  said = {said}\n")
        return "".join(lines)

    def compile_without_ninja(self) -> None:
        for source, built in zip(CUDA_SOURCES, self.objects, strict=True):
            Path(built).parent.mkdir(parents=True, exist_ok=True)
            command = [*self.command, f"--threads={jobs()}", "-c", source, "-o", built]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise Failed(built, (done.stdout + done.stderr).splitlines())


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
            reason = self._with_cuda_or_without(ext)
        except Exception as error:
            error_file.write_text(f"{error or type(error).__name__}\n")
            cuda_error_file.unlink(missing_ok=True)
            raise CompileError(str(error)) from error
        error_file.unlink(missing_ok=True)
        cuda_error_file.unlink(missing_ok=True)
        if reason is not None:
            cuda_error_file.write_text(f"{reason}\n")

    def _with_cuda_or_without(self, ext: Extension) -> str | None:
        """Builds the extension, with the CUDA part if that can be; returns why it cannot."""
        try:
            toolkit = Toolkit.find()
            self._build(ext, toolkit)
            return None
        except (NoCuda, OSError) as error:
            reason = str(error)
        tell(reason)
        self._build(ext, None)
        return reason

    def _build(self, ext: Extension, toolkit: Toolkit | None) -> None:
        """Compiles and links what has to be; raises NoCuda if that fails with the CUDA part."""
        own_compile = self.compiler.compile

        def compile_all(sources: list[str], **options) -> list[str]:
            try:
                return self._compile_by_ninja(sources, ext, toolkit)
            except NoNinja as error:
                print(f"lora_kernels: all files are compiled again, without ninja: {error}")
            if toolkit is not None:
                toolkit.compile_without_ninja()
            return own_compile(sources, **options)

        if toolkit is not None:
            ext = with_cuda(ext, toolkit)
        self.force = True  # ninja knows what is up to date
        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        except Exception as error:
            if toolkit is None:
                raise
            if isinstance(error, Failed) and any(each in error.what for each in toolkit.objects):
                raise NoCuda(f"nvcc failed:\n{error}") from error
            raise NoCuda(f"the extension did not compile or link with it: {error}") from error
        finally:
            self.compiler.compile = own_compile

    def _compile_by_ninja(
        self, sources: list[str], ext: Extension, toolkit: Toolkit | None
    ) -> list[str]:
        """The objects of the sources, up to date; the CUDA objects with them."""
        compiler = getattr(self.compiler, "compiler_so_cxx", None)
        if self.compiler.compiler_type != "unix" or compiler is None:
            raise NoNinja("setuptools does not say how it calls this compiler")
        name = f"{sysconfig.get_config_var('SOABI')}{'-sanitized' if SANITIZES else ''}"
        python = [f"-I{folder}" for folder in (*self.compiler.include_dirs, *ext.include_dirs)]
        python += [f"-D{macro}={value}" for macro, value in ext.define_macros]
        version = subprocess.run([compiler[0], "--version"], capture_output=True, text=True).stdout
        files = {f"{name}/compiler.txt": version}
        lines = [HEAD]
        if toolkit is not None:
            files["cuda.ninja"] = toolkit.build_file()
            lines.append(f"include {BUILT}/cuda.ninja\n")
        flags = quoted(ext.extra_compile_args)
        lines.append(CXX_RULE.format(compiler=quoted(compiler), flags=flags))
        objects = []
        lines.append(f"\nhere = {BUILT}/{name}\nfor_python = {quoted(python)}\n")
        for source in sources:
            built = Path(source).relative_to("csrc").with_suffix(".o")
            objects.append(str(BUILT / name / built))
            lines.append(f"build $here/{built}: cxx {source} | $here/compiler.txt\n")
            if source in BINDING:
                lines.append("  python = $for_python\n")
        run_ninja(f"{name}.ninja", files | {f"{name}.ninja": "".join(lines)})
        return objects

    def get_outputs(self) -> list[str]:
        """What is there: an extension that failed is not."""
        return [path for path in super().get_outputs() if Path(path).exists()]


def with_cuda(ext: Extension, toolkit: Toolkit) -> Extension:
    """The extension as it is with the CUDA objects."""
    ext = copy.copy(ext)
    ext.extra_objects = toolkit.objects
    ext.define_macros = [("LORA_KERNELS_CUDA", f'"{toolkit.described}"')]
    # The runtime's names stay inside: torch brings a runtime of its own into the process.
    ext.extra_link_args = [
        *ext.extra_link_args,
        f"-L{toolkit.libraries}", "-lcudart_static", "-lrt", "-ldl", "-Wl,--exclude-libs,ALL",
    ]  # fmt: skip
    return ext


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
    sanitize = SANITIZE if SANITIZES else []
    setup(
        ext_modules=[
            Extension(
                "lora_kernels._native",
                [*BINDING, *KERNELS],
                include_dirs=["csrc"],
                extra_compile_args=[*FLAGS, *sanitize],
                extra_link_args=["-pthread", "-ldl", *sanitize],
                language="c++",
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildOptionally},
    )
