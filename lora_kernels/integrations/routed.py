"""``route(model)``: many adapters in one model, a different one for every sequence of a batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lora_kernels.adapters.initial_values import draw_lora_a_, draw_lora_b_
from lora_kernels.files.adapters import (
    AdapterFile,
    ModuleAdapter,
    check_finite_in,
    check_flag,
    modules_of,
    read_adapter,
    write_adapter,
)
from lora_kernels.files.config import check_config, ranks_and_scalings
from lora_kernels.files.renaming import Renaming
from lora_kernels.integrations.kernels_option import backend_for
from lora_kernels.integrations.layer_places import place_of
from lora_kernels.integrations.model_calls import unwatch_calls, watch_calls
from lora_kernels.integrations.routed_checks import (
    check_base,
    check_model,
    check_modules,
    check_whole,
    holder_in,
    modules_of_model,
    targeted_in,
)
from lora_kernels.nn.active_adapters import ActiveAdapters
from lora_kernels.nn.batch_choice import Choice
from lora_kernels.nn.checks import adapter_dtype_over, check_initialisation
from lora_kernels.nn.routed_linear import RoutedLoRALinear
from lora_kernels.nn.weight_reads import passing_by_refused
from lora_kernels.ops.routed import Adapter, AdapterSlots, Routing
from lora_kernels.ops.routed.bank.slots import Change, ModelVersion

# What is said of a batch: one for all rows, or one for each; or a routing of the tokens.
Named = str | Mapping[str, float]
Adapters = Named | Sequence[Named] | Routing
Rows = Mapping[str, Adapters]  # by the names of modules

# What handles on a model share that has no layers with adapters yet.
_holders: WeakKeyDictionary[nn.Module, ActiveAdapters] = WeakKeyDictionary()
_lock = threading.Lock()


def route(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    *,
    adapter_dtype: torch.dtype | None = None,
    batch_dim: int = 0,
    kernels: str = "auto",
) -> RoutedModel:
    r"""Let a model hold many LoRA adapters and use another one for every sequence of a batch.

    .. math::
        y_m = x_m W^T + b + s_i \cdot D_i(x_m) A_i^T B_i^T \quad i = \text{token m's adapter}

    Works on any model whose ``nn.Linear`` layers take ``[batch, ..., K]`` (or the same flattened,
    in a forward of the model), such as those of transformers, for serving and for training::

        routed = lora_kernels.route(model)
        routed.load("sql", "adapters/sql")             # PEFT's files
        routed.add("law", rank=16, alpha=32, target_modules=["q_proj", "v_proj"])
        with routed.adapters(["sql", "__base__", "law"]):
            model.generate(**three_prompts)

    The model's own parameters are frozen. A linear layer becomes a :class:`RoutedLoRALinear` when
    the first adapter that touches it arrives; ``undo`` puts everything back. Calling ``route``
    again on a model or its deepcopy gives a handle on the adapters that are in it.

    Args:
        model: a plain model, not wrapped by PEFT; changed in place.
        target_modules: the only layers that adapters may touch: a regular expression for a whole
            name, or a list of whole names or last parts of names, as in PEFT. None: any linear.
        adapter_dtype: that adapters are kept in; None is fp32 over a half-precision base, else the
            base's.
        batch_dim: the axis of the layers' inputs that is the batch's: 1 for models whose layers
            take ``[tokens, batch, K]`` (in those of transformers, where they do).
        kernels: ``auto`` or ``off``, as for :func:`lora_kernels.accelerate`: whether our GPU
            kernels may serve, which are tested first. The last call decides.

    Raises:
        TypeError: model is not a module.
        ValueError: PEFT layers are in the model; batch_dim is not 0 or 1, or not what it was;
            kernels is neither ``auto`` nor ``off``.
    """
    backend = backend_for(kernels, model) if isinstance(model, nn.Module) else "auto"
    routed = RoutedModel(model, target_modules, adapter_dtype, batch_dim)
    routed._active.backend = backend
    return routed


class RoutedModel:
    """A model and the adapters in it; made by :func:`route`.

    Attributes:
        model: the model itself; call it inside of :meth:`adapters`.
    """

    def __init__(
        self,
        model: nn.Module,
        target_modules: str | Sequence[str] | None,
        adapter_dtype: torch.dtype | None,
        batch_dim: int = 0,
    ) -> None:
        check_model(model)
        self.model = model
        self._targets, self._adapter_dtype = target_modules, adapter_dtype
        with _lock:
            active = holder_in(model) or _holders.get(model)
            if active is None:
                active = _holders[model] = ActiveAdapters(AdapterSlots(), batch_dim)
        self._active = active
        if self._active.batch_dim != batch_dim:
            raise ValueError(
                f"batch_dim: the model is routed with {self._active.batch_dim}, got {batch_dim!r}"
            )
        own = {id(p) for layer in self._layers().values() for p in layer.bank.parameters()}
        self._frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        return list(self._active.slots)

    @property
    def slots(self) -> AdapterSlots:
        """The slots of all banks: what a :class:`Routing` of one's own is made for."""
        return self._active.slots

    def adapters(
        self, names: Adapters, *, beams: int = 1, stacked: int = 1, rows: Rows | None = None
    ) -> AbstractContextManager[None]:
        """``with routed.adapters(names):`` says which adapters the batches inside use.

        Forward, ``generate`` and backward may be called inside, any number of times, with any
        lengths and padding (a padding token takes its sequence's adapter). In a compiled model
        names break the graph at every layer; a :class:`Routing` does not, while one thread alone is
        inside of such a ``with``.

        It holds for this thread or asyncio task; others may be inside of their own. A ``with`` in
        the frame of a generator holds while that frame runs: a layer that is called while it is
        suspended raises. Streams are better served by :meth:`batch`.

        A *batch* is one outermost forward or ``generate`` inside, with its backward: it reads one
        version of the adapters from its start to its end, whatever is loaded, replaced or removed
        beside it. Names that were removed before it raise.

        A batch has a row for each of n names; or n * beams, n * stacked or n * beams * stacked.
        Inside of the model's ``generate`` it may also have the beams or returned sequences that
        this was asked for. Any other number raises.

        Args:
            names: one adapter for everything, whatever the rows; or a list with one per sequence;
                ``"__base__"`` is none. In place of a name several adapters and their weights,
                ``{name: weight}``, whose contributions are added up. Or a :class:`Routing` over all
                tokens, made for :attr:`slots`, for batches that hold several sequences per row.
            beams: neighbouring rows that share a name: ``a a b b``, as beam search and
                ``num_return_sequences`` make them outside of the model's own ``generate``.
            stacked: how often the whole batch is repeated: ``a b a b``, as guidance does, and
                preference training that stacks its pairs.
            rows: what holds instead of ``names`` in some modules and what is inside of them, by
                their name: those whose rows are not the text's, such as images, several of which
                may belong to one text. Values are as for ``names``.

        Outside of it, a model that has adapters raises a RuntimeError. So does its end, if the
        model has computed with the weight of a layer with adapters and not called the layer.

        With activation checkpointing a backward computes layers again: with the adapters of its own
        forward where that was one of the whole model or of :meth:`batch`; where it was one of parts
        of the model, backward must be called inside too. One backward of several batches with
        different adapters raises then.

        Raises:
            ValueError: a name is not an adapter's, or no layer has it; no module is named by a key
                of rows.
            TypeError: names are none of these, or another argument does not fit.
        """
        choice = self._choice(names, beams, stacked, rows)
        return passing_by_refused(self._active.using(choice), self._layers)

    def batch(
        self, names: Adapters, *, beams: int = 1, stacked: int = 1, rows: Rows | None = None
    ) -> RoutedBatch:
        """A handle whose calls take their adapters along, for servers, streams and threads::

            handle = routed.batch(["sql", "law"])
            logits = handle(input_ids).logits
            tokens = handle.call(model.generate, input_ids, max_new_tokens=20)

        Every call is a batch of its own, and its backward, wherever that is called, belongs to it.
        A handle may be kept, and called from any thread.

        Args:
            names, beams, stacked, rows: as for :meth:`adapters`.

        Raises:
            ValueError, TypeError: as :meth:`adapters`; the calls, where a name was removed since.
        """
        choice = self._choice(names, beams, stacked, rows)
        return RoutedBatch(self.model, self._active, choice, self._layers)

    def _choice(self, names: Adapters, beams: int, stacked: int, rows: Rows | None) -> Choice:
        for prefix in rows if isinstance(rows, Mapping) else ():
            try:
                self.model.get_submodule(prefix)
            except AttributeError:
                raise ValueError(f"rows: there is no module {prefix!r} in the model") from None
        return Choice(names, self.slots, beams, stacked, rows)

    def load(
        self,
        name: str,
        directory: str | os.PathLike,
        *,
        trainable: bool = False,
        strict: bool = True,
        rename: Mapping[str, str] | None = None,
    ) -> None:
        """Add an adapter from a PEFT adapter directory, all its modules or none.

        Args:
            name: of the new adapter.
            directory: as PEFT's ``save_pretrained`` writes it.
            trainable: whether its parameters require grad.
            strict: whether it is an error that the file lacks modules of the model which its config
                targets; if not, it is a warning. Modules in the file which the config does not
                target are never applied, with a warning, as PEFT ignores them.
            rename: what modules are called in the model, by what they are called in the file, where
                the adapter was trained in another wrapper: ``{"model.language_model": "model"}``.
                Both are whole names of modules, and stand for all that is inside of them too; the
                longest one that fits counts, and "" is all modules. The config goes with the
                file's names, a later :meth:`save` writes the model's.

        Raises:
            TypeError: directory is no path, trainable or strict no bool, or rename no mapping of
                strings.
            ValueError: the files or the name are not good, or name modules that are absent from the
                model, of another shape, or not plain linear layers, or lack some; or they hold
                other values of the base model's parameters than the model has; rename gives two
                modules one name, or has names that are none of the file's. The model is unchanged
                then.
        """
        self._check_name(name)
        file = self._read(directory, trainable, strict, rename)
        with self.slots.change():
            self._check_name(name)
            self._install(name, file, trainable)

    def replace(
        self,
        name: str,
        directory: str | os.PathLike,
        *,
        trainable: bool = False,
        strict: bool = True,
        rename: Mapping[str, str] | None = None,
    ) -> None:
        """Put the adapter of a directory in the place of one that there is, in all layers at once.

        Batches that have begun go on with the one before, those that begin later have the new one;
        there is none in which a layer has the one and another layer the other. The Parameters are
        new ones: make optimizers anew.

        Args:
            name: of the adapter.
            directory, trainable, strict, rename: as for :meth:`load`.

        Raises:
            KeyError: there is no such adapter.
            TypeError, ValueError: as :meth:`load`. The adapter stays as it was then.
        """
        self._check_known(name)
        file = self._read(directory, trainable, strict, rename)
        with self.slots.change():
            self._remove(name)
            self._install(name, file, trainable)

    def _read(
        self,
        directory: str | os.PathLike,
        trainable: bool,
        strict: bool,
        rename: Mapping[str, str] | None,
    ) -> AdapterFile:
        check_flag("trainable", trainable)
        check_flag("strict", strict)
        renaming = Renaming(rename)
        file = renaming.renamed(read_adapter(directory), f"{directory}")
        check_base(self.model, file.base_parameters, f"{directory}")
        check_modules(self.model, file.modules, self._targets)
        check_whole(self.model, file, directory, strict, renaming)
        return file

    def add(
        self,
        name: str,
        config: Mapping[str, Any] | Any | None = None,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        target_modules: str | Sequence[str] | None = None,
        dropout_p: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        """Add a new adapter to be trained, with PEFT's initial values: A Kaiming-uniform, B zero.

        Args:
            name: of the new adapter.
            config: a ``peft.LoraConfig``, or a dictionary of its settings; or instead of it
            rank, alpha, target_modules, dropout_p, use_rslora, init_lora_weights: PEFT's ``r``,
                ``lora_alpha``, ``target_modules`` (also ``"all-linear"``), ``lora_dropout``,
                ``use_rslora`` and ``init_lora_weights`` (True, False or "gaussian").

        Raises:
            TypeError, ValueError: an argument does not fit, or no module is named by it, or one
                that is not a plain linear layer. The model is unchanged then.
        """
        self._check_name(name)
        if config is not None and (rank, alpha, target_modules) != (None, None, None):
            raise TypeError("config: expected it, or rank, alpha and target_modules, got both")
        if config is None:
            if None in (rank, alpha, target_modules):
                raise TypeError("add: expected a config, or rank, alpha and target_modules")
            config = {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": alpha,
                "target_modules": target_modules,
                "lora_dropout": dropout_p,
                "use_rslora": use_rslora,
                "init_lora_weights": init_lora_weights,
            }
        to_dict = getattr(config, "to_dict", None)
        config = dict(config if to_dict is None else to_dict())
        check_config(config, "config")
        check_initialisation(config.get("init_lora_weights", True))
        with self.slots.change():
            self._check_name(name)
            self._add(name, config)

    def _add(self, name: str, config: dict[str, Any]) -> None:
        init, modules = config.get("init_lora_weights", True), {}
        names = targeted_in(self.model, config)
        kinds = ranks_and_scalings(config, names)
        if not names:
            wanted = config.get("target_modules")
            raise ValueError(f"target_modules: no module of the model is named by {wanted!r}")
        for module, layer in check_modules(self.model, names, self._targets).items():
            weight = (layer.base_layer if isinstance(layer, RoutedLoRALinear) else layer).weight
            dtype = adapter_dtype_over(weight, self._adapter_dtype)
            rank, scaling = kinds[module]
            lora_a = torch.empty(rank, layer.in_features, dtype=dtype, device=weight.device)
            lora_b = lora_a.new_zeros(layer.out_features, rank)
            draw_lora_a_(lora_a, init)
            draw_lora_b_(lora_b, init)
            modules[module] = ModuleAdapter(lora_a, lora_b, scaling)
        dropout_p = float(config.get("lora_dropout") or 0.0)
        self._install(name, AdapterFile(config, modules, dropout_p, {}), True, init)

    def remove(self, name: str) -> None:
        """Take an adapter out of all layers. Batches that have begun still have it.

        Raises:
            KeyError: there is no such adapter.
        """
        with self.slots.change():
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._check_known(name)
        for layer in self._layers().values():
            if name in layer.bank:
                layer.bank.remove(name)
        if name in self.slots:  # its layers are gone from the model
            self.slots.forget(name)

    def save(self, name: str, directory: str | os.PathLike) -> None:
        """Write an adapter as a PEFT adapter directory, which PEFT and :meth:`load` read.

        Raises:
            KeyError: there is no such adapter.
        """
        modules, dropout_p, version = {}, 0.0, self.slots.latest
        for module, adapter in self._adapters_of(name, version).items():
            modules |= modules_of(adapter, [module])
            dropout_p = adapter.dropout_p
        config = dict(version.settings.get(name) or {})
        if set(targeted_in(self.model, config)) != modules.keys():
            for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
                config.pop(key, None)
            config["target_modules"] = sorted(modules)
        write_adapter(directory, modules, dropout_p=dropout_p, config=config)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """An adapter's parameters over all layers, for an optimizer of its own.

        Or of one for several adapters: a backward gives gradients to those that its batch named,
        and ``.grad`` of all others stays None, so that no momentum and no decay moves them. DDP has
        to look for such parameters (``find_unused_parameters=True``). With a :class:`Routing` of
        ids on a device, and in a compiled model, others get exact zeros; its ``adapters=``
        bounds them.

        Raises:
            KeyError: there is no such adapter.
        """
        adapters = self._adapters_of(name, self.slots.latest).values()
        return [parameter for adapter in adapters for parameter in adapter.parameters()]

    def undo(self) -> None:
        """Remove all adapters and put the plain linear layers back, trainable as they were.

        Raises:
            RuntimeError: some thread is inside of a ``with ...adapters(...)`` or of a call of a
                handle: the layers would go from under its batch.
        """
        # Until it is published nobody may come in: a batch would read adapters without layers.
        with self.slots.alone(), self._active.nobody_inside(), self.slots.change() as change:
            for name in self.names:
                self._remove(name)
            self._swap({layer: layer.base_layer for layer in self._layers().values()}, change)
            change.on_undo(lambda: watch_calls(self.model, self._active))
            unwatch_calls(self.model)
            _holders.pop(self.model, None)
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def __repr__(self) -> str:
        return (
            f"RoutedModel({type(self.model).__name__}, adapters {self.names} on "
            f"{len(self._layers())} layers)"
        )

    # --- layers -------------------------------------------------------------------------------

    def _layers(self) -> dict[str, RoutedLoRALinear]:
        return {
            name: module
            for name, module in modules_of_model(self.model)
            if isinstance(module, RoutedLoRALinear) and module.active_adapters is self._active
        }

    def _adapters_of(self, name: str, version: ModelVersion) -> dict[str, Adapter]:
        """An adapter's parts by the names of their layers."""
        self._check_known(name, version)
        found = {key: version.adapter_of(each.bank, name) for key, each in self._layers().items()}
        return {module: adapter for module, adapter in found.items() if adapter is not None}

    def _check_name(self, name: str) -> None:
        if name in self.slots:
            raise ValueError(f"name: there is an adapter {name!r} already; remove it first")

    def _check_known(self, name: str, version: ModelVersion | None = None) -> None:
        names = (version or self.slots.latest).names
        if name not in names:
            known = sorted(names, key=names.__getitem__)
            raise KeyError(f"no adapter {name!r} in the model; there are {known}")

    def _install(
        self, name: str, file: AdapterFile, trainable: bool, init: bool | str = True
    ) -> None:
        """Give every module its part of an adapter, or leave the model as it is."""
        found = check_modules(self.model, file.modules, self._targets)
        if not file.modules:
            raise ValueError(f"name: {name!r} would be an adapter of no layer at all")
        layers: dict[str, RoutedLoRALinear] = {}
        wrapped, owners = {}, {}
        for module, layer in found.items():
            part = file.modules[module]
            if layer in owners:
                raise ValueError(
                    f"{module}: one layer in two places, {owners[layer]} and {module}, and an "
                    "adapter for each; it can have one of them"
                )
            owners[layer] = module
            expected = (layer.out_features, layer.in_features)
            if (part.lora_b.shape[0], part.lora_a.shape[1]) != expected:
                raise ValueError(
                    f"{module}: expected lora_A [r, {expected[1]}] and lora_B [{expected[0]}, r], "
                    f"got {list(part.lora_a.shape)} and {list(part.lora_b.shape)}"
                )
            if not isinstance(layer, RoutedLoRALinear):
                wrapped[layer] = self._wrapped(module, layer)
                layer = wrapped[layer]
            check_finite_in(layer.bank.dtype, part, module)
            layers[module] = layer
        with self.slots.change() as change:
            for module, layer in layers.items():
                part = file.modules[module]
                adapter = layer.bank.add(name, *part, file.dropout_p, trainable=trainable)
                adapter.init_lora_weights = init
            change.draft().settings[name] = file.config
            if wrapped:
                if not self._layers():
                    change.on_undo(lambda: unwatch_calls(self.model))
                watch_calls(self.model, self._active)
                self._swap(wrapped, change)

    def _wrapped(self, name: str, linear: nn.Linear) -> RoutedLoRALinear:
        try:
            layer = RoutedLoRALinear.from_linear(
                linear, slots=self.slots, adapter_dtype=self._adapter_dtype
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        layer.active_adapters, layer.place = self._active, place_of(self.model, name)
        return layer

    def _swap(self, others: Mapping[nn.Module, nn.Module], change: Change) -> None:
        """Put other modules in all the places of some."""
        for _, parent in list(modules_of_model(self.model)):
            for name, child in list(parent._modules.items()):
                if child is not None and child in others:
                    place = parent._modules
                    change.on_undo(partial(place.__setitem__, name, child))
                    place[name] = others[child]


class RoutedBatch:
    """Calls of a routed model with adapters that were said before; see :meth:`RoutedModel.batch`.

    Attributes:
        model: the model that it calls.
    """

    def __init__(
        self,
        model: nn.Module,
        active: ActiveAdapters,
        choice: Choice,
        layers: Callable[[], Mapping[str, nn.Module]],
    ) -> None:
        self.model = model
        self._active, self._choice, self._layers = active, choice, layers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.call(self.model, *args, **kwargs)

    def call(self, function: Callable, /, *args: Any, **kwargs: Any) -> Any:
        """Any function that calls the model, such as its ``generate``, or computes a loss.

        Raises:
            TypeError: it returned a generator or a coroutine, which would compute later.
        """
        with passing_by_refused(nullcontext(), self._layers):
            return self._active.call(self._choice, function, args, kwargs)

    def __repr__(self) -> str:
        return f"RoutedBatch({type(self.model).__name__}, {self._choice!r})"
