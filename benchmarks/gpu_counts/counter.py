"""Counts what a function launches on the device of :func:`device.pretended_cuda`.

Floating point numbers are never computed. Integers are, on the host beside the pretended device, as
long as all that they come from is known: so routings, sizes and indices have their values, and code
that reads them back takes its real way (and is counted for it).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .cost import Cost, Operation
from .device import META, is_on_gpu, pretended_cuda, truth
from .table import cost_of

_MOST_VALUES = 1 << 16  # elements of a tensor whose values are kept
# What they give depends on values.
_NEEDS_VALUES = (
    "nonzero", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave",
    "_local_scalar_dense",
)  # fmt: skip
_INDICES = (torch.int32, torch.int64)
_CUDA_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

_active: Counter | None = None


def active() -> Counter:
    """The counter that is on."""
    if _active is None:
        raise RuntimeError("no counter is on; use counting()")
    return _active


class Counter(TorchDispatchMode):
    """Every operation of torch on the pretended device, by its cost.

    Attributes:
        launched: name and cost of each operation, while :meth:`recording`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[str, Cost]] = []
        self._records = False
        self._values: dict[int, Tensor] = {}  # by storage: what it holds, flat on the host

    @contextmanager
    def recording(self) -> Iterator[list[tuple[str, Cost]]]:
        """What is launched inside."""
        self.launched, self._records = [], True
        try:
            yield self.launched
        finally:
            self._records = False

    def add(self, name: str, cost: Cost) -> None:
        if self._records and cost != Cost():
            self.launched.append((name, cost))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type in ("cuda", "meta")
        if to_gpu:
            kwargs["device"] = META
        tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not to_gpu and not any(map(is_on_gpu, tensors)):
            with truth():
                return func(*args, **kwargs)
        about = _about(func)
        if about.is_composite:
            with self:
                return func.decompose(*args, **kwargs)
        if about.is_ours:  # its kernel for the device is made of torch's operations
            with self:
                return func.redispatch(_CUDA_KERNEL, *args, **kwargs)
        with truth():
            result = self._run(func, about, args, kwargs, tensors)
            if self._records:
                operation = about.operation(args, kwargs, tensors, result)
                self.add(about.name, cost_of(operation, about.is_pointwise))
        return result

    # --- values -------------------------------------------------------------------------------

    def values(self, tensor: Tensor) -> Tensor | None:
        """What a tensor of the device holds, on the host: a view of it. None where nobody knows."""
        if not is_on_gpu(tensor):
            return tensor
        flat = self._values.get(tensor.untyped_storage()._cdata)
        if flat is None:
            return None
        if flat.dtype != tensor.dtype:
            flat = flat.view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _keep(self, results, values) -> None:
        """What new tensors of the device hold; values None: nobody knows."""
        results = _leaves(results)
        self._forget(results)
        for tensor, value in zip(results, _leaves(values), strict=False):
            if not isinstance(tensor, Tensor) or not isinstance(value, Tensor):
                continue
            if not tensor.is_floating_point() and tensor.numel() <= _MOST_VALUES:
                storage = tensor.untyped_storage()
                size = storage.nbytes() // tensor.element_size()
                flat = self._values[storage._cdata] = torch.zeros(size, dtype=tensor.dtype)
                flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(value)

    def _forget(self, tensors) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._values.pop(tensor.untyped_storage()._cdata, None)

    def _run(self, func: Callable, about: _About, args, kwargs, tensors: list[Tensor]):
        """The operation on shapes, and on values where they are known."""
        name = about.name
        if about.is_view:
            return func(*args, **kwargs)
        on_host = None if about.draws else self._on_host(func, args, kwargs, tensors)
        if name in _NEEDS_VALUES:
            if on_host is None:
                raise RuntimeError(f"aten::{name}: the host asks for values that are not known")
            return self._uploaded(on_host())
        if name == "_to_copy" and _goes_to_host(args[0], kwargs.get("device")):
            return self._downloaded(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and not is_on_gpu(args[0]):
            return args[0].copy_(self._downloaded(args[1]))
        if name in ("_to_copy", "copy_") and not all(map(is_on_gpu, tensors)):
            result = args[0] if name == "copy_" else func(args[0].to(META), **kwargs)
        else:
            result = func(*args, **kwargs)
        found = None if on_host is None else on_host()
        if "empty" in name and result.dtype in _INDICES and result.numel() <= _MOST_VALUES:
            # Parts of it will be written one after the other; what never is shows.
            found = torch.full(result.shape, torch.iinfo(result.dtype).min, dtype=result.dtype)
        written = about.written(args, kwargs)
        if written and found is None:  # into views too: the whole storage is unknown now
            self._forget(written)
        elif not written:
            self._keep(result, found)
        return result

    def _on_host(self, func, args, kwargs, tensors) -> Callable | None:
        """The operation on values, where all that it reads is known."""
        if any(t.is_floating_point() or t.numel() > _MOST_VALUES for t in tensors):
            return None
        if not tensors and any(isinstance(a, int) and a > _MOST_VALUES for a in args):
            return None  # such as arange
        found = {id(tensor): self.values(tensor) for tensor in tensors}
        if any(value is None for value in found.values()):
            return None
        host_args, host_kwargs = pytree.tree_map(
            lambda a: found[id(a)] if isinstance(a, Tensor) else a, (args, kwargs)
        )
        if host_kwargs.get("device") is not None:
            host_kwargs["device"] = torch.device("cpu")
        return lambda: func(*host_args, **host_kwargs)

    def _uploaded(self, values):
        """Tensors of the device that hold these; numbers stay what they are."""

        def upload(value):
            if not isinstance(value, Tensor):
                return value
            mine = torch.empty_like(value, device=META)
            self._keep(mine, value)
            return mine

        return pytree.tree_map(upload, values)

    def _downloaded(self, tensor: Tensor) -> Tensor:
        values = self.values(tensor)
        if values is None:
            raise RuntimeError(
                f"the host reads a tensor {list(tensor.shape)} of {tensor.dtype} from the device, "
                "whose values are not known"
            )
        return values.clone()


def _goes_to_host(tensor: Tensor, device: torch.device | None) -> bool:
    return is_on_gpu(tensor) and device is not None and torch.device(device).type == "cpu"


class _About:
    """What the schema of an operation says."""

    def __init__(self, func) -> None:
        schema, key = func._schema, torch._C.DispatchKey.CompositeImplicitAutograd
        self.name, self.overload = schema.name.removeprefix("aten::"), schema.overload_name
        self.is_composite = func.has_kernel_for_dispatch_key(key)
        self.is_ours = func.namespace == "lora_kernels"
        self.is_pointwise = torch.Tag.pointwise in func.tags
        self.is_view = func.is_view
        # Values that nobody knows: drawn, or never written.
        self.draws = torch.Tag.nondeterministic_seeded in func.tags or "empty" in self.name
        self._defaults = {each.name: each.default_value for each in schema.arguments}
        self._written = [
            each.name
            for each in schema.arguments
            if each.alias_info is not None and each.alias_info.is_write
        ]
        self._out = [each.name for each in schema.arguments if each.is_out]

    def operation(self, args, kwargs, tensors: list[Tensor], result) -> Operation:
        arguments = {**self._defaults, **dict(zip(self._defaults, args, strict=False)), **kwargs}
        results = [leaf for leaf in _leaves(result) if isinstance(leaf, Tensor)]
        out = [id(arguments[name]) for name in self._out]
        operands = [each for each in tensors if is_on_gpu(each) and id(each) not in out]
        from_host = [each for each in tensors if not is_on_gpu(each) and each.ndim > 0]
        return Operation(self.name, self.overload, arguments, operands, results, from_host)

    def written(self, args, kwargs) -> list[Tensor]:
        """The arguments that the operation writes."""
        if not self._written:
            return []
        given = {**dict(zip(self._defaults, args, strict=False)), **kwargs}
        found = _leaves([given[name] for name in self._written if name in given])
        return [leaf for leaf in found if isinstance(leaf, Tensor)]


_about = functools.cache(_About)


def _leaves(value) -> list:
    """What lies in tuples, lists and the values of dictionaries."""
    if isinstance(value, (tuple, list)):
        return [leaf for each in value for leaf in _leaves(each)]
    return _leaves(list(value.values())) if isinstance(value, dict) else [value]


@contextmanager
def counting() -> Iterator[Counter]:
    """A device, and a counter of what it is given."""
    global _active
    with pretended_cuda(), Counter() as counter:
        before, _active = _active, counter
        try:
            yield counter
        finally:
            _active = before
