"""``accelerate(model)``: our forward in the LoRA layers of a PEFT model, everything else as PEFT has it."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

TESTED_PEFT = "0.21"


def accelerate(model: nn.Module) -> AccelerationReport:
    r"""Give the LoRA layers of a PEFT model the fused forward :func:`lora_kernels.lora_linear`.

    .. math::
        y = x W^T + b + \sum_i s_i \cdot D_i(x) A_i^T B_i^T

    The model is changed in place, by the class of its LoRA layers only: parameters, names, state dicts, hooks,
    ``isinstance``, ``repr``, merging, switching, adding, deleting and saving adapters stay PEFT's. At every call a
    layer looks at its own state and either computes the sum above, DoRA's version of it included, in one operation,
    or calls PEFT's own forward where that would do something else: nothing is approximated. The result is PEFT's
    within rounding; with dropout it is the same distribution under other random bits.

    Adapters added to accelerated layers later are fast at once. Layers that PEFT creates later are not, until
    ``accelerate`` is called again; it can be called any number of times. Call it before ``fully_shard``, DDP and
    ``torch.compile``.

    The fused forward has no double backward; call ``report.undo()`` for a gradient of a gradient.

    Args:
        model: a ``PeftModel``, or any module with ``peft.tuners.lora`` layers in it.

    Returns:
        An :class:`AccelerationReport`: ``print`` it to see which layers are fast, which are not, and why.

    Raises:
        ImportError: PEFT is not installed, or too old to have the layers this was written for.
        TypeError: ``model`` is not a module.
        ValueError: there is no LoRA layer in ``model``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    peft_layers = _import_layers()
    if not any(isinstance(module, peft_layers.LoraLayer) for module in model.modules()):
        raise ValueError(_no_lora_layer(model))
    for name, layer in _lora_layers(model):
        if _stays_peft(name, layer, model) is None and type(layer) is not peft_layers.Linear:
            layer.__class__ = peft_layers.Linear
    return AccelerationReport(weakref.ref(model)).refresh()


