"""Notices layers whose weight is computed with in place of a call, which passes their adapter by.

A layer with an adapter has a ``weight``, because models ask for its dtype, tie it and save it. Some
compute with it and never call the layer (the fast path of torch's encoder, ``h @ head.weight.T``),
and get what the frozen layer gives. Being read is no sign of that alone: T5 reads ``wo.weight``
before it calls ``wo``. The sign is a reader that comes to the same line of code again while the
layer has not been called since.

A read costs a look at the reader's code, a call costs a look-up. Nothing is noted inside of
``torch.compile``, where whatever is noted would have to be guarded; and nothing is kept on the
layers, so that no copy, pickle or state dict holds any of it.
"""

from __future__ import annotations

import dis
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from types import CodeType, FrameType
from typing import NamedTuple
from weakref import ref

from torch import Tensor, nn
from torch.compiler import is_compiling

# What a reader may take of a weight without computing with it.
_METADATA = {
    *("dtype", "device", "shape", "ndim", "layout", "itemsize", "nbytes", "grad", "is_leaf"),
    *("requires_grad", "requires_grad_", "is_meta", "is_cpu", "is_cuda", "is_sparse"),
    *("is_quantized", "is_contiguous", "is_floating_point", "is_complex", "data_ptr"),
    *("size", "dim", "numel", "nelement", "element_size", "stride", "storage_offset"),
    *("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "get_device", "__class__"),
}
_TRANSPOSES = {"T", "mT", "t", "transpose"}
_QUESTIONS = {"isinstance", "hasattr", "getattr", "type", "id"}
_MODULE_CALL = nn.Module._call_impl.__code__
_ENCODER_LAYER = nn.TransformerEncoderLayer.forward.__code__
_ATTENTION = nn.MultiheadAttention.forward.__code__

_ticks = count(1)  # the order of reads and calls, of all layers
_last_call = _last_read = 0


@dataclass(frozen=True, eq=False)
class _Place:
    """Where code reads a weight, and what it does with it."""

    code: CodeType
    reader: str
    computes: bool  # goes on to something else than metadata
    multiplies: bool  # unmistakably a product


class _Read(NamedTuple):
    tick: int
    inside_call: bool  # of some module

    def counts(self, since: int) -> bool:
        """Whether a model ran, so that this was no one looking through its modules."""
        return self.inside_call or _last_call > since


@dataclass(eq=False, slots=True)
class _Seen:
    """What is known of one layer."""

    called: int = 0  # when it was called last
    reads: dict[_Place, _Read] = field(default_factory=dict)  # the first of each, since then
    passed_by: int = 0  # when a reader passed it by last
    reader: str = ""
    warned: bool = False


# By weak references: a WeakKeyDictionary, without what it costs at every call of a layer.
_seen: dict[ref[nn.Module], _Seen] = {}
_places: dict[tuple[int, int], _Place] = {}  # they hold their code, whose id is the key's


def note_call(layer: nn.Module) -> None:
    """Say that the layer's forward runs."""
    global _last_call
    if is_compiling():
        return
    seen = _seen.get(ref(layer)) or _new(layer)
    seen.called = _last_call = next(_ticks)
    if seen.reads:
        seen.reads.clear()


def note_read(layer: nn.Module) -> None:
    """Say that ``layer.weight``, a property that calls this, is read; warn if it is the sign."""
    global _last_read
    if is_compiling():
        return
    active = getattr(layer, "active_adapters", None)  # in PEFT's layers a list of names
    uses_the_base_alone = getattr(active, "uses_the_base_alone", None)
    if uses_the_base_alone is not None and uses_the_base_alone():
        return
    frame = sys._getframe(2)
    place = _place(frame)
    if not place.computes:
        return
    seen = _seen.get(ref(layer)) or _new(layer)
    _last_read = now = next(_ticks)
    first = seen.reads.get(place)
    read = seen.reads[place] = _Read(now, _inside_call(frame)) if first is None else first
    if not _passes_by(place, read, first is not None, seen) or _compiled(layer):
        return
    seen.passed_by, seen.reader = now, place.reader
    if not seen.warned:
        seen.warned = True
        merge = ", or merge() it before" if hasattr(layer, "merge") else ""
        warnings.warn(
            f"{_name_in(frame, layer)}: {place.reader} computes with its weight and does not call "
            f"it, so that the adapter has no effect there; call the layer{merge}",
            stacklevel=3,
        )


def reader_in_place_of_calls(layer: nn.Module) -> str | None:
    """Who computes with the layer's weight, if nothing has called the layer since."""
    seen = _seen.get(ref(layer))
    if seen is None or _compiled(layer):
        return None
    if seen.passed_by > seen.called:
        return seen.reader
    return None if seen.called else _reader(seen, since=0)


def also_read_by(layer: nn.Module) -> str | None:
    """Who has computed with the weight of a layer that has been called since."""
    seen = _seen.get(ref(layer))
    return seen.reader if seen is not None and 0 < seen.passed_by < seen.called else None


def forget(layer: nn.Module) -> None:
    """Drop what is known of a layer."""
    _seen.pop(ref(layer), None)


@contextmanager
def passing_by_refused(
    context: AbstractContextManager[None], layers: Callable[[], Mapping[str, nn.Module]]
) -> Iterator[None]:
    """``context``, and then an error if a reader has passed one of ``layers()`` by in it.

    Raises:
        RuntimeError: the layers' names, and who read their weights.
    """
    began = next(_ticks)
    with context:
        yield
    if _last_read < began:
        return
    passed = {}
    for name, layer in layers().items():
        seen = _seen.get(ref(layer))
        if seen is None or _compiled(layer):
            continue
        if seen.passed_by > began:
            passed[name] = seen.reader
        elif seen.called < began and (reader := _reader(seen, began)):
            passed[name] = reader
    if passed:
        listed = "; ".join(f"{name}, by {reader}" for name, reader in list(passed.items())[:5])
        more = f"; and {len(passed) - 5} more" if len(passed) > 5 else ""
        raise RuntimeError(
            "layers with adapters were not called, and their weights were computed with instead: "
            f"{listed}{more}; what came out there is the base model's"
        )


def _new(layer: nn.Module) -> _Seen:
    return _seen.setdefault(ref(layer, _seen.pop), _Seen())


def _passes_by(place: _Place, first: _Read, again: bool, seen: _Seen) -> bool:
    """Whether a read is the sign, given the first one in its place since the last call."""
    if place.code is _ATTENTION:
        return True
    if place.code is _ENCODER_LAYER:
        # It reads every weight to decide for its fast path, and a second time to take it.
        return again or any(each.code is _ENCODER_LAYER for each in [*seen.reads] if each != place)
    if place.multiplies and first.inside_call and not seen.called:
        return True
    return again and first.counts(first.tick)


def _reader(seen: _Seen, since: int) -> str | None:
    """Who has read a weight after ``since`` that nothing has been called for."""
    for place, read in list(seen.reads.items()):
        if read.tick > since and read.counts(since or read.tick):
            return place.reader
    return None


def _place(frame: FrameType) -> _Place:
    key = id(frame.f_code), frame.f_lasti
    place = _places.get(key)
    if place is None:
        code = frame.f_code
        # Not by the frame's locals: to look at them keeps them alive until it returns.
        name = getattr(code, "co_qualname", code.co_name)
        reader = f"{name} ({frame.f_globals.get('__name__')}, line {frame.f_lineno})"
        place = _places[key] = _Place(code, reader, *_use(code, frame.f_lasti))
    return place


def _use(code: CodeType, offset: int) -> tuple[bool, bool]:
    """Whether the code computes with the ``.weight`` that it reads at offset, and multiplies.

    Anything but an attribute access (``getattr``, ``hasattr``) looks through modules and does not,
    nor does what asks a question, ``isinstance(layer.weight, ...)``.
    """
    instructions = [each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG"]
    at = max(i for i, each in enumerate(instructions) if each.offset <= offset)
    if instructions[at].argval != "weight":
        return False, False
    before = instructions[max(0, at - 4) : at]
    if any(each.opname == "LOAD_GLOBAL" and each.argval in _QUESTIONS for each in before):
        return False, False
    then, after = instructions[at + 1], instructions[at + 2 : at + 3]
    if "NONE" in then.opname or "IS_OP" in (then.opname, *(each.opname for each in after)):
        return False, False
    if then.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
        return True, then.opname == "BINARY_MATRIX_MULTIPLY" or then.argrepr == "@"
    # What a tensor does not have (`quant_state`) was put there to be asked for.
    computes = then.argval not in _METADATA and hasattr(Tensor, then.argval)
    return computes, then.argval in _TRANSPOSES


def _inside_call(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is _MODULE_CALL:
            return True
        frame = frame.f_back
    return False


def _compiled(layer: nn.Module) -> bool:
    """Whether calls go to compiled code of the layer, which does not note them."""
    return layer._compiled_call_impl is not None


def _name_in(frame: FrameType, layer: nn.Module) -> str:
    """What the module that reads calls the layer, and the class of the layer."""
    kind = type(layer).__name__
    for owner in list(frame.f_locals.values()):
        if isinstance(owner, nn.Module):
            for name, module in owner.named_modules():
                if module is layer and name:
                    return f"{name} ({kind})"
    return kind
