"""The backwards of ``routed_lora`` and its halves in differentiable torch, for create_graph=True.

And for many gradients at once (is_grads_batched, ``jacobian(vectorize=True)``), which torch's own
operations have rules for.

Dimensions: M tokens, P pairs, K in_features, N out_features of all slices, H the widest rank of the
bank, n the pairs of one group, R_s the rank of one slice and N_s its columns.

Whatever backend ran the forward: h is computed again from x, and the factors are read from the
parameters, which second derivatives must reach; masks and scalings are constants. The base's
product stays in dy's dtype as the frozen layer's; the adapters' are computed in fp32 (fp64 for
fp64), so that nothing narrow is rounded between one derivative and the next.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.ops.narrow.second_order import drop, with_missing_edge
from lora_kernels.ops.routed.call import (
    BackwardCall,
    ExpandBackward,
    LoRABackward,
    ShrinkBackward,
)
from lora_kernels.ops.routed.pairs import pairs_of
from lora_kernels.ops.routed.tensors import check_groups_can_be_read, groups_of
from lora_kernels.runtime.dropout import packed_keep_mask_of_rows, unpacked_keep_mask
from lora_kernels.runtime.dtypes import accumulator_dtype

X_WAS_NOT_SAVED = (
    "routed_lora: a gradient of lora_b or of the routing's weights is differentiated with respect "
    "to x, which was not saved because every lora_a is frozen; let one require grad in the forward"
)


Found = tuple[Tensor | None, list[Tensor | None], Tensor | None, Tensor | None]


def lora_backward(call: LoRABackward, needs_of: Sequence[bool], edge_to_x: Tensor | None) -> Found:
    """Gradients of x, of each parameter, of the weights and of bias; None where not needed.

    ``needs_of`` says of each parameter whether the forward was to be differentiated by it,
    ``edge_to_x`` ``[0]`` is the missing edge where x needs a gradient and was not saved.
    """
    x, h, dy, needs, in_features = call.x, call.h, call.dy, call.needs, call.in_features
    rows = dy.reshape(-1, dy.shape[-1])
    backward = _Backward(call, needs_of, rows, in_features)
    if x is not None:
        x = (x if needs.x else x.detach()).reshape(-1, in_features).to(backward.dtype)
        h = backward.shrink(x)
    elif h is not None:
        h = with_missing_edge(h.to(backward.dtype), edge_to_x)
    t, grad_weights = backward.expand_backward(rows.to(backward.dtype), h)
    tail = backward.shrink_backward(t, x, rows.shape[0], needs.x)
    if tail is not None:
        tail = tail if call.base is None else call.base.matmul_t(rows) + tail
        tail = tail.to(dy.dtype).reshape(*dy.shape[:-1], in_features)
    return tail, backward.gradients(), grad_weights, rows.sum(0) if needs.bias else None


def shrink_backward(call: ShrinkBackward, needs_of: Sequence[bool], _: Tensor | None) -> Found:
    """Gradients of x and of each parameter."""
    x, needs_x = call.x, call.needs.x
    rows = (x if needs_x else x.detach()).reshape(-1, x.shape[-1])
    backward = _Backward(call, needs_of, rows, x.shape[-1])
    t, wide = call.dy.to(backward.dtype), rows.to(backward.dtype)
    tail = backward.shrink_backward(t, wide, rows.shape[0], needs_x)
    dx = None if tail is None else tail.to(x.dtype).reshape(x.shape)
    return dx, backward.gradients(), None, None


def expand_backward(call: ExpandBackward, needs_of: Sequence[bool], _: Tensor | None) -> Found:
    """Gradients of h, of each parameter and of the weights."""
    h, needs = call.h, call.needs
    rows = call.dy.reshape(-1, call.dy.shape[-1])
    backward = _Backward(call, needs_of, rows, 0)
    narrow = (h if needs.x else h.detach()).to(backward.dtype)
    t, grad_weights = backward.expand_backward(rows.to(backward.dtype), narrow)
    return t.to(h.dtype) if needs.x else None, backward.gradients(), grad_weights, None


class _Slice(NamedTuple):
    """One slice of one adapter."""

    index: int  # of its A among the parameters; its B follows
    a: Tensor  # [R_s, K]
    b: Tensor  # [N_s, R_s]
    columns: slice  # of the result
    ranks: slice  # of h


class _Group(NamedTuple):
    """The pairs of one adapter."""

    slot: int
    pairs: slice
    tokens: Tensor  # [n] int64
    slices: list[_Slice]
    scaling: Tensor  # []
    p: float  # of the dropout


class _Backward:
    """One backward; adds up the gradients of the parameters as it goes."""

    def __init__(
        self,
        call: BackwardCall,
        needs_of: Sequence[bool],  # of each parameter
        like: Tensor,  # in the dtype of the activations
        in_features: int,
    ) -> None:
        self.call, self.needs_of, self.in_features = call, needs_of, in_features
        self.dtype = accumulator_dtype(like.dtype)
        self.weights = call.routing.pair_weights
        if self.weights is not None:
            weights = self.weights if call.needs.weights else self.weights.detach()
            self.weights = weights.to(self.dtype)
        self._gradients: dict[int, Tensor] = {}
        self.groups = list(self._groups())

    def _groups(self) -> Iterator[_Group]:
        bank, routing = self.call.bank, self.call.routing
        check_groups_can_be_read(routing.tokens.device)
        if not routing.plan.shape[0]:  # a backend without loops on the host
            routing = routing._replace(plan=groups_of(routing.offsets, routing.tokens))
        first_of: dict[int, int] = {}  # of each adapter's parameters
        for index, slot in enumerate(self.call.trained.slots):
            first_of.setdefault(slot, index)
        for slot, pairs in ((group.slot, group.pairs) for group in pairs_of(routing).groups):
            if slot not in first_of:
                continue
            adapter, index, slices = bank.slots.index(slot), first_of[slot], []
            for _, columns, ranks in bank.parts_of(adapter):
                a, b = self._factor(index), self._factor(index + 1)
                slices.append(_Slice(index, a, b, columns, ranks))
                index += 2
            tokens, p = routing.tokens[pairs].long(), bank.thresholds[adapter] / 65536
            yield _Group(slot, pairs, tokens, slices, bank.scaling[slot], p)

    def _factor(self, index: int) -> Tensor:
        """A parameter; a constant, where it became trainable since the forward."""
        factor = self.call.trained.parameters[index]
        return (factor if self.needs_of[index] else factor.detach()).to(self.dtype)

    def shrink(self, x: Tensor) -> Tensor:
        """``D(x) A^T`` of every pair: ``[M, K] -> [P, H]``."""
        rows = []
        for group in self.groups:
            dropped = self._drop(group, x[group.tokens])
            rows.append(torch.cat([dropped @ each.a.t() for each in group.slices], dim=1))
        return self._narrow(rows)

    def expand_backward(self, dy: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """t ``[P, H]`` and the gradient of the weights; that of each B on the way."""
        t, grad_weights = [], []
        for group in self.groups:
            scale, rows = group.scaling, dy[group.tokens]
            if self.weights is not None:
                scale = self.weights[group.pairs].unsqueeze(1) * scale
            parts = [_part(rows, 1, each.columns) @ each.b for each in group.slices]
            unscaled = torch.cat(parts, dim=1)  # [n, R]
            t.append(unscaled * scale)
            if h is None:
                continue
            narrow = _part(h, 0, group.pairs).narrow(1, 0, unscaled.shape[1])
            if self.call.needs.weights:
                values = (unscaled * narrow).sum(1, keepdim=True) * group.scaling
                grad_weights.append(values)
            for each in group.slices:
                if self.needs_of[each.index + 1]:
                    scaled = _part(narrow * scale, 1, each.ranks)
                    self._gradients[each.index + 1] = _part(rows, 1, each.columns).t() @ scaled
        weights = self.call.routing.pair_weights
        if weights is None or not self.call.needs.weights:
            return self._narrow(t), None
        return self._narrow(t), self._of_pairs(grad_weights, 1).squeeze(1).to(weights.dtype)

    def shrink_backward(
        self, t: Tensor, x: Tensor | None, rows: int, needs_x: bool
    ) -> Tensor | None:
        """``keep * (t A)`` of every pair, added up by token ``[M, K]``; and the gradient of A."""
        tails = []
        for group in self.groups:
            of_group = _part(t, 0, group.pairs)
            parts = [(each, _part(of_group, 1, each.ranks)) for each in group.slices]
            if needs_x:
                first, *others = (narrow @ each.a for each, narrow in parts)
                tails.append(self._drop(group, sum(others, 0 + first)))  # no negative zeros
            trained = [part for part in parts if self.needs_of[part[0].index]]
            if trained and x is not None:
                dropped = self._drop(group, x[group.tokens])
                for each, narrow in trained:
                    self._gradients[each.index] = narrow.t() @ dropped
        return self._by_token(tails, rows) if needs_x else None

    def gradients(self) -> list[Tensor | None]:
        """The gradient of each parameter: zeros where no pair reached it, None if not needed."""
        found: list[Tensor | None] = []
        for index, parameter in enumerate(self.call.trained.parameters):
            if not self.needs_of[index]:
                found.append(None)
            elif index in self._gradients:
                found.append(self._gradients[index].to(parameter.dtype))
            else:
                found.append(torch.zeros_like(parameter))
        return found

    def _by_token(self, of_groups: list[Tensor], rows: int) -> Tensor:
        """The rows ``[n, K]`` of each group added up by token ``[M, K]``, in the order of slots.

        index_add would add by atomics, in any order where a token names an adapter twice.
        """
        wide, each = self._of_pairs(of_groups, self.in_features), self.call.routing.pairs_per_token
        places = self.call.routing.inverse[: rows * each].long().view(rows, each).sort(dim=1).values
        dx, *others = (wide[place] for place in places.unbind(1))
        return sum(others, dx)

    def _narrow(self, of_groups: list[Tensor]) -> Tensor:
        """The rows ``[n, R]`` of each group as ``[P, H]``, with zeros for other pairs and ranks."""
        return self._of_pairs(of_groups, self.call.bank.max_total_rank)

    def _of_pairs(self, of_groups: list[Tensor], width: int) -> Tensor:
        """The rows of each group as ``[P, width]``, with zeros for other pairs and columns."""
        device = self.call.routing.tokens.device
        pieces, end = [], 0

        def zeros(rows: int) -> Tensor:
            return torch.zeros((rows, width), dtype=self.dtype, device=device)

        for group, rows in zip(self.groups, of_groups, strict=True):
            pieces += [zeros(group.pairs.start - end), F.pad(rows, (0, width - rows.shape[1]))]
            end = group.pairs.stop
        return torch.cat([*pieces, zeros(self.call.routing.tokens.shape[0] - end)])

    def _drop(self, group: _Group, rows: Tensor) -> Tensor:
        """The group's rows ``[n, K]`` of an activation without what its dropout drops, scaled."""
        mask, seed = self.call.mask, self.call.seed
        if group.p == 0 or seed is None:
            return rows
        packed = (
            mask[group.pairs]
            if mask is not None
            else packed_keep_mask_of_rows(
                seed, group.p, group.tokens, self.in_features, group.slot, self.call.place
            )
        )
        return drop(rows, unpacked_keep_mask(packed, self.in_features), group.p)


def _part(tensor: Tensor, dim: int, indices: slice) -> Tensor:
    """``tensor[indices]``; an index of everything has no rule for many gradients at once."""
    return tensor.narrow(dim, indices.start, indices.stop - indices.start)
