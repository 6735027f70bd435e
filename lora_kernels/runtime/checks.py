"""What everything refuses: numbers that are no counts, tensors of another dtype, or of a class that
stands for others.

Such classes are DTensor and torchao's quantised weights.
"""

from numbers import Integral, Real

from torch import SymInt, Tensor

from lora_kernels.runtime.dtypes import FLOATING
from lora_kernels.runtime.eager import PLAIN


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the tensor's memory is elsewhere, and its class cannot know our operations.

    torch's own (fake and functional tensors), classes that only extend Tensor and results of
    collectives that are still awaited take any operation. Nested tensors have checks of their own.
    """
    kind = type(tensor)
    if kind in PLAIN or not hasattr(kind, "__tensor_flatten__"):
        return False
    # Of torch.distributed's AsyncCollectiveTensor.
    return not hasattr(kind, "trigger_wait") and not tensor.is_nested


def check_no_wrapper(name: str, tensor: Tensor) -> None:
    if type(tensor) not in PLAIN and is_wrapper(tensor):
        raise TypeError(f"{name}: expected a plain tensor, got a {type(tensor).__name__}")


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    check_no_wrapper(name, tensor)
    check_dtype(name, tensor)


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected dtype bfloat16, float16, float32 or float64, got {tensor.dtype}"
        )


def check_count(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, (Integral, SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_dropout_p(dropout_p: float) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")


def kind_of(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
