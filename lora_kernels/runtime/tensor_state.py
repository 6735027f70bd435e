"""Tensors that hold no numbers, or that autograd cannot keep: found before something reads them."""

from torch import Tensor

from lora_kernels.runtime.eager import PLAIN

# No allocation lies below it: such an address is an offset into a storage that is gone (or, in
# some processes, an early part of the heap: a second look tells).
LOWEST_ADDRESS = 1 << 40


def has_memory(tensor: Tensor) -> bool:
    """False for a dense tensor whose storage was freed (``untyped_storage().resize_(0)``, as FSDP
    does). With a storage offset its address is not even null, and torch's own elementwise
    operations crash on it."""
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a transform's or a mode's wrapper: not a question of memory
        return True
    return (
        address >= LOWEST_ADDRESS
        or tensor.is_meta
        or tensor.numel() == 0
        or tensor.untyped_storage().nbytes() > 0
    )


def check_has_values(name: str, tensor: Tensor) -> None:
    """Raise for a plain tensor whose storage was freed, or that is torch's lazy zero."""
    if type(tensor) not in PLAIN:  # its class or mode knows
        return
    try:
        if tensor.data_ptr() >= LOWEST_ADDRESS:
            return
    except RuntimeError:  # no memory of its own
        pass
    if tensor._is_zerotensor():
        raise ValueError(
            f"{name}: expected a tensor with memory, got one of torch's lazy zeros "
            "(torch._efficientzerotensor); use torch.zeros"
        )
    if not has_memory(tensor):
        raise ValueError(
            f"{name}: expected a tensor with memory, got one of shape {list(tensor.shape)} whose "
            "storage was freed (FSDP frees the parameters of modules that are not being called)"
        )


def name_unsaved(error: RuntimeError, **saved: Tensor | None) -> None:
    """Raise anew, with the name of the tensor, what autograd has raised for one of inference mode
    that the backward needs."""
    if "Inference tensors cannot be saved" not in str(error):
        return
    for name, tensor in saved.items():
        if tensor is not None and tensor.is_inference():
            raise RuntimeError(
                f"{name}: it was made in inference mode, and the backward of this call needs it; "
                "make it outside of torch.inference_mode(), or pass a clone"
            ) from error
