"""``accelerate(model)``: our forward in the LoRA layers of a PEFT model, the rest as it was."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from lora_kernels.integrations.kernels_option import backend_for, standing
from lora_kernels.integrations.known_weight_readers import never_calls, parent_of, passes_by
from lora_kernels.nn.weight_reads import also_read_by, reader_in_place_of_calls
from lora_kernels.runtime.dtypes import short_name

TESTED_PEFT = "0.21"


def accelerate(model: nn.Module, *, kernels: str = "auto") -> AccelerationReport:
    r"""Give the LoRA layers of a PEFT model the fused forward :func:`lora_kernels.lora_linear`.

    .. math::
        y = x W^T + b + \sum_i s_i \cdot D_i(x) A_i^T B_i^T

    The model is changed in place, by the class of its LoRA layers only: parameters, names, state
    dicts, hooks, ``isinstance``, ``repr``, merging, switching, adding, deleting and saving adapters
    stay PEFT's. At every call a layer looks at its own state, and either computes the sum above (or
    DoRA's version of it) in one operation, or calls PEFT's own forward where that would do anything
    else. Nothing is approximated: the result is PEFT's within rounding; with dropout it has the
    same distribution, drawn from other random bits. fp32 adapters over a half-precision base are
    computed in the base's dtype, as PEFT computes them under autocast.

    Mixed batches (``adapter_names``, an adapter per sequence) are served without gradients as PEFT
    serves them, all adapters in one operation; to train them use :func:`lora_kernels.route`.

    On CPUs, CUDA, MPS and XPU devices; on any other PEFT's own forward serves, and the report says
    so. A model may be moved at any time.

    Adapters added to accelerated layers later are fast at once. Layers that PEFT creates later are
    not, until ``accelerate`` is called again; it can be called any number of times. Call it before
    ``fully_shard``, DDP and ``torch.compile``.

    Gradients can be differentiated again (``create_graph=True``: gradient penalties, forces). Over
    a frozen lora_A the gradient of lora_B cannot, with respect to the layer's input: that raises a
    RuntimeError that says so, because the input was not saved; ``report.undo()`` gives PEFT's own.

    Args:
        model: a ``PeftModel``, or any module with layers of ``peft.tuners.lora`` in it.
        kernels: ``auto`` or ``off``. With ``auto`` our GPU kernels are tested where there is a CUDA
            device, in a process of their own and once per state of the machine (it says so, and
            takes up to a minute); those that pass serve where they should gain. It never times, so
            that two runs of a script give the same bits; :func:`lora_kernels.tune` does. With
            ``off`` the layers take the ``composed`` backend alone. The last call decides.

    Returns:
        An :class:`AccelerationReport`. ``print`` it to see which layers are fast, which are not,
        and why.

    Raises:
        ImportError: PEFT is not installed, or lacks the classes that ours extend.
        TypeError: ``model`` is not a module.
        ValueError: there is no LoRA layer in ``model``; kernels is neither ``auto`` nor ``off``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    peft_layers = _import_layers()
    layers = _lora_layers(model)
    if not layers:
        raise ValueError(_no_lora_layer(model))
    backend = backend_for(kernels, model)
    for name, layer in layers.items():
        if type(layer) is peft_layers.PeftLinear and not _uncalled(name, model):
            layer.__class__ = peft_layers.Linear
        if isinstance(layer, peft_layers.Linear):
            peft_layers.take_backend(layer, backend)
    return AccelerationReport(weakref.ref(model)).refresh()


