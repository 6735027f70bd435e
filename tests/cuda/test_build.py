"""The CUDA kernels as nvcc compiles them. Skipped without nvcc."""

import json
import os
import re
import shutil
import subprocess

import cubins
import pytest

from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime import cuda_extension as native_cuda

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
