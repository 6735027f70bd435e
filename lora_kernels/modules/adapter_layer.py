"""What the drop-in layers share: scaling, merging, state dicts."""

import copy
import math
import sys
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.dtypes import FLOATING
from lora_kernels.modules.base_parameters import BaseParameters
from lora_kernels.modules.peft_names import in_memory_name, our_names
from lora_kernels.modules.weight_reads import note_read

_INITIALISATIONS = (True, False, "gaussian")
_MERGED_FOR_GOOD = "merged"  # key of a state dict whose base weight already holds the adapter


class Merge(NamedTuple):
    """What a merged layer was made from."""

    keep: str  # "device", "cpu" or "none"
    original: dict[str, nn.Parameter]  # the base layer's parameters that were replaced; or nothing


class AdapterLayer(BaseParameters):
    """A frozen ``base_layer`` and one low-rank adapter, which can be merged into it and taken out.

    Subclasses hold the adapter's parameters (``lora_magnitude_vector`` ``[N]`` with DoRA), and say
    in ``_merged_parameters`` what the base layer's become.

    Attributes:
        disable_adapters: set it to compute the base layer alone (a merged layer is unmerged).
    """

    def __init__(
        self, base_layer: nn.Module, rank: int, alpha: float, use_rslora: bool, use_dora: bool
    ) -> None:
        super().__init__()
        self.base_layer = _with_own_parameter_table(base_layer).requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.use_rslora, self.use_dora = use_rslora, use_dora
        self.disable_adapters = False
        self._merge: Merge | None = None
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
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
            frozen = self._frozen_while_merged()
            if sys._getframe(1).f_code is nn.Module.get_parameter.__code__:
                return self._tieable(frozen)
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

    @property
    def merged(self) -> bool:
        """Whether the base layer's weight holds the adapter."""
        return self._merge is not None

    def merge(self, keep: Literal["device", "cpu", "none"] = "device") -> None:
        """Put the adapter into the base layer's weight; a merged layer is left as it is.

        The new weight is computed in fp32 and rounded once. The frozen parameters are not written:
        others may share them. While merged, forward is the base layer's alone, so that no gradient
        reaches the adapter, and ``state_dict`` still gives the frozen weight.

        Args:
            keep: where the frozen weight waits for :meth:`unmerge`: on the ``"device"``, in the
                ``"cpu"``'s memory, or nowhere (``"none"``: its memory is freed and unmerge raises).

        Raises:
            ValueError: keep is none of the three, or the merged weight is not finite.
            RuntimeError: the layer is on the meta device, or cannot be merged.
        """
        if keep not in ("device", "cpu", "none"):
            raise ValueError(f"keep: expected 'device', 'cpu' or 'none', got {keep!r}")
        if self._merge is not None:
            return
        if self.base_layer.weight.is_meta:
            raise RuntimeError("merge: the layer is on the meta device and has no data to merge")
        # Plain tensors even under inference_mode: a later training step may save them.
        with torch.inference_mode(False), torch.no_grad():
            merged = self._merged_parameters()
        original = {}
        for name, tensor in merged.items():
            frozen = getattr(self.base_layer, name)
            if keep == "cpu" and frozen.device.type != "cpu":
                frozen = nn.Parameter(frozen.detach().cpu(), requires_grad=frozen.requires_grad)
            if keep != "none":
                original[name] = frozen
            setattr(self.base_layer, name, nn.Parameter(tensor, requires_grad=False))
        self._merge = Merge(keep, original)

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
        device = self.base_layer.weight.device
        for name, frozen in self._merge.original.items():
            if frozen.device != device:
                frozen = nn.Parameter(
                    frozen.detach().to(device), requires_grad=frozen.requires_grad
                )
            setattr(self.base_layer, name, frozen)
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

    def _frozen_while_merged(self) -> nn.Parameter | None:
        """The frozen weight, None if it was not kept; others may have resized it meanwhile."""
        frozen, merged = self._merge.original.get("weight"), self.base_layer.weight
        if frozen is not None and frozen.shape != merged.shape:
            raise RuntimeError(
                f"weight: the frozen weight has become {list(frozen.shape)} while the layer was "
                f"merged, into {list(merged.shape)}; unmerge(), and resize again"
            )
        return frozen

    def _tieable(self, frozen: nn.Parameter | None) -> nn.Parameter:
        if frozen is None or frozen.device != self.base_layer.weight.device:
            raise RuntimeError(
                f"weight: it cannot be tied while the layer is merged with "
                f"keep={self._merge.keep!r}; unmerge(), or merge with keep='device'"
            )
        return frozen

    def _check_resizable(self, name: str, size: int) -> None:
        """Raise unless the frozen weight has ``size`` rows already, and the adapter can follow."""
        if self._merge is not None:
            raise RuntimeError(f"{name}: the layer is merged; unmerge() before resizing it")
        rows = self.base_layer.weight.shape[0]
        if rows != size:
            raise ValueError(f"{name}: expected {rows}, the rows of the base weight, got {size}")

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The adapter's part of ``state_dict()``, with the names of PEFT's files."""
        return {name: parameter.detach() for name, parameter in self._adapter_parameters().items()}

    def load_adapter(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy another adapter's values into this layer; a merged layer is unmerged first.

        Args:
            state_dict: the adapter's tensors under the names of :meth:`adapter_state_dict` or of a
                PEFT layer in memory. Scaling is not among them: set ``scaling`` where it differs.

        Raises:
            ValueError: a tensor is missing, unknown, or has another shape.
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
        self.unmerge()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(adapter[name])

    def peft_state_dict(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """``state_dict()`` with the names of a PEFT layer in memory that holds ``adapter_name``.

        The way back needs no conversion: ``load_state_dict`` takes both kinds of names.
        """
        return {in_memory_name(name, adapter_name): t for name, t in self.state_dict().items()}

    def _merged_parameters(self) -> dict[str, Tensor]:
        """The base layer's parameters with the adapter in them, by name."""
        raise NotImplementedError

    def _weight_norm(self) -> Tensor:
        """``||W + s B A||`` ``[N]``, without gradient."""
        raise NotImplementedError

    def _output_scale(self) -> Tensor:
        """DoRA's ``m / ||W + s B A||`` ``[N]``; a row of zeros stays zero."""
        norm = self._weight_norm()
        return self.lora_magnitude_vector / norm.clamp_min(torch.finfo(norm.dtype).tiny)

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


