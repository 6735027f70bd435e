"""torch.library registration of ``routed_lora`` and its halves, and their autograd.Function.

``routed_lora`` (with or without a base weight), ``routed_shrink`` and ``routed_expand`` are
differentiable, any number of times (see :mod:`second_order`); the first two have a twin that also
returns what the backward needs. ``..._`` ops add into a tensor and have no gradient. What a call
consists of travels as plain tensors and numbers, see :data:`_PARTS`. The gradients of all factors
come in one flat tensor, of which the Function hands out views. The parameters are arguments for
autograd's sake only: values are read from the bank's storage.

Optional results are empty tensors of shape ``[0]`` where they do not exist. A call that nothing
else has to see goes past the ops to the backend that its plan names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor as _is_batched

from lora_kernels.base_weights import rebuild
from lora_kernels.ops.narrow.products import product_dtype
from lora_kernels.ops.narrow.second_order import missing_edge
from lora_kernels.ops.routed import second_order
from lora_kernels.ops.routed.bank.storage import is_moved_anchor
from lora_kernels.ops.routed.call import (
    NOTHING_TRAINED,
    BackwardCall,
    ExpandBackward,
    ExpandCall,
    ForwardCall,
    Gradients,
    LoRABackward,
    Needs,
    RoutedCall,
    ShrinkBackward,
    stores_mask,
)
from lora_kernels.ops.routed.plan import module_of
from lora_kernels.ops.routed.tensors import (
    BankTensors,
    GradientLayout,
    RoutingTensors,
    TrainableFactors,
    in_one_piece,
)
from lora_kernels.runtime import dispatch
from lora_kernels.runtime.capture import is_captured
from lora_kernels.runtime.dropout import GROUP, MaskPlace
from lora_kernels.runtime.dtypes import accumulator_dtype
from lora_kernels.runtime.eager import (
    autocast_off,
    is_plain_eager,
    requires_grad,
    restore_leading_dims,
)
from lora_kernels.runtime.tensor_state import name_unsaved

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_OPS = torch.ops.lora_kernels
_autocasts = torch._C._is_any_autocast_enabled
_below_autograd = torch._C._AutoDispatchBelowAutograd


# --- calls as arguments ----------------------------------------------------------------------


class _Part(NamedTuple):
    """An attribute of a call as arguments of an op, and what makes it of several."""

    schema: str
    made: Callable[..., Any] | None = None

    @property
    def count(self) -> int:
        return self.schema.count(",") + 1


_PARTS = {
    "bank": _Part(
        "Tensor[] factors, int[] slots, int[] thresholds, int[] slice_columns, int max_total_rank, "
        "Tensor storage, Tensor slot_table, Tensor scaling, Tensor threshold_table",
        BankTensors,
    ),
    "routing": _Part(
        "Tensor tokens, Tensor offsets, Tensor tiles, Tensor inverse, Tensor? pair_weights, "
        "Tensor plan, int pairs_per_token, int block",
        RoutingTensors,
    ),
    "layout": _Part(
        "int[] grad_slots, int[] grad_offsets, int grad_numel, Tensor grad_table", GradientLayout
    ),
    "base": _Part("Tensor[] base, str base_format, SymInt[] base_meta", rebuild),
    "place": _Part("SymInt row_offset, SymInt column_offset, SymInt pitch", MaskPlace),
    "trained": _Part(
        "Tensor[] parameters, int[] parameter_offsets, int[] parameter_slots", TrainableFactors
    ),
    "needs": _Part("bool[3] needs", lambda needs: Needs(*needs)),
    "x?": _Part("Tensor? x"),
    "h?": _Part("Tensor? h"),
    "out": _Part("Tensor(a!) out"),
}
for _kind, _names in {
    "Tensor": "x dy h mask",
    "Tensor?": "bias seed",
    "SymInt": "rows in_features",
    "ScalarType": "dtype",
    "str": "backend",
}.items():
    _PARTS |= {_name: _Part(f"{_kind} {_name}") for _name in _names.split()}
_SIGNATURES = {
    "routed_lora": (ForwardCall, "layout x base bias seed place backend trained", "Tensor"),
    "routed_lora_forward": (
        ForwardCall,
        "x base bias seed place backend",
        "(Tensor y, Tensor h, Tensor mask)",
    ),
    "routed_lora_backward": (
        LoRABackward,
        "layout dy x? base h? mask seed place in_features needs backend",
        "(Tensor dx, Tensor grad, Tensor grad_weights, Tensor grad_bias)",
    ),
    "routed_shrink": (ForwardCall, "layout x seed place backend trained", "Tensor"),
    "routed_shrink_forward": (ForwardCall, "x seed place backend", "(Tensor h, Tensor mask)"),
    "routed_shrink_backward": (
        ShrinkBackward,
        "layout dy x mask seed place needs backend",
        "(Tensor dx, Tensor grad)",
    ),
    "routed_expand": (ExpandCall, "layout h rows dtype backend trained", "Tensor"),
    "routed_expand_backward": (
        ExpandBackward,
        "layout dy h needs backend",
        "(Tensor dh, Tensor grad, Tensor grad_weights)",
    ),
    "routed_lora_": (ForwardCall, "out x seed place backend", "()"),
    "routed_expand_": (ExpandCall, "out h backend", "()"),
}
_PARTS_OF = {name: ["bank", "routing", *each[1].split()] for name, each in _SIGNATURES.items()}
for _name, (_, _, _results) in _SIGNATURES.items():
    _schema = ", ".join(_PARTS[part].schema for part in _PARTS_OF[_name])
    _library.define(f"{_name}({_schema}) -> {_results}")


def _call_of(name: str, arguments: tuple) -> Any:
    """The call that the arguments of an op are, of the class that its signature says."""
    values, at = {}, 0
    for part in _PARTS_OF[name]:
        made, end = _PARTS[part].made, at + _PARTS[part].count
        values[part.rstrip("?")] = arguments[at] if made is None else made(*arguments[at:end])
        at = end
    return _SIGNATURES[name][0](**values)


def _arguments_of(name: str, call: Any) -> list:
    arguments: list = []
    for part in _PARTS_OF[name]:
        value = getattr(call, part.rstrip("?"))
        if part == "base":
            arguments += [[], "", []] if value is None else [
                list(value.tensors()), value.format, list(value.meta),
            ]  # fmt: skip
        elif part == "place":
            width = call.in_features if call.x is None else call.x.shape[-1]
            arguments += [*value[:2], width if value.pitch is None else value.pitch]
        elif part == "mask":
            arguments.append(call.dy.new_empty(0, dtype=torch.uint8) if value is None else value)
        elif part == "needs":
            arguments.append(list(value))
        elif _PARTS[part].count > 1:
            arguments += value
        else:
            arguments.append(value)
    return arguments


# --- calls as backends take them ---------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    return (_with_values(x) if x.is_neg() or x._is_zerotensor() else x).reshape(-1, x.shape[-1])


def _with_values(x: Tensor) -> Tensor:
    """x itself, unless it is one of torch's lazy tensors: kernels read memory."""
    if x._is_zerotensor():
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return x.resolve_neg()


