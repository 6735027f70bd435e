"""Random problems for ``routed_lora``, one way to run them, and a loop over tokens as the oracle.

Dimensions: M tokens, k adapters per token, K in_features, N out_features of all slices, R_s an
adapter's rank in slice s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.ops.routed import (
    AdapterBank,
    AdapterSlots,
    Routing,
    routed_lora,
    routed_lora_linear,
)
from lora_kernels.runtime import cpu_extension
from lora_kernels.runtime.dropout import drop_threshold, keep_mask, keep_scale
from lora_kernels.testing.inputs import changed, in_double, redrawn, without_gaps
from lora_kernels.testing.policy import Draw, Results, assert_draws_within_policy


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


class AsOnADevice(TorchDispatchMode):
    """CPU tensors stand for a device's: the mode tells a routing that it may not look at ids."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


# Those that run on a CPU, each tested alike.
BACKENDS = ["reference", "composed", *([] if cpu_extension.missing() else ["native"])]


def call_routed(problem: RoutedProblem, bank: AdapterBank, backend: str, **changes) -> Tensor:
    """``routed_lora_linear``, or ``routed_lora`` where the problem has no weight."""
    p = problem.with_(**{n: v for n, v in changes.items() if n != "routing"})
    if backend == "native" and p.x.dtype not in cpu_extension.DTYPES:
        backend = "composed"  # serves what the compiled kernels do not take
    routing = changes.get("routing") or p.routing(bank)
    if p.weight is None:
        return routed_lora(p.x, bank, routing, p.out, seed=p.seed, backend=backend)
    return routed_lora_linear(
        p.x, p.weight, bank, routing, p.bias, seed=p.seed, backend=backend
    )  # fmt: skip


