"""One adapter of a bank."""

import math
from numbers import Real

from torch import Tensor, nn

from lora_kernels.initial_values import draw_lora_a_, draw_lora_b_
from lora_kernels.ops.routed_lora.tables import enter_scaling


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
        start: of its region in the bank's storage.
        init_lora_weights: what :meth:`reset_parameters` draws, see :class:`LoRALinear`.
    """

    def __init__(
        self, slot: int, ranks: tuple[int, ...], start: int, scaling: Tensor, dropout_p: float
    ) -> None:
        super().__init__()
        self.slot, self.ranks, self.start = slot, ranks, start
        self.scaling_entry = scaling
        self.scaling_on_meta = 0.0  # what the entry cannot hold there
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
        check_dropout(value)
        self._dropout_p = float(value)

    @property
    def scaling(self) -> Tensor:
        """What the contribution is multiplied by, a 0-d tensor; set it to a number or a tensor."""
        return self.scaling_entry

    @scaling.setter
    def scaling(self, value: float | Tensor) -> None:
        check_scaling(value)
        enter_scaling(self.scaling_entry, value)
        self.keep_scaling(value)

    def keep_scaling(self, value: float | Tensor) -> None:
        """Remember the scaling of a bank on the meta device until it leaves it."""
        if self.scaling_entry.is_meta and not (isinstance(value, Tensor) and value.is_meta):
            self.scaling_on_meta = float(value)

    def reset_parameters(self) -> None:
        """Give the factors a new adapter's values: A Kaiming-uniform and B zero, so that it changes
        nothing; other values of PEFT's where ``init_lora_weights`` says so."""
        for pair in self.factors():
            if pair is not None:
                draw_lora_a_(pair[0], self.init_lora_weights)
                draw_lora_b_(pair[1], self.init_lora_weights)

    def factors(self) -> list[tuple[nn.Parameter, nn.Parameter] | None]:
        """``(A, B)`` of each slice; None where the rank is 0."""
        return [
            (self._parameters.get(names[0]), self._parameters.get(names[1])) if rank else None
            for rank, names in zip(self.ranks, self.parameter_names(), strict=True)
        ]

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


def check_dropout(dropout_p: float) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
