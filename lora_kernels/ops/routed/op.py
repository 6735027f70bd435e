"""torch.library registration of ``routed_lora`` and its halves, and their autograd.Functions.

``routed_lora`` (with or without a base weight), ``routed_shrink`` and ``routed_expand`` are
differentiable, any number of times (see :mod:`second_order`); the first two have a twin that also
returns what the backward needs. ``..._`` ops add into a tensor and have no gradient. A bank and a
routing travel as their fields, see :mod:`operands`. The gradients of all factors come in one flat
tensor, of which the Functions hand out views. The parameters are arguments for autograd's sake
only: values are read from the bank's storage.

Optional results are empty tensors of shape ``[0]`` where they do not exist.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.narrow.products import product_dtype
from lora_kernels.ops.narrow.second_order import missing_edge
from lora_kernels.ops.routed import composed, cpu, second_order
from lora_kernels.ops.routed.bank.storage import is_moved_anchor
from lora_kernels.ops.routed.tensors import (
    BankTensors,
    GradientLayout,
    RoutingTensors,
    in_one_piece,
)
from lora_kernels.runtime import dispatch
from lora_kernels.runtime.capture import is_captured
from lora_kernels.runtime.dropout import GROUP
from lora_kernels.runtime.dtypes import accumulator_dtype
from lora_kernels.runtime.eager import is_plain_eager, requires_grad, restore_leading_dims
from lora_kernels.runtime.tensor_state import name_unsaved

_library = torch.library.Library("lora_kernels", "FRAGMENT")

_CONTEXT = (
    "Tensor[] factors, int[] slots, int[] thresholds, int[] slice_columns, int width, "
    "Tensor storage, Tensor table, Tensor scaling, Tensor threshold_table, "
    "Tensor tokens, Tensor offsets, Tensor tiles, Tensor inverse, Tensor? pair_weights, "
    "Tensor plan, int pairs_per_token, int block"
)
_LAYOUT = "int[] grad_slots, int[] grad_offsets, int grad_numel, Tensor grad_table"
_PARAMETERS = "Tensor[] parameters, int[] parameter_offsets, int[] parameter_slots"
_NUM_BANK, _NUM_ROUTING, _NUM_LAYOUT = (
    len(fields._fields) for fields in (BankTensors, RoutingTensors, GradientLayout)
)

_STORAGE = BankTensors._fields.index("storage")

for _schema in (
    f"routed_lora({_CONTEXT}, {_LAYOUT}, Tensor x, Tensor? weight, Tensor? bias, Tensor? seed, "
    f"str backend, {_PARAMETERS}) -> Tensor",
    f"routed_lora_forward({_CONTEXT}, Tensor x, Tensor? weight, Tensor? bias, Tensor? seed, "
    "str backend) -> (Tensor y, Tensor h, Tensor mask)",
    f"routed_lora_backward({_CONTEXT}, {_LAYOUT}, Tensor dy, Tensor? x, Tensor? weight, Tensor? h, "
    "Tensor mask, Tensor? seed, SymInt in_features, bool[3] needs, str backend)"
    " -> (Tensor dx, Tensor grad, Tensor grad_weights, Tensor grad_bias)",
    f"routed_shrink({_CONTEXT}, {_LAYOUT}, Tensor x, Tensor? seed, str backend, {_PARAMETERS})"
    " -> Tensor",
    f"routed_shrink_forward({_CONTEXT}, Tensor x, Tensor? seed, str backend)"
    " -> (Tensor h, Tensor mask)",
    f"routed_shrink_backward({_CONTEXT}, {_LAYOUT}, Tensor t, Tensor x, Tensor mask, "
    "Tensor? seed, bool needs_x, str backend) -> (Tensor dx, Tensor grad)",
    f"routed_expand({_CONTEXT}, {_LAYOUT}, Tensor h, SymInt rows, ScalarType dtype, str backend, "
    f"{_PARAMETERS}) -> Tensor",
    f"routed_expand_backward({_CONTEXT}, {_LAYOUT}, Tensor dy, Tensor h, bool[2] needs, "
    "str backend) -> (Tensor t, Tensor grad, Tensor grad_weights)",
    f"routed_lora_({_CONTEXT}, Tensor(a!) out, Tensor x, Tensor? seed, str backend) -> ()",
    f"routed_expand_({_CONTEXT}, Tensor(a!) out, Tensor h, str backend) -> ()",
):
    _library.define(_schema)

_OPS = torch.ops.lora_kernels
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def _module(backend: str, like: Tensor) -> ModuleType:
    """The module that serves a resolved backend; Triton is imported when it is first asked for."""
    if backend not in ("triton", "native"):
        return composed
    if backend == "native" and like.device.type == "cpu":
        return cpu
    from lora_kernels.ops.routed import cuda
    from lora_kernels.ops.routed import triton as launch

    return cuda if backend == "native" else launch


def stores_mask(device: torch.device, seed: Tensor | None, backend: str) -> bool:
    """Whether the forward hands its packed keep-mask to the backward; elsewhere it is drawn again.

    Known from the arguments alone, so that fake tensors agree.
    """
    return seed is not None and device.type in ("cpu", "meta") and backend != "triton"


def _unpack(arguments: tuple) -> tuple[BankTensors, RoutingTensors, tuple]:
    bank, rest = BankTensors(*arguments[:_NUM_BANK]), arguments[_NUM_BANK:]
    return bank, RoutingTensors(*rest[:_NUM_ROUTING]), rest[_NUM_ROUTING:]


def _unpack_with_layout(arguments: tuple):
    bank, routing, rest = _unpack(arguments)
    return bank, routing, GradientLayout(*rest[:_NUM_LAYOUT]), rest[_NUM_LAYOUT:]


def _rows(x: Tensor) -> Tensor:
    return _with_values(x).reshape(-1, x.shape[-1])


def _with_values(x: Tensor) -> Tensor:
    """x itself, unless it is one of torch's lazy tensors: kernels read memory."""
    if x._is_zerotensor():
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return x.resolve_neg()


