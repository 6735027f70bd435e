"""torch.library registration of ``lora_weight_norm``."""

import torch
from torch import Tensor

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import rebuild_weight
from lora_kernels.ops.norm.composed import weight_norm
from lora_kernels.runtime.dtypes import accumulator_dtype
from lora_kernels.runtime.eager import autocast_off

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "lora_weight_norm(Tensor[] base, str base_format, SymInt[] base_meta, Tensor lora_a, "
    "Tensor lora_b, Tensor scaling) -> Tensor"
)


def _kernel(base, base_format, base_meta, lora_a, lora_b, scaling) -> Tensor:
    weight = rebuild_weight(base, base_format, base_meta)
    with autocast_off(lora_a):
        return weight_norm(weight, LoRAFactors(lora_a, lora_b, scaling))


_library.impl("lora_weight_norm", _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("lora_kernels::lora_weight_norm", lib=_library)
def _(base, base_format, base_meta, lora_a, lora_b, scaling):
    weight = rebuild_weight(base, base_format, base_meta)
    return lora_a.new_empty(weight.shape[0], dtype=accumulator_dtype(weight.dtype))