def _forward(call: ForwardCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(y, h, mask)``; x is ``[..., K]``, and so is y."""
    x, call.x = call.x, _rows(call.x)
    if call.out is not None:
        # A view, or the rows could not be added to in place: the public function sees to it.
        call.out = call.out.view(-1, call.out.shape[-1])
    y, h, mask = module_of(call.backend, x).forward(call)
    if x.ndim != 2 and call.out is None:
        y = restore_leading_dims(y, x)
    return y, h, mask


def _shrink(call: ForwardCall) -> tuple[Tensor, None, Tensor | None]:
    call.x = _rows(call.x)
    h, mask = module_of(call.backend, call.x).shrink(call)
    return h, None, mask


def _expand(call: ExpandCall) -> tuple[Tensor, None, None]:
    if call.out is None:
        out = call.h.new_zeros((call.rows, call.bank.slice_columns[-1]), dtype=call.dtype)
    else:
        out = call.out.view(-1, call.out.shape[-1])
    call.h = _with_values(call.h)
    module_of(call.backend, call.h).expand_(call, out)
    return out, None, None


def _backward(call: LoRABackward) -> Gradients:
    dy, call.dy = call.dy, _rows(call.dy)
    call.x = None if call.x is None else _rows(call.x)
    found = module_of(call.backend, dy).backward(call)
    dx = found.x
    if dx is not None:
        found = found._replace(x=dx.view(*dy.shape[:-1], call.in_features))
    return found


def _shrink_backward(call: ShrinkBackward) -> Gradients:
    x, call.x, call.dy = call.x, _rows(call.x), _with_values(call.dy)
    found = module_of(call.backend, x).shrink_backward(call)
    return found if found.x is None else found._replace(x=found.x.view(x.shape))


def _expand_backward(call: ExpandBackward) -> Gradients:
    call.dy, call.h = _rows(call.dy), _with_values(call.h)
    found = module_of(call.backend, call.h).expand_backward(call)
    return found if found.x is None else found._replace(x=found.x.to(call.h.dtype))


# --- kernels ---------------------------------------------------------------------------------


def _received(call: RoutedCall) -> None:
    """Make the call of an op that runs, in a graph or with copies of its arguments, a backend's."""
    storage = call.bank.storage
    if storage.ndim == 2 and is_captured(storage.device):  # by a compiled graph
        raise RuntimeError(
            "a captured CUDA graph holds addresses: call reserve() on the bank before, so that "
            "what it reads stays where it is"
        )
    if is_moved_anchor(storage):  # by who gives an op copies of its arguments
        call.bank = in_one_piece(call.bank)
    if isinstance(call, BackwardCall) and call.mask is not None and call.mask.numel() == 0:
        call.mask = None


def _kernel(name: str, run: Callable, results: Callable | None):
    def kernel(*arguments):
        call = _call_of(name, arguments)
        _received(call)
        if name.endswith("_forward"):
            call.save = True
        with autocast_off(call.routing.tokens):
            found = run(call)
        return None if results is None else results(call, found)

    return kernel


def _or_empty(like: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if each is None else each for each in gradients)


def _stored(call: ForwardCall, found: tuple) -> Tensor:
    mask = found[2] if stores_mask(call.x.device, call.seed, call.backend) else None
    return call.x.new_empty(0, dtype=torch.uint8) if mask is None else mask


_KERNELS = {
    "routed_lora": (_forward, lambda call, found: found[0]),
    "routed_lora_forward": (_forward, lambda call, found: (*found[:2], _stored(call, found))),
    "routed_lora_backward": (_backward, lambda call, found: _or_empty(call.dy, *found)),
    "routed_shrink": (_shrink, lambda call, found: found[0]),
    "routed_shrink_forward": (_shrink, lambda call, found: (found[0], _stored(call, found))),
    "routed_shrink_backward": (_shrink_backward, lambda call, found: _or_empty(call.x, *found[:2])),
    "routed_expand": (_expand, lambda call, found: found[0]),
    "routed_expand_backward": (_expand_backward, lambda call, found: _or_empty(call.h, *found[:3])),
    "routed_lora_": (_forward, None),
    "routed_expand_": (_expand, None),
}
for _name, (_run, _made) in _KERNELS.items():
    for _key in dispatch.DISPATCH_KEYS.values():
        _library.impl(_name, _kernel(_name, _run, _made), _key)


# --- shapes ----------------------------------------------------------------------------------


def _fake_y(call: ForwardCall) -> Tensor:
    return call.x.new_empty((*call.x.shape[:-1], call.bank.slice_columns[-1]))


def _fake_h(call: ForwardCall) -> Tensor:
    x = call.x
    wide = call.backend != "composed"
    dtype = accumulator_dtype(x.dtype) if wide else product_dtype(x)
    return x.new_empty((call.routing.tokens.shape[0], call.bank.max_total_rank), dtype=dtype)


def _fake_mask(call: ForwardCall) -> Tensor:
    shape = 0
    if stores_mask(call.x.device, call.seed, call.backend):
        shape = (call.routing.tokens.shape[0], -(-call.x.shape[-1] // GROUP))
    return call.x.new_empty(shape, dtype=torch.uint8)


def _fake_gradients(call: BackwardCall, like: Tensor, x_shape: tuple) -> tuple[Tensor, ...]:
    needs, weights = call.needs, call.new_weights(torch.empty_like)
    return (
        like.new_empty(x_shape if needs.x else 0),
        call.bank.storage.new_empty(call.layout.numel),
        like.new_empty(0) if weights is None else weights,
        call.dy.new_empty(call.dy.shape[-1] if needs.bias else 0),
    )


_FAKES = {
    "routed_lora": _fake_y,
    "routed_lora_forward": lambda call: (_fake_y(call), _fake_h(call), _fake_mask(call)),
    "routed_lora_backward": lambda call: _fake_gradients(
        call, call.dy, (*call.dy.shape[:-1], call.in_features)
    ),
    "routed_shrink": _fake_h,
    "routed_shrink_forward": lambda call: (_fake_h(call), _fake_mask(call)),
    "routed_shrink_backward": lambda call: _fake_gradients(call, call.x, call.x.shape)[:2],
    "routed_expand": lambda call: call.h.new_empty(
        (call.rows, call.bank.slice_columns[-1]), dtype=call.dtype
    ),
    "routed_expand_backward": lambda call: _fake_gradients(call, call.h, call.h.shape)[:3],
    "routed_lora_": lambda call: None,
    "routed_expand_": lambda call: None,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(
        f"lora_kernels::{_name}",
        lambda *arguments, name=_name, fake=_fake: fake(_call_of(name, arguments)),
        lib=_library,
    )


# --- autograd --------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """One of the three differentiable operations."""

    name: str
    of_backward: type[BackwardCall]
    second_order: Callable
    saved: tuple[str, ...]  # attributes of the call that a backward may need, the operand first


_LORA = _Kind("routed_lora", LoRABackward, second_order.lora_backward, ("x",))
_SHRINK = _Kind("routed_shrink", ShrinkBackward, second_order.shrink_backward, ("x", "seed"))
_EXPAND = _Kind("routed_expand", ExpandBackward, second_order.expand_backward, ("h",))
_KINDS = {kind.name: kind for kind in (_LORA, _SHRINK, _EXPAND)}


class RoutedFunction(torch.autograd.Function):
    """Saves the caller's x only where an A needs a gradient, h where a B or the weights do."""

    @staticmethod
    def forward(ctx, kind, call, operand, bias, pair_weights, *parameters):
        """``operand`` is x, or h for an expand."""
        if kind is not _SHRINK:
            call.routing = call.routing._replace(pair_weights=pair_weights)
        if kind is _LORA:
            call.save = True
        with _below_autograd():
            y, h, mask = _with_saved(kind, call)
        x, base, ctx.edge_to_x = None, None, None
        if kind is _LORA:
            base = call.base
            needs_a, needs_b = call.layout.needs_gradient(call.bank)
            needs_h = needs_b or ctx.needs_input_grad[4]
            x, h = operand if needs_a else None, h if needs_h else None
            if needs_h and not needs_a and ctx.needs_input_grad[2]:
                ctx.edge_to_x = missing_edge(operand, second_order.X_WAS_NOT_SAVED)
        elif kind is _SHRINK:
            x, h = operand, None
        else:
            h = operand
        weights = () if base is None else base.tensors()
        ctx.save_for_backward(
            x, h, mask, call.seed, pair_weights, *weights,
            # For their versions: a routing that was filled again must not be read, and changing a
            # parameter before the backward raises.
            call.routing.tokens, *call.trained.used(call.routing),
        )  # fmt: skip
        ctx.base = len(weights), *(("", ()) if base is None else (base.format, base.meta))
        bank = call.bank
        # Only the tables of reserved memory, an arena, may hold something else by then.
        if bank.storage.ndim == 1 and is_captured(bank.storage.device):
            bank = bank._replace(
                scaling=bank.scaling.clone(), threshold_table=bank.threshold_table.clone()
            )
        ctx.kind, ctx.routing = kind, call.routing._replace(pair_weights=None)
        ctx.call = functools.partial(
            kind.of_backward, bank, backend=call.backend, place=call.place, alone=call.alone,
            layout=call.layout, trained=call.trained, in_features=operand.shape[-1],
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx, dy):
        x, h, mask, seed, pair_weights, *others = ctx.saved_tensors
        _, _, needs_x, needs_bias, needs_weights, *needs = ctx.needs_input_grad
        count, *base = ctx.base
        call = ctx.call(
            routing=ctx.routing._replace(pair_weights=pair_weights), x=x, h=h, mask=mask, seed=seed,
            base=rebuild(others[:count], *base), dy=dy,
            needs=Needs(needs_x, needs_weights, needs_bias),
        )  # fmt: skip
        with autocast_off(dy):
            if torch.is_grad_enabled() or _is_batched(dy):  # create_graph, vectorize
                dx, gradients, *grads = ctx.kind.second_order(call, needs, ctx.edge_to_x)
            else:
                name = f"{ctx.kind.name}_backward"
                with _below_autograd():
                    if call.alone and is_plain_eager(call.routing.tokens):
                        dx, flat, *grads = _KERNELS[name][0](call)
                    else:
                        dx, flat, *grads = Gradients(*_op(name, call))
                gradients = call.trained.gradients(flat)
        grad_weights, grad_bias = grads
        return (
            None,
            None,
            dx if needs_x else None,
            grad_bias if needs_bias else None,
            grad_weights if needs_weights else None,
            *gradients,
        )


# RoutedFunction.apply without what it does for torch.func, which takes half of its time. torch's
# stubs have no class between Function and object.
_apply_eagerly = super(torch.autograd.Function, RoutedFunction).apply  # pyright: ignore[reportAttributeAccessIssue]


def _with_saved(
    kind: _Kind, call: ForwardCall | ExpandCall
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(y, h, mask)`` of a forward that a backward follows."""
    if call.alone:
        y, h, mask = _KERNELS[kind.name][0](call)
        stored = mask is not None and stores_mask(y.device, call.seed, call.backend)
        return y, h, mask if stored else None
    if kind is _EXPAND:
        return _op(kind.name, call), None, None
    y, *others = _op(f"{kind.name}_forward", call)
    h, mask = others if kind is _LORA else (None, *others)
    # As many tensors whichever way the call took: checkpointing counts them.
    return y, h, mask if mask.numel() else None


def _op(name: str, call: RoutedCall):
    return getattr(_OPS, name)(*_arguments_of(name, call))


def _tensors_of(call: ForwardCall | ExpandCall, weights: Tensor | None) -> Sequence[Tensor | None]:
    """What may need a gradient, in the order of :class:`RoutedFunction`."""
    if isinstance(call, ExpandCall):
        return call.h, None, weights, *call.trained.parameters
    return call.x, call.bias, weights, *call.trained.parameters


def run(name: str, call: ForwardCall | ExpandCall) -> Tensor:
    """The op, or past it the backend straight where nothing else has to see the call."""
    if not call.alone:
        return _op(name, call)
    tokens, kind = call.routing.tokens, _KINDS[name]
    if _autocasts() and torch.is_autocast_enabled(tokens.device.type):
        with autocast_off(tokens):
            return run(name, call)
    weights = None if kind is _SHRINK else call.routing.pair_weights
    tensors = _tensors_of(call, weights) if torch.is_grad_enabled() else None
    if tensors is None or not requires_grad(tensors):
        with _below_autograd():
            return _KERNELS[name][0](call)[0]
    try:
        return _apply_eagerly(kind, call, *tensors)
    except RuntimeError as error:
        saved = {name: getattr(call, name) for name in kind.saved}
        saved[kind.saved[0]] = tensors[0]  # as it was given: the call has its rows by now
        base = call.base if isinstance(call, ForwardCall) else None
        name_unsaved(error, **saved, weight=None if base is None else base.tensors()[0])
        raise


def run_in_place(name: str, call: ForwardCall | ExpandCall, out: Tensor) -> None:
    """Add into ``out``, which autograd does not see: no gradient is needed."""
    call.out = out
    if call.alone:
        with autocast_off(out), _below_autograd():
            _KERNELS[name][0](call)
        torch.autograd.graph.increment_version(out)
    else:
        _op(name, call)


def _differentiable(name: str):
    def kernel(*arguments):
        kind, call = _KINDS[name], _call_of(name, arguments)
        tensors = _tensors_of(call, None if kind is _SHRINK else call.routing.pair_weights)
        if requires_grad(tensors):
            return RoutedFunction.apply(kind, call, *tensors)
        call.trained = NOTHING_TRAINED
        with _below_autograd():
            return _op(name, call)

    return kernel


def _without_gradient(name: str):
    def kernel(*arguments):
        if requires_grad(arguments):
            raise RuntimeError(f"{name} is not differentiable; routed_lora is, any number of times")
        with _below_autograd():
            result = getattr(_OPS, name)(*arguments)
        if result is None:  # in place: autograd must know that ``out`` has changed
            torch.autograd.graph.increment_version(_call_of(name, arguments).out)
        return result

    return kernel


for _name in _SIGNATURES:
    _registered = _differentiable(_name) if _name in _KINDS else _without_gradient(_name)
    _library.impl(_name, _registered, "Autograd")
