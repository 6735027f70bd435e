"""Who competes in serving or training many adapters with one layer.

A provider is a function from the inputs of one call to a `Call` whose leaves are x, then A
and B of each adapter and slice.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.preparing import Unavailable, import_peft
from lora_kernels.measuring.linear_call import DTYPES, Call, Typed


@dataclass(frozen=True)
class RoutedCase(Typed):
    """sequences x tokens rows; sequence i uses adapter i mod adapters, whose ranks are ``ranks``,
    over and over. slices: out_features of each, side by side."""

    sequences: int = 64
    tokens: int = 1
    k: int = 2048
    slices: tuple[int, ...] = (2048,)
    adapters: int = 16
    ranks: tuple[int, ...] = (8, 16, 24, 32, 40, 48, 56, 64)
    dtype: str = "bf16"
    adapter_dtype: str = ""  # as dtype
    train: bool = False
    base: bool = True  # False: the adapters alone, without the frozen layer
    device: str = "cpu"

    @property
    def torch_adapter_dtype(self) -> torch.dtype:
        return DTYPES[self.adapter_dtype or self.dtype]

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens

    @property
    def n(self) -> int:
        return sum(self.slices)

    def rank_of(self, adapter: int) -> int:
        return self.ranks[adapter % len(self.ranks)]

    @property
    def adapter_of_row(self) -> list[int]:
        return [i % self.adapters for i in range(self.sequences) for _ in range(self.tokens)]

    @property
    def title(self) -> str:
        what = "training" if self.train else "inference"
        ranks = sorted(set(self.ranks))
        spread = f"r {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"r {ranks[0]}"
        out = "+".join(map(str, self.slices))
        adapters = f"{self.adapters} {self.adapter_dtype or self.dtype} adapters of {spread}"
        alone = "" if self.base else ", without the base layer"
        return (
            f"routed, {what}: {self.sequences}x{self.tokens} tokens, {adapters}, "
            f"{self.k} to {out}, {self.dtype}{alone}"
        )


@dataclass(frozen=True)
class RoutedInputs:
    """What every provider gets, bit for bit the same."""

    x: Tensor  # [sequences, tokens, K]
    weight: Tensor  # [N, K], frozen
    lora_a: list[list[Tensor]]  # per adapter and slice [R, K]
    lora_b: list[list[Tensor]]  # per adapter and slice [N_s, R]
    scaling: list[float]  # per adapter
    dy: Tensor  # [sequences, tokens, N]


def frozen(inputs: RoutedInputs, case: RoutedCase) -> Call:
    if not case.base:
        raise Unavailable("without a base layer there is nothing frozen")
    return Call(lambda: F.linear(inputs.x, inputs.weight), [inputs.x])


def _base(inputs: RoutedInputs, case: RoutedCase) -> Tensor:  # [M, N]
    rows = inputs.x.flatten(0, 1)
    return F.linear(rows, inputs.weight) if case.base else rows.new_zeros((case.rows, case.n))


def _own_factors(inputs: RoutedInputs, case: RoutedCase) -> list[list[tuple[Tensor, Tensor]]]:
    """Per adapter and slice, tensors of this provider's own."""
    return [
        [
            tuple(factor.detach().clone().requires_grad_(case.train) for factor in pair)
            for pair in zip(a, b, strict=True)
        ]
        for a, b in zip(inputs.lora_a, inputs.lora_b, strict=True)
    ]


def _leaves(inputs: RoutedInputs, factors: list[list[tuple[Tensor, Tensor]]]) -> list[Tensor]:
    return [inputs.x, *(factor for slices in factors for pair in slices for factor in pair)]


