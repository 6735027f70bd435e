"""The one-pass kernels of dropout, compiled for every card: they fit and do not spill."""

import functools
import random
import re

import pytest
import torch
from compile_cases import BF16, DEVICES, FP16, FP32
from compile_only import Launch, compile_launch, record_launches
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from lora_kernels.ops.narrow.triton import masked
from lora_kernels.ops.routed.tensors import RoutingTensors
from lora_kernels.ops.routed.triton import masked as routed_masked
from lora_kernels.runtime.dropout import ActiveDropout, MaskPlace

SLOTS = 5
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def routing_of(tokens: int) -> RoutingTensors:
    block = 16 if tokens <= 256 else 64

    def ints(*shape):
        return empty(*shape, dtype=torch.int32)

    tiles = ints(tokens // block + min(SLOTS + 1, tokens), 2)
    plan = empty(0, 4, dtype=torch.int64)
    return RoutingTensors(
        ints(tokens), ints(SLOTS + 2), tiles, ints(tokens), None, plan, 1, block
    )  # fmt: skip


def run(tokens: int, columns: int, ranks: tuple[int, ...], dtype: torch.dtype, p=0.1, row_offset=0):
    """Every launch of both modules, once."""
    seed, x = empty(dtype=torch.int64), empty(tokens, columns, dtype=dtype)
    place = MaskPlace(row_offset)
    dropout = ActiveDropout(p, seed, place)
    _, mask = masked.masked_copy(x, dropout)
    masked.masked_copy(x, dropout, mask)
    masked.draw_mask(tokens, columns, dropout)
    for rank in ranks:
        t, a = empty(tokens, rank, dtype=dtype), empty(rank, columns, dtype=dtype)
        masked.masked_product(t, a, mask, dropout, alpha=0.5 + p)
        masked.masked_product(t, a, mask, dropout, scale=empty(dtype=torch.float32))
    routing, thresholds = routing_of(tokens), empty(SLOTS + 1, dtype=torch.int32)
    z, mask = routed_masked.gather_masked(x, routing, thresholds, seed, place)
    routed_masked.gather_masked(x, routing, thresholds, None, place, mask)
    routed_masked.gather_masked(x, routing, thresholds, None, place, draws=False)
    routed_masked.mask_rows_(z, routing, thresholds, mask)


def launches_of(capability: int, *args, **kwargs) -> list[Launch]:
    modules = [masked, routed_masked]
    return record_launches(modules, lambda: run(*args, **kwargs), DEVICES[capability])


@functools.cache
def resources_of(capability: int, tokens: int, columns: int, dtype: torch.dtype, row_offset=0):
    launches = launches_of(capability, tokens, columns, (16, 100), dtype, row_offset=row_offset)
    return [(launch, compile_launch(launch, capability)) for launch in launches]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("capability", DEVICES)
def test_fits_and_does_not_spill(capability, dtype):
    """As many threads per multiprocessor as hide the memory, too: half of sm_80's at the least."""
    for launch, used in resources_of(capability, 8192, 4096, dtype):
        warps = launch.options["num_warps"]
        assert warps in (4, 8) and used.stack == 0, (launch.name, used)
        assert used.shared <= DEVICES[capability].shared_memory, (launch.name, used.shared)
        is_product = launch.name == "masked_product_kernel"
        assert used.registers <= (144 if is_product else 80), (launch.name, used.registers)
        if not is_product:
            assert used.shared <= 4096, (launch.name, used.shared)


@pytest.mark.parametrize("capability", DEVICES)
def test_offsets_are_64_bits_wide_and_sizes_odd(capability):
    """Rows past 2^31 elements, a counter of two words, columns that are multiples of nothing."""
    for launch, used in resources_of(capability, 1_000_001, 4097, BF16, 2**40):
        # Every element has a pointer and a predicate of its own.
        assert used.stack == 0 and used.registers <= 168, (launch.name, used.registers, used.stack)
        drawing = launch.arguments.get("DRAW", launch.name == "draw_mask_kernel")
        assert launch.arguments.get("LONG_COUNTER", False) == drawing, launch.name


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("capability", DEVICES)
def test_instructions(capability, dtype):
    """Rows are read and written 16 bytes at a time; bits are packed by the thread that drew them.

    No operand of a wgmma comes from registers, where a pipelined one could see it overwritten.
    """
    for launch, used in resources_of(capability, 8192, 4096, dtype):
        if launch.name == "masked_product_kernel":
            unit = MATRIX.get(capability, "mma.sync")
            on_matrix_units = any(map(used.instructions, (*MATRIX.values(), "mma.sync")))
            assert bool(used.instructions(unit)) == (dtype != FP32), launch.name
            assert on_matrix_units == (dtype != FP32)
            from_registers = re.findall(r"wgmma\.mma_async[^;]*\},\s*\{", used.assembly)
            assert not from_registers
        elif launch.name != "draw_mask_kernel":
            assert used.instructions("ld.global.v4"), launch.name
        if launch.name == "draw_mask_kernel":
            assert not used.instructions("bar.sync") and not used.instructions("shfl")
        else:
            assert used.instructions("st.global.v4"), launch.name


def test_no_argument_that_follows_the_call_compiles_again():
    """30 random numbers of tokens, p and places: one variant of each launch, as Triton keys it."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    random.seed(0)
    seen = {}
    for step in range(30):
        tokens = random.choice([1, 16, 17, 4096, random.randrange(257, 100_000)])
        if step % 2:
            tokens = random.randrange(257, 20_000)
        p, row_offset = random.random(), random.choice([0, 1, 16, random.randrange(10_000)])
        launches = launches_of(90, tokens, 4096, (16, 100), BF16, p=p, row_offset=row_offset)
        for index, launch in enumerate(launches):
            bind = create_function_from_signature(
                launch.kernel.signature, launch.kernel.params, backend
            )
            key = bind(**launch.arguments, **launch.options)[1]
            block = launch.arguments["BLOCK_M"]  # a routing has tiles of 16 pairs or of 64
            seen.setdefault((index, launch.name, block), set()).add(str((key, launch.options)))
    assert len(seen) == 11 + 4, "the routed ones twice"
    assert all(len(keys) == 1 for keys in seen.values()), {k: len(v) for k, v in seen.items()}
