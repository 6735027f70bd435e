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
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lora_kernels.runtime.dropout import GROUP, ActiveDropout, MaskPlace, drop_threshold

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = ("portable", "AVX2", "AVX-512", "AVX-512 with BF16")
AVX2, AVX512_BF16 = 1, 3  # indices of LEVELS

_NUMBER = {dtype: number for number, dtype in enumerate(DTYPES)}
_CPU = torch.device("cpu")  # whatever the default device
_ERROR_FILE = Path(__file__).parents[1] / "_native_error.txt"


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
    spec = spec_from_file_location("lora_kernels._native", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} has no extension module's name")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extension() -> ModuleType | None:
    """The compiled extension, or None where it is absent or ignored."""
    return _found()[0]


def loaded() -> ModuleType:
    """The compiled extension, for callers that :func:`missing` has told that it is there."""
    native, reason = _found()
    assert native is not None, reason
    return native


def status() -> str:
    """Whether the extension is there, as a phrase for people; why not if it is not."""
    return _found()[1]


def missing() -> str | None:
    """Why the extension cannot be used; None when it can."""
    return None if extension() is not None else status()


def level() -> int:
    """The instruction set in use, an index of ``LEVELS``; -1 without the extension."""
    return -1 if extension() is None else loaded().level()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = dict(line.split("\t: ", 1) for line in lines if "\t: " in line)
    return fields.get("model name") or platform.processor() or platform.machine()


# What torch.compiler.assume_constant_result says; calling it would import torch._dynamo.
missing._dynamo_marked_constant = level._dynamo_marked_constant = True


# --- operands --------------------------------------------------------------------------------


