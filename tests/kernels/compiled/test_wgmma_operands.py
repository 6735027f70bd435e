"""No kernel for sm_90 overwrites the left operand of a product that still reads it."""

import re

import pytest
import wgmma_operands
from compile_cases import (
    CALLS,
    MASKED_CALLS,
    ROUTED_CALLS,
    cases,
    resources_of,
)

CASES = [
    pytest.param(call, id=name)
    for name, call, capability in cases(CALLS | ROUTED_CALLS | MASKED_CALLS)
    if capability == 90
]


@pytest.mark.parametrize("call", CASES)
def test_no_operand_is_overwritten(call):
    for launch, used in resources_of(call, 90):
        if not used.instructions("wgmma.mma_async"):
            continue  # to disassemble a kernel takes a second
        machine_code = used.machine_code()
        assert not wgmma_operands.overwritten(machine_code), launch.name
        # Products that read registers are waited for in their step, too: so it takes more than
        # another assembler to bring the hazard about.
        code = wgmma_operands.instructions(machine_code).values()
        if any(map(wgmma_operands.left_operand, code)):
            waits = [text for text in code if "WARPGROUP.DEPBAR" in text]
            assert all("gsb0, 0x0" in wait for wait in waits), (launch.name, waits)


def test_masked_kernels_read_from_registers():
    """So that the tests above look at something."""
    call, _ = CALLS["bf16, r 16, dropout"]
    shrink = next(
        used for launch, used in resources_of(call, 90)
        if launch.name == "shrink_kernel" and launch.arguments["DROPOUT"]
    )  # fmt: skip
    code = wgmma_operands.instructions(shrink.machine_code()).values()
    assert sum(map(bool, map(wgmma_operands.left_operand, code))) >= 4


# A step of a pipelined loop: its second product is waited for in the next one.
LOOP = """
    /*0000*/ MOV R40, RZ ;
    /*0010*/ WARPGROUP.ARRIVE ;
    /*0020*/ HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR4], R24, gsb0 ;
    /*0030*/ NOP ;
    /*0040*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
    /*0050*/ IMAD.MOV.U32 R45, RZ, RZ, R8 ;
    /*0060*/ HGMMA.64x16x16.F32.BF16 R24, R44, gdesc[UR8], R24, gsb0 ;
    /*0070*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
    /*0080*/ MOV R40, R8 ;
    /*0090*/ @P0 BRA 0x10 ;
    /*00a0*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*00b0*/ MOV R44, R8 ;
    /*00c0*/ EXIT ;
"""
FIRST = 40  # the first register that the first product reads


def test_a_loop_that_waits_in_time_is_clean():
    assert not wgmma_operands.overwritten(LOOP)


def written_before_the_wait(instruction: str) -> str:
    return LOOP.replace("NOP", instruction.format(FIRST, FIRST + 3))


@pytest.mark.parametrize(
    "instruction",
    [
        "IMAD.MOV.U32 R{0}, RZ, RZ, RZ",
        "@P1 MOV R{1}, R2",
        "LDS.128 R{0}, [R2]",
        "LDSM.16.M88.4 R{0}, [R2]",
        "SHFL.IDX PT, R{1}, R2, R3, 0x1f",
    ],
)
def test_a_planted_write_is_found(instruction):
    ((product, _),) = wgmma_operands.overwritten(written_before_the_wait(instruction))
    assert FIRST in wgmma_operands.left_operand(product)


@pytest.mark.parametrize(
    "instruction", ["STS [R{0}], R{1}", "ISETP.GE.AND P0, PT, R{0}, R{1}, PT", "MOV RZ, R{0}"]
)
def test_a_read_is_none(instruction):
    assert not wgmma_operands.overwritten(written_before_the_wait(instruction))


@pytest.mark.parametrize(
    "address, product",
    [("0040", "R44"), ("0070", "R40"), ("00a0", "R44")],
    ids=["in the next step", "in the same step", "behind the loop"],
)
def test_a_wait_that_is_missing_is_found(address, product):
    without = re.sub(rf"/\*{address}\*/ WARPGROUP.DEPBAR[^;]*", f"/*{address}*/ NOP ", LOOP)
    assert {found.split()[2] for found, _ in wgmma_operands.overwritten(without)} == {f"{product},"}
