"""Finds the compiled extension and wraps its CPU kernels.

Dimensions: M rows, D a wide dimension, R rank.

``LORA_KERNELS_NATIVE=0`` in the environment ignores the extension, a path takes that file instead
(``make sanitize`` does); ``LORA_KERNELS_CPU_LEVEL`` (0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with
BF16) keeps it from using newer instructions. Both are read when the extension is first asked for.

The kernels take wide activations in bf16, fp16 or fp32 with unit stride in the last dimension, and
narrow ones (h, t) in fp32; they accumulate in fp32. Every result is a sum in an order that depends
on its own row and column only: the same bits for any number of threads and any other rows. (The
gradients of A and B sum over rows, in blocks of a fixed size.)
"""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lora_kernels.dropout import GROUP, drop_threshold

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = ("portable", "AVX2", "AVX-512", "AVX-512 with BF16")
AVX2, AVX512_BF16 = 1, 3  # indices of LEVELS

_NUMBER = {dtype: number for number, dtype in enumerate(DTYPES)}
_ERROR_FILE = Path(__file__).with_name("_native_error.txt")


@functools.cache
def _found() -> tuple[ModuleType | None, str]:
    """The extension, or None and why."""
    asked = os.environ.get("LORA_KERNELS_NATIVE", "1")
    if asked == "0":
        return None, "the compiled extension is switched off by LORA_KERNELS_NATIVE=0"
    try:
        _native = _load(asked) if asked != "1" else import_module("lora_kernels._native")
    except ImportError as error:
        if _ERROR_FILE.exists():
            reason = _ERROR_FILE.read_text().strip()
            return None, f"the compiled extension was not built: {reason}"
        return None, f"the compiled extension was not built, or does not load: {error}"
    level = os.environ.get("LORA_KERNELS_CPU_LEVEL")
    if level is not None:
        _native.set_level(int(level))
    return _native, f"built, using {LEVELS[_native.level()]}"


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("lora_kernels._native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extension() -> ModuleType | None:
    """The compiled extension, or None where it is absent or ignored."""
    return _found()[0]


def status() -> str:
    """Whether the extension is there, as a phrase for people; why not if it is not."""
    return _found()[1]


def missing() -> str | None:
    """Why the extension cannot be used; None when it can."""
    return None if extension() is not None else status()


def level() -> int:
    """The instruction set in use, an index of ``LEVELS``; -1 without the extension."""
    return -1 if extension() is None else extension().level()


# What torch.compiler.assume_constant_result says; calling it would import torch._dynamo.
missing._dynamo_marked_constant = level._dynamo_marked_constant = True


# --- operands --------------------------------------------------------------------------------


def rows_of(x: Tensor) -> Tensor:
    """``[..., D]`` as ``[M, D]`` with unit stride in D; copied only if it must be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _wide(rows: Tensor) -> tuple[int, int, int]:
    return rows.data_ptr(), _NUMBER[rows.dtype], rows.stride(0)


def _packed(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))


def _factor(factor: Tensor, transposed: bool) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """A ``[R, D]``, or B ``[D, R]`` if ``transposed``: what must live on, and the kernels' view.

    Factors in fp64, or strided in both directions, are copied first.
    """
    if factor.dtype not in _NUMBER:
        factor = factor.float()
    if factor.stride(1) != 1 and factor.stride(0) != 1:
        factor = factor.contiguous()
    rank_stride, column_stride = factor.stride()
    rank = factor.shape[0]
    if transposed:
        rank_stride, column_stride, rank = column_stride, rank_stride, factor.shape[1]
    return factor, (factor.data_ptr(), _NUMBER[factor.dtype], rank_stride, column_stride, rank)


# --- one adapter -----------------------------------------------------------------------------


def packed_keep_mask(seed: Tensor, p: float, rows: int, columns: int, stream: int = 0) -> Tensor:
    """:func:`lora_kernels.dropout.packed_keep_mask`, the same bits."""
    groups = -(-columns // GROUP)
    out = torch.empty((rows, groups), dtype=torch.uint8)
    extension().draw_mask(
        out.data_ptr(), groups, 0, rows, columns, seed.item(), stream, drop_threshold(p),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def shrink(
    wide: Tensor,  # [M, D], unit stride in D
    factor: Tensor,  # [R, D], or [D, R] if transposed
    scale: float,
    mask: Tensor | None = None,  # [M, ceil(D/8)]
    *,
    transposed: bool = False,
) -> Tensor:
    """``scale * (keep * wide) @ factor^T``: ``[M, R]`` in fp32."""
    rows, columns = wide.shape
    factor, (address, dtype, rank_stride, column_stride, rank) = _factor(factor, transposed)
    out = torch.empty((rows, rank), dtype=torch.float32)
    extension().shrink(
        *_wide(wide), rows, columns, *_packed(mask), address, dtype, rank_stride, column_stride,
        rank, out.data_ptr(), rank, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out


def expand_(
    out: Tensor,  # [M, D], unit stride in D; written or added to
    narrow: Tensor,  # [M, R] fp32
    factor: Tensor,  # [R, D], or [D, R] if transposed
    scale: float = 1.0,
    mask: Tensor | None = None,  # [M, ceil(D/8)]
    *,
    transposed: bool = False,
    add: bool = True,
) -> None:
    """``out (+)= keep * (narrow @ (scale * factor))``, rounded once to out's dtype.

    For bf16 on a processor that multiplies pairs of bf16, narrow and the scaled factor are rounded
    to bf16 first, as for any GEMM in bf16.
    """
    rows, columns = out.shape
    factor, (address, dtype, rank_stride, column_stride, rank) = _factor(factor, transposed)
    extension().expand(
        *_wide(out), rows, columns, add, *_packed(mask), address, dtype, rank_stride,
        column_stride, scale, rank, narrow.data_ptr(), narrow.stride(0), torch.get_num_threads(),
    )  # fmt: skip


def rank_gradient(
    wide: Tensor,  # [M, D], unit stride in D
    narrow: Tensor,  # [M, R] fp32
    like: Tensor,  # the factor: [R, D], or [D, R] if transposed
    scale: float = 1.0,
    mask: Tensor | None = None,  # [M, ceil(D/8)]
    *,
    transposed: bool = False,
) -> Tensor:
    """``scale * narrow^T @ (keep * wide)`` in the shape and dtype of ``like``."""
    rows, columns = wide.shape
    dtype = like.dtype if like.dtype in _NUMBER else torch.float32
    grad = torch.empty(like.shape, dtype=dtype)
    rank_stride, column_stride = grad.stride()
    if transposed:
        rank_stride, column_stride = column_stride, rank_stride
    extension().rank_gradient(
        *_wide(wide), rows, columns, *_packed(mask), narrow.data_ptr(), narrow.stride(0),
        narrow.shape[1], scale, grad.data_ptr(), _NUMBER[dtype], rank_stride, column_stride,
        torch.get_num_threads(),
    )  # fmt: skip
    return grad if dtype == like.dtype else grad.to(like.dtype)


def project(
    dy: Tensor,  # [M, N], unit stride in N
    lora_b: Tensor,  # [N, R]
    t_scale: float,
    h: Tensor,  # [M, R] fp32
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``t = t_scale * dy @ B`` ``[M, R]`` in fp32 and ``grad_b = scale * dy^T @ h``.

    dy is read once where a block of its rows stays in the cache. ``grad_b`` has the shape and dtype
    of ``lora_b``.
    """
    rows, columns = dy.shape
    factor, (address, dtype, rank_stride, column_stride, rank) = _factor(lora_b, True)
    t = torch.empty((rows, rank), dtype=torch.float32)
    grad = torch.empty(lora_b.shape, dtype=factor.dtype)
    extension().project(
        *_wide(dy), rows, columns, address, dtype, rank_stride, column_stride, rank,
        t.data_ptr(), t_scale, h.data_ptr(), h.stride(0), scale, grad.data_ptr(),
        _NUMBER[grad.dtype], grad.stride(1), grad.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return t, grad if grad.dtype == lora_b.dtype else grad.to(lora_b.dtype)


# --- many adapters ---------------------------------------------------------------------------


class RoutedCall:
    """The groups of one routing over one bank, as ``routed_lora``'s kernels take them.

    Dimensions: P pairs, H the widest rank of the bank. ``bank`` and ``routing`` are those of
    :mod:`lora_kernels.ops.routed_lora.operands`; ``in_features`` may be 0 where A is not used. A
    bank in fp64 is copied to fp32 for the call.
    """

    def __init__(self, bank, routing, in_features: int, seed: Tensor | None) -> None:
        self.bank, self.routing, self.in_features, self.seed = bank, routing, in_features, seed
        storage, weights = bank.storage, routing.pair_weights
        storage = storage if storage.dtype in _NUMBER else storage.float()
        if weights is not None:
            weights = weights.detach().to(torch.float32).contiguous()
        thresholds = None
        if seed is not None:
            # Not the bank's table: that may have changed since the forward.
            by_slot = [0] * bank.scaling.shape[0]
            for slot, threshold in zip(bank.slots, bank.thresholds, strict=True):
                by_slot[slot] = threshold
            thresholds = torch.tensor(by_slot, dtype=torch.int32)
        self._alive = storage, weights, thresholds
        groups = routing.plan.shape[0]
        if groups and routing.plan[-1, 0] < 0:  # filled up, as graphs have it
            groups = int((routing.plan[:, 0] >= 0).sum())
        self._groups = extension().Routed(
            storage.data_ptr(),
            _NUMBER[storage.dtype],
            bank.table.data_ptr(),
            bank.scaling.data_ptr(),
            0 if thresholds is None else thresholds.data_ptr(),
            bank.slice_columns,
            in_features,
            routing.plan.data_ptr(),
            groups,
            routing.tokens.data_ptr(),
            0 if weights is None else weights.data_ptr(),
            torch.get_num_threads(),
        )

    def draw_mask(self) -> Tensor:
        """``[P, ceil(K/8)]``: the packed keep-masks of the pairs whose adapter drops."""
        shape = self.routing.tokens.shape[0], -(-self.in_features // GROUP)
        mask = torch.empty(shape, dtype=torch.uint8)
        self._groups.draw_mask(*_packed(mask), self.seed.item())
        return mask

    def shrink(self, x: Tensor, mask: Tensor | None, *, zeros: bool) -> Tensor:
        """h ``[P, H]`` in fp32; what is not written is zero where ``zeros`` asks for it."""
        h = self._narrow(zeros)
        rows = rows_of(x)  # maybe a copy, which has to outlive the call
        self._groups.shrink(*_wide(rows), *_packed(mask), *_packed(h))
        return h

    def expand_(self, out: Tensor, h: Tensor) -> None:
        """``out += w s h B^T``; out ``[M, N]`` with unit stride in N."""
        h = _single(h)
        self._groups.expand(*_wide(out), *_packed(h))

    def expand_backward(
        self, dy: Tensor, h: Tensor | None, needs_weights: bool, *, zeros: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """t ``[P, H]`` in fp32, and the gradient of the pairs' weights."""
        t, grad = self._narrow(zeros), None
        h = None if h is None else _single(h)
        if needs_weights:
            grad = torch.zeros(self.routing.tokens.shape[0], dtype=torch.float32)
        self._groups.expand_backward(
            *_wide(dy), *_packed(t), *_packed(h), 0 if grad is None else grad.data_ptr()
        )
        return t, None if grad is None else grad.to(self.routing.pair_weights.dtype)

    def gradients(self, dy: Tensor | None, h, x: Tensor | None, t, mask, layout) -> Tensor:
        """The flat gradient of the factors: those of B from dy and h, those of A from x and t."""
        storage = self._alive[0]
        grad = storage.new_zeros(layout.numel)
        if dy is not None:
            h = _single(h)
            self._groups.gradient_b(
                *_wide(dy), *_packed(h), grad.data_ptr(), layout.table.data_ptr()
            )
        if x is not None:
            rows, t = rows_of(x), _single(t)
            self._groups.gradient_a(
                *_wide(rows), *_packed(mask), *_packed(t), grad.data_ptr(), layout.table.data_ptr()
            )
        return grad.to(self.bank.storage.dtype)

    def shrink_backward_(self, dx: Tensor, t: Tensor, mask: Tensor | None) -> None:
        """``dx += keep * (t A)``; dx ``[M, K]`` with unit stride in K."""
        t = _single(t)
        self._groups.shrink_backward(*_wide(dx), *_packed(mask), *_packed(t))

    def _narrow(self, zeros: bool) -> Tensor:
        shape = self.routing.tokens.shape[0], self.bank.width
        return (torch.zeros if zeros else torch.empty)(shape, dtype=torch.float32)


def _single(narrow: Tensor) -> Tensor:
    """h or t as the kernels read it: fp32, unit stride in the rank."""
    narrow = narrow.to(torch.float32)
    return narrow if narrow.stride(1) == 1 else narrow.contiguous()


@contextmanager
def unit_stride(out: Tensor) -> Iterator[Tensor]:
    """``out`` ``[M, D]``, or a copy with unit stride in D that is copied back."""
    if out.stride(1) == 1 or out.shape[1] == 1:
        yield out
        return
    copy = out.contiguous()
    yield copy
    out.copy_(copy)