def _with_own_parameter_table(module: nn.Module) -> nn.Module:
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


def check_no_hooks(name: str, module: nn.Module) -> None:
    """Raise where a module's weights cannot be used without calling it."""
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        raise ValueError(
            f"{name}: it has hooks, which the fused forward would not run; remove them, or put "
            "them on the LoRA layer"
        )


def check_adapter(rank: int, alpha: float, init_lora_weights: bool | str) -> None:
    """Raise for the first hyperparameter that does not fit."""
    check_size("rank", rank)
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha: expected a number, got {type(alpha).__name__}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: expected a finite number, got {alpha}")
    check_initialisation(init_lora_weights)


def check_size(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, Integral):
        raise TypeError(f"{name}: expected an integer, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")


def check_base_layer(name: str, module: nn.Module) -> None:
    """Raise where ``module.weight`` cannot be shared with, or replaced in, a copy of the module."""
    if not isinstance(module.weight, nn.Parameter):
        raise TypeError(
            f"{name}: expected weight to be a plain Parameter, got "
            f"{type(module.weight).__name__}; remove its parametrization first"
        )
    if "forward" in vars(module):
        raise ValueError(
            f"{name}: its forward was replaced on the instance, which would bypass the adapter; "
            "remove what replaced it first"
        )


def check_initialisation(init_lora_weights: bool | str) -> None:
    if init_lora_weights not in _INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights: expected True, False or 'gaussian', got {init_lora_weights!r}"
        )


def adapter_dtype_over(weight: Tensor, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """What an adapter is kept in: fp32 over a half-precision base unless said otherwise."""
    for name, dtype in (("weight", weight.dtype), ("adapter_dtype", adapter_dtype)):
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(
                f"{name}: expected dtype bfloat16, float16, float32 or float64, got {dtype}"
            )
    if adapter_dtype is not None:
        return adapter_dtype
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
