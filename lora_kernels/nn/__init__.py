"""Drop-in layers: torch's own with a frozen weight and one LoRA adapter, or many."""

from lora_kernels.nn.active_adapters import ActiveAdapters
from lora_kernels.nn.lora_embedding import LoRAEmbedding
from lora_kernels.nn.lora_linear import LoRALinear
from lora_kernels.nn.routed_linear import RoutedLoRALinear

__all__ = ["ActiveAdapters", "LoRAEmbedding", "LoRALinear", "RoutedLoRALinear"]
