"""Drop-in layers: torch's own with a frozen weight and a LoRA adapter."""

from lora_kernels.modules.lora_embedding import LoRAEmbedding
from lora_kernels.modules.lora_linear import LoRALinear

__all__ = ["LoRAEmbedding", "LoRALinear"]