def _or_empty(like: Tensor, tensor: Tensor | None) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


# --- kernels ---------------------------------------------------------------------------------


def _without_autocast(function):
    """The ops do their own casts; autocast must not add any below them."""

    def kernel(*arguments):
        kind = arguments[_NUM_BANK].device.type  # of the routing's tokens
        storage = arguments[_STORAGE]
        if storage.ndim == 2 and is_captured(storage.device):  # by a compiled graph
            raise RuntimeError(
                "a captured CUDA graph holds addresses: call reserve() on the bank before, so that "
                "what it reads stays where it is"
            )
        if is_moved_anchor(storage):  # by who gives an op copies of its arguments
            bank = in_one_piece(BankTensors(*arguments[:_NUM_BANK]))
            arguments = (*bank, *arguments[_NUM_BANK:])
        if not torch.is_autocast_enabled(kind):
            return function(*arguments)
        with torch.autocast(kind, enabled=False):
            return function(*arguments)

    return kernel


@_without_autocast
def _forward(*arguments):
    bank, routing, (x, weight, bias, seed, backend) = _unpack(arguments)
    y, h, mask = _module(backend, x).forward(_rows(x), weight, bias, bank, routing, seed, True)
    if not stores_mask(x.device, seed, backend):
        mask = None
    return (
        restore_leading_dims(y, x),
        h,
        x.new_empty(0, dtype=torch.uint8) if mask is None else mask,
    )


@_without_autocast
def _inference(*arguments):
    bank, routing, _, (x, weight, bias, seed, backend, *_) = _unpack_with_layout(arguments)
    y, _, _ = _module(backend, x).forward(_rows(x), weight, bias, bank, routing, seed, False)
    return restore_leading_dims(y, x)


@_without_autocast
def _backward(*arguments):
    bank, routing, layout, rest = _unpack_with_layout(arguments)
    dy, x, weight, h, mask, seed, in_features, needs, backend = rest
    dx, grad, grad_weights, grad_bias = _module(backend, dy).backward(
        _rows(dy), None if x is None else _rows(x), weight, bank, routing, layout, h,
        _or_none(mask), seed, in_features, tuple(needs),
    )  # fmt: skip
    return (
        dy.new_empty(0) if dx is None else dx.view(*dy.shape[:-1], in_features),
        grad,
        _or_empty(dy, grad_weights),
        _or_empty(dy, grad_bias),
    )


