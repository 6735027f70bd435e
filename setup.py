"""Builds ``lora_kernels._native`` from ``csrc`` where a C++17 compiler and pybind11 are.

All metadata is in pyproject.toml. Without a compiler, or if it fails, the install is pure Python
and works; why is written to ``lora_kernels/_native_error.txt``, which ``python -m lora_kernels
doctor`` reads. Environment: ``LORA_KERNELS_BUILD=0`` builds nothing,
``LORA_KERNELS_SANITIZE=1`` builds with the address and undefined-behaviour sanitizers.

The CUDA part will come from ``csrc/cuda`` as an extension of its own beside this one.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ERROR_FILE = "_native_error.txt"
SOURCES = ["csrc/binding.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
HEADERS = sorted(map(str, Path("csrc/cpu").glob("*.h")))
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


class BuildOptionally(build_ext):
    """Records why an extension was not built, and lets the install go on."""

    def build_extension(self, ext: Extension) -> None:
        error_file = Path(self.get_ext_fullpath(ext.name)).parent / ERROR_FILE
        error_file.unlink(missing_ok=True)
        try:
            if os.environ.get("LORA_KERNELS_BUILD") == "0":
                raise CompileError("LORA_KERNELS_BUILD=0 was set when it was installed")
            self._compile(ext)
        except Exception as error:
            error_file.parent.mkdir(parents=True, exist_ok=True)
            error_file.write_text(f"{error or type(error).__name__}\n")
            raise CompileError(str(error)) from error

    def _compile(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError as error:
            raise CompileError("pybind11 was not there when it was installed") from error
        from pybind11.setup_helpers import ParallelCompile

        ext.include_dirs.append(pybind11.get_include())
        ParallelCompile(default=os.cpu_count() or 1).install()
        super().build_extension(ext)

    def get_outputs(self) -> list[str]:
        """What is there: an extension that failed is not."""
        return [path for path in super().get_outputs() if Path(path).exists()]


sanitize = SANITIZE if os.environ.get("LORA_KERNELS_SANITIZE") == "1" else []
setup(
    ext_modules=[
        Extension(
            "lora_kernels._native",
            SOURCES,
            depends=HEADERS,
            include_dirs=["csrc"],
            extra_compile_args=[*FLAGS, *sanitize],
            extra_link_args=["-pthread", "-ldl", *sanitize],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildOptionally},
)
