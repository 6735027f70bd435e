"""Many adapters in one batch: the calls that are counted, beside PEFT's mixed batches.

Dimensions: M tokens, K in_features.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels import AdapterBank, Routing, routed_lora, routed_lora_linear

from .cases import BF16, FEATURES, FP32, Launched
from .counter import Counter

_NAMES = {BF16: "bf16", FP32: "fp32"}
_QKV = (4096, 1024, 1024)


@dataclass(frozen=True)
class RoutedCase:
    """A batch over a bank.

    Attributes:
        does: ``decode`` (32 sequences of a token), ``prefill`` (32 of 512) or ``training`` (8192
            tokens, forward and backward); ``filling``: making the routing of ``decode``.
        bank_dtype: of the factors.
        widths: N of each slice.
        dropout_p: of every adapter.
        order: ``sorted`` or ``interleaved``: how the tokens lie.
        way: ``routed_lora_linear``, or ``routed_lora`` into what the base has made.
    """

    does: str
    bank_dtype: torch.dtype = FP32
    widths: tuple[int, ...] = (FEATURES,)
    dropout_p: float = 0.0
    order: str = "interleaved"
    way: str = "routed_lora_linear"

    @property
    def ranks(self) -> list[int]:
        return [8, 16, 32, 64] * 4 if self.does == "training" else [32] * 8

    @property
    def name(self) -> str:
        slices = "one output" if len(self.widths) == 1 else "q k v"
        return (
            f"routed {self.way}, {self.does}, {slices}, {_NAMES[self.bank_dtype]} bank, "
            f"p {self.dropout_p:g}, {self.order}"
        )

    def sequences(self) -> list[int]:
        """The adapter of each sequence; a token of a training batch is one."""
        count, adapters = {"training": (8192, 16)}.get(self.does, (32, 8))
        ids = [index * adapters // count for index in range(count)]
        if self.order == "interleaved":
            random.Random(0).shuffle(ids)
        return ids

    def tokens(self) -> list[int]:
        each = 512 if self.does == "prefill" else 1
        return [adapter for adapter in self.sequences() for _ in range(each)]


def routed_cases() -> Iterator[RoutedCase]:
    yield RoutedCase("filling")
    for dtype in (FP32, BF16):
        for does in ("decode", "prefill"):
            yield RoutedCase(does, dtype)
            yield RoutedCase(does, dtype, _QKV)
        yield RoutedCase("decode", dtype, order="sorted")
        yield RoutedCase("decode", dtype, way="routed_lora")
        for dropout_p in (0.0, 0.05):
            for order in ("interleaved", "sorted"):
                yield RoutedCase("training", dtype, dropout_p=dropout_p, order=order)


def count_routed(case: RoutedCase, counter: Counter) -> dict[str, Launched]:
    bank, ids = _bank(case), torch.tensor(case.tokens())
    if case.does == "filling":
        with counter.recording() as launched:
            Routing.from_tokens(ids, bank)
        return {"ours": launched}
    routing = Routing.from_tokens(ids, bank)
    trains = case.does == "training"
    x = torch.empty(len(ids), FEATURES, dtype=BF16, device="cuda", requires_grad=trains)
    weight = torch.empty(sum(case.widths), FEATURES, dtype=BF16, device="cuda")

    def call():
        if case.way == "routed_lora_linear":
            return routed_lora_linear(x, weight, bank, routing)
        return routed_lora(x, bank, routing, out=nn.functional.linear(x, weight))

    for _ in range(2):  # the first makes plans, and reads the groups' sizes
        with torch.set_grad_enabled(trains), counter.recording() as launched:
            y = call()
        if trains:
            forward, dy = list(launched), torch.empty_like(y)
            with counter.recording() as launched:
                torch.autograd.grad(y, [x, *bank.parameters()], dy)
            launched = forward + launched
    found = {"ours": launched}
    if not trains:
        found["PEFT"] = _count_peft(case, counter)
    return found


def _bank(case: RoutedCase) -> AdapterBank:
    widths, made = list(case.widths), {"dtype": case.bank_dtype, "device": "cuda"}
    bank = AdapterBank(FEATURES, widths if len(widths) > 1 else widths[0], **made)
    for index, rank in enumerate(case.ranks):
        lora_a = [torch.empty(rank, FEATURES, **made) for _ in widths]
        lora_b = [torch.empty(width, rank, **made) for width in widths]
        if len(widths) == 1:
            (lora_a,), (lora_b,) = lora_a, lora_b
        bank.add(f"adapter {index}", lora_a, lora_b, 2.0, case.dropout_p)
    return bank.train(case.does == "training")


def _count_peft(case: RoutedCase, counter: Counter) -> Launched:
    """PEFT's mixed batch: a layer for each slice."""
    launched = []
    for width in case.widths:
        base = nn.Linear(FEATURES, width, bias=False, device="cuda", dtype=BF16)
        config = LoraConfig(r=32, lora_alpha=64, target_modules=["0"])
        widens = {"autocast_adapter_dtype": case.bank_dtype == FP32}
        model = get_peft_model(nn.Sequential(base), config, adapter_name="adapter 0", **widens)
        for index in range(1, 8):
            model.add_adapter(f"adapter {index}", config, **widens)
        layer = model.base_model.model[0].eval()
        each = len(case.tokens()) // len(case.sequences())
        x = torch.empty(len(case.sequences()), each, FEATURES, dtype=BF16, device="cuda")
        names = [f"adapter {index}" for index in case.sequences()]
        with torch.no_grad(), counter.recording() as recorded:
            layer(x, adapter_names=names)
        launched += recorded
    return launched
