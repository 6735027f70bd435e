"""The CUDA kernels as nvcc compiles them, and the build itself. Skipped without nvcc."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cubins
import pytest

from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime import cuda_extension as native_cuda

ROOT = cubins.ROOT
needs_nvcc = pytest.mark.skipif(cubins.nvcc() is None, reason="nvcc is not installed")
by_kernel = pytest.mark.parametrize("source", cubins.SOURCES)
by_arch = pytest.mark.parametrize("arch", cubins.ARCHS)


@pytest.fixture
def kernels():
    if cubins.nvcc() is None:
        pytest.skip("nvcc is not installed")
    if cubins.cuobjdump() is None:
        pytest.skip("cuobjdump is not installed")
    return cubins.kernels_of


# ---- the kernels


@by_arch
@by_kernel
def test_nothing_spills(source, arch, kernels):
    found = kernels(source, arch)
    assert found
    for name, kernel in found.items():
        assert kernel.stack == kernel.local == 0, (name, kernel.stack, kernel.local)
        assert not kernel.has(r"LDL|STL"), name
        # What is not asked for at launch: the alignment of what is, where the driver takes part.
        assert kernel.shared <= 1024, name


@by_arch
@by_kernel
def test_no_more_registers_than_in_the_table(source, arch, kernels):
    table = json.loads(cubins.TABLE.read_text())
    version, _ = cubins.compiled()
    if version != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}, this is {version}")
    allowed = {
        name: numbers
        for name, numbers in table["registers and shared bytes"][arch].items()
        if name.startswith(f"{source}_kernel<")
    }
    found = kernels(source, arch)
    renew = "python tests/cuda/cubins.py > tests/cuda/resources.json"
    assert found.keys() == allowed.keys(), renew
    for name, (registers, shared) in allowed.items():
        assert found[name].registers <= registers, f"{name}: {renew}"
        assert found[name].shared <= shared, f"{name}: {renew}"


@pytest.mark.parametrize("source", ["decode_linear", "decode_routed"])
@by_arch
def test_decode_multiplies_on_the_matrix_units_and_reads_16_bytes_at_once(source, arch, kernels):
    for name, kernel in kernels(source, arch).items():
        bf16 = name.startswith(f"{source}_kernel<bf16")
        assert kernel.has(r"HMMA\.16816\.F32\.BF16" if bf16 else r"HMMA\.16816\.F32$"), name
        if name.endswith("true>"):  # aligned rows
            assert kernel.has(r"LDG\.E\.\S*128"), name
        assert kernel.has("UCGABAR_ARV") == (arch != "80"), f"{name}: clusters from 9.0 on"
        assert not kernel.has("RED|ATOM"), f"{name}: results would differ from run to run"


def test_the_gemm_is_made_of_hopper_instructions(kernels):
    """Products of whole warpgroups, bulk copies in and out, registers from the copying warps."""
    for name, kernel in kernels("gemm_tail", "90a").items():
        for mnemonic in ("HGMMA", "UTMALDG", r"UTMALDG\.2D\.MULTICAST", "UTMASTG", "USETMAXREG"):
            assert kernel.has(mnemonic), (name, mnemonic)
        assert not kernel.has("HMMA"), name
        # Two warpgroups at 232 registers and one at 40 is what is asked for at run time.
        assert kernel.registers * 384 <= 65_536, name


@pytest.mark.parametrize("arch", ["80", "100"])
def test_the_gemm_traps_elsewhere(arch, kernels):
    for name, kernel in kernels("gemm_tail", arch).items():
        assert kernel.has(r"BPT\.TRAP"), name


@needs_nvcc
@by_kernel
def test_the_assembler_has_no_complaint(source):
    """C7508: setmaxnreg is ignored; C7510 and its like: products are made one after the other."""
    said = cubins.compiled()[1][source][1]
    assert not re.search(r"C7508|serializ|warning|spill", said, re.I), said


def test_names_are_read():
    for mangled, name in (
        (
            "_ZN4lora4cuda49_GLOBAL__N__bc7986db_16_decode_linear_cu_8568850820"
            "decode_linear_kernelI6__halfLi1ELb1EEEvNS0_12DecodeLinearENS1_6LayoutE",
            "decode_linear_kernel<fp16, 1, true>",
        ),
        (
            "_ZN4lora4cuda49_GLOBAL__N__33b5a136_16_decode_routed_cu_72e8c83220"
            "decode_routed_kernelI13__nv_bfloat16S3_Lb0EEEvNS0_12DecodeRoutedENS1_6LayoutE",
            "decode_routed_kernel<bf16, bf16, false>",
        ),
        (
            "_ZN4lora4cuda49_GLOBAL__N__33b5a136_16_decode_routed_cu_72e8c83220"
            "decode_routed_kernelI6__halffLb1EEEvNS0_12DecodeRoutedENS1_6LayoutE",
            "decode_routed_kernel<fp16, fp32, true>",
        ),
    ):
        assert cubins.readable(mangled) == name


# ---- the installed extension


@needs_nvcc
def test_the_installed_extension_has_its_cuda_part():
    if os.environ.get("LORA_KERNELS_NATIVE", "1") != "1" or native.missing():
        pytest.skip("another extension, or none, is in use")
    if "LORA_KERNELS_CUDA=0" in native_cuda.status():
        pytest.skip(native_cuda.status())
    assert native_cuda.built_for(), native_cuda.status()
    # Imported, and without a driver a launch says so.
    with pytest.raises(RuntimeError, match=r"gemm_tail.*: cuda\w+, "):
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a driver")
        native.extension().cuda_gemm_tail(
            0, 0, 1, *(0, 0) * 4, False, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 128, 1
        )


@needs_nvcc
def test_the_runtimes_names_stay_inside():
    """torch has a CUDA runtime of its own in the process, maybe of another version."""
    if not native_cuda.built_for() or native_cuda.emulated() or shutil.which("nm") is None:
        pytest.skip("there is no CUDA part, or no nm, to look with")
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", native.extension().__file__],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "PyInit__native" in listing and not re.search(r" [TW] (_*cuda|cu[A-Z])", listing)


# ---- setup.py


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


# Plain C API: compiled in no time.
BINDING = """
#include <Python.h>
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
  return m;
}
"""
KERNEL = "__global__ void kernel(int* at) { *at = 42; }\nint answer() { return 42; }\n"


@needs_nvcc
def test_a_build_with_and_without_its_cuda_part(tmp_path):
    """The script on sources of three lines: what is built, what is recorded, what is said."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    for name, text in (("binding.cpp", BINDING), ("cuda/kernel.cu", KERNEL), ("cpu/none", "")):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    package = tmp_path / "lora_kernels"
    package.mkdir()
    errors = package / "_native_cuda_error.txt"

    def build(**variables: str) -> str:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("LORA_KERNELS_")
        }
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment | {"LORA_KERNELS_CUDA_ARCHS": "80"} | variables,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    def imported(code: str) -> str:
        program = f"import sys; sys.path.insert(0, 'lora_kernels'); import _native as n; {code}"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    build()
    assert imported("print(n.built_for, n.answer)").endswith("sm_80 compute_80 42")
    assert not errors.exists() and len(list(tmp_path.glob("build/cuda/*.o"))) == 1

    (tmp_path / "csrc/cuda/kernel.cu").write_text(KERNEL + "no such thing;\n")
    said = build(LORA_KERNELS_CUDA="1")
    assert "LORA_KERNELS_CUDA=1, but lora_kernels: built without its CUDA part" in said
    assert "!" * 80 in said
    recorded = errors.read_text()
    assert recorded.startswith("nvcc failed:") and "kernel.cu(3): error" in recorded
    assert imported("print(repr(n.built_for))") == "''"

    (tmp_path / "csrc/cuda/kernel.cu").write_text(KERNEL)
    assert "LORA_KERNELS_CUDA=0 was set" in build(LORA_KERNELS_CUDA="0")
    assert errors.read_text().strip() == "LORA_KERNELS_CUDA=0 was set when it was installed"
    assert build() == "", "it is built again, now that it may have its CUDA part, and quietly"
    assert not errors.exists() and imported("print(n.answer)") == "42"

    # A CUDA part that the rest does not compile with is left out too.
    (tmp_path / "csrc/binding.cpp").write_text(BINDING.replace("int answer();", "#error CUDA"))
    assert "did not compile or link with it" in build()
    assert imported("print(repr(n.built_for))") == "''" and "compile or link" in errors.read_text()

    (tmp_path / "csrc/binding.cpp").write_text("no such thing;\n")
    build(LORA_KERNELS_CUDA="0")
    assert (package / "_native_error.txt").read_text().strip() and not errors.exists()
