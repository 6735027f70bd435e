"""One frozen linear layer with many adapters in one batch: decoding, or a training step.

`layer` is the time of the whole layer (forward, or forward and backward), `part` the adapters'
share of it: this provider's time minus the frozen layer's in the same repetition. As in `op`, a run
goes through several sets of inputs, together larger than the last-level cache, each with adapters
of its own; on CUDA it is the replay of a graph where the provider can be captured.
"""

import math

import torch
from torch import Tensor

from lora_kernels.bench.case import RoutedCase
from lora_kernels.bench.memory import PeakMemory, SavedStorage, peak_of, saved_for_backward
from lora_kernels.bench.providers import Call, MissingExtra
from lora_kernels.bench.replay import GraphReplay
from lora_kernels.bench.routed_providers import OTHER_FUNCTIONS, ROUTED_PROVIDERS, RoutedInputs
from lora_kernels.measuring import machine, timing
from lora_kernels.testing import error_bound

MAX_SETS = 16


def make_inputs(case: RoutedCase, seed: int) -> RoutedInputs:
    generator = torch.Generator(case.device).manual_seed(seed)

    def draw(*shape: int, spread: float = 1.0, dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, device=case.device)
        return (values * spread).to(dtype)

    dtype, adapter_dtype = case.torch_dtype, case.torch_adapter_dtype
    ranks = [case.rank_of(adapter) for adapter in range(case.adapters)]
    return RoutedInputs(
        x=draw(case.sequences, case.tokens, case.k, dtype=dtype).requires_grad_(case.train),
        weight=draw(case.n, case.k, spread=case.k**-0.5, dtype=dtype),
        lora_a=[
            [draw(r, case.k, spread=case.k**-0.5, dtype=adapter_dtype) for _ in case.slices]
            for r in ranks
        ],
        lora_b=[
            [draw(n, r, spread=r**-0.5, dtype=adapter_dtype) for n in case.slices] for r in ranks
        ],
        scaling=[0.5 + 0.25 * (adapter % 5) for adapter in range(case.adapters)],
        dy=draw(case.sequences, case.tokens, case.n, dtype=dtype),
    )


def inputs_to_exceed_cache(case: RoutedCase) -> int:
    """Enough for three times the last-level cache, and at least two."""
    ranks = sum(case.rank_of(adapter) for adapter in range(case.adapters))
    elements = case.rows * (case.k + case.n) + case.n * case.k * case.base
    elements += ranks * (len(case.slices) * case.k + case.n)
    cache = machine.last_level_cache_bytes(torch.device(case.device))
    return min(MAX_SETS, max(2, math.ceil(3 * cache / (elements * case.torch_dtype.itemsize))))


class Routed(GraphReplay):
    """One provider's calls on all sets of inputs."""

    def __init__(self, case: RoutedCase, calls: list[Call], sets: list[RoutedInputs]) -> None:
        super().__init__(torch.device(case.device), self._call_all, len(calls), "layer")
        self._case, self._calls, self._sets = case, calls, sets
        self.first_loss = None

    def saved(self) -> list[SavedStorage]:
        if not self._case.train:
            return []
        call, inputs = self._calls[0], self._sets[0]
        own = [inputs.weight, *(leaf for leaf in call.leaves if leaf is not inputs.x)]
        return saved_for_backward(call.forward, own)

    def peak(self) -> PeakMemory:
        return peak_of(lambda: run_once(self._case, self._calls[0], self._sets[0]), self.device)

    def _call_all(self) -> None:
        for call, inputs in zip(self._calls, self._sets, strict=True):
            run_once(self._case, call, inputs)


def run_once(case: RoutedCase, call: Call, inputs: RoutedInputs) -> None:
    with call.around(), torch.set_grad_enabled(case.train):
        y = call.forward()
        if case.train:
            torch.autograd.grad(y, call.leaves, inputs.dy, allow_unused=True)


def formula(
    case: RoutedCase, inputs: RoutedInputs, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """The result and its leaves (x, then A and B of each adapter and slice), by a plain loop."""
    x = inputs.x.detach().to(dtype).requires_grad_()
    rows = x.flatten(0, 1)
    weight = inputs.weight.to(dtype)
    y = rows @ weight.t() if case.base else rows.new_zeros((case.rows, case.n))
    owner = torch.tensor(case.adapter_of_row, device=x.device)
    leaves = [x]
    for adapter in range(case.adapters):
        mine = (owner == adapter).nonzero().flatten()
        parts = []
        for a, b in zip(inputs.lora_a[adapter], inputs.lora_b[adapter], strict=True):
            a, b = (factor.detach().to(dtype).requires_grad_() for factor in (a, b))
            leaves += [a, b]
            parts.append((rows[mine] @ a.t()) @ b.t() * inputs.scaling[adapter])
        y = y.index_add(0, mine, torch.cat(parts, dim=1))
    return y.view(*x.shape[:2], case.n), leaves


def wrong(case: RoutedCase, call: Call, inputs: RoutedInputs) -> str | None:
    """What in this provider's results breaks the package's error policy; None when nothing does."""

    def results(y: Tensor, leaves: list[Tensor]) -> dict[str, Tensor]:
        found = {"y": y.detach()}
        if case.train:
            dy = inputs.dy.to(y.dtype)
            gradients = torch.autograd.grad(
                y, leaves, dy, allow_unused=True, materialize_grads=True
            )
            found["dx"] = gradients[0]
            found |= {f"gradient {i}": gradient for i, gradient in enumerate(gradients[1:])}
        return found

    with call.around():
        ours = results(call.forward(), call.leaves)
    eager, oracle = (
        results(*formula(case, inputs, dtype)) for dtype in (case.torch_dtype, torch.float64)
    )
    if len(ours) != len(oracle):
        return f"{len(ours)} results where there should be {len(oracle)}"
    for name, exact in oracle.items():
        error = (ours[name].double() - exact).abs().max().item()
        bound = error_bound(eager[name], exact, case.torch_dtype)
        if not error <= bound:  # so that a NaN is refused
            return f"{name} is off by {error:.3g}, allowed is {bound:.3g}"
    return None


def prepare(case: RoutedCase, names: list[str]) -> tuple[dict[str, Routed], dict[str, str]]:
    """The layers that can run here, and for those that cannot, why."""
    sets = [make_inputs(case, seed) for seed in range(inputs_to_exceed_cache(case))]
    layers, skipped = {}, {}
    for name in names:
        try:
            calls = [ROUTED_PROVIDERS[name](inputs, case) for inputs in sets]
            reason = None if name in OTHER_FUNCTIONS else wrong(case, calls[0], sets[0])
            if reason:
                skipped[name] = f"not timed, its result is wrong: {reason}"
                continue
            layer = Routed(case, calls, sets)
            layer.warm_up()
            layers[name] = layer
        except MissingExtra:
            raise
        except Exception as error:  # one provider's trouble is not the others'
            skipped[name] = f"{type(error).__name__}: {error}"
    return layers, skipped


def with_parts(case: RoutedCase, samples: dict[str, list[timing.Sample]]) -> None:
    """Adds each repetition's `part` to the samples."""
    frozen = samples.get("frozen")
    for name, taken in samples.items():
        if name == "frozen" or (case.base and not frozen):
            continue
        for rep, sample in enumerate(taken):
            sample["part"] = sample["layer"] - (frozen[rep]["layer"] if case.base else 0.0)
