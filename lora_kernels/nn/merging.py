"""The weight of a layer whose adapter is merged into it, in the place of the frozen one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor, nn

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import BaseWeight
from lora_kernels.base_weights.base import Place
from lora_kernels.nn.base_call import COMPUTED, tensor_of
from lora_kernels.nn.sharded import is_managed, is_sharded, sharded_like, whole, write
from lora_kernels.runtime.checks import is_wrapper
from lora_kernels.runtime.dtypes import FLOATING, accumulator_dtype

if TYPE_CHECKING:
    from lora_kernels.nn.adapter_layer import AdapterLayer


Keep = Literal["device", "cpu", "none"]


class Merge(NamedTuple):
    """What a merged layer was made from."""

    keep: Keep
    original: dict[str, nn.Parameter]  # the base layer's parameters that were replaced; or nothing


def merged_weight(base: BaseWeight, factors: LoRAFactors) -> BaseWeight:
    """``c * (W + s B A)`` as a new weight of the same format, c being the factors' output_scale.

    Computed in fp32 (fp64 for fp64) and rounded once, one cache-sized block at a time.

    Raises:
        ValueError: the merged weight has elements that are not finite.
    """
    accumulator = accumulator_dtype(base.dtype)
    left, right = factors.b.to(accumulator) * factors.scaling, factors.a.to(accumulator)

    def blocks() -> Iterator[tuple[Place, Tensor]]:
        for place, block in base.adapted_blocks(left, right):
            if factors.output_scale is not None:
                block *= factors.output_scale[place[0]].unsqueeze(1)
            yield place, block

    return base.merged(blocks())


def why_not_merged(layer: AdapterLayer, has_own_forward: bool) -> str | None:
    """Why the base layer's weight cannot be replaced by one with the adapter in it."""
    base = layer.base_layer
    weight, own = tensor_of(base, "weight"), vars(base)
    if weight is COMPUTED:
        return "base_layer's weight is computed when it is read; remove its parametrization"
    if weight.is_meta:
        if is_offloaded(layer):
            return "the layer's weights are offloaded (accelerate) and not here to be merged"
        return "the layer is on the meta device and has no data to merge"
    if weight.dtype not in FLOATING or (is_wrapper(weight) and not is_sharded(weight)):
        return f"base_layer's weight is quantised ({type(weight).__name__}, {weight.dtype})"
    if has_own_forward or ("forward" in own and "_hf_hook" not in own):
        return (
            f"base_layer ({type(base).__name__}) has a forward of its own, which may make "
            "something else of the merged weight than of the frozen one"
        )
    return None


def is_offloaded(layer: nn.Module) -> bool:
    """Whether accelerate puts weights in place around a forward; elsewhere they are on meta."""
    return "_hf_hook" in vars(layer) or any("_hf_hook" in vars(each) for each in layer.children())


def kept_parameter(base: nn.Module, name: str, keep: str) -> nn.Parameter:
    """What unmerging puts back."""
    frozen = getattr(base, name)
    kept = frozen.detach()
    if keep == "cpu" and frozen.device.type != "cpu":
        kept = kept.cpu()
    elif _is_written_in_place(base, frozen):
        kept = kept.clone()
    else:
        return frozen
    return nn.Parameter(kept, requires_grad=frozen.requires_grad)


def replace_parameter(base: nn.Module, name: str, new: nn.Parameter) -> None:
    """Put another parameter in the place of one, or its values where FSDP would undo that."""
    old = getattr(base, name)
    if _is_written_in_place(base, old):
        write(old, whole(new))
        return
    if is_sharded(old) and not is_sharded(new):
        new = nn.Parameter(sharded_like(old, new), requires_grad=new.requires_grad)
    setattr(base, name, new)


def _is_written_in_place(base: nn.Module, parameter: nn.Parameter) -> bool:
    return is_sharded(parameter) and is_managed(base)
