"""Forward calls without a backward: decoding with one adapter, and the GEMMs with a tail alone.

`decode` is one `lora_linear` of few tokens. `y` and `dx` are the wide GEMMs of a training step from
operands that are there already: ``x W^T + h B^T`` and ``dy W + keep * (t A)``; native competes with
each of its tiles. As in `op`, a run goes through several sets of inputs, together larger than the
last-level cache, and on CUDA it is the replay of a graph.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.bench.case import KernelCase
from lora_kernels.bench.memory import SavedStorage
from lora_kernels.bench.providers import Unavailable, cell_of, forced_strategy
from lora_kernels.bench.replay import GraphReplay
from lora_kernels.measuring import machine
from lora_kernels.ops.linear.triton.operands import Dropout
from lora_kernels.runtime import cuda_extension, dispatch
from lora_kernels.runtime.dropout import ActiveDropout, drop_threshold, keep_mask
from lora_kernels.testing import error_bound

MAX_SETS = 64
SCALING, SEED = 2.0, 20_240_607


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


def inputs_to_exceed_cache(case: KernelCase) -> int:
    """Enough for three times the last-level cache, and at least two."""
    elements = case.m * (case.k + case.n) + case.n * case.k
    cache = machine.last_level_cache_bytes(torch.device(case.device))
    return min(MAX_SETS, max(2, math.ceil(3 * cache / (elements * case.torch_dtype.itemsize))))


# ---- who competes


def frozen(inputs: KernelInputs, case: KernelCase) -> Tensor:
    return inputs.left @ inputs.right(case)[0]


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
    cell = cell_of(case, "backward" if case.what == "dx" else "forward")
    with forced_strategy(strategy, inputs.left.device):
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


DECODE_PROVIDERS: dict[str, Callable[[KernelInputs, KernelCase], Tensor]] = {
    "frozen": frozen,
    "composed": functools.partial(decode, "composed"),
    "triton": functools.partial(decode, "triton"),
    "native": functools.partial(decode, "native"),
}
GEMM_PROVIDERS: dict[str, Callable[[KernelInputs, KernelCase], Tensor]] = {
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
    return DECODE_PROVIDERS if case.what == "decode" else GEMM_PROVIDERS


# ---- running them


class Kernel(GraphReplay):
    """One provider's calls on all sets of inputs."""

    first_loss = None

    def __init__(
        self,
        case: KernelCase,
        call: Callable[[KernelInputs, KernelCase], Tensor],
        sets: list[KernelInputs],
    ) -> None:
        super().__init__(torch.device(case.device), self._call_all, len(sets), "forward")
        self._case, self._call, self._sets = case, call, sets

    def saved(self) -> list[SavedStorage]:
        return []

    @torch.no_grad()
    def _call_all(self) -> None:
        for inputs in self._sets:
            self._call(inputs, self._case)


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


def wrong(case: KernelCase, ours: Tensor, inputs: KernelInputs) -> str | None:
    """What breaks the package's error policy; None when nothing does."""
    exact = formula(case, inputs, torch.float64)
    bound = error_bound(formula(case, inputs, case.torch_dtype), exact, case.torch_dtype)
    error = (ours.double() - exact).abs().max().item()
    return None if error <= bound else f"off by {error:.3g}, allowed is {bound:.3g}"


def prepare(case: KernelCase, names: list[str]) -> tuple[dict[str, Kernel], dict[str, str]]:
    """The calls that can run here, and for those that cannot, why."""
    sets = [make_inputs(case, seed) for seed in range(inputs_to_exceed_cache(case))]
    kernels, skipped = {}, {}
    for name in names:
        call = providers(case)[name]
        try:
            with torch.no_grad():
                ours = call(sets[0], case)
            if name != "frozen" and (reason := wrong(case, ours, sets[0])):
                skipped[name] = f"not timed, its result is wrong: {reason}"
                continue
            kernel = Kernel(case, call, sets)
            kernel.warm_up()
            kernels[name] = kernel
        except Exception as error:  # one provider's trouble is not the others'
            skipped[name] = f"{type(error).__name__}: {error}"
    return kernels, skipped
