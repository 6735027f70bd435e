"""``reset_parameters`` of a layer's parts, whose initial values only the layer knows.

What materialises a model calls it on every module, in any order: as ``torch.nn.Linear``'s own it
would make B random, and leave DoRA's magnitude the norm of a weight that is drawn later.
"""

from __future__ import annotations

import copy
import weakref

import torch
from torch import nn

from lora_kernels.nn.sharded import put_shards_back


class PartReset:
    """Set as ``reset_parameters`` on ``base_layer`` and on the modules of an adapter.

    The base layer's values are its class's, the adapter's those that its layer was made with; with
    DoRA the magnitude follows. A part that was copied or pickled alone has its class's own again.
    """

    def __init__(self, layer: nn.Module | None, part: nn.Module) -> None:
        # Weak, so that a model's memory is free as soon as nobody holds the model.
        self._layer, self._part = _reference(layer), _reference(part)

    @torch.no_grad()
    def __call__(self) -> None:
        layer, part = self._layer(), self._part()
        name = next((name for name, each in _children(layer) if each is part), None)
        if name is None:
            type(part).reset_parameters(part)
            return
        layer.unmerge()
        put_shards_back(layer)
        if name == "base_layer":
            type(part).reset_parameters(part)
        else:
            for leaf, _ in part.named_parameters():
                layer._draw(f"{name}.{leaf}", layer.init_lora_weights)
        layer._reset_magnitude()

    def __deepcopy__(self, memo: dict) -> PartReset:
        return PartReset(copy.deepcopy(self._layer(), memo), copy.deepcopy(self._part(), memo))

    def __reduce__(self):
        return PartReset, (self._layer(), self._part())


def _children(layer: nn.Module | None):
    return () if layer is None else layer.named_children()


def _reference(module: nn.Module | None):
    return _nothing if module is None else weakref.ref(module)


def _nothing() -> None:
    return None
