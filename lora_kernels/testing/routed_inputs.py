"""Random problems for ``routed_lora``.

Dimensions: M tokens, k adapters per token, K in_features, N out_features of all slices, R_s an
adapter's rank in slice s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_kernels.ops.routed import AdapterBank, AdapterSlots, Routing
from lora_kernels.testing.inputs import changed, in_double, redrawn, without_gaps


def some_ids(tokens: int, adapters: int, per_token: int = 1, seed: int = 0) -> Tensor:
    """Random slots, -1 among them; the last adapter is used, the first is not."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, adapters, (tokens, per_token), generator=generator)
    ids[ids == 0] = -1
    if tokens:
        ids[tokens // 2, 0] = adapters - 1
    return ids


@dataclass(frozen=True)
class AdapterValues:
    """What one adapter is made of; a pair ``(A [R_s, K], B [N_s, R_s])`` or None for each slice."""

    slot: int
    pairs: tuple[tuple[Tensor, Tensor] | None, ...]
    scaling: float
    dropout_p: float = 0.0
    training: bool = True

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> "AdapterValues":
        """The same adapter, each factor changed; they are called by slice and side."""
        pairs = (
            pair and tuple(change(f"{s} {i}", factor) for i, factor in enumerate(pair))
            for s, pair in enumerate(self.pairs)
        )
        return replace(self, pairs=tuple(pairs))

    def parameters(self, name: str) -> dict[str, Tensor]:
        """The factors under the names that gradients have in results."""
        one = len(self.pairs) == 1
        return {
            f"{name}.{role}" if one else f"{name}.{role}_{s}": factor
            for s, pair in enumerate(self.pairs)
            if pair is not None
            for role, factor in zip(("lora_a", "lora_b"), pair, strict=True)
        }


@dataclass(frozen=True)
class RoutedProblem:
    """The inputs of one call: signed random data, scaled so that y and every gradient are O(1)."""

    x: Tensor  # [M, K]
    weight: Tensor | None  # [N, K]
    bias: Tensor | None  # [N]
    out: Tensor | None  # [M, N], added to; only without weight
    adapters: dict[str, AdapterValues]
    widths: tuple[int, ...]  # out_features of each slice
    ids: Tensor  # [M, k] int64, on the CPU; -1: none
    weights: Tensor | None  # [M, k] fp32
    seed: Tensor | None  # []
    dy: Tensor  # [M, N]

    @staticmethod
    def random(
        ids: Tensor | Sequence,
        ranks: Sequence[int | Sequence[int]],
        in_features: int,
        out_features: int | Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        with_weight: bool = True,
        with_bias: bool = True,
        with_out: bool = False,
        weighted: bool = False,
        dropout: Sequence[float] | float = 0.0,
        device: str = "cpu",
        generator_seed: int = 0,
    ) -> "RoutedProblem":
        """Draw a problem; the values depend on ``generator_seed`` and the sizes only.

        Args:
            ids: ``[M]`` or ``[M, k]``, numbers of adapters, -1 for none.
            ranks: of each adapter, in a sliced bank one for each slice (0: none).
            dropout: p of each adapter, or of all.
        """
        generator = torch.Generator().manual_seed(generator_seed)
        ids = torch.as_tensor(ids, dtype=torch.int64)
        ids = ids.unsqueeze(1) if ids.ndim == 1 else ids
        widths = (out_features,) if isinstance(out_features, int) else tuple(out_features)
        rows, columns = ids.shape[0], sum(widths)

        def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            return values.to(device=device, dtype=dtype)

        def pair(rank: int, width: int) -> tuple[Tensor, Tensor] | None:
            if rank == 0:
                return None
            kind = adapter_dtype or dtype
            a = draw(rank, in_features, scale=in_features**-0.5, dtype=kind)
            return a, draw(width, rank, scale=rank**-0.5, dtype=kind)

        adapters = {}
        for slot, given in enumerate(ranks):
            of_slices = (given,) if isinstance(given, int) else tuple(given)
            adapters[f"a{slot}"] = AdapterValues(
                slot,
                tuple(pair(*sizes) for sizes in zip(of_slices, widths, strict=True)),
                scaling=(-1) ** slot * (0.5 + 0.2 * slot / len(ranks)),
                dropout_p=dropout if isinstance(dropout, (int, float)) else dropout[slot],
            )
        drops = any(adapter.dropout_p for adapter in adapters.values())
        # 0.5 to 1.5: a maximum error that hangs on one heavy row would say little. No two alike:
        # two pairs of one token would cancel exactly, and leave nothing to compare.
        weights = draw(*ids.shape, dtype=torch.float32)
        weights = weights.sign() * (0.5 + torch.erf(weights.abs() / 2**0.5))
        return RoutedProblem(
            x=draw(rows, in_features),
            weight=draw(columns, in_features, scale=in_features**-0.5) if with_weight else None,
            bias=draw(columns) if with_weight and with_bias else None,
            out=draw(rows, columns) if with_out else None,
            adapters=adapters,
            widths=widths,
            ids=ids,
            weights=weights if weighted else None,
            seed=torch.tensor(0x1234_5678_9ABC_DEF1, device=device) if drops else None,
            dy=draw(rows, columns),
        )

    def with_(self, **changes) -> "RoutedProblem":
        """The same problem with some inputs replaced."""
        return replace(self, **changes)

    def with_adapter(self, name: str, **changes) -> "RoutedProblem":
        """The same problem with something of one adapter replaced."""
        changed = replace(self.adapters[name], **changes)
        return replace(self, adapters={**self.adapters, name: changed})

    def redrawn(self, number: int) -> "RoutedProblem":
        """Other values of the same sizes and magnitudes; draw 0 is this problem."""
        if number == 0:
            return self
        changes = changed(self, lambda name, t: redrawn(t, number, name), ("ids", "seed"))
        adapters = {
            name: adapter.changed(lambda at, f, name=name: redrawn(f, number, f"{name} {at}"))
            for name, adapter in self.adapters.items()
        }
        seed = None if self.seed is None else self.seed + number
        return replace(self, seed=seed, adapters=adapters, **changes)

    def tight(self) -> "RoutedProblem":
        """The same activations and weights without gaps, see :meth:`LoRAProblem.tight`."""
        return replace(self, **changed(self, lambda _, tensor: without_gaps(tensor)))

    def to(self, device: str | torch.device) -> "RoutedProblem":
        """The same problem with its tensors, but for the ids, on another device."""
        adapters = {
            name: each.changed(lambda _, factor: factor.to(device))
            for name, each in self.adapters.items()
        }
        moved = changed(self, lambda _, tensor: tensor.to(device), ("ids",))
        return replace(self, adapters=adapters, **moved)

    def double(self) -> "RoutedProblem":
        """The same values in fp64."""
        adapters = {name: each.changed(in_double) for name, each in self.adapters.items()}
        return replace(self, adapters=adapters, **changed(self, in_double))

    def bank(self, slots: AdapterSlots | None = None) -> AdapterBank:
        """A new bank that holds the adapters, each in the slot that ``ids`` mean."""
        kinds = [p.dtype for a in self.adapters.values() for p in a.parameters("").values()]
        bank = AdapterBank(
            self.x.shape[1],
            self.widths[0] if len(self.widths) == 1 else self.widths,
            dtype=kinds[0] if kinds else self.x.dtype,
            device=self.x.device,
            slots=slots if slots is not None else AdapterSlots(max(len(self.adapters), 1)),
        )
        for name, adapter in self.adapters.items():
            a, b = zip(*(pair or (None, None) for pair in adapter.pairs), strict=True)
            if len(self.widths) == 1:
                (a,), (b,) = a, b
            # A tensor: its value is not looked at, and may be what a bad file has.
            scaling = torch.tensor(adapter.scaling, dtype=torch.float64)
            added = bank.add(name, a, b, scaling, adapter.dropout_p)
            added.train(adapter.training)
            assert added.slot == adapter.slot
        return bank

    def routing(self, bank: AdapterBank, max_tokens: int | None = None) -> Routing:
        """The routing that ``ids`` and ``weights`` describe."""
        count = self.ids.shape[0] if max_tokens is None else max_tokens
        routing = Routing.empty(count, bank, self.ids.shape[1])
        if self.weights is not None:
            return routing.set_weighted_(self.ids, self.weights)
        if self.ids.shape[1] > 1:
            return routing.set_weighted_(self.ids, torch.ones(self.ids.shape))
        return routing.set_tokens_(self.ids[:, 0])

    def used(self) -> dict[str, AdapterValues]:
        """The adapters that tokens use."""
        slots = set(self.ids.flatten().tolist())
        return {name: adapter for name, adapter in self.adapters.items() if adapter.slot in slots}

    def names(self) -> list[str]:
        """Everything that can have a gradient."""
        inputs = [n for n in ("x", "bias", "weights", "out") if getattr(self, n) is not None]
        return inputs + [n for name, a in self.used().items() for n in a.parameters(name)]