@dataclass(repr=False)
class AccelerationReport:
    """What became of each LoRA layer of a model; ``print`` shows it as a table.

    Names are those of ``model.named_modules()``. The lists are as of the last :meth:`refresh`:
    hooks, offloading or another dtype can send a layer that was fast back to PEFT's forward.

    Attributes:
        fast: names of the layers that our forward serves. Where the adapters are disabled or merged
            there is nothing to fuse, and PEFT runs the base layer.
        delegated: name of each other LoRA layer, and why PEFT's own forward serves it.
        uncalled: name of each layer that the model does not call, and who computes with its weight
            instead: its adapters have no effect, as in PEFT. Known of some models from the start,
            of others after they have run; compiled code is not seen.
        notes: name of a fast layer, and what to know about it.
        delegated_calls: name of an accelerated layer, and how many calls so far PEFT's forward has
            served, by reason; calls inside ``torch.compile`` are not counted.
        kernels: what decides about our kernels on the devices of the layers, and what would change
            it; a line each.
        peft_version: the PEFT that was found.
    """

    _model: weakref.ref[nn.Module]
    fast: list[str] = field(default_factory=list)
    delegated: dict[str, str] = field(default_factory=dict)
    uncalled: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    delegated_calls: dict[str, dict[str, int]] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    peft_version: str = ""

    def refresh(self) -> AccelerationReport:
        """Look at the model again, as it stands now, and return the report."""
        import peft

        peft_layers = _import_layers()
        model = self._live_model()
        self.peft_version = peft.__version__
        self.fast, self.delegated, self.uncalled = [], {}, {}
        self.notes, self.delegated_calls = {}, {}
        for name, layer in _lora_layers(model).items():
            if isinstance(layer, peft_layers.Linear):
                state = peft_layers.read_layer(layer)
            else:
                state = _not_ours(name, layer, model)
            note = _note(layer, state)
            if isinstance(state, str) and note is None:
                self.delegated[name] = state
            elif state is not None and (reader := _reader_instead(name, layer, model)):
                self.uncalled[name] = reader
            else:
                self.fast.append(name)
                if notes := [each for each in (note, _also_read(name, layer, model)) if each]:
                    self.notes[name] = "; ".join(notes)
            if calls := peft_layers.delegated_calls(layer):
                self.delegated_calls[name] = calls
        self.kernels = self._kernels()
        return self

    def _kernels(self) -> list[str]:
        """Of the fast layers."""
        model, ours = self._live_model(), _import_layers().Linear
        layers = [each for each in map(model.get_submodule, self.fast) if isinstance(each, ours)]
        if layers and all(layer._backend == "composed" for layer in layers):
            return ["kernels are off: composed serves"]
        weights = [layer.get_base_layer().weight for layer in layers]
        devices, dtypes = ([getattr(w, name) for w in weights] for name in ("device", "dtype"))
        return standing(devices, dict.fromkeys(dtypes))

    def undo(self) -> None:
        """Give every LoRA layer of the model its PEFT class back. Doing it twice is harmless.

        Raises:
            RuntimeError: ``fully_shard`` has built classes of its own on top of ours. Nothing is
                changed then.
        """
        peft_layers = _import_layers()
        ours: dict[str, nn.Module] = {
            name: layer
            for name, layer in _lora_layers(self._live_model()).items()
            if isinstance(layer, peft_layers.Linear)
        }
        for name, layer in ours.items():
            if type(layer) is not peft_layers.Linear:
                raise RuntimeError(
                    f"cannot undo: since accelerate, the class of {name} has become "
                    f"{_class_name(layer)} (fully_shard does this); undo before sharding"
                )
        for layer in ours.values():
            layer.__class__ = peft_layers.PeftLinear
            peft_layers.forget_calls(layer)

    def __str__(self) -> str:
        total = len(self.fast) + len(self.delegated) + len(self.uncalled)
        title = f"{len(self.fast)} of {total} LoRA layers take the fused forward"
        title += f" (PEFT {self.peft_version}"
        if not self.peft_version.startswith(f"{TESTED_PEFT}."):
            title += f", tested with {TESTED_PEFT}"
        rows = Counter((_pattern(name), "fused") for name in self.fast)
        for name, reason in self.delegated.items():
            rows[_pattern(name), f"PEFT: {reason}"] += 1
        for name, reader in self.uncalled.items():
            rows[_pattern(name), f"none: {reader} computes with its weight, without adapters"] += 1
        lines = [title + ")", "", *_table(rows)]
        for note, count in Counter(self.notes.values()).items():
            lines.append(f"note on {count} of them: {note}")
        calls = Counter()
        for counts in self.delegated_calls.values():
            calls.update(counts)
        for reason, count in calls.items():
            lines.append(f"calls that PEFT's forward has served: {count}: {reason}")
        lines += self.kernels
        return "\n".join(lines)

    def __repr__(self) -> str:
        uncalled = f", {len(self.uncalled)} not called" if self.uncalled else ""
        return (
            f"AccelerationReport({len(self.fast)} fast, {len(self.delegated)} delegated{uncalled})"
        )

    def _live_model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this report no longer exists")
        return model


