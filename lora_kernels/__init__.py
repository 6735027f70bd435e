"""LoRA as fast as the frozen layer it adapts: kernels, their autograd, drop-in layers.

Importing this package needs torch and nothing else: no GPU, no Triton, no compiled extension.
"""

from lora_kernels.ops.lora_linear import explain, lora_linear
from lora_kernels.version import __version__

__all__ = ["__version__", "accelerate", "explain", "lora_linear"]


def accelerate(model):
    """Placeholder replaced when the integration lands."""
    from lora_kernels.integrations.peft import accelerate as accelerate_peft

    return accelerate_peft(model)
