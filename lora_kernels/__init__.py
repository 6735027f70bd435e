"""LoRA at close to the cost of the frozen layer it adapts: kernels, autograd, drop-in layers.

Importing this package needs torch and nothing else: no GPU, no Triton, no PEFT, no compiled part.
"""

from typing import TYPE_CHECKING

from lora_kernels.integrations.routed import route
from lora_kernels.nn import LoRAEmbedding, LoRALinear, RoutedLoRALinear
from lora_kernels.old_paths import find_old_paths
from lora_kernels.ops import explain
from lora_kernels.ops.linear import lora_linear
from lora_kernels.ops.norm import lora_weight_norm
from lora_kernels.ops.routed import (
    AdapterBank,
    AdapterSlots,
    Routing,
    routed_expand,
    routed_lora,
    routed_lora_linear,
    routed_shrink,
)
from lora_kernels.version import __version__

if TYPE_CHECKING:
    from lora_kernels.integrations.peft import accelerate
    from lora_kernels.measuring.tuning import tune

__all__ = [
    "AdapterBank",
    "AdapterSlots",
    "LoRAEmbedding",
    "LoRALinear",
    "RoutedLoRALinear",
    "Routing",
    "__version__",
    "accelerate",
    "explain",
    "lora_linear",
    "lora_weight_norm",
    "route",
    "routed_expand",
    "routed_lora",
    "routed_lora_linear",
    "routed_shrink",
    "tune",
]

find_old_paths()


def __getattr__(name: str):
    if name == "accelerate":  # PEFT is imported when it is asked for
        from lora_kernels.integrations.peft import accelerate

        return accelerate
    if name == "tune":  # and what measures
        from lora_kernels.measuring.tuning import tune

        return tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
