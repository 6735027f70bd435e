"""``reset_parameters`` of a layer's parts, whose initial values only the layer knows.

What materialises a model calls it on every module, in any order: as ``torch.nn.Linear``'s own it
would make B random, and leave DoRA's magnitude the norm of a weight that is drawn later.
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_kernels.nn.sharded import put_shards_back

if TYPE_CHECKING:
    from lora_kernels.nn.adapter_layer import AdapterLayer

Part = nn.Linear | nn.Embedding


class PartReset:
    """Set as ``reset_parameters`` on ``base_layer`` and on the modules of an adapter.

    The base layer's values are its class's, the adapter's those that its layer was made with; with
    DoRA the magnitude follows. A part that was copied or pickled alone has its class's own again.
    """

    def __init__(self, layer: AdapterLayer | None, part: Part | None) -> None:
        # Weak, so that a model's memory is free as soon as nobody holds the model.
        self._layer = None if layer is None else weakref.ref(layer)
        self._part = None if part is None else weakref.ref(part)

    def _live(self) -> tuple[AdapterLayer | None, Part | None]:
        layer = None if self._layer is None else self._layer()
        return layer, None if self._part is None else self._part()

    @torch.no_grad()
    def __call__(self) -> None:
        layer, part = self._live()
        assert part is not None, "a copy of a part that is gone has a reset of its own"
        names = {} if layer is None else {each: name for name, each in layer.named_children()}
        if layer is None or part not in names:
            _reset_as_its_class(part)
            return
        layer.unmerge()
        put_shards_back(layer)
        if part is layer.base_layer:
            _reset_as_its_class(part)
        else:
            for leaf, _ in part.named_parameters():
                layer._draw(f"{names[part]}.{leaf}", layer.init_lora_weights)
        layer._reset_magnitude()

    def __deepcopy__(self, memo: dict) -> PartReset:
        layer, part = self._live()
        return PartReset(copy.deepcopy(layer, memo), copy.deepcopy(part, memo))

    def __reduce__(self):
        return PartReset, self._live()


def _reset_as_its_class(part: Part) -> None:
    type(part).reset_parameters(part)  # pyright: ignore[reportArgumentType] (one part, one class)
