"""One layer and one adapter: the calls that are counted, ours beside PEFT's in the same state.

Dimensions: M tokens, K in_features, N out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_kernels

from .cost import Cost
from .counter import Counter
from .handwritten import HandwrittenLoRA

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FEATURES = 4096  # K and N
VOCABULARY = 32_000
_NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}

Launched = list[tuple[str, Cost]]


@dataclass(frozen=True)
class LinearCase:
    """A layer, its adapters and what is asked of it.

    Attributes:
        tokens, rank: M and R.
        dtype: of x and the base layer.
        adapter_dtype: of A and B.
        dropout_p: of each adapter, in training mode.
        does: ``forward`` (no gradients) or ``training`` (forward and backward).
        bias: whether the base layer has one.
        dora: whether the result is scaled by columns.
        adapters: how many are active.
        frozen: what needs no gradient in training: nothing, ``x`` or ``A``.
        way: how the call is made: PEFT's layer accelerated, ``LoRALinear`` or ``lora_linear``.
        scaling_on_device: a 0-d tensor instead of a number (``lora_linear`` alone takes one).
    """

    tokens: int
    rank: int = 16
    dtype: torch.dtype = BF16
    adapter_dtype: torch.dtype = FP32
    dropout_p: float = 0.0
    does: str = "training"
    bias: bool = False
    dora: bool = False
    adapters: int = 1
    frozen: str = ""
    way: str = "accelerate"
    scaling_on_device: bool = False

    @property
    def name(self) -> str:
        parts = [
            f"linear {self.way}", f"M {self.tokens}", f"r {self.rank}",
            f"{_NAMES[self.dtype]} x", f"{_NAMES[self.adapter_dtype]} adapters",
            f"p {self.dropout_p:g}", self.does,
        ]  # fmt: skip
        parts += ["bias"] * self.bias + ["DoRA"] * self.dora
        parts += [f"{self.adapters} adapters"] * (self.adapters > 1)
        parts += [f"{self.frozen} frozen"] * bool(self.frozen)
        parts += ["scaling on the device"] * self.scaling_on_device
        return ", ".join(parts)


@dataclass(frozen=True)
class EmbeddingCase:
    """Indices ``[M]`` into an adapted embedding."""

    tokens: int
    adapter_dtype: torch.dtype = FP32
    does: str = "training"
    way: str = "accelerate"

    @property
    def name(self) -> str:
        adapters = f"{_NAMES[self.adapter_dtype]} adapters"
        return f"embedding {self.way}, M {self.tokens}, r 16, bf16, {adapters}, {self.does}"


def linear_cases() -> Iterator[LinearCase]:
    dtypes = [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32)]
    wide = LinearCase(8192)
    for dtype, adapter_dtype in dtypes:
        with_dtypes = replace(wide, dtype=dtype, adapter_dtype=adapter_dtype)
        yield replace(with_dtypes, tokens=1, does="forward")
        for tokens, rank in ((8192, 16), (512, 16), (8192, 64)):
            if dtype != BF16 and (tokens, rank) != (8192, 16):
                continue
            for dropout_p in (0.0, 0.05):
                for does in ("forward", "training"):
                    yield replace(
                        with_dtypes, tokens=tokens, rank=rank, dropout_p=dropout_p, does=does
                    )
    for adapter_dtype in (FP32, BF16):
        for dropout_p in (0.0, 0.05):
            case = replace(wide, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
            yield replace(case, bias=True)
            yield replace(case, dora=True)
            yield replace(case, adapters=2)
            yield replace(case, adapters=3)
            yield replace(case, frozen="x")
            yield replace(case, frozen="A")
            yield replace(case, way="LoRALinear")
            yield replace(case, way="lora_linear")
            yield replace(case, way="lora_linear", scaling_on_device=True)
        yield replace(case, dropout_p=0.0, dora=True, does="forward")


def embedding_cases() -> Iterator[EmbeddingCase]:
    for adapter_dtype in (FP32, BF16):
        for way in ("accelerate", "LoRAEmbedding"):
            for tokens, does in ((1, "forward"), (8192, "forward"), (8192, "training")):
                yield EmbeddingCase(tokens, adapter_dtype, does, way)


def count_linear(case: LinearCase, counter: Counter) -> dict[str, Launched]:
    """What each provider launches: ``ours``, ``PEFT``, and where it applies ``handwritten``."""
    layer = peft_layer(case)
    x = _input(case)
    found = {"PEFT": _count(counter, case, layer, [x, *layer.parameters()], x)}
    plain = not case.dora and not case.bias and case.adapters == 1 and not case.frozen
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = layer.base_layer.weight
    if plain and case.dtype != FP16:
        # fp16 would round h and t to fp16: not the same numbers.

        def by_hand(x: Tensor) -> Tensor:
            return HandwrittenLoRA.apply(x, weight, a, b, 2.0, case.dropout_p)

        found["handwritten"] = _count(counter, case, by_hand, [x, a, b], x)
    ours, parameters = _ours(case, layer)
    found["ours"] = _count(counter, case, ours, [x, *parameters], x)
    return found


def _ours(case: LinearCase, layer: nn.Module) -> tuple[Callable, list[Tensor]]:
    if case.way == "accelerate":
        lora_kernels.accelerate(layer)
        return layer, list(layer.parameters())
    if case.way == "LoRALinear":
        made = lora_kernels.LoRALinear.from_linear(
            layer.base_layer, case.rank, 2 * case.rank, dropout_p=case.dropout_p,
            use_dora=case.dora, adapter_dtype=case.adapter_dtype,
        )  # fmt: skip
        return made, list(made.parameters())
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scaling = torch.full((), 2.0, device="cuda") if case.scaling_on_device else 2.0

    def call(x: Tensor) -> Tensor:
        weight, bias = layer.base_layer.weight, layer.base_layer.bias
        return lora_kernels.lora_linear(x, weight, a, b, scaling, bias, dropout_p=case.dropout_p)

    return call, [a, b]


def peft_layer(case: LinearCase) -> nn.Module:
    """PEFT's own layer in the case's state, as ``get_peft_model`` makes it."""
    base = nn.Linear(FEATURES, FEATURES, case.bias, device="cuda", dtype=case.dtype)
    config = LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout_p, use_dora=case.dora,
        target_modules=["0"],
    )  # fmt: skip
    layer = _adapted(base, config, case.adapter_dtype, case.adapters)
    if case.frozen == "A":
        for adapter in layer.lora_A.values():
            adapter.requires_grad_(False)
    return layer


def _adapted(
    base: nn.Module, config: LoraConfig, adapter_dtype: torch.dtype, adapters: int
) -> nn.Module:
    """The layer of a model of that one layer, with so many active adapters."""
    # PEFT keeps adapters in fp32 over a half-precision base unless it is told not to.
    widens = adapter_dtype == FP32
    model = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=widens)
    names = ["default"]
    for number in range(1, adapters):
        names.append(f"adapter {number}")
        model.add_adapter(names[-1], config, autocast_adapter_dtype=widens)
    model.base_model.set_adapter(names)
    layer = model.base_model.model[0]
    lora = [p for name, p in layer.named_parameters() if "lora_" in name]
    assert lora and {parameter.dtype for parameter in lora} == {adapter_dtype}
    return layer


def count_embedding(case: EmbeddingCase, counter: Counter) -> dict[str, Launched]:
    base = nn.Embedding(VOCABULARY, FEATURES, device="cuda", dtype=BF16)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["0"])
    layer = _adapted(base, config, case.adapter_dtype, 1)
    x = torch.zeros(case.tokens, dtype=torch.int64, device="cuda")
    found = {"PEFT": _count(counter, case, layer, list(layer.parameters()), x)}
    if case.way == "accelerate":
        lora_kernels.accelerate(layer)
        ours = layer
    else:
        ours = lora_kernels.LoRAEmbedding.from_embedding(
            base, 16, 32, adapter_dtype=case.adapter_dtype
        )
    found["ours"] = _count(counter, case, ours, list(ours.parameters()), x)
    return found


def _input(case: LinearCase) -> Tensor:
    needs = case.does == "training" and case.frozen != "x"
    shape = case.tokens, FEATURES
    return torch.empty(shape, dtype=case.dtype, device="cuda", requires_grad=needs)


def _count(
    counter: Counter,
    case: LinearCase | EmbeddingCase,
    function: Callable[[Tensor], Tensor],
    leaves: list[Tensor],
    x: Tensor,
) -> Launched:
    """What the second call launches: the first makes plans and tables, which are kept."""
    for _ in range(2):
        if case.does == "forward":
            with torch.no_grad(), counter.recording() as launched:
                function(x)
            continue
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        with counter.recording() as launched:
            y = function(x)
        forward, dy = list(launched), torch.empty_like(y)
        with counter.recording() as launched:
            torch.autograd.grad(y, leaves, dy)
        launched = forward + launched
    return launched
