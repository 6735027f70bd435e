"""The calls that a model makes: the shapes of its adapted layers, and how many have each."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels.measuring.linear_call import DTYPES, LinearCase
from lora_kernels.measuring.routed_call import RoutedCase
from lora_kernels.measuring.search import Case
from lora_kernels.nn import LoRALinear, RoutedLoRALinear

NAMES = {dtype: name for name, dtype in DTYPES.items()}

Work = dict[Case, int]  # calls, and how many layers make them


def work_of(
    model: nn.Module,
    tokens: Sequence[int],
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    dropout_p: float | None = None,
) -> Work:
    """The model's calls, shape by shape: those first that take most of its time, and of a shape
    those of most tokens. What is given stands in the place of the layers' own."""
    shapes = Counter(_shapes(model, device, dtype, rank, dropout_p))
    work: Work = {}
    known: set[tuple[str, ...]] = set()
    for shape in sorted(shapes, key=lambda each: -shapes[each] * each.k * each.n):
        for m in sorted(tokens, reverse=True):
            case = replace(shape, m=m)
            if (keys := tuple(case.keys.values())) not in known:
                known.add(keys)
                work[case] = shapes[shape]
    return work


def _shapes(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype | None,
    rank: int | None,
    dropout_p: float | None,
) -> Iterator[Case]:
    """The case of each layer, for no tokens."""
    layers = list(filter(None, (_adapted(layer) for layer in model.modules())))
    if not layers and not any(_is_of_peft(layer, "LoraLayer") for layer in model.modules()):
        layers = _plain(model)
    for k, widths, of_base, r, p, adapters in layers:
        r, p = rank or r or 16, p if dropout_p is None else dropout_p
        name = NAMES.get(dtype or of_base) if of_base.is_floating_point else None
        if name is None:  # fp64, or packed integers
            continue
        if adapters is None:
            yield LinearCase(0, k, sum(widths), name, p, r, 2 * r, str(device))
        else:
            yield RoutedCase(0, k, widths, name, p, r, adapters, str(device))


class _Layer(NamedTuple):
    """What the calls of a layer depend on."""

    in_features: int
    widths: tuple[int, ...]  # of the slices
    dtype: torch.dtype  # of the base
    rank: int = 0  # 0: it has no adapters
    dropout_p: float = 0.0
    adapters: int | None = None  # in its bank


def _adapted(layer: nn.Module) -> _Layer | None:
    """What a layer with adapters is; None for other modules."""
    if isinstance(layer, LoRALinear):
        widths, dtype = (layer.out_features,), layer.base_layer.weight.dtype
        return _Layer(layer.in_features, widths, dtype, layer.rank, layer.dropout_p)
    if isinstance(layer, RoutedLoRALinear):
        bank, dtype = layer.bank, layer.base_layer.weight.dtype
        adapters = [bank[name] for name in bank]
        rank = max((each.rank for each in adapters), default=0)
        p = max((each.dropout_p for each in adapters), default=0.0)
        count = max(len(adapters), 1)
        return _Layer(bank.in_features, bank.slice_widths, dtype, rank, p, count)
    return _of_peft(layer) if _is_of_peft(layer, "Linear") else None


def _is_of_peft(layer: nn.Module, name: str) -> bool:
    """Whether it is a layer of that class, or of one below. A model has some only where PEFT has
    been imported."""
    peft = sys.modules.get("peft.tuners.lora.layer")
    return peft is not None and isinstance(layer, getattr(peft, name))


def _of_peft(layer: Any) -> _Layer | None:
    active = [name for name in layer.active_adapters if name in layer.r]
    if not active:
        return None
    ranks = [layer.r[name] for name in active]
    p = float(getattr(layer.lora_dropout[active[0]], "p", 0.0))  # Identity has none
    # Several without dropout are computed as one, else the first with the base layer.
    rank = ranks[0] if p else sum(ranks)
    dtype = layer.get_base_layer().weight.dtype
    return _Layer(layer.in_features, (layer.out_features,), dtype, rank, p)


def _plain(model: nn.Module) -> Iterator[_Layer]:
    """The linear layers of a model without adapters; adapters are seldom put on its head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer is not head and not name.endswith("lm_head"):
            yield _Layer(layer.in_features, (layer.out_features,), layer.weight.dtype)
