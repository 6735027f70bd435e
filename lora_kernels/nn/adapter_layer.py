"""What the drop-in layers share: scaling, merging, initial values, state dicts."""

import copy
import math
import sys
from collections.abc import Mapping
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight
from lora_kernels.nn.base_parameters import BaseParameters
from lora_kernels.nn.checks import LoRAOptions, check_initialisation
from lora_kernels.nn.merging import (
    Keep,
    Merge,
    is_offloaded,
    kept_parameter,
    merged_weight,
    replace_parameter,
    why_not_merged,
)
from lora_kernels.nn.part_reset import Part, PartReset
from lora_kernels.nn.peft_names import in_memory_name, our_names
from lora_kernels.nn.sharded import is_managed, put_shards_back, whole, write
from lora_kernels.nn.weight_reads import note_read
from lora_kernels.ops.norm import lora_weight_norm

_MERGED_FOR_GOOD = "merged"  # key of a state dict whose base weight already holds the adapter


class AdapterLayer(BaseParameters):
    """A frozen ``base_layer`` and one low-rank adapter, which can be merged into it and taken out.

    Subclasses hold the adapter's parameters (``lora_magnitude_vector`` ``[N]`` with DoRA), draw
    them in ``_draw``, and say in ``_merged_parameters`` what the base layer's become.

    Attributes:
        disable_adapters: set it to compute the base layer alone (a merged layer is unmerged).
        init_lora_weights: what :meth:`reset_parameters` draws.
    """

    _shown: ClassVar[tuple[str, ...]]  # by repr
    base_layer: Part
    lora_magnitude_vector: nn.Parameter | None
    _scaling: Tensor

    def __init__(self, base_layer: Part, options: LoRAOptions) -> None:
        super().__init__()
        self._initialised = getattr(base_layer, "_is_hf_initialized", False)
        self.base_layer = _with_own_parameter_table(base_layer).requires_grad_(False)
        self.base_layer.reset_parameters = PartReset(self, self.base_layer)
        self.rank, self.alpha, self.use_rslora, self.use_dora, self.init_lora_weights, _ = options
        self.disable_adapters = False
        self._merge: Merge | None = None
        self.scaling = self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
        self.register_state_dict_post_hook(_put_back_original)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: the frozen one, or the merged one while merged.

        Whoever computes with it instead of calling the layer passes the adapter by unless it is
        merged, and gets a UserWarning for it, once per layer. ``get_parameter``, which models tie
        weights with, gets the frozen one always.

        Raises:
            RuntimeError: the frozen weight has been resized while the layer was merged, or cannot
                be tied as ``merge`` has not kept it on the device.
        """
        if self._merge is None:
            if not self.disable_adapters:
                note_read(self)
        elif not torch.compiler.is_compiling():
            frozen = self._frozen_in(self._merge)
            if sys._getframe(1).f_code is nn.Module.get_parameter.__code__:
                return self._tieable(self._merge, frozen)
        return self.base_layer.weight

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        self._set_base_parameter("weight", value)

    @property
    def scaling(self) -> Tensor:
        """What the adapter's contribution is multiplied by: ``alpha / rank`` until it is set.

        A 0-d tensor, so that a compiled layer takes another value without being compiled again. Set
        it to a number, or to a 0-d tensor to be read on the device.
        """
        return self._scaling

    @scaling.setter
    def scaling(self, value: float | Tensor) -> None:
        if self._merge is not None:
            raise RuntimeError("scaling: the layer is merged with the present one; unmerge() first")
        if isinstance(value, Real):
            # A plain tensor even under inference_mode: a later training step saves it.
            with torch.inference_mode(False):
                value = torch.tensor(value, dtype=torch.float64, device="cpu")
        if not isinstance(value, Tensor):
            raise TypeError(
                f"scaling: expected a number or a 0-d tensor, got {type(value).__name__}"
            )
        if value.ndim != 0 or value.requires_grad:
            raise ValueError(
                "scaling: expected a number or a 0-d tensor without gradient, got a tensor of "
                f"shape {list(value.shape)} with requires_grad={value.requires_grad}"
            )
        self._scaling = value

    def extra_repr(self) -> str:
        parts = [f"{name}={getattr(self, name)}" for name in self._shown]
        if dropout_p := getattr(self, "dropout_p", 0.0):
            parts.append(f"dropout_p={dropout_p}")
        parts += [name for name in ("use_rslora", "use_dora", "merged") if getattr(self, name)]
        return ", ".join(parts)

    @property
    def merged(self) -> bool:
        """Whether the base layer's weight holds the adapter."""
        return self._merge is not None

    def merge(self, keep: Keep = "device") -> None:
        """Put the adapter into the base layer's weight; a merged layer is left as it is.

        The new weight is computed in fp32 and rounded once. The frozen parameters are not written:
        others may share them. While merged, forward is the base layer's alone, so that no gradient
        reaches the adapter, and ``state_dict`` still gives the frozen weight. Hooks on
        ``base_layer`` then see the merged result. To serve without the wrapper, after
        ``merge("none")`` put ``base_layer``, a plain layer, into its place.

        Where FSDP has sharded the layer every process has to call it, and the shards, which are
        FSDP's own, are written in place: a layer whose weight is tied to this one's changes too.

        Args:
            keep: where the frozen weight waits for :meth:`unmerge`: on the ``"device"``, in the
                ``"cpu"``'s memory, or nowhere (``"none"``: its memory is freed and unmerge raises).

        Raises:
            ValueError: keep is none of the three, or the merged weight is not finite.
            RuntimeError: the layer is on the meta device or offloaded, its weight is quantised or
                computed when it is read, its base layer has a forward of its own, or it cannot be
                merged otherwise.
        """
        if keep not in ("device", "cpu", "none"):
            raise ValueError(f"keep: expected 'device', 'cpu' or 'none', got {keep!r}")
        if self._merge is not None:
            return
        put_shards_back(self)
        if reason := why_not_merged(self, self._has_own_forward()):
            raise RuntimeError(f"merge: {reason}")
        # Plain tensors even under inference_mode: a later training step may save them.
        with torch.inference_mode(False), torch.no_grad():
            merged = self._merged_parameters()
            original = {}
            for name, tensor in merged.items():
                if keep != "none":
                    original[name] = kept_parameter(self.base_layer, name, keep)
                replace_parameter(self.base_layer, name, nn.Parameter(tensor, requires_grad=False))
        self._merge = Merge(keep, original)

    def _base_alone(self, x: Tensor) -> Tensor:
        """A forward where the adapter is merged or disabled."""
        if self.disable_adapters and self._merge is not None:
            kept = self._merge.original
            if not (kept and is_managed(self.base_layer)):
                self.unmerge()
            else:  # FSDP has gathered the merged weight for this forward
                like = self.base_layer.weight
                frozen = {name: whole(value).to(like.dtype) for name, value in kept.items()}
                return torch.func.functional_call(self.base_layer, frozen, (x,))
        return self.base_layer(x)

    def unmerge(self) -> None:
        """Put the frozen parameters back, bit for bit; an unmerged layer is left as it is.

        They are the same Parameter objects too, unless they waited on another device.

        Raises:
            RuntimeError: the layer was merged with ``keep="none"``.
        """
        if self._merge is None:
            return
        if self._merge.keep == "none":
            raise RuntimeError(
                "unmerge: the frozen weight was not kept by merge(keep='none'); merge with "
                "keep='device' or keep='cpu' to be able to unmerge, or load the weight again"
            )
        put_shards_back(self)
        device = self.base_layer.weight.device
        for name, frozen in self._merge.original.items():
            if frozen.device != device:
                frozen = nn.Parameter(
                    frozen.detach().to(device), requires_grad=frozen.requires_grad
                )
            replace_parameter(self.base_layer, name, frozen)
        self._merge = None

    def _set_base_parameter(self, name: str, parameter: nn.Parameter | None) -> None:
        """A merged layer is merged again, into the new frozen parameter."""
        if self._merge is None:
            super()._set_base_parameter(name, parameter)
            return
        keep, original = self._merge
        if parameter is original.get(name):
            return
        self.unmerge()
        super()._set_base_parameter(name, parameter)
        self.merge(keep)

    def _frozen_in(self, merge: Merge) -> nn.Parameter | None:
        """The frozen weight of a merged layer, None if it was not kept; others may have resized
        the merged one meanwhile."""
        frozen, merged = merge.original.get("weight"), self.base_layer.weight
        if frozen is not None and frozen.shape != merged.shape:
            raise RuntimeError(
                f"weight: the frozen weight has become {list(frozen.shape)} while the layer was "
                f"merged, into {list(merged.shape)}; unmerge(), and resize again"
            )
        return frozen

    def _tieable(self, merge: Merge, frozen: nn.Parameter | None) -> nn.Parameter:
        if frozen is None or frozen.device != self.base_layer.weight.device:
            raise RuntimeError(
                f"weight: it cannot be tied while the layer is merged with keep={merge.keep!r}; "
                "unmerge(), or merge with keep='device'"
            )
        return frozen

    def _check_resizable(self, name: str, size: int) -> None:
        """Raise unless the frozen weight has ``size`` rows already, and the adapter can follow."""
        if self._merge is not None:
            raise RuntimeError(f"{name}: the layer is merged; unmerge() before resizing it")
        rows = self.base_layer.weight.shape[0]
        if rows != size:
            raise ValueError(f"{name}: expected {rows}, the rows of the base weight, got {size}")

    def _has_own_forward(self) -> bool:
        """Whether the base layer's class computes otherwise than from its weight as it is."""
        raise NotImplementedError

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The adapter's part of ``state_dict()``, with the names of PEFT's files."""
        put_shards_back(self)
        return {name: parameter.detach() for name, parameter in self._adapter_parameters().items()}

    def load_adapter(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy another adapter's values into this layer; a merged layer is unmerged first.

        Args:
            state_dict: the adapter's tensors under the names of :meth:`adapter_state_dict` or of a
                PEFT layer in memory. Scaling is not among them: set ``scaling`` where it differs.

        Raises:
            ValueError: a tensor is missing, unknown, or has another shape.
            RuntimeError: the adapter is on the meta device, or offloaded.
        """
        names = our_names(state_dict)
        adapter = {names.get(name, name): tensor for name, tensor in state_dict.items()}
        parameters = self._adapter_parameters()
        if adapter.keys() != parameters.keys():
            raise ValueError(
                f"state_dict: expected the adapter's tensors {sorted(parameters)}, "
                f"got {sorted(state_dict)}"
            )
        for name, parameter in parameters.items():
            if adapter[name].shape != parameter.shape:
                raise ValueError(
                    f"state_dict: expected {name} of shape {list(parameter.shape)}, "
                    f"got {list(adapter[name].shape)}"
                )
        self._check_here("load_adapter")
        self.unmerge()
        put_shards_back(self)
        for name, parameter in self._adapter_parameters().items():
            write(parameter, whole(adapter[name]))

    @torch.no_grad()
    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Give the adapter its initial values, see the class; a merged layer is unmerged first.

        DoRA's magnitude becomes the norm of the adapted weight, so that it changes nothing yet.
        """
        check_initialisation(init_lora_weights)
        if is_offloaded(self):
            self._check_here("reset_lora_parameters")
            if self.use_dora:
                self._frozen_weight()
        self.unmerge()
        put_shards_back(self)
        for name in self._adapter_parameters():
            self._draw(name, init_lora_weights)
        self._reset_magnitude()

    def reset_parameters(self) -> None:
        """:meth:`reset_lora_parameters` as the constructor did it, with its ``init_lora_weights``.

        What materialises a model calls this on every module. The parts' own ``reset_parameters``
        give them the same values, so that the order does not matter; ``base_layer``'s is its
        class's.
        """
        self.reset_lora_parameters(self.init_lora_weights)

    def _draw(self, name: str, init_lora_weights: bool | str) -> None:
        """Give an adapter's parameter its initial values; DoRA's magnitude is left alone."""
        raise NotImplementedError

    def _reset_magnitude(self) -> None:
        """DoRA's m becomes ``||W + s B A||``, as soon as all of these have values."""
        magnitude = self.lora_magnitude_vector
        if magnitude is None or any(parameter.is_meta for parameter in self.parameters()):
            return
        # transformers marks what it has loaded.
        if not getattr(magnitude, "_is_hf_initialized", False):
            write(magnitude, self._weight_norm())

    def _check_here(self, call: str) -> None:
        for name, parameter in self._adapter_parameters().items():
            if parameter.is_meta:
                place = "offloaded (accelerate)" if is_offloaded(self) else "on the meta device"
                raise RuntimeError(f"{call}: {name} is {place} and cannot be written")

    @property
    def _is_hf_initialized(self) -> bool:
        """Set by transformers when it has drawn the weights of a new module, parts first.

        It does not know our layers: their parts are marked as done, and the layer draws them here.
        """
        return self._initialised

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        # Inside of its initialisation alone: others set it to keep the values that there are.
        drawing = nn.init.zeros_.__module__.startswith("transformers.")
        if value and drawing and not self._initialised:
            self.base_layer.requires_grad_(False)  # what it has loaded requires grad
            self.reset_parameters()
        self._initialised = value

    def peft_state_dict(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """``state_dict()`` with the names of a PEFT layer in memory that holds ``adapter_name``.

        The way back needs no conversion: ``load_state_dict`` takes both kinds of names.
        """
        return {in_memory_name(name, adapter_name): t for name, t in self.state_dict().items()}

    def _merged_parameters(self) -> dict[str, Tensor]:
        """The base layer's parameters with the adapter in them, by name."""
        raise NotImplementedError

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """The frozen W ``[N, K]``, A ``[R, K]`` and B ``[N, R]``, whole where they are sharded."""
        raise NotImplementedError

    def _weight_norm(self) -> Tensor:
        """``||W + s B A||`` ``[N]``, without gradient."""
        return lora_weight_norm(*self._gathered(), self._scaling)

    def _merged_weight(self) -> Tensor:
        """``c * (W + s B A)`` ``[N, K]``, c being DoRA's."""
        output_scale = self._output_scale()
        weight, a, b = self._gathered()
        factors = LoRAFactors(a, b, self._scaling, output_scale)
        (merged,) = merged_weight(DenseWeight(weight), factors).tensors()
        return merged

    def _frozen_weight(self) -> Tensor:
        """The base layer's weight where its values are read, gathered where it is sharded.

        Raises:
            RuntimeError: it is offloaded.
        """
        weight = self.base_layer.weight
        if weight.is_meta and is_offloaded(self):
            raise RuntimeError(
                "base_layer: its weight is offloaded (accelerate) and here only while it is "
                "called; DoRA needs its norm"
            )
        return whole(weight)

    def _output_scale(self) -> Tensor | None:
        """DoRA's ``m / ||W + s B A||`` ``[N]``, a row of zeros stays zero; None without DoRA."""
        if not self.use_dora:
            return None
        norm, magnitude = self._weight_norm(), self.lora_magnitude_vector
        assert magnitude is not None, "a layer has a magnitude with use_dora"
        return whole(magnitude) / norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def _adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if not name.startswith("base_layer.")
        }

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Take PEFT's names; values that are loaded belong to an unmerged layer."""
        own = [name[len(prefix) :] for name in state_dict if name.startswith(prefix)]
        for theirs, ours in our_names(own).items():
            state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
        for_good = state_dict.pop(prefix + _MERGED_FOR_GOOD, None)
        has_base = f"{prefix}base_layer.weight" in state_dict
        if has_base and self._merge is not None and not self._merge.original:
            self._merge = None  # the weight that was not kept arrives with this state dict
        self.unmerge()
        if has_base and for_good is not None:
            self._merge = Merge("none", {})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn, recurse=True):
        """Take what ``merge`` has kept along to another dtype or device."""
        super()._apply(fn, recurse)
        if self._scaling.device.type != "cpu":
            self._scaling = self._scaling.to(self.base_layer.weight.device)
        if self._merge is not None:
            on_cpu = self._merge.keep == "cpu"
            for name, frozen in self._merge.original.items():
                data = frozen.data
                # fn on no elements tells the dtype without a trip over the device.
                moved = data.to(fn(data.new_empty(0)).dtype) if on_cpu else fn(data)
                if moved is not data:
                    moved = nn.Parameter(moved, requires_grad=frozen.requires_grad)
                    self._merge.original[name] = moved
        return self


def _with_own_parameter_table(module: Part) -> Part:
    """A shallow copy: the same Parameters, but ``merge`` replaces them in it alone."""
    own = copy.copy(module)
    own._parameters = dict(module._parameters)
    return own


def _put_back_original(module: AdapterLayer, state_dict, prefix: str, local_metadata) -> None:
    """State dicts are those of the unmerged layer, whatever its state.

    Where the frozen weight was not kept this cannot be: a mark then keeps the adapter from being
    applied twice, and makes a strict load into a layer that does not know it fail.
    """
    if module._merge is None:
        return
    for name, frozen in module._merge.original.items():
        state_dict[f"{prefix}base_layer.{name}"] = frozen.detach()
    if not module._merge.original:
        state_dict[prefix + _MERGED_FOR_GOOD] = torch.ones((), dtype=torch.bool)
