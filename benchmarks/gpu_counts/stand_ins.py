"""One launch each in place of the package's own elementwise Triton kernels.

What Triton launches torch's dispatcher does not see. Each entry of :data:`STAND_INS` replaces a
launcher wherever the package has it by name: it returns tensors of the shapes that the launcher
returns, and says what one launch reads and writes. A launcher that is not there is named by
:func:`missing`.

Dimensions: M tokens, P pairs, K in_features, R rank, G = ceil(K / 8).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest import mock

import torch
from torch import Tensor

from .cost import Cost, nbytes
from .counter import active

_DRIVER = "lora_kernels.ops.narrow.triton.driver"
_MASKED = "lora_kernels.ops.narrow.triton.masked"
_ROUTED_MASKED = "lora_kernels.ops.routed.triton.masked"
_SEED = 8  # bytes


def _bits(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty((rows, -(-columns // 8)), dtype=torch.uint8)


def _launch(name: str, read: int, written: int) -> None:
    active().add(name, Cost(1, read, written))


def _masked_copy(x, dropout, mask=None):
    """Reads x ``[M, K]`` and the seed or the mask; writes a copy and a mask that it drew."""
    kept, drawn = x.new_empty(x.shape), mask is None
    mask = _bits(x, *x.shape) if drawn else mask
    read = nbytes(x) + (_SEED if drawn else nbytes(mask))
    _launch("masked_copy", read, nbytes(kept) + drawn * nbytes(mask))
    return kept, mask


def _draw_mask(rows, columns, dropout):
    """Reads the seed, writes the mask ``[M, G]``."""
    mask = _bits(dropout.seed, rows, columns)
    _launch("draw_mask", _SEED, nbytes(mask))
    return mask


def _masked_product(t, a, mask, dropout, alpha=1.0, scale=None):
    """Reads t ``[M, R]``, A ``[R, K]`` and the mask, writes ``keep * (t A)`` ``[M, K]``."""
    out = a.new_empty((t.shape[0], a.shape[1]))
    _launch("masked_product", nbytes(t, a, mask), nbytes(out))
    return out


def _gather_masked(x, routing, threshold_table, seed, place, mask=None, draws=True):
    """Reads a row of x for each pair, and the mask if there is one; writes the rows masked
    ``[P, K]``, and the mask ``[P, G]`` where it drew it."""
    pairs = routing.tokens.shape[0]
    kept = x.new_empty((pairs, x.shape[1]))
    read, written = nbytes(kept, routing.tokens, routing.tiles, threshold_table), nbytes(kept)
    if mask is not None:
        read += nbytes(mask)
    elif draws:
        mask = _bits(x, pairs, x.shape[1])
        read, written = read + _SEED, written + nbytes(mask)
    _launch("gather_masked", read, written)
    return kept, mask


def _mask_rows(z, routing, threshold_table, mask):
    """Reads z ``[P, K]`` and the mask, writes z."""
    _launch("mask_rows_", nbytes(z, mask, routing.tiles, threshold_table), nbytes(z))
    return z


def _nothing_is_missing(device):
    """Triton's driver would be started for the answer."""
    return None


STAND_INS: dict[tuple[str, str], Callable] = {
    (_MASKED, "masked_copy"): _masked_copy,
    (_MASKED, "draw_mask"): _draw_mask,
    (_MASKED, "masked_product"): _masked_product,
    (_ROUTED_MASKED, "gather_masked"): _gather_masked,
    (_ROUTED_MASKED, "mask_rows_"): _mask_rows,
    (_DRIVER, "missing"): _nothing_is_missing,
}


def missing() -> list[str]:
    """The launchers of the table that the package does not have."""
    return [f"{module}.{name}" for module, name in STAND_INS if launcher_of(module, name) is None]


def launcher_of(module: str, name: str) -> Callable | None:
    try:
        return getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None


@contextmanager
def stand_ins() -> Iterator[None]:
    """With every launcher that there is replaced, in all modules that have imported it."""
    replacing = {
        launcher: replacement
        for (module, name), replacement in STAND_INS.items()
        if (launcher := launcher_of(module, name)) is not None
    }
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] != "lora_kernels":
                continue
            for attribute, value in list(vars(module).items()):
                if callable(value) and _is_hashable(value) and value in replacing:
                    stack.enter_context(mock.patch.object(module, attribute, replacing[value]))
        yield


def _is_hashable(value: object) -> bool:
    return type(value).__hash__ is not None