def rows_of(x: Tensor) -> Tensor:
    """``[..., D]`` as ``[M, D]`` with unit stride in D, its numbers in memory as they are; copied
    only if it must be."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) == 1 and not rows.is_neg():
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _wide(rows: Tensor) -> tuple[int, int, int]:
    return rows.data_ptr(), _NUMBER[rows.dtype], rows.stride(0)


def _packed(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))


def _as_read(tensor: Tensor | None) -> Tensor | None:
    """A factor as the kernels take it: of a dtype of theirs, unit stride in one dimension."""
    if tensor is None:
        return None
    tensor = tensor if tensor.dtype in _NUMBER else tensor.float()
    if 1 in tensor.stride() and not tensor.is_neg():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


# --- one adapter -----------------------------------------------------------------------------


def packed_keep_mask(
    seed: Tensor,
    p: float,
    rows: int,
    columns: int,
    stream: int = 0,
    place: MaskPlace = MaskPlace(),
) -> Tensor:
    """:func:`lora_kernels.runtime.dropout.packed_keep_mask`, the same bits."""
    groups = -(-columns // GROUP)
    out = torch.empty((rows, groups), dtype=torch.uint8, device="cpu")
    loaded().draw_mask(
        out.data_ptr(), groups, *place.groups(columns), rows, columns, seed.item(), stream,
        drop_threshold(p), torch.get_num_threads(),
    )  # fmt: skip
    return out


def allocate_saved(
    x: Tensor,  # [..., K]
    rank: int,
    dropout: ActiveDropout | None,
) -> tuple[Tensor, Tensor | None]:  # [M, R] fp32; [M, ceil(K/8)] uint8
    """Memory for h and, where something is dropped, for the packed keep-mask."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    h = torch.empty((rows, rank), dtype=torch.float32, device=_CPU)
    if dropout is None:
        return h, None
    return h, torch.empty((rows, -(-columns // GROUP)), dtype=torch.uint8, device=_CPU)


def adapter_forward(
    y: Tensor,  # [..., N], contiguous
    x: Tensor,  # [..., K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    h: Tensor | None,  # [M, R] fp32
    mask: Tensor | None,  # [M, ceil(K/8)] uint8
    scaling: float,
    dropout: ActiveDropout | None,
    *,
    add: bool,
) -> None:
    """``y += s h B^T``, or ``y = ...``, with ``h = D(x) A^T``; writes the mask and, where it is
    given, h.

    For bf16 on a processor that multiplies pairs of bf16, h and s B are rounded to bf16 for their
    product, as for any GEMM in bf16.
    """
    threads = torch.get_num_threads()
    how = (1.0, scaling, 0, 0, 0, 0, add, threads)
    if dropout is not None:
        how = (
            dropout.scale, scaling, *dropout.place.groups(x.shape[-1]), dropout.seed.item(),
            dropout.threshold, add, threads,
        )  # fmt: skip
    native, reason = _found()  # and not loaded(): a call less
    assert native is not None, reason
    kernel = native.adapter_forward
    # It looks at its operands itself: the ordinary ones need nothing here.
    if kernel(y, x, lora_a, lora_b, h, mask, *how):
        return
    a, b = _as_read(lora_a), _as_read(lora_b)
    if not kernel(y, rows_of(x), a, b, h, mask, *how):
        raise _unread(y=y, x=x, lora_a=a, lora_b=b, h=h, mask=mask)


def adapter_backward(
    dx: Tensor | None,  # [..., K], contiguous
    grad_a: Tensor | None,  # [R, K]
    grad_b: Tensor | None,  # [N, R]
    dy: Tensor,  # [..., N]
    x: Tensor | None,  # [..., K], for grad_a
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    h: Tensor | None,  # [M, R], for grad_b
    mask: Tensor | None,  # [M, ceil(K/8)] uint8
    scaling: float,
    dropout: ActiveDropout | None,
    *,
    add: bool,
) -> None:
    """``dx += keep * (t A)``, or ``dx = ...``, with ``t = s / (1 - p) dy B``; and the gradients
    ``grad_a = t^T (keep * x)`` and ``grad_b = s dy^T h``. None where not needed."""
    t_scale = scaling if dropout is None else scaling * dropout.scale
    how = t_scale, scaling, add, torch.get_num_threads()
    native, reason = _found()
    assert native is not None, reason
    kernel = native.adapter_backward
    if kernel(dx, grad_a, grad_b, dy, x, lora_a, lora_b, h, mask, *how):
        return
    a, b, into_a, into_b = map(_as_read, (lora_a, lora_b, grad_a, grad_b))
    rows = None if x is None else rows_of(x)
    h = None if h is None else _single(h)
    mask = None if mask is None else mask.contiguous()
    if not kernel(dx, into_a, into_b, rows_of(dy), rows, a, b, h, mask, *how):
        raise _unread(
            dx=dx, grad_a=into_a, grad_b=into_b, dy=dy, x=x, lora_a=a, lora_b=b, h=h, mask=mask
        )
    for grad, into in ((grad_a, into_a), (grad_b, into_b)):
        if grad is not None and into is not None and into is not grad:
            grad.copy_(into)


def _unread(**tensors: Tensor | None) -> RuntimeError:
    came = ", ".join(
        f"{name} {t.dtype} {list(t.shape)} of strides {t.stride()}"
        for name, t in tensors.items()
        if t is not None
    )
    return RuntimeError(
        "lora_kernels._native cannot read these tensors: their shapes do not fit, or one has no "
        f"memory of its own (a transform's or a mode's wrapper): {came}"
    )


# --- many adapters ---------------------------------------------------------------------------


class RoutedGroups:
    """The groups of one routing over one bank, as ``routed_lora``'s kernels take them.

    Dimensions: P pairs, H the widest rank of the bank. ``bank`` and ``routing`` are those of
    :mod:`lora_kernels.ops.routed.tensors`; ``in_features`` may be 0 where A is not used.
    The bank is in one of ``DTYPES``; ``place`` is that of x and of the masks.
    """

    def __init__(
        self,
        bank,
        routing,
        in_features: int,
        seed: Tensor | None,
        place: MaskPlace = MaskPlace(),
    ) -> None:
        self.bank, self.routing, self.in_features, self.seed = bank, routing, in_features, seed
        self.place = place
        storage, weights = bank.storage, routing.pair_weights
        if weights is not None:
            weights = weights.detach().to(torch.float32).contiguous()
        thresholds = None
        if seed is not None:
            # Not the bank's table: that may have changed since the forward.
            thresholds = torch.zeros(bank.scaling.shape[0], dtype=torch.int32, device="cpu")
            for slot, threshold in zip(bank.slots, bank.thresholds, strict=True):
                thresholds[slot] = threshold
        self._alive = storage, weights, thresholds
        groups = routing.plan.shape[0]
        if groups and routing.plan[-1, 0] < 0:  # filled up, as graphs have it
            groups = int((routing.plan[:, 0] >= 0).sum())
        # Regions with memory of their own are offset from a matrix, before it or behind.
        reach = storage.numel() if storage.ndim == 1 else -1
        native, reason = _found()
        assert native is not None, reason
        self._groups = native.Routed(
            storage.data_ptr(), reach, _NUMBER[storage.dtype], bank.slot_table.data_ptr(),
            bank.slot_table.shape[0], bank.max_total_rank, bank.scaling.data_ptr(),
            0 if thresholds is None else thresholds.data_ptr(), bank.slice_columns, in_features,
            routing.plan.data_ptr(), groups, routing.tokens.data_ptr(), routing.tokens.shape[0],
            0 if weights is None else weights.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def draw_mask(self) -> Tensor | None:
        """``[P, ceil(K/8)]``: the packed keep-masks of the pairs whose adapter drops; None where no
        adapter does."""
        if self.seed is None:
            return None
        shape = self.routing.tokens.shape[0], -(-self.in_features // GROUP)
        mask = torch.empty(shape, dtype=torch.uint8, device="cpu")
        groups = self.place.groups(self.in_features)
        self._groups.draw_mask(*_packed(mask), *groups, self.seed.item())
        return mask

    def shrink(self, x: Tensor, mask: Tensor | None, *, zeros: bool) -> Tensor:
        """h ``[P, H]`` in fp32; what is not written is zero where ``zeros`` asks for it."""
        h = self._narrow(zeros)
        # By names, so that copies outlive the call.
        rows, mask = rows_of(x), None if mask is None else with_unit_stride(mask)
        self._groups.shrink(*_wide(rows), *_packed(mask), h.data_ptr(), h.stride(0))
        return h

    def expand_(self, out: Tensor, h: Tensor) -> None:
        """``out += w s h B^T``; out ``[M, N]`` with unit stride in N."""
        h = _single(h)
        self._groups.expand(*_wide(out), h.data_ptr(), h.stride(0))

    def expand_backward(
        self, dy: Tensor, h: Tensor | None, needs_weights: bool, *, zeros: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """t ``[P, H]`` in fp32, and the gradient of the pairs' weights."""
        t, grad = self._narrow(zeros), None
        h = None if h is None else _single(h)
        if needs_weights:
            grad = torch.zeros(self.routing.tokens.shape[0], dtype=torch.float32, device="cpu")
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
                *_wide(dy), *_packed(h), grad.data_ptr(), grad.numel(), layout.table.data_ptr()
            )
        if x is not None:
            rows, t, mask = rows_of(x), _single(t), None if mask is None else with_unit_stride(mask)
            self._groups.gradient_a(
                *_wide(rows), *_packed(mask), *_packed(t), grad.data_ptr(), grad.numel(),
                layout.table.data_ptr(),
            )  # fmt: skip
        return grad

    def shrink_backward_(self, dx: Tensor, t: Tensor, mask: Tensor | None) -> None:
        """``dx += keep * (t A)``; dx ``[M, K]`` with unit stride in K."""
        t, mask = _single(t), None if mask is None else with_unit_stride(mask)
        self._groups.shrink_backward(*_wide(dx), *_packed(mask), *_packed(t))

    def _narrow(self, zeros: bool) -> Tensor:
        shape = self.routing.tokens.shape[0], self.bank.max_total_rank
        return (torch.zeros if zeros else torch.empty)(shape, dtype=torch.float32, device="cpu")


def _single(narrow: Tensor) -> Tensor:
    """h or t as the kernels read it: fp32, unit stride in the rank."""
    narrow = narrow.to(torch.float32)
    return narrow if narrow.stride(1) == 1 else narrow.contiguous()


def with_unit_stride(matrix: Tensor) -> Tensor:
    """The matrix with unit stride in its last dimension."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


@contextmanager
def unit_stride(out: Tensor) -> Iterator[Tensor]:
    """``out`` ``[M, D]``, or a copy with unit stride in D that is copied back."""
    rows = with_unit_stride(out)
    yield rows
    if rows is not out:
        out.copy_(rows)