def naive(inputs: RoutedInputs, case: RoutedCase) -> Call:
    """A loop over the adapters in plain torch, the rows' indices known beforehand."""
    factors = _own_factors(inputs, case)
    owner = torch.tensor(case.adapter_of_row, device=inputs.x.device)
    rows_of = [(owner == adapter).nonzero().flatten() for adapter in range(case.adapters)]

    def forward() -> Tensor:
        rows, y = inputs.x.flatten(0, 1), _base(inputs, case)
        for adapter, mine in enumerate(rows_of):
            some = rows[mine].to(factors[adapter][0][0].dtype)
            parts = [F.linear(F.linear(some, a), b) for a, b in factors[adapter]]
            delta = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            y = y.index_add(0, mine, (delta * inputs.scaling[adapter]).to(y.dtype))
        return y.view(*inputs.x.shape[:2], case.n)

    return Call(forward, _leaves(inputs, factors))


def _padded(inputs: RoutedInputs, case: RoutedCase) -> list[tuple[Tensor, Tensor]]:
    """Per slice all adapters' A ``[L, R, K]`` and scaled B ``[L, N, R]``, padded with zeros."""
    if case.train:
        raise Unavailable("padded copies of the adapters do not train them")
    widest = -(-max(case.ranks) // 8) * 8  # torch._grouped_mm wants rows of 16 bytes
    stacked = []
    for s in range(len(case.slices)):
        a = [F.pad(a[s], (0, 0, 0, widest - a[s].shape[0])) for a in inputs.lora_a]
        b = [
            F.pad(b[s] * scaling, (0, widest - b[s].shape[1]))
            for b, scaling in zip(inputs.lora_b, inputs.scaling, strict=True)
        ]
        stacked.append((torch.stack(a).to(inputs.x.dtype), torch.stack(b).to(inputs.x.dtype)))
    return stacked


def gather_bmm(inputs: RoutedInputs, case: RoutedCase) -> Call:
    """Each sequence's padded factors are gathered, then batched products."""
    stacked = _padded(inputs, case)
    owner = torch.tensor(case.adapter_of_row[:: case.tokens], device=inputs.x.device)

    def forward() -> Tensor:
        parts = [
            torch.bmm(torch.bmm(inputs.x, a[owner].mT), b[owner].mT) for a, b in stacked
        ]  # [sequences, tokens, N]
        return _base(inputs, case).view(*inputs.x.shape[:2], case.n) + torch.cat(parts, dim=-1)

    return Call(forward, [inputs.x])


def grouped_mm(inputs: RoutedInputs, case: RoutedCase) -> Call:
    """``torch._grouped_mm`` on rows sorted by adapter, ranks padded to the widest."""
    if inputs.x.dtype != torch.bfloat16:
        raise Unavailable("torch._grouped_mm takes bf16 only")
    stacked = _padded(inputs, case)
    owner = torch.tensor(case.adapter_of_row, device=inputs.x.device)
    order = torch.argsort(owner, stable=True)
    ends = torch.bincount(owner, minlength=case.adapters).cumsum(0).int()

    def forward() -> Tensor:
        rows = inputs.x.flatten(0, 1)[order]
        parts = []
        for a, b in stacked:
            h = torch._grouped_mm(rows, a.mT, offs=ends)
            parts.append(torch._grouped_mm(h, b.mT, offs=ends))
        y = _base(inputs, case).index_add(0, order, torch.cat(parts, dim=1))
        return y.view(*inputs.x.shape[:2], case.n)

    return Call(forward, [inputs.x])


def peft(inputs: RoutedInputs, case: RoutedCase, accelerated: bool = False) -> Call:
    """PEFT's mixed batch, a layer per slice; ``accelerated``: with our forward in it."""
    if case.train:
        raise Unavailable("PEFT refuses mixed batches in training")
    if not case.base:
        raise Unavailable("PEFT's layer has a base")
    package = import_peft()
    Linear = package.tuners.lora.layer.Linear
    layers = []
    for s, weight in enumerate(inputs.weight.split(case.slices)):
        linear = nn.Linear(case.k, case.slices[s], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        layer = None
        for adapter in range(case.adapters):
            a, b = inputs.lora_a[adapter][s], inputs.lora_b[adapter][s]
            options = {"r": a.shape[0], "lora_alpha": a.shape[0], "config": package.LoraConfig()}
            name = f"adapter{adapter}"
            if layer is None:
                layer = Linear(linear, name, **options)
            else:
                layer.update_layer(name, **options)
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a.clone(), b.clone()
            layer.scaling[name] = inputs.scaling[adapter]
        layers.append(layer.to(case.device).eval().requires_grad_(False))
    names = [f"adapter{i}" for i in case.adapter_of_row[:: case.tokens]]
    model = nn.ModuleList(layers)
    report = _accelerated(model) if accelerated else None

    def forward() -> Tensor:
        parts = [layer(inputs.x, adapter_names=names) for layer in model]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    if accelerated:
        with torch.no_grad():
            forward()
        if report.refresh().delegated_calls:
            raise Unavailable(f"left to PEFT: {report.delegated_calls}")
    return Call(forward, [inputs.x])


def _accelerated(model: nn.Module):
    from lora_kernels import accelerate

    return accelerate(model)


def ours(inputs: RoutedInputs, case: RoutedCase, backend: str = "auto") -> Call:
    from lora_kernels.ops.routed import AdapterBank, Routing, routed_lora, routed_lora_linear

    bank = AdapterBank(
        case.k, list(case.slices), dtype=case.torch_adapter_dtype, device=case.device
    )
    leaves = [inputs.x]
    for adapter in range(case.adapters):
        a, b = inputs.lora_a[adapter], inputs.lora_b[adapter]
        added = bank.add(f"adapter{adapter}", a, b, inputs.scaling[adapter])
        leaves += [factor for pair in added.factors() for factor in pair]
    bank.requires_grad_(case.train).train(case.train)
    bank.reserve()  # a GPU's calls are captured
    names = [f"adapter{i}" for i in case.adapter_of_row[:: case.tokens]]
    routing = Routing.from_sequences(names, case.tokens, bank)

    def forward() -> Tensor:
        if case.base:
            return routed_lora_linear(inputs.x, inputs.weight, bank, routing, backend=backend)
        return routed_lora(inputs.x, bank, routing, backend=backend)

    return Call(forward, leaves)


def single(inputs: RoutedInputs, case: RoutedCase) -> Call:
    """One adapter of the mean rank for all tokens: what routing is measured against."""
    from lora_kernels.ops.linear import lora_linear

    rank = round(sum(case.rank_of(i) for i in range(case.adapters)) / case.adapters)
    shapes = ((rank, case.k), (case.n, rank))
    lora_a, lora_b = (
        (torch.randn(shape, device=case.device) * 0.02)
        .to(case.torch_adapter_dtype)
        .requires_grad_(case.train)
        for shape in shapes
    )
    weight = inputs.weight if case.base else None
    return Call(
        lambda: lora_linear(inputs.x, weight, lora_a, lora_b, 1.0), [inputs.x, lora_a, lora_b]
    )


# Those that compute something else, to compare with.
OTHER_FUNCTIONS = ("frozen", "single")

PROVIDERS: dict[str, Callable[[RoutedInputs, RoutedCase], Call]] = {
    "frozen": frozen,
    "naive": naive,
    "single": single,
    "peft": peft,
    "peft-accelerated": functools.partial(peft, accelerated=True),
    "gather-bmm": gather_bmm,
    "grouped-mm": grouped_mm,
    "ours": ours,
    "composed": functools.partial(ours, backend="composed"),
    "triton": functools.partial(ours, backend="triton"),
    "triton-fused": functools.partial(ours, backend="triton"),
    "native": functools.partial(ours, backend="native"),
}


def around(name: str) -> contextlib.AbstractContextManager[None]:
    """What a provider is called in: triton-fused has the base GEMM and the routed tail in one."""
    if name != "triton-fused":
        return contextlib.nullcontext()
    from lora_kernels.ops.routed.triton import tiles

    return tiles.use_strategy("fused")