@dataclass(repr=False)
class AccelerationReport:
    """What became of each LoRA layer of a model; ``print`` shows it as a table.

    Names are those of ``model.named_modules()``. The lists are as of the last :meth:`refresh`: hooks, offloading,
    merging or another dtype can send a layer that was fast back to PEFT's forward, and the other way round.

    Attributes:
        fast: names of the layers that our forward serves.
        delegated: name of each other LoRA layer, and why PEFT's own forward serves it.
        notes: name of a fast layer, and what to know about its numerics.
        delegated_calls: of the accelerated layers, the calls so far that PEFT's forward served, by reason (calls
            inside ``torch.compile`` are not counted). Calls with the adapters disabled or merged are not among
            them: there is nothing to fuse.
        peft_version: the PEFT that was found.
    """

    _model: weakref.ref[nn.Module]
    fast: list[str] = field(default_factory=list)
    delegated: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    delegated_calls: dict[str, dict[str, int]] = field(default_factory=dict)
    peft_version: str = ""

    def refresh(self) -> AccelerationReport:
        """Look at the model again as it stands now. Returns the report itself: ``print(report.refresh())``."""
        import peft

        peft_layers = _import_layers()
        model = self._live_model()
        self.fast, self.delegated, self.notes, self.delegated_calls = [], {}, {}, {}
        self.peft_version = peft.__version__
        for name, layer in _lora_layers(model):
            reason = _stays_peft(name, layer, model)
            state = None if reason else peft_layers.read_layer(layer)
            if reason or isinstance(state, str):
                self.delegated[name] = reason or state
            else:
                self.fast.append(name)
                note = _note(state)
                if note:
                    self.notes[name] = note
            calls = peft_layers.delegated_calls(layer)
            if calls:
                self.delegated_calls[name] = calls
        return self

    def undo(self) -> None:
        """Give every LoRA layer of the model its PEFT class back. Doing it twice is harmless.

        Raises:
            RuntimeError: ``fully_shard`` has built classes of its own on top of ours. Nothing is changed then.
        """
        peft_layers = _import_layers()
        layers = [
            (name, layer)
            for name, layer in self._live_model().named_modules()
            if isinstance(layer, peft_layers.Linear)
        ]
        for name, layer in layers:
            if type(layer) is not peft_layers.Linear:
                raise RuntimeError(
                    f"cannot undo: the class of {name} was changed to {_class_name(type(layer))} after accelerate "
                    "(fully_shard does this); undo before sharding"
                )
        for _, layer in layers:
            layer.__class__ = peft_layers.PeftLinear
            peft_layers.forget_calls(layer)

    def __str__(self) -> str:
        total = len(self.fast) + len(self.delegated)
        lines = [
            f"{len(self.fast)} of {total} LoRA layers take the fused forward (PEFT {self.peft_version})"
        ]
        if not self.peft_version.startswith(TESTED_PEFT + "."):
            lines[0] += f"; tested with PEFT {TESTED_PEFT}"
        rows = Counter((_pattern(name), "fused") for name in self.fast)
        rows.update((_pattern(name), f"PEFT: {reason}") for name, reason in self.delegated.items())
        lines += ["", *_table(("layers", "module", "forward"), rows)]
        notes = Counter(self.notes.values())
        lines += [f"note: {_layers(count)}: {note}" for note, count in notes.items()]
        calls = Counter()
        for counts in self.delegated_calls.values():
            calls.update(counts)
        lines += [
            f"calls served by PEFT so far: {count}: {reason}" for reason, count in calls.items()
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"AccelerationReport({len(self.fast)} fast, {len(self.delegated)} delegated)"

    def _live_model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this report no longer exists")
        return model


def _import_layers():
    """Our layer classes; they extend PEFT's, so this is where peft gets imported."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("accelerate() needs PEFT: pip install peft") from error
    try:
        from lora_kernels.integrations import peft_layers
    except ImportError as error:
        raise ImportError(
            f"accelerate() is written for PEFT {TESTED_PEFT}; PEFT {peft.__version__} lacks what it extends: {error}"
        ) from error
    return peft_layers


def _lora_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    lora_layer = _import_layers().LoraLayer
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, lora_layer)
    ]


def _stays_peft(name: str, layer: nn.Module, model: nn.Module) -> str | None:
    """Why a layer's class is left alone, whatever its state; None for those we extend."""
    peft_layers = _import_layers()
    if isinstance(layer, peft_layers.Linear):
        return None
    if type(layer) is not peft_layers.PeftLinear:
        if isinstance(layer, peft_layers.PeftLinear):
            return f"class {_class_name(type(layer))} extends PEFT's lora.Linear (accelerate before fully_shard)"
        return f"class {_class_name(type(layer))} is not PEFT's lora.Linear"
    parent = model.get_submodule(name.rpartition(".")[0].removesuffix("base_layer").rstrip("."))
    if isinstance(parent, peft_layers.MultiheadAttention):
        return "lora.MultiheadAttention reads its weights and never calls it"
    return None


def _note(state) -> str | None:
    for adapter in state.adapters:
        for tensor in (adapter.lora_a, adapter.lora_b):
            if tensor.dtype is not state.weight.dtype and state.weight.dtype in (
                torch.bfloat16,
                torch.float16,
            ):
                adapters, base = (
                    str(t.dtype).removeprefix("torch.") for t in (tensor, state.weight)
                )
                return f"{adapters} adapters over a {base} base: computed in {base}, as PEFT does under autocast"
    return None


def _no_lora_layer(model: nn.Module) -> str:
    from peft.tuners.tuners_utils import BaseTunerLayer

    others = {_class_name(type(m)) for m in model.modules() if isinstance(m, BaseTunerLayer)}
    found = f"; found layers of other PEFT methods: {', '.join(sorted(others))}" if others else ""
    return (
        "model: expected a model with LoRA layers, as peft.get_peft_model(model, LoraConfig(...)) makes it, got "
        f"{type(model).__name__} without any{found}"
    )


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _pattern(name: str) -> str:
    """Layers of one kind in many blocks under one name: ``layers.0.q_proj`` and on are ``layers.*.q_proj``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _table(head: tuple[str, str, str], rows: Counter) -> list[str]:
    cells = [head] + [(str(count), module, forward) for (module, forward), count in rows.items()]
    counts, modules = (max(len(row[column]) for row in cells) for column in (0, 1))
    return [f"{row[0]:>{counts}}  {row[1]:<{modules}}  {row[2]}" for row in cells]
