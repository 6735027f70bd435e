"""What the public functions of ``routed_lora`` refuse: an error names the argument, what was
expected and what came."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.base_weights import BaseWeight
from lora_kernels.ops.routed.bank.bank import AdapterBank
from lora_kernels.ops.routed.routing import Routing
from lora_kernels.runtime.checks import check_no_wrapper, kind_of
from lora_kernels.runtime.dtypes import FLOATING


def check_pair(bank: AdapterBank, routing: Routing, device: torch.device) -> None:
    if not isinstance(bank, AdapterBank):
        raise TypeError(f"bank: expected an AdapterBank, got {type(bank).__name__}")
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing, got {type(routing).__name__}")
    if routing.slots is not bank.slots:
        raise ValueError("routing: expected one made for the bank's slots, got one of other slots")
    if forward_ad._current_level >= 0:
        raise NotImplementedError("routed_lora: forward-mode differentiation is not defined")
    for name, other in (("bank", bank.device), ("routing", routing.device)):
        if other != device and not (
            other.type == device.type and None in (other.index, device.index)
        ):
            raise ValueError(f"{name}: expected x's device {device}, got {other}")


def check_rows(name: str, rows: int, routing: Routing) -> None:
    if rows not in (routing.num_tokens, routing.max_tokens):
        room = f" (or {routing.max_tokens}, all it has room for)"
        raise ValueError(
            f"{name}: expected {routing.num_tokens} tokens{room}, as in the routing, got {rows}"
        )


def check_h(h: Tensor, bank: AdapterBank, routing: Routing) -> None:
    _check_operand("h", h)
    check_pair(bank, routing, h.device)


def check_input(x: Tensor, bank: AdapterBank, routing: Routing) -> None:
    _check_operand("x", x)
    check_pair(bank, routing, x.device)
    if x.ndim == 0 or x.shape[-1] != bank.in_features:
        raise ValueError(f"x: expected [..., {bank.in_features}], got {list(x.shape)}")
    check_rows("x", x.shape[:-1].numel(), routing)


def _check_operand(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a tensor of floating point, got {kind_of(tensor)}")
    check_no_wrapper(name, tensor)
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a sparse or nested one")


def check_out_type(out: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a tensor, got {type(out).__name__}")
    check_no_wrapper("out", out)
    if not torch.compiler.is_compiling() and (out.is_neg() or out._is_zerotensor()):
        raise ValueError(
            "out: expected a tensor of its own values, got a lazily negated or zero one"
        )
    if out.dtype not in FLOATING or out.layout is not torch.strided:
        raise TypeError(f"out: expected a dense tensor of floating point, got {kind_of(out)}")


def check_out(out: Tensor, shape: tuple, dtype: torch.dtype, operand: Tensor) -> None:
    """``operand``: what is read while ``out`` is written."""
    device = operand.device
    if tuple(out.shape) != tuple(shape) or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"out: expected {list(shape)} in {dtype} on {device}, got {list(out.shape)} in "
            f"{out.dtype} on {out.device}"
        )
    if torch.compiler.is_compiling():
        return  # what follows looks at memory
    if torch._debug_has_internal_overlap(out) == 1:  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError("out: expected rows that do not overlap, got a tensor that repeats memory")
    try:
        rows = out.view(-1, out.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"out: expected leading dimensions that can be flattened in place, got strides "
            f"{out.stride()}"
        ) from None
    (inner, size), (outer, _) = sorted(zip(rows.stride(), rows.shape, strict=True))
    if min(rows.shape) > 1 and outer < inner * size:
        raise ValueError(f"out: expected rows that do not overlap, got strides {out.stride()}")
    if _share_memory(rows, operand):
        raise ValueError("out: expected memory of its own, got some that is read while it changes")


def _share_memory(out: Tensor, operand: Tensor) -> bool:
    """Whether an element of ``out`` ``[M, N]`` may be one of ``operand`` ``[..., K]``."""
    if out.is_meta or not out.numel() or not operand.numel():
        return False
    if out.untyped_storage().data_ptr() != operand.untyped_storage().data_ptr():
        return False
    ends = []
    for tensor in (out, operand):
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        ends.append((tensor.storage_offset(), tensor.storage_offset() + last))
    (out_first, out_last), (first, last) = ends
    if out_last < first or last < out_first:
        return False
    # Neighbouring columns of one matrix interleave without touching.
    pitch = out.stride(0)
    if operand.ndim != 2 or operand.stride() != (pitch, 1) or out.stride(1) != 1:
        return True
    column = (out_first - first) % pitch
    return column < operand.shape[1] or column + out.shape[1] > pitch


def check_base(base: BaseWeight | None, bias: Tensor | None, bank: AdapterBank, x: Tensor) -> None:
    if not isinstance(base, BaseWeight):
        raise TypeError(f"weight: expected a tensor, got {type(base).__name__}")
    weights, shape = base.tensors(), (bank.out_features, bank.in_features)
    dense = [("weight", *weights)] if base.format == "dense" else []
    for name, tensor in (*dense, ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        check_no_wrapper(name, tensor)
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
        _check_matrix(name, tensor, shape[:1] if name == "bias" else shape, x)
    if not dense:
        _check_matrix("weight", base, shape, x)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in weights):
        raise ValueError(
            "weight: expected a frozen tensor (requires_grad=False), got one that requires grad"
        )


def _check_matrix(name: str, of: Tensor | BaseWeight, shape: tuple, x: Tensor) -> None:
    if tuple(of.shape) != shape:
        raise ValueError(f"{name}: expected {list(shape)}, got {list(of.shape)}")
    if of.dtype != x.dtype:
        raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {of.dtype}")
    if of.device != x.device:
        raise ValueError(f"{name}: expected x's device {x.device}, got {of.device}")


def check_seed(seed: Tensor, device: torch.device) -> None:
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.ndim != 0:
        raise TypeError(f"seed: expected a 0-d int64 tensor, got {kind_of(seed)}")
    if seed.device != device:
        raise ValueError(f"seed: expected it on {device}, got {seed.device}")