@_without_autocast
def _shrink(*arguments):
    bank, routing, (x, seed, backend) = _unpack(arguments)
    h, mask = _module(backend, x).shrink(_rows(x), bank, routing, seed)
    if not stores_mask(x.device, seed, backend):
        mask = None
    return h, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def _shrink_inference(*arguments):
    bank, routing, _, (x, seed, backend, *_) = _unpack_with_layout(arguments)
    return _shrink(*bank, *routing, x, seed, backend)[0]


@_without_autocast
def _shrink_backward(*arguments):
    bank, routing, layout, rest = _unpack_with_layout(arguments)
    t, x, mask, seed, needs_x, backend = rest
    dx, grad = _module(backend, x).shrink_backward(
        _with_values(t), _rows(x), bank, routing, layout, _or_none(mask), seed, needs_x
    )
    return x.new_empty(0) if dx is None else dx.view(x.shape), grad


@_without_autocast
def _expand(*arguments):
    bank, routing, _, (h, rows, dtype, backend, *_) = _unpack_with_layout(arguments)
    out = h.new_zeros((rows, bank.slice_columns[-1]), dtype=dtype)
    _module(backend, h).expand_(out, _with_values(h), bank, routing)
    return out


@_without_autocast
def _expand_backward(*arguments):
    bank, routing, layout, (dy, h, needs, backend) = _unpack_with_layout(arguments)
    t, grad, grad_weights = _module(backend, h).expand_backward(
        _rows(dy), _with_values(h), bank, routing, layout, tuple(needs)
    )
    return (
        h.new_empty(0) if t is None else t.to(h.dtype),
        grad,
        _or_empty(h, grad_weights),
    )


@_without_autocast
def _lora_in_place(*arguments):
    bank, routing, (out, x, seed, backend) = _unpack(arguments)
    # A view, or the rows could not be added to in place: the public function sees to it.
    _module(backend, x).add_(out.view(-1, out.shape[-1]), _rows(x), bank, routing, seed)


@_without_autocast
def _expand_in_place(*arguments):
    bank, routing, (out, h, backend) = _unpack(arguments)
    _module(backend, h).expand_(out.view(-1, out.shape[-1]), _with_values(h), bank, routing)


_KERNELS = {
    "routed_lora": _inference,
    "routed_lora_forward": _forward,
    "routed_lora_backward": _backward,
    "routed_shrink": _shrink_inference,
    "routed_shrink_forward": _shrink,
    "routed_shrink_backward": _shrink_backward,
    "routed_expand": _expand,
    "routed_expand_backward": _expand_backward,
    "routed_lora_": _lora_in_place,
    "routed_expand_": _expand_in_place,
}
for _name, _kernel in _KERNELS.items():
    for _key in dispatch.DISPATCH_KEYS.values():
        _library.impl(_name, _kernel, _key)


# --- shapes ----------------------------------------------------------------------------------


def _fake(name: str):
    return torch.library.register_fake(f"lora_kernels::{name}", lib=_library)


@_fake("routed_lora")
def _(*arguments):
    bank, _, _, (x, *_) = _unpack_with_layout(arguments)
    return x.new_empty((*x.shape[:-1], bank.slice_columns[-1]))


def _fake_h(x: Tensor, bank: BankTensors, routing: RoutingTensors, backend: str) -> Tensor:
    dtype = accumulator_dtype(x.dtype) if backend in ("triton", "native") else product_dtype(x)
    return x.new_empty((routing.tokens.shape[0], bank.width), dtype=dtype)


