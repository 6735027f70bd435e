"""One adapter of a bank."""

from __future__ import annotations

import math
import weakref
from numbers import Real

import torch
from torch import Tensor, nn

from lora_kernels.adapters.initial_values import draw_lora_a_, draw_lora_b_
from lora_kernels.ops.routed.bank.tables import scaling_dtype
from lora_kernels.runtime.checks import check_dropout_p
from lora_kernels.runtime.dropout import drop_threshold


class Adapter(nn.Module):
    """One adapter of an :class:`AdapterBank`: its parameters, scaling and dropout.

    ``lora_a`` ``[R, K]`` and ``lora_b`` ``[N, R]`` are ordinary parameters with their own
    ``requires_grad``; an optimizer may hold those of one adapter. In a sliced bank they are
    ``lora_a_0``, ``lora_b_0``, ``lora_a_1``, ... without those of slices where the rank is 0.

    Dropout acts while the adapter is in training mode: ``bank.train()`` and ``eval()`` set all,
    ``bank[name].eval()`` this one.

    Attributes:
        slot: its number in routings.
        ranks: R of each slice.
        init_lora_weights: what :meth:`reset_parameters` draws, see :class:`LoRALinear`.
    """

    _dropout_p: float

    def __init__(
        self,
        slot: int,
        ranks: tuple[int, ...],
        scaling: float | Tensor,
        dropout_p: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.slot, self.ranks = slot, ranks
        self._bank: weakref.ref | None = None  # told of what versions of it hold
        self._scaling = scaling_on(device, scaling)
        self.dropout_p = dropout_p
        self.init_lora_weights: bool | str = True

    @property
    def rank(self) -> int:
        """Over all slices."""
        return sum(self.ranks)

    @property
    def dropout_p(self) -> float:
        """The probability with which an element of x is dropped in training."""
        return self._dropout_p

    @dropout_p.setter
    def dropout_p(self, value: float) -> None:
        check_dropout_p(value)
        self._set("_dropout_p", float(value), "thresholds")

    @property
    def threshold(self) -> int:
        """Below which a lane is dropped; 0 in evaluation mode."""
        return drop_threshold(self._dropout_p) if self.training else 0

    def train(self, mode: bool = True) -> Adapter:
        """Dropout on or off."""
        changes = self.training != mode
        super().train(mode)
        if changes and self._dropout_p:
            self._tell("thresholds")
        return self

    @property
    def scaling(self) -> Tensor:
        """What the contribution is multiplied by, a 0-d tensor; set it to a number or a tensor.

        It is not to be changed in place: a batch under way goes on with what it began with.
        """
        return self._scaling

    @scaling.setter
    def scaling(self, value: float | Tensor) -> None:
        check_scaling(value)
        self._set("_scaling", scaling_on(self._scaling.device, value), "scaling")

    def move_scaling(self, device: torch.device) -> None:
        """Follow the bank to another device. A number survives the meta device."""
        if device.type != "meta" and self._scaling.device != device:
            known = 0.0 if self._scaling.is_meta else self._scaling
            self._scaling = scaling_on(device, known)

    def _set(self, name: str, value: object, what: str) -> None:
        """Set an attribute that versions hold, or neither."""
        before = getattr(self, name, value)
        setattr(self, name, value)
        try:
            self._tell(what)
        except BaseException:
            setattr(self, name, before)
            raise

    def _tell(self, what: str) -> None:
        bank = self._bank() if self._bank is not None else None
        if bank is not None:
            bank.adapter_changed(self, what)

    def belong_to(self, bank: nn.Module | None) -> None:
        """Tell this bank of changes from now on."""
        self._bank = None if bank is None else weakref.ref(bank)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_bank": None}

    def reset_parameters(self) -> None:
        """Give the factors a new adapter's values: A Kaiming-uniform and B zero, so that it changes
        nothing; other values of PEFT's where ``init_lora_weights`` says so."""
        for pair in self.factors():
            if pair is not None:
                draw_lora_a_(pair[0], self.init_lora_weights)
                draw_lora_b_(pair[1], self.init_lora_weights)

    def factors(self) -> list[tuple[nn.Parameter, nn.Parameter] | None]:
        """``(A, B)`` of each slice; None where the rank is 0."""
        found = []
        for a_name, b_name in self.parameter_names():
            a, b = self._parameters.get(a_name), self._parameters.get(b_name)
            found.append(None if a is None or b is None else (a, b))
        return found

    def parameter_names(self) -> list[tuple[str, str]]:
        """The names of A and B of each slice."""
        if len(self.ranks) == 1:
            return [("lora_a", "lora_b")]
        return [(f"lora_a_{s}", f"lora_b_{s}") for s in range(len(self.ranks))]

    def __getattr__(self, name: str):
        if name in ("lora_a", "lora_b") and len(self.__dict__.get("ranks", (0,))) > 1:
            raise AttributeError(
                f"{name}: the bank has {len(self.ranks)} slices; use {name}_0, {name}_1, ... or "
                "factors()"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        ranks = self.ranks[0] if len(self.ranks) == 1 else self.ranks
        dropout = f", dropout_p={self.dropout_p}" if self.dropout_p else ""
        return f"slot={self.slot}, rank={ranks}{dropout}"


@torch.no_grad()
def scaling_on(device: torch.device, scaling: float | Tensor) -> Tensor:
    """``[]`` on the device, in what its tables have; on the host for the meta device."""
    if device.type == "meta":
        if isinstance(scaling, Tensor) and scaling.is_meta:
            return torch.empty((), dtype=torch.float64, device="meta")
        device = torch.device("cpu")
    if not isinstance(scaling, Tensor):
        return torch.tensor(float(scaling), dtype=scaling_dtype(device), device=device)
    if scaling.device != device:
        scaling = scaling.cpu()  # in its own dtype: MPS does not copy to fp64
    return scaling.detach().to(scaling_dtype(device)).to(device).clone()


def check_scaling(scaling: float | Tensor) -> None:
    if isinstance(scaling, Tensor):
        if scaling.ndim != 0 or scaling.is_complex() or scaling.requires_grad:
            raise ValueError(
                "scaling: expected a number or a real 0-d tensor without gradient, got a tensor of "
                f"shape {list(scaling.shape)}, {scaling.dtype}, "
                f"requires_grad={scaling.requires_grad}"
            )
    elif isinstance(scaling, bool) or not isinstance(scaling, Real):
        raise TypeError(f"scaling: expected a number or a 0-d tensor, got {type(scaling).__name__}")
    elif not math.isfinite(scaling):
        raise ValueError(f"scaling: expected a finite number, got {scaling}")
