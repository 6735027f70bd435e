"""Forward calls without a backward: decoding with one adapter, and the GEMMs with a tail alone.

`decode` is one `lora_linear` of few tokens. `y` and `dx` are the wide GEMMs of a training step from
operands that are there already: ``x W^T + h B^T`` and ``dy W + keep * (t A)``; native competes with
each of its tiles. As in `op`, a run goes through several sets of inputs, together larger than the
last-level cache, and on CUDA it is the replay of a graph.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.naive import naive_linear
from benchmarks.op_providers import around
from benchmarks.preparing import Unavailable, prepare_each
from lora_kernels import lora_linear
from lora_kernels.measuring.linear_call import SEED, LinearCase, Typed
from lora_kernels.measuring.timed_calls import TimedCalls, sets_past_cache
from lora_kernels.ops.linear.triton.operands import Dropout
from lora_kernels.runtime import cuda_extension, dispatch
from lora_kernels.runtime.dropout import ActiveDropout, drop_threshold, keep_mask
from lora_kernels.testing import assert_within_policy

SCALING = 2.0


@dataclass(frozen=True)
class KernelCase(Typed):
    what: str  # "decode", "y" or "dx"
    m: int
    k: int
    n: int
    rank: int
    dropout: float = 0.0  # dx only
    dtype: str = "bf16"
    device: str = "cuda"

    @property
    def title(self) -> str:
        what = {"decode": "decoding", "y": "the GEMM of y", "dx": "the GEMM of dx"}[self.what]
        drops = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{what}: M {self.m}, K {self.k}, N {self.n}, r {self.rank}, {self.dtype}{drops}"


Case = KernelCase


@dataclass(frozen=True)
class KernelInputs:
    """Everything in one dtype; what y needs, or dx."""

    left: Tensor  # [M, D], x or dy
    weight: Tensor  # [N, K]
    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    narrow: Tensor  # [M, R], h or t, scaled

    def right(self, case: KernelCase) -> tuple[Tensor, Tensor]:
        """The right operands of the GEMM and its tail, ``[D, C]`` and ``[R, C]``."""
        if case.what == "dx":
            return self.weight, self.lora_a
        return self.weight.t(), self.lora_b.t()

    def drop(self, case: KernelCase) -> Dropout | None:
        if not case.dropout:
            return None
        seed = torch.tensor(SEED, device=self.left.device)
        return Dropout(ActiveDropout(case.dropout, seed), case.m, case.k)


def make_inputs(case: KernelCase, seed: int) -> KernelInputs:
    generator = torch.Generator(case.device).manual_seed(seed)

    def draw(rows: int, columns: int, spread: float = 1.0) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=case.device)
        return (values * spread).to(case.torch_dtype)

    return KernelInputs(
        left=draw(case.m, case.n if case.what == "dx" else case.k),
        weight=draw(case.n, case.k, case.k**-0.5),
        lora_a=draw(case.rank, case.k, case.k**-0.5),
        lora_b=draw(case.n, case.rank, case.rank**-0.5),
        narrow=draw(case.m, case.rank),
    )


# ---- who competes


def frozen(inputs: KernelInputs, case: KernelCase) -> Tensor:
    return inputs.left @ inputs.right(case)[0]


def naive(inputs: KernelInputs, case: KernelCase) -> Tensor:
    return naive_linear(inputs.left, inputs.weight, inputs.lora_a, inputs.lora_b, SCALING, 0.0)


def decode(backend: str, inputs: KernelInputs, case: KernelCase) -> Tensor:
    return lora_linear(
        inputs.left, inputs.weight, inputs.lora_a, inputs.lora_b, SCALING, backend=backend
    )


def composed_gemm(inputs: KernelInputs, case: KernelCase) -> Tensor:
    """Two GEMMs of the vendor's, the second of which adds."""
    if case.dropout:
        raise Unavailable("the vendor's GEMMs have no mask")
    right, tail = inputs.right(case)
    return (inputs.narrow @ tail).addmm_(inputs.left, right)


