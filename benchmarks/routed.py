"""One frozen linear layer with many adapters in one batch: decoding, or a training step.

`layer` is the time of the whole layer (forward, or forward and backward), `part` the adapters'
share of it: this provider's time minus the frozen layer's in the same repetition. As in `op`, a run
goes through several sets of inputs, together larger than the last-level cache, each with adapters
of its own; on CUDA it is the replay of a graph where the provider can be captured.
"""

import torch
from torch import Tensor

from benchmarks.memory import PeakMemory, SavedStorage, peak_of, saved_for_backward
from benchmarks.preparing import prepare_each
from benchmarks.routed_providers import (
    OTHER_FUNCTIONS,
    PROVIDERS,
    RoutedCase,
    RoutedInputs,
    around,
)
from lora_kernels.measuring import timing
from lora_kernels.measuring.linear_call import Call
from lora_kernels.measuring.timed_calls import TimedCalls, sets_past_cache
from lora_kernels.testing import assert_within_policy

Case = RoutedCase


def default_cases(device: str) -> list[RoutedCase]:
    """Decoding, and a batch of prompts."""
    return [RoutedCase(device=device), RoutedCase(16, 64, device=device)]


def default_providers(case: RoutedCase) -> list[str]:
    if case.train:
        return ["frozen", "naive", "composed", "ours"]
    return ["frozen", "naive", "peft", "gather-bmm", "grouped-mm", "composed", "ours"]


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


def bytes_of(case: RoutedCase) -> int:
    """Of one set of inputs, the adapters among them."""
    ranks = sum(case.rank_of(adapter) for adapter in range(case.adapters))
    elements = case.rows * (case.k + case.n) + case.n * case.k * case.base
    elements += ranks * (len(case.slices) * case.k + case.n)
    return elements * case.torch_dtype.itemsize


class Routed(TimedCalls):
    """One provider's calls on all sets of inputs."""

    def __init__(self, case: RoutedCase, name: str, sets: list[RoutedInputs]) -> None:
        self._case, self._sets = case, sets
        self.calls = [PROVIDERS[name](inputs, case) for inputs in sets]
        device, parts = torch.device(case.device), {"layer": self._call}
        super().__init__(device, parts, len(sets), around=lambda: around(name))

    def saved(self) -> list[SavedStorage]:
        if not self._case.train:
            return []
        call, inputs = self.calls[0], self._sets[0]
        own = [inputs.weight, *(leaf for leaf in call.leaves if leaf is not inputs.x)]
        return saved_for_backward(call.forward, own)

    def peak(self) -> PeakMemory:
        with self._around():
            return peak_of(lambda: self._call(0) and None, self.device)

    def _call(self, number: int) -> object:
        call, inputs = self.calls[number], self._sets[number]
        with torch.set_grad_enabled(self._case.train):
            y = call.forward()
            if not self._case.train:
                return y
            return torch.autograd.grad(y, call.leaves, inputs.dy, allow_unused=True)


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


def hold_to_policy(case: RoutedCase, call: Call, inputs: RoutedInputs) -> None:
    """Raises an AssertionError where a result breaks the package's error policy."""

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

    ours = results(call.forward(), call.leaves)
    eager, oracle = (
        results(*formula(case, inputs, dtype)) for dtype in (case.torch_dtype, torch.float64)
    )
    for name, exact in oracle.items():
        like = eager[name].to(ours[name].dtype)  # an fp32 adapter over a half base
        assert_within_policy(name, ours[name], like, exact, case.torch_dtype)


def prepare(case: RoutedCase, names: list[str]) -> tuple[dict[str, Routed], dict[str, str]]:
    count = sets_past_cache(bytes_of(case), torch.device(case.device), most=16)
    sets = [make_inputs(case, seed) for seed in range(count)]

    def make(name: str) -> Routed:
        layer = Routed(case, name, sets)
        if name not in OTHER_FUNCTIONS:
            with around(name):
                hold_to_policy(case, layer.calls[0], sets[0])
        layer.warm_up()
        return layer

    return prepare_each(names, make)


def derive(case: RoutedCase, samples: dict[str, list[timing.Sample]]) -> None:
    """Adds each repetition's `part` to the samples."""
    frozen = samples.get("frozen")
    for name, taken in samples.items():
        if name == "frozen" or (case.base and not frozen):
            continue
        for rep, sample in enumerate(taken):
            sample["part"] = sample["layer"] - (frozen[rep]["layer"] if case.base else 0.0)
