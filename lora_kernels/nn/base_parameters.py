"""``weight`` and ``bias`` of a layer that are its base layer's."""

import sys
from typing import ClassVar

import torch
from torch import nn
from torch.nn import Parameter


class BaseParameters(nn.Module):
    """Puts a parameter that is assigned to ``weight`` or ``bias`` into ``base_layer``.

    Models tie and load parameters by their names, ``lm_head.weight``; whoever does finds the base
    layer's where the layer without an adapter had its own. Subclasses have properties of those
    names.
    """

    # transformers looks for this in every module: names in a state dict that may be left out of a
    # file, where another module has the same tensor. It reads no more than the keys.
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "base_layer.weight": "base_layer.weight",
        "base_layer.bias": "base_layer.bias",
    }

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """As in ``nn.Module``, which comes here when a Parameter is assigned to an attribute. What
        else is assigned comes to the property's setter."""
        if name in ("weight", "bias") and isinstance(getattr(type(self), name, None), property):
            self._set_base_parameter(name, param)
        else:
            super().register_parameter(name, param)

    def requires_grad_(self, requires_grad: bool = True) -> "BaseParameters":
        """As in ``nn.Module``; but not to follow ``weight``, which is frozen, after a resize.

        transformers gives what ``resize_token_embeddings`` returns the flag that ``weight`` had.
        """
        if sys._getframe(1).f_code.co_name == "_resize_token_embeddings":
            return self
        return super().requires_grad_(requires_grad)

    def _set_base_parameter(self, name: str, parameter: Parameter | None) -> None:
        own = getattr(self.base_layer, name)
        if own is not None and parameter is not None and parameter.shape != own.shape:
            raise ValueError(
                f"{name}: expected a parameter of shape {list(own.shape)}, the base layer's, got "
                f"{list(parameter.shape)}"
            )
        setattr(self.base_layer, name, parameter)


def base_parameter(name: str) -> property:
    """The base layer's parameter of that name, as a layer's own."""

    def get(layer: BaseParameters) -> Parameter | None:
        return getattr(layer.base_layer, name)

    def set_(layer: BaseParameters, value: Parameter | None) -> None:
        layer._set_base_parameter(name, value)

    return property(get, set_, doc=f"The base layer's {name}.")


@torch.no_grad()
def resize(parameter: Parameter, dim: int, size: int) -> None:
    """Cut the end off a parameter, or add zeros there; it stays the same object."""
    kept = parameter.data.narrow(dim, 0, min(size, parameter.shape[dim]))
    shape = list(parameter.shape)
    shape[dim] = size - kept.shape[dim]
    parameter.grad = None
    parameter.data = torch.cat([kept, kept.new_zeros(shape)], dim)