def triton_gemm(strategy: str, inputs: KernelInputs, case: KernelCase) -> Tensor:
    if reason := dispatch.unavailable("triton", inputs.left.device, case.torch_dtype):
        raise Unavailable(reason)
    from lora_kernels.ops.linear.triton.gemm import gemm_with_tail

    right, tail = inputs.right(case)
    out = inputs.left.new_empty((case.m, right.shape[1]))
    sizes = LinearCase(case.m, case.k, case.n, case.dtype, case.dropout, case.rank)
    cell = sizes.cell("backward" if case.what == "dx" else "forward")
    with around(f"triton-{strategy}", inputs.left.device):
        gemm_with_tail(cell, inputs.left, right, inputs.narrow, tail, out, drop=inputs.drop(case))
    return out


def native_gemm(tile: tuple[int, int], inputs: KernelInputs, case: KernelCase) -> Tensor:
    device = inputs.left.device
    if reason := cuda_extension.missing(device) or cuda_extension.missing_gemm_tail(device):
        raise Unavailable(reason)
    right, tail = inputs.right(case)
    out = inputs.left.new_empty((case.m, right.shape[1]))
    cuda_extension.gemm_tail(
        inputs.left, right, inputs.narrow, tail, out, drop=inputs.drop(case),
        tile_columns=tile[0], cluster=tile[1],
    )  # fmt: skip
    return out


DECODE: dict[str, Callable[[KernelInputs, KernelCase], Tensor]] = {
    "frozen": frozen,
    "naive": naive,
    "composed": functools.partial(decode, "composed"),
    "triton": functools.partial(decode, "triton"),
    "native": functools.partial(decode, "native"),
}
GEMM: dict[str, Callable[[KernelInputs, KernelCase], Tensor]] = {
    "frozen": frozen,
    "composed": composed_gemm,
    "triton-hybrid": functools.partial(triton_gemm, "hybrid"),
    "triton-fused": functools.partial(triton_gemm, "fused"),
    **{
        f"native {columns}x{cluster}": functools.partial(native_gemm, (columns, cluster))
        for columns, cluster in cuda_extension.TILES
    },
}


def providers(case: KernelCase) -> dict[str, Callable[[KernelInputs, KernelCase], Tensor]]:
    return DECODE if case.what == "decode" else GEMM


# ---- running them


def formula(case: KernelCase, inputs: KernelInputs, dtype: torch.dtype) -> Tensor:
    left, weight, a, b, narrow = (
        getattr(inputs, name).to(dtype) for name in ("left", "weight", "lora_a", "lora_b", "narrow")
    )
    if case.what == "decode":
        return left @ weight.t() + SCALING * ((left @ a.t()) @ b.t())
    if case.what == "y":
        return left @ weight.t() + narrow @ b.t()
    tail = narrow @ a
    if drop_threshold(case.dropout):
        keep = keep_mask(inputs.drop(case).seed, case.dropout, case.m, case.k)
        tail = torch.where(keep, tail, 0)  # its scale is in t
    return left @ weight + tail


def prepare(case: KernelCase, names: list[str]) -> tuple[dict[str, TimedCalls], dict[str, str]]:
    elements = case.m * (case.k + case.n) + case.n * case.k
    count = sets_past_cache(elements * case.torch_dtype.itemsize, torch.device(case.device))
    sets = [make_inputs(case, seed) for seed in range(count)]
    exact = formula(case, sets[0], torch.float64)
    eager = formula(case, sets[0], case.torch_dtype)

    def make(name: str) -> TimedCalls:
        provider = providers(case)[name]

        @torch.no_grad()
        def call(number: int) -> Tensor:
            return provider(sets[number], case)

        if name != "frozen":
            assert_within_policy(case.what, call(0), eager, exact, case.torch_dtype)
        kernel = TimedCalls(torch.device(case.device), {"forward": call}, count)
        kernel.warm_up()
        return kernel

    return prepare_each(names, make)