def _fake_mask(x: Tensor, routing: RoutingTensors, seed: Tensor | None, backend: str) -> Tensor:
    shape = 0
    if stores_mask(x.device, seed, backend):
        shape = (routing.tokens.shape[0], -(-x.shape[-1] // GROUP))
    return x.new_empty(shape, dtype=torch.uint8)


@_fake("routed_lora_forward")
def _(*arguments):
    bank, routing, (x, _weight, _bias, seed, backend) = _unpack(arguments)
    return (
        x.new_empty((*x.shape[:-1], bank.slice_columns[-1])),
        _fake_h(x, bank, routing, backend),
        _fake_mask(x, routing, seed, backend),
    )


@_fake("routed_lora_backward")
def _(*arguments):
    bank, routing, layout, rest = _unpack_with_layout(arguments)
    dy, in_features, (needs_x, needs_weights, needs_bias) = rest[0], rest[6], rest[7]
    return (
        dy.new_empty((*dy.shape[:-1], in_features) if needs_x else 0),
        bank.storage.new_empty(layout.numel),
        torch.empty_like(routing.pair_weights) if needs_weights else dy.new_empty(0),
        dy.new_empty(dy.shape[-1] if needs_bias else 0),
    )


@_fake("routed_shrink")
def _(*arguments):
    bank, routing, _, (x, _seed, backend, *_) = _unpack_with_layout(arguments)
    return _fake_h(x, bank, routing, backend)


@_fake("routed_shrink_forward")
def _(*arguments):
    bank, routing, (x, seed, backend) = _unpack(arguments)
    return _fake_h(x, bank, routing, backend), _fake_mask(x, routing, seed, backend)


@_fake("routed_shrink_backward")
def _(*arguments):
    bank, _, layout, (_t, x, _mask, _seed, needs_x, _backend) = _unpack_with_layout(arguments)
    return x.new_empty(x.shape if needs_x else 0), bank.storage.new_empty(layout.numel)


@_fake("routed_expand")
def _(*arguments):
    bank, _, _, (h, rows, dtype, *_) = _unpack_with_layout(arguments)
    return h.new_empty((rows, bank.slice_columns[-1]), dtype=dtype)


@_fake("routed_expand_backward")
def _(*arguments):
    bank, routing, layout, (_dy, h, (needs_h, needs_weights), _) = _unpack_with_layout(arguments)
    return (
        h.new_empty(h.shape if needs_h else 0),
        bank.storage.new_empty(layout.numel),
        torch.empty_like(routing.pair_weights) if needs_weights else h.new_empty(0),
    )


@_fake("routed_lora_")
def _(*arguments):
    return None


@_fake("routed_expand_")
def _(*arguments):
    return None


# --- autograd --------------------------------------------------------------------------------


def _call(name: str, *arguments):
    """The op, or its kernel straight where nothing records or replaces operations.

    Through the dispatcher some twenty arguments are boxed twice, which a small batch feels.
    """
    at_once = is_plain_eager(arguments[_NUM_BANK])
    with torch._C._AutoDispatchBelowAutograd():
        return (_KERNELS[name] if at_once else getattr(_OPS, name))(*arguments)


class _Parameters(NamedTuple):
    """Where the gradients of the parameters lie in the flat tensor, and whose they are."""

    offsets: list[int]  # -1 where none is needed
    slots: list[int]

    def used(self, parameters: tuple[Tensor, ...], routing: RoutingTensors) -> list[Tensor]:
        """The parameters of the adapters that the batch uses, as far as the host knows.

        They are saved for their version counters: changing one before the backward raises, while
        other adapters may take their steps.
        """
        if type(routing.plan) is not Tensor or torch._C._len_torch_dispatch_stack() > 0:
            return []  # a graph is being traced: there are no values to look at
        slots = set(routing.plan[:, 0].tolist())
        return [p for p, slot in zip(parameters, self.slots, strict=True) if slot in slots]

    def gradients(self, flat: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor | None]:
        return [
            flat.as_strided(parameter.shape, (parameter.shape[1], 1), offset)
            if offset >= 0
            else None
            for offset, parameter in zip(self.offsets, parameters, strict=True)
        ]


class _Function(torch.autograd.Function):
    """What the three have in common. ``context`` is (bank, routing without weights, layout)."""

    @staticmethod
    def keep(ctx, saved, bank, routing, layout, places: _Parameters, backend, parameters) -> None:
        # The tokens for their version too: a routing that was filled again must not be read.
        ctx.save_for_backward(*saved, routing.tokens, *places.used(parameters, routing))
        if is_captured(bank.storage.device):  # only then may the tables hold something else later
            bank = bank._replace(
                scaling=bank.scaling.clone(), threshold_table=bank.threshold_table.clone()
            )
        ctx.context = bank, routing._replace(pair_weights=None), layout
        ctx.places, ctx.parameters, ctx.backend = places, parameters, backend

    @staticmethod
    def saved(ctx, count: int, pair_weights_at: int | None = None):
        """``(bank, routing, layout)`` with the weights in it, and the first saved tensors."""
        tensors = ctx.saved_tensors[:count]
        bank, routing, layout = ctx.context
        if pair_weights_at is not None:
            routing = routing._replace(pair_weights=tensors[pair_weights_at])
        return (bank, routing, layout), tensors

    @staticmethod
    def factors(ctx) -> second_order.Factors:
        needs = ctx.needs_input_grad[len(ctx.needs_input_grad) - len(ctx.parameters) :]
        return second_order.Factors(ctx.parameters, ctx.places.slots, needs)


class RoutedLoRAFunction(_Function):
    """The base layer and the adapters' contributions; saves the caller's x, h and the mask."""

    @staticmethod
    def forward(
        ctx, bank, routing, layout, places, backend, x, weight, bias, seed, pair_weights, *factors
    ):
        routing = routing._replace(pair_weights=pair_weights)
        y, h, mask = _call("routed_lora_forward", *bank, *routing, x, weight, bias, seed, backend)
        trains_a, trains_b = layout.trains(bank)
        needs_h = trains_b or ctx.needs_input_grad[9]
        saved = x if trains_a else None, weight, h if needs_h else None, mask, seed, pair_weights
        _Function.keep(ctx, saved, bank, routing, layout, places, backend, factors)
        ctx.in_features, ctx.edge_to_x = x.shape[-1], None
        if needs_h and not trains_a and ctx.needs_input_grad[5]:
            ctx.edge_to_x = missing_edge(x, second_order.X_WAS_NOT_SAVED)
        return y

    @staticmethod
    def backward(ctx, dy):
        context, (x, weight, h, mask, seed, _) = _Function.saved(ctx, 6, pair_weights_at=5)
        needs_x, _, needs_bias, _, needs_weights = ctx.needs_input_grad[5:10]
        needs = needs_x, needs_weights, needs_bias
        if _takes_torch(dy):
            bank, routing, _ = context
            dx, gradients, grad_weights, grad_bias = _in_torch(
                second_order.lora_backward, dy, x, weight, bank, routing, _Function.factors(ctx),
                h, _or_none(mask), seed, ctx.in_features, needs, ctx.edge_to_x,
            )  # fmt: skip
        else:
            dx, flat, grad_weights, grad_bias = _call(
                "routed_lora_backward", *_flat(context), dy, x, weight, h, mask, seed,
                ctx.in_features, list(needs), ctx.backend,
            )  # fmt: skip
            gradients = ctx.places.gradients(flat, ctx.parameters)
        return (
            *(None,) * 5,
            dx if needs_x else None,
            None,
            grad_bias if needs_bias else None,
            None,
            grad_weights if needs_weights else None,
            *gradients,
        )


class RoutedShrinkFunction(_Function):
    @staticmethod
    def forward(ctx, bank, routing, layout, places, backend, x, seed, *factors):
        h, mask = _call("routed_shrink_forward", *bank, *routing, x, seed, backend)
        _Function.keep(ctx, (x, mask, seed), bank, routing, layout, places, backend, factors)
        return h

    @staticmethod
    def backward(ctx, t):
        context, (x, mask, seed) = _Function.saved(ctx, 3)
        needs_x = ctx.needs_input_grad[5]
        if _takes_torch(t):
            bank, routing, _ = context
            dx, gradients = _in_torch(
                second_order.shrink_backward, t, x, bank, routing, _Function.factors(ctx),
                _or_none(mask), seed, needs_x,
            )  # fmt: skip
        else:
            dx, flat = _call(
                "routed_shrink_backward", *_flat(context), t, x, mask, seed, needs_x, ctx.backend
            )
            gradients = ctx.places.gradients(flat, ctx.parameters)
        return (*(None,) * 5, dx if needs_x else None, None, *gradients)


class RoutedExpandFunction(_Function):
    @staticmethod
    def forward(
        ctx, bank, routing, layout, places, backend, h, rows, dtype, pair_weights, *factors
    ):
        routing = routing._replace(pair_weights=pair_weights)
        y = _call("routed_expand", *bank, *routing, *layout, h, rows, dtype, backend, [], [], [])
        _Function.keep(ctx, (h, pair_weights), bank, routing, layout, places, backend, factors)
        return y

    @staticmethod
    def backward(ctx, dy):
        context, (h, _) = _Function.saved(ctx, 2, pair_weights_at=1)
        needs_h, _, _, needs_weights = ctx.needs_input_grad[5:9]
        needs = needs_h, needs_weights
        if _takes_torch(dy):
            bank, routing, _ = context
            t, gradients, grad_weights = _in_torch(
                second_order.expand_backward, dy, h, bank, routing, _Function.factors(ctx), needs
            )
        else:
            t, flat, grad_weights = _call(
                "routed_expand_backward", *_flat(context), dy, h, list(needs), ctx.backend
            )
            gradients = ctx.places.gradients(flat, ctx.parameters)
        return (
            *(None,) * 5,
            t if needs_h else None,
            None,
            None,
            grad_weights if needs_weights else None,
            *gradients,
        )


def _flat(context: tuple) -> tuple:
    return tuple(field for fields in context for field in fields)


def _takes_torch(gradient: Tensor) -> bool:
    """Whether a backward is differentiated in its turn (create_graph), or is many (vectorize)."""
    return torch.is_grad_enabled() or _is_batched(gradient)


def _in_torch(backward, dy: Tensor, *arguments):
    """A differentiable backward; autocast must not add casts to it."""
    with torch.autocast(dy.device.type, enabled=False):
        return backward(dy, *arguments)


def _lora_autograd(*arguments):
    bank, routing, layout, rest = _unpack_with_layout(arguments)
    x, weight, bias, seed, backend, parameters, offsets, slots = rest
    if not requires_grad((x, bias, routing.pair_weights, *parameters)):
        return _call("routed_lora", *arguments[:-3], [], [], [])
    return RoutedLoRAFunction.apply(
        bank, routing, layout, _Parameters(offsets, slots), backend, x, weight, bias, seed,
        routing.pair_weights, *parameters,
    )  # fmt: skip


def _shrink_autograd(*arguments):
    bank, routing, layout, rest = _unpack_with_layout(arguments)
    x, seed, backend, parameters, offsets, slots = rest
    if not requires_grad((x, *parameters)):
        return _call("routed_shrink", *arguments[:-3], [], [], [])
    return RoutedShrinkFunction.apply(
        bank, routing, layout, _Parameters(offsets, slots), backend, x, seed, *parameters
    )


def _expand_autograd(*arguments):
    bank, routing, layout, rest = _unpack_with_layout(arguments)
    h, rows, dtype, backend, parameters, offsets, slots = rest
    if not requires_grad((h, routing.pair_weights, *parameters)):
        return _call("routed_expand", *arguments[:-3], [], [], [])
    return RoutedExpandFunction.apply(
        bank, routing, layout, _Parameters(offsets, slots), backend, h, rows, dtype,
        routing.pair_weights, *parameters,
    )  # fmt: skip


def _without_gradient(name: str):
    def kernel(*arguments):
        if requires_grad(arguments):
            raise RuntimeError(f"{name} is not differentiable; routed_lora is, any number of times")
        result = _call(name, *arguments)
        if result is None:  # in place: autograd must know that ``out`` has changed
            _, _, (out, *_) = _unpack(arguments)
            torch.autograd.graph.increment_version(out)
        return result

    return kernel


def call_differentiable(name: str, tokens: Tensor, *arguments):
    """The op, or its Autograd kernel straight where nothing else has to see the call."""
    if not is_plain_eager(tokens) or torch._C._are_functorch_transforms_active():
        return getattr(_OPS, name)(*arguments)
    try:
        return _DIFFERENTIABLE[name](*arguments)
    except RuntimeError as error:
        *_, inputs = _unpack_with_layout(arguments)
        name_unsaved(error, **dict(zip(_SAVED_INPUTS[name], inputs, strict=False)))
        raise


# The first inputs, as far as they may be saved.
_SAVED_INPUTS = {
    "routed_lora": ("x", "weight"),
    "routed_shrink": ("x", "seed"),
    "routed_expand": ("h",),
}
_DIFFERENTIABLE = {
    "routed_lora": _lora_autograd,
    "routed_shrink": _shrink_autograd,
    "routed_expand": _expand_autograd,
}
for _name in _KERNELS:
    _library.impl(_name, _DIFFERENTIABLE.get(_name) or _without_gradient(_name), "Autograd")
