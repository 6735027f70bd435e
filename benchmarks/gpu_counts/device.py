"""A CUDA device without a GPU: tensors that have shapes and no numbers, and say they are on it.

They are torch's meta tensors. Inside of :func:`pretended_cuda` Python sees them as plain tensors of
a CUDA device, so that the package's own code runs as it does on one: no subclass, and no dispatch
mode that it could see. What is replaced for that, until the context ends:

* ``Tensor.device``, ``is_cuda`` and ``is_meta`` of a meta tensor say ``cuda:0``; in torch's own
  code below the dispatcher they say the truth. ``data_ptr`` gives each storage an address.
* ``torch._C._len_torch_dispatch_stack`` is 0: the package asks it whether someone is watching.
* ``torch.cuda`` answers for one H200 with its first stream, which is not being captured;
  ``torch.version.cuda`` is a version; ``pin_memory`` and ``record_stream`` do nothing.
* ``F.dropout`` calls ``native_dropout``, as torch does by itself for CUDA tensors.
* ``Tensor.to`` and ``cuda`` take the first device where none is numbered.
* An index that is a list is uploaded where the counter sees it; torch does that out of sight.
* What the package remembers of devices and plans is forgotten, before and after.

An allocation of ``device="cuda"`` becomes one on meta in :class:`counter.Counter`, without which
nothing can be made here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.runtime import eager
from lora_kernels.runtime.plan import forget_plans

CUDA = torch.device("cuda", 0)
META = torch.device("meta")
CAPABILITY = (9, 0)

_H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    shared_memory_per_block_optin=232_448,
    total_memory=141 << 30,
    L2_cache_size=60 << 20,
    warp_size=32,
)
_STREAM = SimpleNamespace(
    stream_id=0,
    device=CUDA,
    wait_stream=lambda _: None,
    wait_event=lambda _: None,
    record_event=lambda: None,
)
_ADDRESS_SPACE = 1 << 36  # of a storage: larger than any

_device_of, _is_cuda, _is_meta = (
    getattr(Tensor, name) for name in ("device", "is_cuda", "is_meta")
)
_address_of, _address_of_storage = Tensor.data_ptr, torch.UntypedStorage.data_ptr
_to, _get, _set = Tensor.to, Tensor.__getitem__, Tensor.__setitem__
_native_modes = torch._C._len_torch_dispatch_stack
_told_truth = 0  # how many of torch's own operations are running


@contextmanager
def truth() -> Iterator[None]:
    """For torch's own code: a meta tensor says that it is one."""
    global _told_truth
    _told_truth += 1
    try:
        yield
    finally:
        _told_truth -= 1


def is_on_gpu(tensor: Tensor) -> bool:
    """Whoever asks."""
    return _is_meta.__get__(tensor)


@contextmanager
def pretended_cuda() -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in _replaced():
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(_forget)
        _forget()
        yield


def _replaced() -> list[tuple[object, str, object]]:
    addresses: dict[int, int] = {}

    def device(tensor: Tensor) -> torch.device:
        pretends = _is_meta.__get__(tensor) and not _told_truth
        return CUDA if pretends else _device_of.__get__(tensor)

    def start_of(storage: torch.UntypedStorage) -> int:
        return addresses.setdefault(storage._cdata, (len(addresses) + (1 << 10)) * _ADDRESS_SPACE)

    def address(tensor: Tensor) -> int:
        if not _is_meta.__get__(tensor) or _told_truth:
            return _address_of(tensor)
        return start_of(tensor.untyped_storage()) + tensor.storage_offset() * tensor.element_size()

    def dropout(input, p=0.5, training=True, inplace=False) -> Tensor:
        if not training or p == 0:
            return input
        return torch.native_dropout(input, p, True)[0]

    def storage_address(storage: torch.UntypedStorage) -> int:
        if storage.device.type != "meta" or _told_truth:
            return _address_of_storage(storage)
        return start_of(storage)

    def get(tensor: Tensor, index):
        return _get(tensor, _uploaded(index, tensor))

    def set_(tensor: Tensor, index, value) -> None:
        _set(tensor, _uploaded(index, tensor), value)

    def to(tensor: Tensor, *args, **kwargs) -> Tensor:
        args = [_numbered(value) for value in args]
        return _to(tensor, *args, **{name: _numbered(value) for name, value in kwargs.items()})

    cuda = torch.cuda
    no_modes = lambda: _native_modes() if _told_truth else 0  # noqa: E731
    return [
        (Tensor, "device", property(device)),
        (Tensor, "is_cuda", property(lambda t: _is_cuda.__get__(t) or device(t) == CUDA)),
        (Tensor, "is_meta", property(lambda t: device(t).type == "meta")),
        (Tensor, "data_ptr", address),
        (torch.UntypedStorage, "data_ptr", storage_address),
        (Tensor, "__getitem__", get),
        (Tensor, "__setitem__", set_),
        (Tensor, "to", to),
        (Tensor, "cuda", lambda tensor, *_: to(tensor, CUDA)),
        (Tensor, "pin_memory", lambda tensor, *_: tensor),
        (Tensor, "record_stream", lambda tensor, stream: None),
        (torch._C, "_len_torch_dispatch_stack", no_modes),
        (eager, "_dispatch_modes", no_modes),
        (torch.version, "cuda", "13.0"),
        (cuda, "_lazy_init", lambda: None),
        (cuda, "is_available", lambda: True),
        (cuda, "device_count", lambda: 1),
        (cuda, "current_device", lambda: 0),
        (cuda, "current_stream", lambda *_: _STREAM),
        (cuda, "is_current_stream_capturing", lambda: False),
        (cuda, "get_device_capability", lambda *_: CAPABILITY),
        (cuda, "get_device_properties", lambda *_: _H200),
        (F, "dropout", dropout),
    ]


def _numbered(value):
    """A CUDA device with its number, for which torch would ask the driver."""
    is_cuda = isinstance(value, (str, torch.device)) and str(value) == "cuda"
    return CUDA if is_cuda else value


def _uploaded(index, tensor: Tensor):
    """An index with tensors in place of lists."""
    if isinstance(index, tuple):
        return tuple(_uploaded(each, tensor) for each in index)
    if isinstance(index, list) and is_on_gpu(tensor):
        return torch.tensor(index).to(CUDA)
    return index


def _forget() -> None:
    """What functions of the package have kept of devices, and its plans."""
    forget_plans()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "lora_kernels":
            for value in list(vars(module).values()):
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()