def _import_layers():
    """The module of our layer classes. They extend PEFT's: this is where PEFT gets imported."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("accelerate() needs PEFT: pip install peft") from error
    try:
        from lora_kernels.integrations.peft import layers as peft_layers
    except ImportError as error:
        raise ImportError(
            f"accelerate() was written for PEFT {TESTED_PEFT}, and PEFT {peft.__version__} lacks "
            f"what it extends: {error}"
        ) from error
    return peft_layers


def _lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    lora_layer = _import_layers().LoraLayer
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, lora_layer))
    return {name: layer for name, layer in layers if isinstance(layer, nn.Module)}


def _not_ours(name: str, layer: nn.Module, model: nn.Module) -> str:
    """Why the layer does not have our class."""
    if type(layer) is not _import_layers().PeftLinear:
        sharded = type(layer).__name__.startswith("FSDP")
        hint = ": call accelerate before fully_shard" if sharded else ""
        return f"{_class_name(layer)} is not PEFT's lora.Linear{hint}"
    if _uncalled(name, model):
        return "lora.MultiheadAttention reads its weights and never calls it"
    return "new or undone: call accelerate again"


def _uncalled(name: str, model: nn.Module) -> bool:
    """Whether the layer is the output projection inside a ``lora.MultiheadAttention``."""
    owner = model.get_submodule(name.rpartition(".")[0].removesuffix("base_layer").rstrip("."))
    return isinstance(owner, _import_layers().MultiheadAttention)


def _reader_instead(name: str, layer: nn.Module, model: nn.Module) -> str | None:
    """Who computes with the weight of a layer that is not called; None for a layer that is."""
    parent, child = parent_of(model, name)
    by_its_class = type(parent).__name__ if never_calls(parent, child) else None
    return reader_in_place_of_calls(layer) or by_its_class


def _also_read(name: str, layer: nn.Module, model: nn.Module) -> str | None:
    """A note for a layer that is called at times, and at times passed by."""
    parent, child = parent_of(model, name)
    reader = also_read_by(layer)
    if reader is None and passes_by(parent, child):
        reader = type(parent).__name__
    if reader is None:
        return None
    return (
        f"{reader} also computes with its weight instead of calling it (torch's and Mamba's fused "
        "paths do): without adapters then, as in PEFT"
    )


def _note(layer: nn.Module, state) -> str | None:
    """What to know about a fast layer; None where that is nothing, or the layer is not fast."""
    if state is None:
        return None
    if isinstance(state, str):
        # FSDP makes the weights whole before the layer is called: only the call can tell.
        if "(DTensor)" in state and getattr(layer, "_is_fsdp_managed_module", False):
            return "sharded by FSDP between its calls: fused in a call if whole by then"
        return None
    for adapter in state.adapters:
        for tensor in (adapter.factors.a, adapter.factors.b):
            if state.base.dtype.itemsize < min(tensor.element_size(), 4):
                adapters, base = short_name(tensor.dtype), short_name(state.base.dtype)
                return (
                    f"{adapters} adapters over a {base} base: computed in {base}, "
                    "as PEFT does under autocast"
                )
    return None


def _no_lora_layer(model: nn.Module) -> str:
    from peft.tuners.tuners_utils import BaseTunerLayer

    others = {_class_name(m) for m in model.modules() if isinstance(m, BaseTunerLayer)}
    found = f" (layers of other PEFT methods: {', '.join(sorted(others))})" if others else ""
    return (
        "model: expected a model with LoRA layers, such as peft.get_peft_model(model, "
        f"LoraConfig(...)) returns, got {type(model).__name__} without one{found}"
    )


def _class_name(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _pattern(name: str) -> str:
    """One name for a layer of every block: ``layers.*.q_proj`` for ``layers.0.q_proj`` and on."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _table(rows: Counter[tuple[str, str]]) -> list[str]:
    cells = [("layers", "module", "forward")]
    cells += [(str(count), module, forward) for (module, forward), count in rows.items()]
    counts, modules = (max(len(row[column]) for row in cells) for column in (0, 1))
    return [f"{row[0]:>{counts}}  {row[1]:<{modules}}  {row[2]}" for row in cells]
