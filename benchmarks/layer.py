"""A training step of one decoder layer of Llama-3 8B's shape, in plain torch: no transformers.

All seven linears are adapted, the frozen weights are shared between the providers, and the
gradient that enters the backward is given. `step` is forward and backward. Frozen is the layer
without adapters whose input requires grad.
"""

import contextlib
import functools
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.bench.case import LayerCase
from lora_kernels.bench.memory import PeakMemory, SavedStorage, peak_of, saved_for_backward
from lora_kernels.bench.providers import forced_strategy, naive_formula, naive_fp32_formula
from lora_kernels.measuring import timing

# linear(x, weight, lora_a, lora_b, scaling, dropout_p)
LinearFunction = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Tensor]


def frozen_linear(x, weight, lora_a, lora_b, scaling, dropout_p) -> Tensor:
    return F.linear(x, weight)


def our_linear(backend: str, x, weight, lora_a, lora_b, scaling, dropout_p) -> Tensor:
    from lora_kernels import lora_linear

    return lora_linear(x, weight, lora_a, lora_b, scaling, dropout_p=dropout_p, backend=backend)


@dataclass(frozen=True)
class LayerProvider:
    linear: LinearFunction
    adapter_dtype: torch.dtype | None = torch.float32  # None: that of the base
    strategy: str | None = None
    adapted: bool = True


PROVIDERS = {
    "frozen": LayerProvider(frozen_linear, adapted=False),
    "naive": LayerProvider(naive_formula, adapter_dtype=None),
    "naive-fp32": LayerProvider(naive_fp32_formula),
    "composed": LayerProvider(functools.partial(our_linear, "composed")),
    "triton-hybrid": LayerProvider(functools.partial(our_linear, "triton"), strategy="hybrid"),
    "triton-fused": LayerProvider(functools.partial(our_linear, "triton"), strategy="fused"),
    "native": LayerProvider(functools.partial(our_linear, "native")),
    "ours": LayerProvider(functools.partial(our_linear, "auto")),
}


class DecoderLayer(nn.Module):
    """x [B, T, hidden] -> [B, T, hidden]; every linear goes through ``linear``."""

    def __init__(
        self, case: LayerCase, weights: dict[str, Tensor], provider: LayerProvider
    ) -> None:
        super().__init__()
        self.case, self._linear = case, provider.linear
        self._weights = weights
        self._norms = [torch.ones(case.hidden, dtype=case.torch_dtype, device=case.device)] * 2
        generator = torch.Generator().manual_seed(3)
        dtype = provider.adapter_dtype or case.torch_dtype
        self.adapters = nn.ParameterDict()
        for name, (out_features, in_features) in case.linears().items():
            a = torch.randn(case.rank, in_features, generator=generator) * in_features**-0.5
            b = torch.randn(out_features, case.rank, generator=generator) * 0.01
            for key, value in ((f"{name}_a", a), (f"{name}_b", b)):
                self.adapters[key] = nn.Parameter(
                    value.to(case.device, dtype), requires_grad=provider.adapted
                )

    def _project(self, name: str, x: Tensor) -> Tensor:
        lora_a, lora_b = self.adapters[f"{name}_a"], self.adapters[f"{name}_b"]
        scaling = self.case.alpha / self.case.rank
        return self._linear(x, self._weights[name], lora_a, lora_b, scaling, self.case.dropout)

    def forward(self, x: Tensor) -> Tensor:
        case = self.case
        batch, length, _ = x.shape
        head = case.hidden // case.heads

        normed = F.rms_norm(x, (case.hidden,), self._norms[0], 1e-5)
        q, k, v = (
            self._project(name, normed).view(batch, length, heads, head).transpose(1, 2)
            for name, heads in (("q", case.heads), ("k", case.kv_heads), ("v", case.kv_heads))
        )
        q, k = rotated(q), rotated(k)
        groups = case.heads // case.kv_heads
        k, v = (each.repeat_interleave(groups, dim=1) for each in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self._project("o", mixed.transpose(1, 2).reshape(batch, length, -1))

        normed = F.rms_norm(x, (case.hidden,), self._norms[1], 1e-5)
        gated = F.silu(self._project("gate", normed)) * self._project("up", normed)
        return x + self._project("down", gated)


def rotated(x: Tensor) -> Tensor:  # [B, heads, T, head]
    """Rotary position embedding, the two halves of a head as pairs."""
    half = x.shape[-1] // 2
    frequency = 500_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(x.shape[2], device=x.device), frequency)  # [T, half]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class LayerStep:
    """One provider's step on fixed inputs."""

    def __init__(self, case: LayerCase, name: str, weights: dict[str, Tensor]) -> None:
        provider = PROVIDERS[name]
        self.device = torch.device(case.device)
        self.timing = "events" if self.device.type == "cuda" else "wall clock"
        self.first_loss: float | None = None
        self._layer = DecoderLayer(case, weights, provider)
        self._weights = weights
        self._trained = [p for p in self._layer.parameters() if p.requires_grad]
        self._around = contextlib.nullcontext
        if provider.strategy:
            self._around = functools.partial(forced_strategy, provider.strategy, self.device)
        generator = torch.Generator().manual_seed(4)
        shape = (case.batch, case.length, case.hidden)
        self._x, self._dy = (
            torch.randn(shape, generator=generator).to(case.device, case.torch_dtype)
            for _ in range(2)
        )
        self._x.requires_grad_()

    def run(self) -> timing.Sample:
        clock = timing.Clock(self.device)
        with self._around():
            clock.start()
            y = self._layer(self._x)
            clock.mark("forward")
            grads = torch.autograd.grad(y, [self._x, *self._trained], self._dy)
            clock.mark("backward")
        sample = clock.seconds()
        sample["step"] = sample["forward"] + sample["backward"]
        if self.first_loss is None:
            if not all(torch.isfinite(tensor).all() for tensor in (y, *grads)):
                raise FloatingPointError("the step's result or a gradient is not finite")
            self.first_loss = (y.detach().float() * self._dy.float()).mean().item()
        return sample

    def saved(self) -> list[SavedStorage]:
        own = [*self._layer.parameters(), *self._weights.values()]
        with self._around():
            return saved_for_backward(lambda: self._layer(self._x), own)

    def peak(self) -> PeakMemory:
        gc.collect()
        return peak_of(lambda: self.run() and None, self.device)


def base_weights(case: LayerCase) -> dict[str, Tensor]:
    generator = torch.Generator(case.device).manual_seed(2)
    return {
        name: (
            torch.randn(n, k, generator=generator, device=case.device) * k**-0.5
        ).to(case.torch_dtype)
        for name, (n, k) in case.linears().items()
    }  # fmt: skip


def prepare(case: LayerCase, names: list[str]) -> tuple[dict[str, LayerStep], dict[str, str]]:
    """The steps that can run here, and for those that cannot, why."""
    weights = base_weights(case)
    steps, skipped = {}, {}
    for name in names:
        try:
            step = LayerStep(case, name, weights)
            for _ in range(2):
                step.run()  # warms up: compilation, the allocator
            steps[name] = step
        except Exception as error:  # one provider's trouble is not the others'
            skipped[name] = f"{type(error).__name__}: {error}"
    return steps, skipped


def small(case: LayerCase) -> LayerCase:
    """The same layer at a size for a CPU, to try the benchmark out."""
    sizes = {"batch": 2, "length": 16, "hidden": 64, "heads": 4, "kv_heads": 2, "intermediate": 96}
    return LayerCase(**{**asdict(case), **sizes, "rank": 4})
