"""CUDA graphs and streams: whether one is captured, and what may be kept between calls then.

A tensor that is made while a graph is captured lies in the graph's memory, and has values when the
graph is replayed, not before. A graph holds addresses: what it reads must not be given up later.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling

_CAN_BE = torch.backends.cuda.is_built()  # or torch raises when it is asked for a fake tensor's
_dispatch_modes = torch._C._len_torch_dispatch_stack


def is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and _CAN_BE and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """The current stream of a device, as a number; 0 where there are none.

    In the key of a cache it keeps apart what other streams read: nothing is read before it is
    there, nor given up while it is read.
    """
    if device.type != "cuda" or not _CAN_BE:
        return 0
    return torch.cuda.current_stream(device).cuda_stream


def kept_per_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``functools.cache`` for few constants: the last argument is the device that they are made on.

    Nothing is kept that a captured graph computes or that is fake. What is kept stays, as a graph
    may read it. The stream that made it is waited for, once: others would need an event to read it.
    """
    kept: dict[tuple, Tensor] = {}

    @functools.wraps(make)
    def find(*key) -> Tensor:
        if is_compiling() or _dispatch_modes() > 0:
            return make(*key)
        tensor = kept.get(key)
        if tensor is not None:
            return tensor
        with torch.inference_mode(False):  # a training step may save it
            tensor = make(*key)
        device = key[-1]
        if is_captured(device):
            return tensor
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return kept.setdefault(key, tensor)

    return find
