"""Memory that ends where a tensor does: a read behind it ends the process, as it may on a GPU."""

import ctypes
import mmap
import os
from collections.abc import Callable

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_MAPPINGS = []  # never unmapped: tensors do not own them


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy whose last byte is the last of a page, before one that cannot be read."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    mapping = mmap.mmap(-1, pages + mmap.PAGESIZE)
    _MAPPINGS.append(mapping)
    end = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + pages
    if _LIBC.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=pages - size)
    return copy.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def survives(function: Callable[[], None]) -> bool:
    """Whether a child process comes to the end of ``function``."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0