def run_routed(
    problem: RoutedProblem,
    backend: str,
    needs: Sequence[str] | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The result and the gradients named in ``needs`` (None: all), as ``{"y": ..., "x": ...}``.

    Parameters are called ``a0.lora_a``, in sliced banks ``a0.lora_a_0``. Everything is detached
    first, keeping its strides, so that runs do not touch each other. Of adapters that no token
    uses there are none, which a call for all gradients asserts.
    """
    everything = needs is None
    needs = problem.names() if everything else needs
    inputs = {n: getattr(problem, n) for n in ("x", "weight", "bias", "weights", "out")}
    leaves = {n: None if t is None else t.detach() for n, t in inputs.items()}
    for name in ("x", "bias", "weights", "out"):
        if leaves[name] is not None:
            leaves[name].requires_grad_(name in needs)
    bank, unused = problem.bank(), []
    for name, parameter in _parameters(bank).items():
        leaves[name] = parameter.requires_grad_(name in needs or everything)
        if everything and name not in needs:
            unused.append(parameter)
    given = {n: leaves[n] for n in inputs}
    if given["out"] is not None:
        given["out"] = given["out"].clone()  # added to in place
    with torch.autocast(problem.x.device.type, dtype=autocast, enabled=autocast is not None):
        y = call_routed(problem, bank, backend, **given)
    wanted = [leaves[name] for name in needs]
    if unused:
        gradients = torch.autograd.grad(y, unused, problem.dy, retain_graph=True, allow_unused=True)
        assert set(gradients) == {None}, "an adapter without tokens has a gradient"
    gradients = torch.autograd.grad(y, wanted, problem.dy) if wanted else ()
    return {"y": y.detach(), **dict(zip(needs, gradients, strict=True))}


def _parameters(bank: AdapterBank) -> dict[str, torch.nn.Parameter]:
    return {n.removeprefix("adapters."): p for n, p in bank.named_parameters()}


def keep_factor(adapter: AdapterValues, seed: Tensor | None, rows: int, columns: int) -> Tensor:
    """What x is multiplied by elementwise, fp64 ``[M, K]``: 0 or the scale of dropout; or ones."""
    if not adapter.training or drop_threshold(adapter.dropout_p) == 0:
        return torch.ones(rows, columns, dtype=torch.float64)
    mask = keep_mask(seed, adapter.dropout_p, rows, columns, adapter.slot)
    return mask.double() * keep_scale(adapter.dropout_p)


def routed_oracle(problem: RoutedProblem) -> dict[str, Tensor]:
    """y and every gradient in fp64 by the formulas, one token and one of its adapters at a time."""
    p = problem.double()
    rows, columns = p.x.shape
    by_slot = {adapter.slot: (name, adapter) for name, adapter in p.adapters.items()}
    keeps = {a.slot: keep_factor(a, p.seed, rows, columns) for a in p.adapters.values()}
    y = torch.zeros_like(p.dy) if p.out is None else p.out.clone()
    dx = torch.zeros_like(p.x)
    if p.weight is not None:
        y += torch.einsum("mk,nk->mn", p.x, p.weight) + (0 if p.bias is None else p.bias)
        dx += torch.einsum("mn,nk->mk", p.dy, p.weight)
    results = {"y": y, "x": dx}
    if p.bias is not None:
        results["bias"] = p.dy.sum(0)
    if p.weights is not None:
        results["weights"] = torch.zeros_like(p.weights)
    if p.out is not None:
        results["out"] = p.dy
    for name, adapter in p.used().items():
        for n, factor in adapter.parameters(name).items():
            results[n] = torch.zeros_like(factor)
    for m, slots in enumerate(p.ids.tolist()):
        for j, slot in enumerate(slots):
            if slot not in by_slot:
                continue
            name, adapter = by_slot[slot]
            keep = keeps[slot][m]
            w = 1.0 if p.weights is None else p.weights[m, j].item()
            start = 0
            for s, (pair, width) in enumerate(zip(adapter.pairs, p.widths, strict=True)):
                part, start = slice(start, start + width), start + width
                if pair is None:
                    continue
                a, b = pair
                suffix = "" if len(adapter.pairs) == 1 else f"_{s}"
                h = a @ (keep * p.x[m])
                delta = adapter.scaling * (b @ h)
                t = w * adapter.scaling * (p.dy[m, part] @ b)
                y[m, part] += w * delta
                dx[m] += keep * (t @ a)
                results[f"{name}.lora_a{suffix}"] += torch.outer(t, keep * p.x[m])
                results[f"{name}.lora_b{suffix}"] += (w * adapter.scaling) * torch.outer(
                    p.dy[m, part], h
                )
                if p.weights is not None:
                    results["weights"][m, j] += p.dy[m, part] @ delta
    return results


def routed_eager(problem: RoutedProblem) -> dict[str, Tensor]:
    """The plain formula in x's dtype as trainers run it: a loop over the adapters, with autograd.

    Factors of another dtype are cast to x's, as autocast does.
    """
    p, leaves = problem.tight(), {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        leaves[name] = tensor.detach().clone().requires_grad_()
        return leaves[name]

    x = leaf("x", p.x)
    bias = None if p.bias is None else leaf("bias", p.bias)
    weights = None if p.weights is None else leaf("weights", p.weights)
    if p.weight is not None:
        y = F.linear(x, p.weight, bias)
    else:
        y = torch.zeros_like(p.dy) if p.out is None else leaf("out", p.out)
    for tensor in (x, weights):
        y = y if tensor is None else y - tensor[:0].sum().to(y.dtype)  # a function of it, always
    for name, adapter in p.used().items():
        factors = {n: leaf(n, factor) for n, factor in adapter.parameters(name).items()}
        tokens, which = torch.nonzero(p.ids == adapter.slot, as_tuple=True)
        rows = x[tokens] * keep_factor(adapter, p.seed, *x.shape)[tokens].to(x.dtype)
        parts = []
        for s, (pair, width) in enumerate(zip(adapter.pairs, p.widths, strict=True)):
            suffix = "" if len(adapter.pairs) == 1 else f"_{s}"
            if pair is None:
                parts.append(x.new_zeros(len(tokens), width))
                continue
            a, b = (factors[f"{name}.{role}{suffix}"].to(x.dtype) for role in ("lora_a", "lora_b"))
            parts.append(F.linear(F.linear(rows, a), b) * adapter.scaling)
        delta = torch.cat(parts, dim=1)
        if weights is not None:
            delta = delta * weights[tokens, which].to(x.dtype).unsqueeze(1)
        y = y.index_add(0, tokens, delta)
    gradients = torch.autograd.grad(y, list(leaves.values()), p.dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def check_routed(
    problem: RoutedProblem,
    backend: str,
    needs: Sequence[str] | None = None,
    known: tuple[Results, Results] | None = None,
    **options,
) -> Results:
    """``backend``'s result and gradients, after holding each to the error policy.

    known: eager's and the oracle's results, where they are at hand.
    """

    def draw(number: int) -> Draw:
        drawn = problem.redrawn(number)
        ours = run_routed(drawn, backend, needs, **options)
        if known is not None and number == 0:
            return ours, *known
        return ours, routed_eager(drawn), routed_oracle(drawn)

    ours = assert_draws_within_policy(draw, problem.x.dtype)
    assert needs is not None or ours.keys() == {"y", *problem.names()}
    return ours
