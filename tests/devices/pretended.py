"""A device in Python: memory of the CPU behind torch's PrivateUse1, with the limits of MPS.

Its tensors are plain ones of another device (no subclass, no mode), so that everything that looks
at a tensor's type or device sees what it would see on a real one. It refuses what MPS refuses or
gets wrong: fp64, operations without an MPS kernel, integers drawn from more than 32 bits, int64
divided with rounding, and operands on the CPU that are more than a number.

A tensor owns no memory: its storage is the key under which the tensor on the CPU is found. Views
are contiguous to torch, whatever their strides on the CPU; they share memory there.

Torch can have one such device per process, and then takes it for the machine's accelerator: use
this in a process of its own.
"""

import functools
from importlib.resources import files

import torch
import yaml
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

DEVICE, KEY = "pretended", "PrivateUse1"

# Views that torch would make of the strides it believes in.
_VIEWS = (
    "t", "transpose.int", "permute", "slice.Tensor", "select.int", "unsqueeze", "squeeze",
    "squeeze.dim", "squeeze.dims", "expand", "unbind.int", "split.Tensor", "split_with_sizes",
    "view.dtype", "_unsafe_view",
)  # fmt: skip
_ROUNDING = ("floor_divide", "div.Tensor_mode", "div.Scalar_mode", "remainder.Tensor")

_on_cpu: dict[int, Tensor] = {}  # by storage
_libraries: list[torch.library.Library] = []  # they unregister when they die


class _Module(_DummyBackendModule):
    """What torch asks ``torch.pretended`` for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def set_up() -> None:
    """Give torch the device, for the rest of the process."""
    _setup_privateuseone_for_python_backend(DEVICE, _Module())
    _libraries.extend(torch.library.Library(name, "IMPL") for name in ("_", "aten"))
    _libraries[0].fallback(_run, KEY)
    _libraries[0].fallback(torch.library.fallthrough_kernel, f"Autocast{KEY}")
    for name in _VIEWS:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        _libraries[1].impl(name, functools.partial(_run, op), KEY)
    _give_addresses()


def _give_addresses() -> None:
    """Tensors of the device say the addresses on the CPU; their own memory is nowhere."""
    of_tensor, of_storage = Tensor.data_ptr, torch.UntypedStorage.data_ptr

    def address(tensor: Tensor) -> int:
        return of_tensor(host(tensor) if _is_ours(tensor) else tensor)

    def storage_address(storage: torch.UntypedStorage) -> int:
        if storage.device.type == DEVICE:
            storage = _on_cpu[storage._cdata].untyped_storage()
        return of_storage(storage)

    Tensor.data_ptr, torch.UntypedStorage.data_ptr = address, storage_address


def host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU behind one of the device: the same memory."""
    return _on_cpu[tensor.untyped_storage()._cdata]


def _wrap(tensor: Tensor) -> Tensor:
    _refuse_fp64(tensor.dtype)
    ours = torch._C._acc.create_empty_tensor(list(tensor.shape), tensor.dtype)
    _on_cpu[ours.untyped_storage()._cdata] = tensor
    return ours


def _is_ours(value) -> bool:
    return isinstance(value, Tensor) and value.device.type == DEVICE


def _run(op, *args, **kwargs):
    """The operation on the CPU; an argument that it returns stays the argument it was."""
    name = op.name().removeprefix("aten::")
    operands = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    ours = [tensor for tensor in operands if _is_ours(tensor)]
    if name == "_copy_from":
        return _copy(*args)
    if name == "_local_scalar_dense":
        return host(args[0]).item()
    _refuse(name, args, [tensor for tensor in operands if not _is_ours(tensor)])

    def lower(value):
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return host(value) if _is_ours(value) else value

    def lift(value):
        if not isinstance(value, Tensor):
            return value
        for tensor in ours:
            if host(tensor) is value:
                if tensor.shape != value.shape:  # an empty ``out=``, to be given its size
                    tensor.data = _wrap(value)
                return tensor
        return _wrap(value)

    args, kwargs = pytree.tree_map(lower, (args, kwargs))
    # What began as a number comes as one, also where the operation takes a tensor.
    args = tuple(
        torch.tensor(value)
        if isinstance(value, (int, float)) and str(argument.type) == "Tensor"
        else value
        for value, argument in zip(args, op._schema.arguments, strict=False)
    )
    if name in ("view", "_unsafe_view"):
        return _wrap(args[0].reshape(args[1]))
    return pytree.tree_map(lift, op(*args, **kwargs))


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _refuse_fp64(target.dtype)
    to = host(target) if _is_ours(target) else target
    to.copy_(host(source) if _is_ours(source) else source)
    return target


def _refuse_fp64(dtype: torch.dtype) -> None:
    if dtype in (torch.float64, torch.complex128):
        raise TypeError(f"the device has no {dtype}")


def _refuse(name: str, args: tuple, on_cpu: list[Tensor]) -> None:
    """Raise for what MPS does not do, or not right."""
    if not _has_kernel(name):
        raise NotImplementedError(f"MPS has no kernel of aten::{name}")
    if any(tensor.ndim for tensor in on_cpu):
        raise RuntimeError(f"aten::{name}: an operand is on the CPU")
    if name == "random_.from" and args[2] - args[1] > 2**31:
        raise RuntimeError(f"MPS draws 32 bits, asked for {args[1]} to {args[2]}")
    if name in _ROUNDING and not args[0].is_floating_point():
        raise RuntimeError(f"MPS divides integers in fp32 (aten::{name})")


@functools.cache
def _has_kernel(name: str) -> bool:
    """Whether torch's own table of operations has an MPS kernel, or one for every device."""
    entry = _table()[name]
    if delegate := entry.get("structured_delegate"):
        entry = _table()[delegate]
    dispatch = entry.get("dispatch")
    keys = "CompositeImplicitAutograd" if dispatch is None else ", ".join(dispatch)
    return "Composite" in keys or "MPS" in keys.replace("SparseMPS", "").split(", ")


@functools.cache
def _table() -> dict[str, dict]:
    text = files("torchgen").joinpath("packaged/ATen/native/native_functions.yaml").read_text()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return {entry["func"].partition("(")[0]: entry for entry in yaml.load(text, loader)}
