"""Whose adapter each row of a layer's input takes: from what was said of the batch and the shapes
of this very forward. What both together do not decide raises; nothing is guessed from a count.

Dimensions: n names, B rows of a batch, T tokens of a row, K in_features, M rows of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

# What the models of transformers call the inputs that are as long as their activations.
_TEXT_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "labels",
)


class Forward(NamedTuple):
    """What one forward of the whole model is computed on."""

    rows: int
    tokens: frozenset[int]  # of one row: the encoder's and the decoder's may differ


# A row's adapter by its name, or several with a weight each.
Row = str | tuple[tuple[str, float], ...]


class Runs(NamedTuple):
    """Rows of neighbouring tokens: token m takes ``names[m // length]``."""

    names: tuple[Row, ...]
    length: int


@dataclass(frozen=True)
class NamedRows:
    """What was said of a batch's rows."""

    names: tuple[Row, ...]  # one per sequence
    beams: frozenset[int] = frozenset({1})  # how many neighbouring rows a name may have; 1 always
    stacked: int = 1  # how often the whole batch may be repeated

    def layouts(self) -> dict[int, set[tuple[Row, ...]]]:
        """The names of all rows, by how many rows there are."""
        layouts: dict[int, set[tuple[Row, ...]]] = {}
        for beams in self.beams:
            for stacked in {1, self.stacked}:
                rows = tuple(name for name in self.names for _ in range(beams)) * stacked
                layouts.setdefault(len(rows), set()).add(rows)
        return layouts


def runs_of(
    shape: Sequence[int], said: NamedRows, axis: int = 0, forward: Forward | None = None
) -> Runs:
    """The names of the tokens of a layer's input.

    With a batch axis the layer's rows are those of the forward, or a multiple of them that was said
    (a model may stack its batch inside). A matrix has one token of each row, or all of them; how
    many that is, only the forward knows: padding may have been cut out of what looks like a batch.

    Args:
        shape: ``[..., K]``, the batch on ``axis``; or ``[M, K]``, flattened from that.
        said: what is known of the batch.
        axis: 0 or 1.
        forward: the one that is running; None where the layer is called by other means.

    Raises:
        ValueError: the rows are none that were said, or could be several of them.
    """
    lead, layouts = tuple(shape[:-1]), said.layouts()
    if len(lead) > 1:
        rows = lead[axis]
        fits = rows in layouts
        if forward is not None and forward.rows in layouts:
            fits = fits and not (rows % forward.rows or _is_transposed(lead, axis, forward))
        if not fits:
            raise ValueError(_unfit(shape, said, axis, forward))
        found = [
            Runs(names * math.prod(lead[:axis]), math.prod(lead[axis + 1 :]))
            for names in layouts[rows]
        ]
    else:
        found = _runs_of_matrix(lead[0] if lead else 1, layouts, axis, forward)
        if not found:
            raise ValueError(_unfit(shape, said, axis, forward))
    if len({_by_token(runs) for runs in found} if len(found) > 1 else found) > 1:
        raise ValueError(
            f"x: {list(shape)} could be rows that share a name with their neighbours (beams), the "
            "batch repeated (stacked), or tokens of fewer rows, which take other adapters; pass a "
            "Routing over the tokens instead of names"
        )
    return found[0]


def _runs_of_matrix(
    tokens: int,
    layouts: Mapping[int, Iterable[tuple[Row, ...]]],
    axis: int,
    forward: Forward | None,
) -> list[Runs]:
    """All that ``[tokens, K]`` may be: one token of every row, or all tokens of every row."""
    if forward is None:
        return [Runs(names, 1) for names in layouts.get(tokens, ())]
    if forward.rows not in layouts:
        return []
    found = []
    for rows, all_names in layouts.items():
        if rows % forward.rows:
            continue
        # Fewer rows than tokens may be what is left without padding: only this forward's are taken.
        lengths = forward.tokens or {1}
        if rows == forward.rows:
            lengths = lengths | {1}
        for length in lengths:
            if rows * length == tokens:
                for names in all_names:
                    found.append(Runs(names, length) if axis == 0 else Runs(names * length, 1))
    return found


def _is_transposed(lead: tuple[int, ...], axis: int, forward: Forward) -> bool:
    """Whether another axis has the forward's rows, and the batch's as many as a row has tokens."""
    others = lead[:axis] + lead[axis + 1 :]
    return lead[axis] != forward.rows and lead[axis] in forward.tokens and forward.rows in others


def _by_token(runs: Runs) -> tuple[Row, ...]:
    return tuple(name for name in runs.names for _ in range(runs.length))


def _unfit(shape: Sequence[int], said: NamedRows, axis: int, forward: Forward | None) -> str:
    layouts, lead = said.layouts(), shape[:-1]
    counts = " or ".join(map(str, sorted(layouts)))
    if len(lead) > 1:
        expected = f"expected {counts} rows on axis {axis}"
        others = [i for i, size in enumerate(lead[:2]) if i != axis and size in layouts]
        hint = f" (axis {others[0]} has as many: route's batch_dim)" if others else ""
    else:
        expected, hint = f"expected the tokens of {counts} rows", ""
    running = ""
    if forward is not None:
        lengths = " or ".join(map(str, sorted(forward.tokens))) or "?"
        running = f", in a forward of {forward.rows} rows of {lengths} tokens"
    return (
        f"x: {expected} for {len(said.names)} names, got {list(shape)}{hint}{running}; pass beams= "
        "where neighbouring rows share a name, stacked= where the whole batch is repeated, rows= "
        "for modules with rows of their own, batch_dim= to route where the batch is on another "
        "axis, or a Routing over the tokens instead of names"
    )


def forward_of(args: Sequence[Any], kwargs: Mapping[str, Any], axis: int = 0) -> Forward | None:
    """Rows and tokens of a model's inputs: ids ``[B, T]``, or floats ``[B, T, K]``, ``[B, K]``.

    The first positional tensor counts and what transformers calls its text inputs, or else the
    first tensor by keyword.
    """
    tensors = [value for value in args if isinstance(value, Tensor)][:1]
    tensors += [kwargs[name] for name in _TEXT_INPUTS if isinstance(kwargs.get(name), Tensor)]
    if not tensors:
        tensors = [value for value in kwargs.values() if isinstance(value, Tensor)][:1]
    rows, tokens = None, set()
    for tensor in tensors:
        shape = tuple(tensor.shape[:-1] if tensor.is_floating_point() else tensor.shape)
        if not shape or (len(shape) == 1 and not tensor.is_floating_point()):
            continue
        own_axis = axis if len(shape) > axis else 0
        rows = shape[own_axis] if rows is None else rows
        if shape[own_axis] == rows and len(shape) <= 2:
            tokens.add(math.prod(shape) // rows if rows else 0)
    return None if rows is None else Forward(rows, frozenset(tokens))
