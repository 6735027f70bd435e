"""The calls whose kernels are compiled without a GPU: what our operations launch for each.

The tests beside this file and the table of resources share them.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from compile_only import Launch, Resources, compile_launch, record_launches

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight
from lora_kernels.ops.linear.call import LinearBackward, LinearCall, Needs
from lora_kernels.ops.linear.triton import gemm, launch, tiles
from lora_kernels.ops.narrow.triton import masked
from lora_kernels.ops.routed import call as routed
from lora_kernels.ops.routed import triton as routed_launch
from lora_kernels.ops.routed.tensors import BankTensors, GradientLayout, RoutingTensors
from lora_kernels.ops.routed.triton import launch as routed_grids
from lora_kernels.ops.routed.triton import masked as routed_masked
from lora_kernels.ops.routed.triton import tiles as routed_tiles
from lora_kernels.runtime.device_limits import DeviceLimits
from lora_kernels.runtime.dropout import ActiveDropout

# Writes the table of resources, benchmarks/resources.md.
RENEW = "python -m pytest tests/kernels/compiled/test_resource_table.py --renew"

# As cudaDeviceProp has them: A100, A10, RTX 4090, H200, B200, RTX 5090.
DEVICES = {
    80: DeviceLimits("sm_80", 80, 108, 166_912),
    86: DeviceLimits("sm_86", 86, 72, 101_376),
    89: DeviceLimits("sm_89", 89, 128, 101_376),
    90: DeviceLimits("sm_90", 90, 132, 232_448),
    100: DeviceLimits("sm_100", 100, 148, 232_448),
    120: DeviceLimits("sm_120", 120, 170, 101_376),
}
MATRIX_INSTRUCTION = {
    capability: {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(capability, "mma.sync")
    for capability in DEVICES
}


@contextmanager
def fp32_precision(tf32: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@dataclass(frozen=True)
class LinearCase:
    """A forward and a backward of ``lora_linear``, with every gradient but that of the bias."""

    tokens: int
    in_features: int
    out_features: int
    rank: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout_p: float = 0.0
    with_output_scale: bool = False
    strategy: str = "fused"
    scaling_on_device: bool = False
    tf32: bool = False  # fp32 products on the matrix units

    modules = (launch, gemm)

    def run(self) -> None:
        """On meta tensors: nothing is computed, only launched."""
        m, k, n, r = self.tokens, self.in_features, self.out_features, self.rank

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, dy, weight, bias = empty(m, k), empty(m, n), empty(n, k), empty(n)
        lora_a, lora_b = (empty(*s, dtype=self.adapter_dtype) for s in ((r, k), (n, r)))
        scaling = empty(dtype=torch.float32) if self.scaling_on_device else torch.tensor(2.0)
        seed = empty(dtype=torch.int64) if self.dropout_p else None
        scale = empty(n, dtype=torch.float32) if self.with_output_scale else None
        dropout = None if seed is None else ActiveDropout(self.dropout_p, seed)
        base, factors = DenseWeight(weight), LoRAFactors(lora_a, lora_b, scaling, scale)
        call = LinearCall(x, base, factors, bias, dropout, save_unscaled=scale is not None)
        needs = Needs(True, True, True, False, scale is not None)
        with tiles.use_cells({"*": {"strategy": self.strategy}}), fp32_precision(self.tf32):
            _, h, _, unscaled, _ = launch.forward(call)
            launch.backward(LinearBackward(dy, base, factors, dropout, needs, x, h, unscaled))


@dataclass(frozen=True)
class RoutedCase:
    """``routed_lora_linear`` with and without a backward, with every gradient but the bias's."""

    tokens: int
    in_features: int
    slices: tuple[int, ...]  # out_features of each
    max_total_rank: int  # of the widest adapter, its slices together
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout: bool = False
    pairs_per_token: int = 1
    weighted: bool = False
    with_weight: bool = True
    num_slots: int = 64
    strategy: str = "hybrid"
    tf32: bool = False  # fp32 products on the matrix units

    modules = (routed_grids,)

    def run(self) -> None:
        """On meta tensors: nothing is computed, only launched."""
        m, k, slots, factors = (
            self.tokens, self.in_features, self.num_slots, 1 + len(self.slices),
        )  # fmt: skip
        pairs = m * self.pairs_per_token
        block = 16 if pairs <= 256 else 64

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def ints(*shape: int) -> torch.Tensor:
            return empty(*shape, dtype=torch.int32)

        columns = [sum(self.slices[:s]) for s in range(factors)]
        bank = BankTensors(
            factors=[], slots=[], thresholds=[], slice_columns=columns,
            max_total_rank=self.max_total_rank,
            storage=empty(1 << 24, dtype=self.adapter_dtype),
            slot_table=empty(slots + 1, factors, 3, dtype=torch.int64),
            scaling=empty(slots + 1, dtype=torch.float64), threshold_table=ints(slots + 1),
        )  # fmt: skip
        routing = RoutingTensors(
            tokens=ints(pairs), offsets=ints(slots + 2),
            tiles=ints(pairs // block + min(slots + 1, pairs), 2), inverse=ints(pairs),
            pair_weights=empty(pairs, dtype=torch.float32) if self.weighted else None,
            plan=empty(0, 4, dtype=torch.int64), pairs_per_token=self.pairs_per_token, block=block,
        )  # fmt: skip
        layout = GradientLayout(
            [0], [0] * factors, 1 << 24, empty(slots + 1, factors, dtype=torch.int64)
        )
        x, dy, weight = empty(m, k), empty(m, columns[-1]), empty(columns[-1], k)
        common = bank, routing, "triton", empty(dtype=torch.int64) if self.dropout else None
        base = DenseWeight(weight) if self.with_weight else None
        with routed_tiles.use_strategy(self.strategy), fp32_precision(self.tf32):
            for save in (False, True):
                call = routed.ForwardCall(*common, x=x, base=base, save=save)
                _, h, _ = routed_launch.forward(call)
            routed_launch.backward(
                routed.LoRABackward(
                    *common, dy=dy, layout=layout, needs=routed.Needs(True, self.weighted),
                    base=base, in_features=k, x=x, h=h,
                )
            )  # fmt: skip


@dataclass(frozen=True)
class MaskedCase:
    """Dropout around the vendor's GEMMs, of one adapter and of many: what ``composed`` launches."""

    tokens: int
    in_features: int
    rank: int
    dtype: torch.dtype
    num_slots: int = 64

    modules = (masked, routed_masked)

    def run(self) -> None:
        """On meta tensors: nothing is computed, only launched."""
        m, k = self.tokens, self.in_features

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def ints(*shape: int) -> torch.Tensor:
            return empty(*shape, dtype=torch.int32)

        x, seed = empty(m, k), empty(dtype=torch.int64)
        dropout = ActiveDropout(0.1, seed)
        _, mask = masked.masked_copy(x, dropout)
        masked.masked_copy(x, dropout, mask)
        masked.draw_mask(m, k, dropout)
        masked.masked_product(empty(m, self.rank), empty(self.rank, k), mask, dropout)
        block = 16 if m <= 256 else 64
        routing = RoutingTensors(
            tokens=ints(m), offsets=ints(self.num_slots + 2),
            tiles=ints(m // block + min(self.num_slots + 1, m), 2), inverse=ints(m),
            pair_weights=None, plan=empty(0, 4, dtype=torch.int64), pairs_per_token=1, block=block,
        )  # fmt: skip
        thresholds = ints(self.num_slots + 1)
        kept, mask = routed_masked.gather_masked(x, routing, thresholds, seed, dropout.place)
        routed_masked.gather_masked(x, routing, thresholds, None, dropout.place, mask)
        routed_masked.mask_rows_(kept, routing, thresholds, mask)


Case = LinearCase | RoutedCase | MaskedCase

# Every call for every architecture takes the better part of an hour: on demand.
SWEEP = os.environ.get("COMPILE_SWEEP") == "1"

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

ALL = tuple(DEVICES)
WIDE = (80, 90, 100)  # cards for servers

# name: (call, compute capabilities of the default tests and the table; `make triton-matrix` takes
# all of DEVICES)
CALLS = {
    "bf16, r 16, dropout": (
        LinearCase(8192, 4096, 4096, 16, BF16, BF16, 0.1),
        ALL,
    ),
    "bf16, fp32 adapters, r 64, DoRA": (
        LinearCase(
            8192, 4096, 4096, 64, BF16, FP32, with_output_scale=True, scaling_on_device=True
        ),
        ALL,
    ),
    "bf16, fp32 adapters, r 160, dropout, hybrid": (
        LinearCase(8192, 4096, 4096, 160, BF16, FP32, 0.1, strategy="hybrid"),
        ALL,
    ),
    "fp16, fp32 adapters, r 3, dropout, odd sizes": (
        LinearCase(1000, 4097, 4095, 3, FP16, FP32, 0.1),
        WIDE,
    ),
    "fp32, r 16, dropout, hybrid": (
        LinearCase(8192, 4096, 4096, 16, FP32, FP32, 0.1, strategy="hybrid"),
        (90,),
    ),
    "tf32, r 16, dropout, hybrid": (
        LinearCase(8192, 4096, 4096, 16, FP32, FP32, 0.1, strategy="hybrid", tf32=True),
        (90,),
    ),
    "bf16, r 16, one token": (
        LinearCase(1, 4096, 4096, 16, BF16, BF16, strategy="hybrid"),
        (90,),
    ),
}
ROUTED_CALLS = {
    "routed, bf16, r 16": (RoutedCase(8192, 4096, (4096,), 16, BF16, BF16), WIDE),
    "routed q k v, bf16, fp32 adapters, r 64, dropout": (
        RoutedCase(8192, 4096, (4096, 1024, 1024), 192, BF16, FP32, dropout=True),
        WIDE,
    ),
    "routed, bf16, r 64, two weighted adapters per token": (
        RoutedCase(8192, 4096, (4096,), 64, BF16, BF16, pairs_per_token=2, weighted=True), ALL,
    ),
    "routed alone, fp16, fp32 adapters, r 3, dropout, odd sizes": (
        RoutedCase(1000, 4097, (4095,), 3, FP16, FP32, dropout=True, with_weight=False), WIDE,
    ),
    "routed, fp32, r 16, dropout": (
        RoutedCase(8192, 4096, (4096,), 16, FP32, FP32, dropout=True), (90,),
    ),
    "routed, tf32, r 16, dropout": (
        RoutedCase(8192, 4096, (4096,), 16, FP32, FP32, dropout=True, tf32=True), (90,),
    ),
    "routed q k v fused, bf16, r 16, dropout": (
        RoutedCase(8192, 4096, (4096, 1024, 1024), 48, BF16, BF16, dropout=True, strategy="fused"),
        ALL,
    ),
    "routed fused, fp16, fp32 adapters, r 24, odd sizes": (
        RoutedCase(1000, 4097, (4095,), 24, FP16, FP32, strategy="fused"), (90,),
    ),
    "routed fused, fp32, r 64": (
        RoutedCase(8192, 4096, (4096,), 64, FP32, FP32, strategy="fused"), (90,),
    ),
    "routed q k v, bf16, r 16, 32 tokens": (
        RoutedCase(32, 4096, (4096, 1024, 1024), 48, BF16, BF16), WIDE,
    ),
    "routed, bf16, fp32 adapters, r 32, 32 tokens": (
        RoutedCase(32, 4096, (4096,), 32, BF16, FP32), ALL,
    ),
    "routed, bf16, r 160, one token": (RoutedCase(1, 4096, (4096,), 160, BF16, BF16), (90,)),
}  # fmt: skip


MASKED_CALLS = {
    "masks, bf16, r 16": (MaskedCase(8192, 4096, 16, BF16), ALL),
    "masks, fp16, r 160, odd sizes": (MaskedCase(1000, 4097, 160, FP16), WIDE),
    "masks, fp32, r 64, few tokens": (MaskedCase(200, 4096, 64, FP32), (80, 90)),
}


def cases(calls: dict) -> list[tuple[str, Case, int]]:
    """``(name, call, compute capability)``: a sample, or all with COMPILE_SWEEP=1."""
    return [
        (f"{name}-sm_{capability}", call, capability)
        for name, (call, capabilities) in calls.items()
        for capability in (DEVICES if SWEEP else capabilities)
    ]


@functools.cache
def launches_of(call: Case, capability: int) -> list[Launch]:
    """What the call launches on that device, each distinct kernel variant once."""
    recorded = record_launches(list(call.modules), call.run, DEVICES[capability])
    return list({compile_key(launched): launched for launched in recorded}.values())


def compile_key(launched: Launch) -> str:
    """Equal for launches that share one compiled kernel, give or take alignment of sizes."""
    constants = {
        parameter.name: launched.arguments[parameter.name]
        for parameter in launched.kernel.params
        if parameter.is_constexpr
    }
    dtypes = [str(getattr(argument, "dtype", "")) for argument in launched.arguments.values()]
    return f"{launched.name} {constants} {launched.options} {dtypes}"


@functools.cache
def resources_of(call: Case, capability: int) -> list[tuple[Launch, Resources]]:
    return [
        (launched, compile_launch(launched, capability))
        for launched in launches_of(call, capability)
    ]


def resource_table() -> str:
    """Registers, spills and shared memory of every kernel, as Markdown."""
    lines = [
        f"# Resources of our kernels, compiled by Triton {triton.__version__}",
        "",
        "Generated without a GPU; the tests compare it for the Triton it names. To renew:",
        "",
        f"    {RENEW}",
        "",
        "Registers per thread, spills and other stack in bytes per thread, shared memory in bytes",
        "per block. Tile: BLOCK_M x (BLOCK_C or BLOCK_D) [x BLOCK_D] / BLOCK_R, warps x stages.",
        "",
        "## At most",
        "",
        "Registers / shared memory of each kernel in the calls below. What a block may ask for:",
        f"{', '.join(f'{v.shared_memory} on sm_{k}' for k, v in DEVICES.items())}.",
        "",
        f"| kernel | {' | '.join(f'sm_{capability}' for capability in DEVICES)} |",
        f"|---|{'---:|' * len(DEVICES)}",
    ]
    for kernel, most in bounds().items():
        cells = (f"{most[each][0]} / {most[each][1]}" if each in most else "" for each in DEVICES)
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    for name, (call, capabilities) in (CALLS | ROUTED_CALLS | MASKED_CALLS).items():
        shape = f"M {call.tokens}, K {call.in_features}"
        if isinstance(call, LinearCase):
            shape += f", N {call.out_features}"
        elif isinstance(call, RoutedCase):
            shape += f", N {'+'.join(map(str, call.slices))}"
        lines += ["", f"## {name} ({shape})", ""]
        lines += [
            "| sm | kernel | tile | variant | registers | stack | shared |",
            "|---|---|---|---|---:|---:|---:|",
        ]
        for capability in capabilities:
            for launched, used in resources_of(call, capability):
                cells = (
                    capability,
                    launched.name.removesuffix("_kernel"),
                    _tile(launched),
                    _variant(launched),
                    used.registers,
                    used.stack,
                    used.shared,
                )
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def bounds() -> dict[str, dict[int, tuple[int, int]]]:
    """kernel -> compute capability -> the most registers and the most shared memory."""
    found = {}
    for call, capabilities in (CALLS | ROUTED_CALLS | MASKED_CALLS).values():
        for capability in capabilities:
            for launched, used in resources_of(call, capability):
                most = found.setdefault(launched.name.removesuffix("_kernel"), {})
                registers, shared = most.get(capability, (0, 0))
                most[capability] = max(registers, used.registers), max(shared, used.shared)
    return dict(sorted(found.items()))


def _tile(launched: Launch) -> str:
    sizes = {
        name: launched.arguments[name]
        for name in ("BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_C", "BLOCK_D", "BLOCK_K")
        if name in launched.arguments
    }
    rank = f" / {launched.arguments['BLOCK_R']}" if "BLOCK_R" in launched.arguments else ""
    stages = f" x {launched.options['num_stages']}" if "num_stages" in launched.options else ""
    return f"{' x '.join(map(str, sizes.values()))}{rank}, {launched.options['num_warps']}{stages}"


def _variant(launched: Launch) -> str:
    flags = [
        name.removeprefix("HAS_").lower().replace("_", " ")
        for name, argument in launched.arguments.items()
        if argument is True
    ]
    return ", ".join(flags)
