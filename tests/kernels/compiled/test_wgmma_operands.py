"""No kernel for sm_90 overwrites the left operand of a product that still reads it."""

import functools
import re
from dataclasses import replace

import pytest
import wgmma_operands
from compile_cases import (
    CALLS,
    MASKED_CALLS,
    ROUTED_CALLS,
    cases,
    launches_of,
    resources_of,
)
from compile_only import compile_launch

CASES = [
    pytest.param(call, id=name)
    for name, call, capability in cases(CALLS | ROUTED_CALLS | MASKED_CALLS)
    if capability == 90
]


@pytest.mark.parametrize("call", CASES)
def test_no_operand_is_overwritten(call):
    for launch, used in resources_of(call, 90):
        assert not wgmma_operands.overwritten(used.machine_code()), launch.name


@pytest.mark.parametrize("call", CASES)
def test_products_that_read_registers_are_waited_for_in_their_step(call):
    """So it takes more than another assembler to bring the hazard about."""
    for launch, used in resources_of(call, 90):
        code = wgmma_operands.instructions(used.machine_code()).values()
        if any(map(wgmma_operands.left_operand, code)):
            waits = [text for text in code if "WARPGROUP.DEPBAR" in text]
            assert all("gsb0, 0x0" in wait for wait in waits), (launch.name, waits)


@functools.cache
def listing() -> str:
    """Of a shrink with dropout, whose mask brings the left operand into registers.

    With eight warps and no cast, so that a product is in flight from one step to the next.
    """
    call, _ = CALLS["bf16, r 16, dropout"]
    launch = next(launch for launch in launches_of(call, 90) if launch.name == "shrink_kernel")
    assert launch.arguments["DROPOUT"]
    more_warps = replace(launch, options={**launch.options, "num_warps": 8})
    return compile_launch(more_warps, 90).machine_code()


def products() -> dict[int, str]:
    code = wgmma_operands.instructions(listing())
    return {address: text for address, text in code.items() if wgmma_operands.left_operand(text)}


def planted(address: int, instruction: str) -> str:
    """The listing with one more instruction after that at an address."""
    line = rf"/\*{address:04x}\*/\s+.*?;.*"
    more = f"/*{address + 8:04x}*/ {instruction} ;"
    changed, count = re.subn(line, lambda found: f"{found[0]}\n{more}", listing())
    assert count == 1
    return changed


def test_masked_kernels_read_from_registers():
    assert len(products()) >= 4, "nothing was looked for"


def written_before_the_wait(instruction: str) -> tuple[str, int]:
    """The listing with an instruction right after the first product, and that product's operand."""
    first = min(products())
    operand = min(wgmma_operands.left_operand(products()[first]))
    return planted(first, instruction.format(operand, operand + 3)), operand


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
    changed, operand = written_before_the_wait(instruction)
    ((product, _),) = wgmma_operands.overwritten(changed)
    assert operand in wgmma_operands.left_operand(product)


@pytest.mark.parametrize(
    "instruction", ["STS [R{0}], R{1}", "ISETP.GE.AND P0, PT, R{0}, R{1}, PT", "MOV RZ, R{0}"]
)
def test_a_read_is_none(instruction):
    assert not wgmma_operands.overwritten(written_before_the_wait(instruction)[0])


@pytest.mark.parametrize("wait", [0x1, 0x0])
def test_a_product_in_flight_round_the_loop_is_followed(wait):
    """The second half of a step is waited for in the next one: without that wait it is not."""
    kept = f"WARPGROUP.DEPBAR.LE gsb0, {wait:#x}"
    assert kept in listing()
    assert bool(wgmma_operands.overwritten(listing().replace(kept, "NOP"))) == (wait == 0x1)
