"""Every kernel compiled for every architecture: it fits, does not spill, uses the hardware."""

import re
from dataclasses import replace

import pytest
import torch
import triton
from compile_cases import (
    BF16,
    CALLS,
    DEVICES,
    MATRIX_INSTRUCTION,
    WIDE,
    LinearCase,
    cases,
    launches_of,
    resources_of,
)
from compile_only import compile_launch, compile_launch_for_amd, stack_accesses_in_loops
from packaging.version import Version

from lora_kernels.ops.linear.triton import tiles

CASES = [pytest.param(*case, id=name) for name, *case in cases(CALLS)]
DOTS = {"shrink_kernel", "rank_gradient_kernel", "gemm_tail_kernel", "gemm_tail_tma_kernel"}


@pytest.mark.parametrize("call, capability", CASES)
def test_fits_and_does_not_spill(call, capability):
    for launch, used in resources_of(call, capability):
        # The Triton that is pinned, and newer ones, keep nothing in memory on cards for servers.
        strict = capability in WIDE and Version(triton.__version__) >= Version("3.9")
        spills = used.stack if strict else used.spills
        assert not spills, (launch.name, used.registers, used.stack)
        assert used.shared <= DEVICES[capability].shared_memory, (launch.name, used.shared)
        assert used.registers * 32 * launch.options["num_warps"] <= 65_536, launch.name


LOOP_IN_A_LOOP = """
    /*0000*/ STL [R1], R4 ;
    /*0010*/ LDL R4, [R1] ;
    /*0020*/ HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
    /*0030*/ {place} ;
    /*0040*/ @P0 BRA 0x20 ;
    /*0050*/ LDL.LU R4, [R1] ;
    /*0060*/ @P1 BRA 0x10 ;
    /*0070*/ EXIT ;
"""


@pytest.mark.parametrize("place, found", [("NOP", 0), ("LDL R4, [R1]", 1), ("STL.64 [R1], R4", 1)])
def test_a_planted_spill_in_a_loop_is_found(place, found):
    assert len(stack_accesses_in_loops(LOOP_IN_A_LOOP.format(place=place))) == found


@pytest.mark.parametrize("call, capability", CASES)
def test_registers_are_as_tiles_take_them_to_be(call, capability):
    """What the number of parts is reckoned from, where there may be more than one."""
    for launch, used in resources_of(call, capability):
        if launch.name != "rank_gradient_kernel" or call.tokens == 1:
            continue
        bound = tiles.rank_gradient_registers(
            launch.arguments["BLOCK_R"], launch.options["num_warps"], DEVICES[capability]
        )
        assert used.registers <= bound


@pytest.mark.parametrize("call, capability", CASES)
def test_instructions(call, capability):
    seen = set()
    for launch, used in resources_of(call, capability):
        seen.add(launch.name)
        if launch.name not in DOTS:
            continue
        small = launch.arguments["BLOCK_M"] < 64 and launch.name != "rank_gradient_kernel"
        if call.dtype == torch.float32 and not call.tf32:  # ieee: not on the matrix units
            assert not any(used.instructions(mnemonic) for mnemonic in MATRIX_INSTRUCTION.values())
        else:
            expected = "mma.sync" if small else MATRIX_INSTRUCTION[capability]
            assert used.instructions(expected), (launch.name, expected)
        if launch.name == "gemm_tail_tma_kernel":
            assert used.instructions("cp.async.bulk.tensor"), launch.name
        elif call.in_features % 8 == 0:
            # Rows by 16 bytes, without a pipeline too. TF32's wide products take their left operand
            # by rows of the reduction, so that dy is copied by single elements.
            wide = MATRIX_INSTRUCTION[capability] != "mma.sync"
            single = call.tf32 and wide and launch.name == "rank_gradient_kernel"
            copy = "cp.async.ca" if single else "cp.async.cg"
            copy = copy if launch.options["num_stages"] > 1 else "ld.global.v4"
            assert used.instructions(copy), launch.name
    on_tma = call.strategy == "fused" and capability >= 90 and call.in_features % 8 == 0
    assert ("gemm_tail_tma_kernel" in seen) == on_tma
    assert {"shrink_kernel", "rank_gradient_kernel"} <= seen


@pytest.mark.parametrize(
    "call", [call for _, call, capability in cases(CALLS) if capability == 90], ids=str
)
def test_no_cast_value_is_a_register_operand_of_wgmma(call):
    """One way to the hazard that test_wgmma_operands looks for is not taken at all.

    Only the mask may bring a left operand into registers.
    """
    for launch, used in resources_of(call, 90):
        if launch.name in DOTS and not launch.arguments["DROPOUT"]:
            from_registers = re.findall(r"wgmma\.mma_async[^;]*\},\s*\{", used.assembly)
            assert not from_registers, launch.name


@pytest.mark.parametrize("rank", [16, 64, 256])
def test_tail_is_free_on_sm_90(rank):
    """The GEMM with a tail against the same GEMM without one: registers and shared memory."""
    call = LinearCase(8192, 4096, 4096, rank, BF16, BF16)
    with_tail, *_ = [
        launch for launch in launches_of(call, 90) if launch.name == "gemm_tail_tma_kernel"
    ]
    assert with_tail.arguments["HAS_TAIL"] and with_tail.arguments["RIGHT_TRANSPOSED"]
    plain = replace(with_tail, arguments={**with_tail.arguments, "HAS_TAIL": False})
    tail, base = compile_launch(with_tail, 90), compile_launch(plain, 90)
    assert tail.registers <= 1.05 * base.registers, (tail.registers, base.registers)
    assert tail.shared <= 1.05 * base.shared, (tail.shared, base.shared)


@pytest.mark.parametrize("call", [CALLS["bf16, r 16, dropout"][0]], ids=["bf16, r 16, dropout"])
def test_compiles_for_amd(call):
    """By pointers; nothing but compiling is claimed there."""
    for launch in launches_of(call, 80):
        staged = replace(launch, options={**launch.options, "num_stages": 2})
        used = compile_launch_for_amd(staged)
        assert used.shared <= 65_536, launch.name
        if launch.name in DOTS:
            assert used.instructions("mfma"), launch.name
