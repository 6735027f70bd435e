"""setup.py: what it builds, builds again, records and says, on sources of a few lines."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import cubins
import pytest

ROOT = cubins.ROOT
needs_nvcc = pytest.mark.skipif(cubins.nvcc() is None, reason="nvcc is not installed")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("LORA_KERNELS_CUDA", "LORA_KERNELS_CUDA_ARCHS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return cubins.setup_script()


@needs_nvcc
@pytest.mark.parametrize(
    ("asked", "archs", "described"),
    [
        (None, ("80", "90a", "100"), "sm_80 sm_90a sm_100 compute_100"),
        ("80,90a", ("80", "90a"), "sm_80 sm_90a compute_90"),
        (" 8.0 ; sm_86 9.0a;", ("80", "86", "90a"), "sm_80 sm_86 sm_90a compute_90"),
        ("8.0;8.0+PTX;19.9", ("80",), "sm_80 compute_80"),
    ],
)
def test_architectures(asked, archs, described, script, monkeypatch, capsys):
    if asked is not None:
        monkeypatch.setenv("LORA_KERNELS_CUDA_ARCHS", asked)
    toolkit = script.Toolkit.find()
    assert toolkit.archs == archs
    assert toolkit.described == f"cuda_{toolkit.version} {described}"
    assert ("does not know sm_199" in capsys.readouterr().out) == ("19.9" in (asked or ""))
    assert (toolkit.libraries / "libcudart_static.a").exists()


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"LORA_KERNELS_CUDA": "0"}, "LORA_KERNELS_CUDA=0 was set"),
        ({"PATH": "", "CUDA_HOME": "", "CUDA_PATH": ""}, "nvcc was not there"),
        ({"LORA_KERNELS_CUDA_ARCHS": "hopper"}, "expected names like 9.0a or 90a, got 'hopper'"),
        ({"LORA_KERNELS_CUDA_ARCHS": "19.9"}, "knows none of the architectures 19.9"),
    ],
    ids=str,
)
def test_why_there_is_no_cuda_part(variables, reason, script, monkeypatch):
    if "ARCHS" in str(variables) and cubins.nvcc() is None:
        pytest.skip("nvcc is not installed")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(script.NoCuda, match=re.escape(reason)):
        script.Toolkit.find()


def test_nvcc_is_looked_for_where_people_say(script, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.touch(mode=0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.setenv(name, str(tmp_path))
        assert script.find_nvcc() == str(nvcc)


def test_pybind11_may_be_torchs_copy(script, monkeypatch):
    find_spec = script.importlib.util.find_spec
    hidden = {"pybind11"}
    monkeypatch.setattr(
        script.importlib.util,
        "find_spec",
        lambda name: None if name in hidden else find_spec(name),
    )
    include = Path(script.pybind11_include())
    assert "torch" in include.parts and (include / "pybind11" / "pybind11.h").exists()
    hidden.add("torch")
    with pytest.raises(script.CompileError, match="pybind11 was not there"):
        script.pybind11_include()


# ---- builds

# Plain C API: compiled in no time.
BINDING = """
#include <Python.h>
#include "cpu/kernels.h"
#ifdef LORA_KERNELS_CUDA
int answer();
#else
#define LORA_KERNELS_CUDA ""
int answer() { return 0; }
#endif
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__native() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddStringConstant(m, "built_for", LORA_KERNELS_CUDA);
  PyModule_AddIntConstant(m, "answer", answer());
  PyModule_AddIntConstant(m, "sum", one() + two());
  return m;
}
"""
KERNEL = "__global__ void kernel(int* at) { *at = 42; }\nint answer() { return 42; }\n"
SOURCES = {
    "csrc/binding.cpp": BINDING,
    "csrc/cpu/kernels.h": "int one();\nint two();\n",
    "csrc/cpu/number.h": "#define NUMBER 1\n",
    "csrc/cpu/one.cpp": '#include "kernels.h"\n#include "number.h"\nint one() { return NUMBER; }\n',
    "csrc/cpu/two.cpp": '#include "kernels.h"\nint two() { return 2; }\n',
}
# setup.py, where ninja is somewhere else or nowhere.
FOUND = """
import runpy, shutil, sys
which = shutil.which
shutil.which = lambda name, **options: {!r} if name == "ninja" else which(name, **options)
sys.argv = sys.argv[1:]
runpy.run_path("setup.py", run_name="__main__")
"""


class Tree:
    """A folder with setup.py and small sources."""

    def __init__(self, folder: Path):
        self.folder, self.package = folder, folder / "lora_kernels"
        self.error, self.cuda_error = (
            self.package / f"_native{which}error.txt" for which in ("_", "_cuda_")
        )
        shutil.copy(ROOT / "setup.py", folder)
        self.package.mkdir()
        for name, text in SOURCES.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def command(self, *command: str, **variables: str) -> dict:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("LORA_KERNELS_") and name != "LD_PRELOAD"
        }
        return {
            "args": [sys.executable, *command], "cwd": self.folder, "text": True,
            "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT,
            "env": environment | {"LORA_KERNELS_CUDA": "0", "LORA_KERNELS_CUDA_ARCHS": "80"}
            | variables,
        }  # fmt: skip

    def run(self, *command: str, **variables: str) -> str:
        done = subprocess.run(**self.command(*command, **variables))
        assert done.returncode == 0, done.stdout
        return done.stdout

    def build(self, *options: str, **variables: str) -> str:
        options = options or ("--inplace",)
        return self.run("setup.py", "-q", "build_ext", *options, **variables)

    def imported(self, code: str) -> str:
        return self.run(
            "-c", f"import sys; sys.path.insert(0, 'lora_kernels'); import _native as n; {code}"
        ).strip()

    def made(self) -> dict[str, int]:
        """Objects, and the extensions in folders of builds, with their times."""
        found = [*self.folder.glob("build/**/*.o"), *self.folder.glob("build/**/*.so")]
        return {path.name.partition(".cpython")[0]: path.stat().st_mtime_ns for path in found}

    def remade(self, *options: str, **variables: str) -> set[str]:
        """What a build makes or makes anew."""
        before = self.made()
        self.build(*options, **variables)
        return {name for name, time in self.made().items() if before.get(name) != time}


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path)


def test_what_has_changed_is_built(tree):
    assert tree.remade() == {"binding.o", "one.o", "two.o", "_native"}
    assert tree.imported("print(n.sum)") == "3"
    assert tree.remade() == set(), "nothing has changed"
    assert tree.remade(MAX_JOBS="1") == set(), "how many compilers run is no change"

    tree.write("csrc/cpu/two.cpp", SOURCES["csrc/cpu/two.cpp"].replace("2", "20"))
    assert tree.remade() == {"two.o", "_native"}
    tree.write("csrc/cpu/number.h", "#define NUMBER 10\n")
    assert tree.remade() == {"one.o", "_native"}, "what includes it"
    tree.write("csrc/cpu/kernels.h", SOURCES["csrc/cpu/kernels.h"] + "int three();\n")
    assert tree.remade() == {"binding.o", "one.o", "two.o", "_native"}
    assert tree.imported("print(n.sum)") == "30"
    assert tree.remade(CXXFLAGS="-O1") == {"binding.o", "one.o", "two.o", "_native"}, "a command"


def test_another_compiler_compiles_everything(tree):
    tree.build()
    (said,) = tree.folder.glob("build/native/*/compiler.txt")
    assert said.read_text()
    said.write_text("another one\n")
    assert tree.remade() == {"binding.o", "one.o", "two.o", "_native"}


def test_builds_share_their_objects(tree):
    tree.build()
    assert tree.remade("--build-lib", "build/other", "--build-temp", "build/temp") == {"_native"}
    assert len([*tree.folder.glob("build/other/lora_kernels/_native*.so")]) == 1
    # With sanitizers it is another build, whose objects are others.
    tree.build("--build-lib", "build/sanitized", LORA_KERNELS_SANITIZE="1")
    assert len([*tree.folder.glob("build/native/*-sanitized/binding.o")]) == 1
    assert tree.remade() == set()


def test_build_files_work_by_hand(tree):
    tree.build()
    (file,) = tree.folder.glob("build/native/*.ninja")
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    by_hand = [ninja, "-f", str(file.relative_to(tree.folder))]

    def said() -> str:
        return subprocess.run(by_hand, cwd=tree.folder, capture_output=True, text=True).stdout

    assert "no work to do" in said()
    tree.write("csrc/cpu/number.h", "#define NUMBER 10\n")
    assert "[1/1] csrc/cpu/one.cpp" in said()
    assert tree.remade() == {"_native"}, "setuptools links what was compiled by hand"


def test_two_builds_at_once(tree):
    commands = [
        tree.command("setup.py", "-q", "build_ext", "--build-lib", f"build/{name}")
        for name in ("here", "there")
    ]
    running = [subprocess.Popen(**command) for command in commands]
    for each in running:
        said, _ = each.communicate()
        assert each.returncode == 0 and "without ninja" not in said, said
    assert len([*tree.folder.glob("build/*here/lora_kernels/_native*.so")]) == 2
    assert tree.remade("--build-lib", "build/here") == set()


@pytest.mark.parametrize("broken", [False, True], ids=["no ninja", "a ninja that does not run"])
def test_without_ninja_setuptools_compiles(broken, tree):
    if broken:
        tree.write("bin/ninja", "#!/bin/sh\necho out of order; exit 3\n")
        (tree.folder / "bin/ninja").chmod(0o755)
        said = tree.run("-c", FOUND.format("bin/ninja"), "setup.py", "-q", "build_ext", "--inplace")
        assert "without ninja: out of order" in said
    else:
        said = tree.run("-c", FOUND.format(None), "setup.py", "-q", "build_ext", "--inplace")
        assert "without ninja: it was not found" in said
        assert not (tree.folder / "build/native").exists()
    assert tree.imported("print(n.sum)") == "3" and not tree.error.exists()


@needs_nvcc
def test_without_ninja_there_is_a_cuda_part_too(tree):
    tree.write("csrc/cuda/kernel.cu", KERNEL)
    options = ("-c", FOUND.format(None), "setup.py", "-q", "build_ext", "--inplace")
    tree.run(*options, LORA_KERNELS_CUDA="1")
    assert tree.imported("print(n.answer)") == "42"
    tree.write("csrc/cuda/kernel.cu", KERNEL + "no such thing;\n")
    assert "!" * 80 in tree.run(*options, LORA_KERNELS_CUDA="1")
    assert "kernel.cu(3): error" in tree.cuda_error.read_text()
    assert tree.imported("print(n.answer, n.sum)") == "0 3"


def test_what_the_compiler_said_is_recorded(tree):
    tree.write("csrc/cpu/one.cpp", "int one() { return three; }\n")
    tree.build(MAX_JOBS="1")
    recorded = tree.error.read_text()
    assert re.match(r"csrc/cpu/one\.cpp:1:\d+: error: .*three.* not declared|"
                    r"csrc/cpu/one\.cpp:1:\d+: error: use of undeclared", recorded)  # fmt: skip
    assert "ninja" not in recorded and "-std=c++17" not in recorded, "nothing but the compiler"
    assert not [*tree.package.glob("*.so")]
    # The rest was compiled all the same, and is not again.
    tree.write("csrc/cpu/one.cpp", SOURCES["csrc/cpu/one.cpp"])
    assert tree.remade() == {"one.o", "_native"}
    assert not tree.error.exists()


def test_no_compiler(tree):
    tree.build(CXX="/no/such/compiler")
    assert "/no/such/compiler" in tree.error.read_text()
    tree.build(LORA_KERNELS_BUILD="0")
    assert tree.error.read_text() == "LORA_KERNELS_BUILD=0 was set when it was installed\n"


def test_wheels_and_editable_installs(tree):
    """The files that pip is given, and what the wheel of a source distribution has in it."""
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree.folder)
    for name in ("__init__.py", "version.py"):
        shutil.copy(ROOT / "lora_kernels" / "version.py", tree.package / name)

    def hook(name: str, folder: str) -> Path:
        code = f"from setuptools import build_meta as b; print(b.{name}({folder!r}))"
        return tree.folder / folder / tree.run("-c", code).splitlines()[-1]

    def inside(wheel: Path) -> set[str]:
        with zipfile.ZipFile(wheel) as opened:
            return {name for name in opened.namelist() if ".dist-info/" not in name}

    extension = f"lora_kernels/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    before = hook("build_editable", "editable") and tree.made()
    assert (tree.folder / extension).exists(), "built in place"
    (tree.folder / extension).unlink()
    wheel = hook("build_wheel", "wheel")
    assert inside(wheel) == {
        "lora_kernels/__init__.py", "lora_kernels/version.py", extension,
        "lora_kernels/_native_cuda_error.txt",
    }  # fmt: skip
    after = tree.made()
    assert all(after[name] == time for name, time in before.items()), "nothing is compiled again"

    archive = hook("build_sdist", "dist")
    shutil.unpack_archive(archive, tree.folder / "unpacked", filter="data")
    (unpacked,) = (tree.folder / "unpacked").iterdir()
    tree.folder = unpacked
    assert inside(hook("build_wheel", "wheel")) == inside(wheel)


@needs_nvcc
def test_a_build_with_and_without_its_cuda_part(tree):
    tree.write("csrc/cuda/kernel.cu", KERNEL)
    tree.write("csrc/cuda/other.cu", '#include "other.cuh"\n')
    tree.write("csrc/cuda/other.cuh", "\n")

    def build(**variables: str) -> str:
        return tree.build(**{"LORA_KERNELS_CUDA": ""} | variables)

    build()
    assert tree.imported("print(n.built_for, n.answer)").endswith("sm_80 compute_80 42")
    assert not tree.cuda_error.exists()
    (folder,) = tree.folder.glob("build/native/cuda_*-sm_80-compute_80")
    assert {path.name for path in folder.iterdir()} == {
        "kernel.o", "kernel.txt", "other.o", "other.txt",
    }  # fmt: skip

    assert tree.remade(LORA_KERNELS_CUDA="", MAX_JOBS="7") == set()
    tree.write("csrc/cuda/other.cuh", "int other() { return 1; }\n")
    assert tree.remade(LORA_KERNELS_CUDA="") == {"other.o", "_native"}, "what includes it"

    tree.write("csrc/cuda/kernel.cu", KERNEL + "no such thing;\n")
    said = build(LORA_KERNELS_CUDA="1")
    assert "LORA_KERNELS_CUDA=1, but lora_kernels: built without its CUDA part" in said
    assert "!" * 80 in said
    recorded = tree.cuda_error.read_text()
    assert recorded.startswith("nvcc failed:") and "kernel.cu(3): error" in recorded
    assert tree.imported("print(repr(n.built_for))") == "''"

    tree.write("csrc/cuda/kernel.cu", KERNEL)
    assert "LORA_KERNELS_CUDA=0 was set" in build(LORA_KERNELS_CUDA="0")
    with_it = {"binding.o", "kernel.o", "_native"}
    assert tree.cuda_error.read_text() == "LORA_KERNELS_CUDA=0 was set when it was installed\n"
    assert tree.remade(LORA_KERNELS_CUDA="") == with_it, "only the binding knows of it"
    assert build(LORA_KERNELS_CUDA="") == "", "quietly"
    assert not tree.cuda_error.exists() and tree.imported("print(n.answer)") == "42"

    # A CUDA part that the rest does not compile with is left out too.
    tree.write("csrc/binding.cpp", BINDING.replace("int answer();", "#error CUDA"))
    assert "did not compile or link with it" in build()
    assert tree.imported("print(repr(n.built_for))") == "''"
    assert "compile or link" in tree.cuda_error.read_text()

    tree.write("csrc/binding.cpp", "no such thing;\n")
    build(LORA_KERNELS_CUDA="0")
    assert tree.error.read_text().strip() and not tree.cuda_error.exists()
