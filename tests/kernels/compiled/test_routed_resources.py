"""The kernels of routed_lora compiled for every architecture: they fit and do not spill."""

import re
from dataclasses import replace

import pytest
import torch
from compile_cases import (
    BF16,
    DEVICES,
    FP32,
    MATRIX_INSTRUCTION,
    ROUTED_CALLS,
    RoutedCase,
    cases,
    launches_of,
    resources_of,
)
from compile_only import compile_launch, compile_launch_for_amd

CASES = [pytest.param(*case, id=name) for name, *case in cases(ROUTED_CALLS)]
NARROW = {"routed_shrink_kernel", "routed_gradient_kernel"}
DOTS = {*NARROW, "routed_expand_kernel", "routed_gemm_kernel"}


@pytest.mark.parametrize("call, capability", CASES)
def test_fits_and_does_not_spill(call, capability):
    for launch, used in resources_of(call, capability):
        assert not used.spills, (launch.name, used.registers, used.stack)
        assert used.shared <= DEVICES[capability].shared_memory, (launch.name, used.shared)
        assert used.registers * 32 * launch.options["num_warps"] <= 65_536, launch.name


@pytest.mark.parametrize("call, capability", CASES)
def test_instructions(call, capability):
    seen = set()
    for launch, used in resources_of(call, capability):
        seen.add(launch.name)
        if launch.name not in DOTS:
            continue
        if call.dtype == torch.float32 and not call.tf32:  # ieee: not on the matrix units
            assert not any(used.instructions(mnemonic) for mnemonic in MATRIX_INSTRUCTION.values())
            continue
        # Tiles of 16 pairs are too short for the wide instructions, except as a depth.
        small = launch.arguments["BLOCK_M"] < 64 and launch.name != "routed_gradient_kernel"
        expected = "mma.sync" if small else MATRIX_INSTRUCTION[capability]
        assert used.instructions(expected), (launch.name, expected)
        gathers = launch.name in ("routed_shrink_kernel", "routed_gemm_kernel")
        if gathers and call.in_features % 8 == 0:
            copy = "cp.async.cg" if launch.options["num_stages"] > 1 else "ld.global.v4"
            assert used.instructions(copy), "rows are gathered 16 bytes at a time"
    wide = "routed_gemm_kernel" if call.strategy == "fused" else "routed_expand_kernel"
    assert DOTS & seen == NARROW | {wide}
    assert ("routed_combine_kernel" in seen) == (call.pairs_per_token > 1)


def test_inference_of_few_tokens_is_two_launches():
    few = RoutedCase(32, 4096, (4096, 1024, 1024), 48, BF16, FP32, dropout=True)
    first, second, *_ = launches_of(few, 90)
    assert first.name == "routed_shrink_kernel" and first.arguments["SPLIT"]
    assert second.name == "routed_expand_kernel" and second.arguments["PARTIALS"]
    assert second.options["num_stages"] == 1


@pytest.mark.parametrize(
    "call", [call for _, call, capability in cases(ROUTED_CALLS) if capability == 90], ids=str
)
def test_no_cast_value_is_a_register_operand_of_wgmma(call):
    """One way to the hazard that test_wgmma_operands looks for is not taken at all.

    Only the mask may bring a left operand into registers.
    """
    for launch, used in resources_of(call, 90):
        if launch.name in DOTS and not launch.arguments["DROPOUT"]:
            from_registers = re.findall(r"wgmma\.mma_async[^;]*\},\s*\{", used.assembly)
            assert not from_registers, launch.name


def test_ranks_that_are_multiples_of_eight_are_read_16_bytes_at_a_time():
    """The rank is known on the device only: both ways are compiled, and the fast one is fast."""
    call, _ = ROUTED_CALLS["routed, bf16, r 16"]
    for launch, used in resources_of(call, 90):
        if launch.name == "routed_shrink_kernel" and not launch.arguments["OF_A"]:
            copies = len(re.findall(r"cp\.async\.cg[^;]*, 0x10|cp\.async\.cg", used.assembly))
            of_a = next(u for each, u in resources_of(call, 90) if each.name == launch.name)
            assert copies > of_a.instructions("cp.async.cg")
            return
    raise AssertionError("no shrink of dy")


@pytest.mark.parametrize("capability", [90, 100])
def test_offsets_are_64_bits_wide(capability):
    """More than 2^31 elements of x, of the storage and of the masks' groups."""
    call = RoutedCase(2**20, 16_384, (16_384,), 16, BF16, BF16, dropout=True)
    dropping = [each for each in launches_of(call, capability) if each.arguments.get("DROPOUT")]
    assert len(dropping) >= 3 and all(each.arguments["LONG_COUNTER"] for each in dropping)
    for launch in dropping:
        used = compile_launch(launch, capability)
        assert not used.spills and used.instructions("mul.wide"), launch.name


@pytest.mark.parametrize("name", ["routed q k v, bf16, fp32 adapters, r 64, dropout"])
def test_compiles_for_amd(name):
    """Nothing but compiling is claimed there."""
    for launch in launches_of(ROUTED_CALLS[name][0], 80):
        staged = replace(launch, options={**launch.options, "num_stages": 2})
        used = compile_launch_for_amd(staged)
        assert used.shared <= 65_536, launch.name
        if launch.name in DOTS:
            assert used.instructions("mfma"), launch.name
