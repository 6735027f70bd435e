"""A training step of one decoder layer of Llama-3 8B's shape, in plain torch: no transformers.

All seven linears are adapted, the frozen weights are shared between the providers, and the
gradient that enters the backward is given. `step` is forward and backward. Frozen is the layer
without adapters whose input requires grad.
"""

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.memory import PeakMemory, SavedStorage, peak_of, saved_for_backward
from benchmarks.naive import naive_fp32_linear, naive_linear
from benchmarks.op_providers import around
from benchmarks.preparing import import_peft, prepare_each
from lora_kernels import lora_linear
from lora_kernels.measuring import timing
from lora_kernels.measuring.linear_call import Typed
from lora_kernels.testing import assert_within_policy


@dataclass(frozen=True)
class LayerCase(Typed):
    batch: int = 4
    length: int = 2048
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 14336
    dtype: str = "bf16"
    dropout: float = 0.0
    rank: int = 16
    alpha: float = 32
    device: str = "cuda"

    @property
    def title(self) -> str:
        return (
            f"decoder layer: hidden {self.hidden}, {self.batch}x{self.length} tokens, "
            f"r {self.rank}, {self.dtype}, dropout {self.dropout:g}"
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """name -> (out_features, in_features)"""
        head = self.hidden // self.heads
        return {
            "q": (self.heads * head, self.hidden),
            "k": (self.kv_heads * head, self.hidden),
            "v": (self.kv_heads * head, self.hidden),
            "o": (self.hidden, self.heads * head),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


# To try the benchmark out on a CPU.
SMALL = {
    "batch": 2, "length": 16, "hidden": 64, "heads": 4, "kv_heads": 2, "intermediate": 96,
    "rank": 4,
}  # fmt: skip
Case = LayerCase


def default_cases(device: str) -> list[LayerCase]:
    sizes = {} if torch.device(device).type == "cuda" else SMALL
    return [LayerCase(dropout=p, device=device, **sizes) for p in (0.0, 0.1)]


def default_providers(case: LayerCase) -> list[str]:
    return ["frozen", "naive", "naive-fp32", "peft", "composed", "ours"]


# ---- who competes

# linear(x, weight, lora_a, lora_b, scaling, dropout_p)
LinearFunction = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Tensor]


def frozen_linear(x, weight, lora_a, lora_b, scaling, dropout_p) -> Tensor:
    return F.linear(x, weight)


def our_linear(backend: str, x, weight, lora_a, lora_b, scaling, dropout_p) -> Tensor:
    return lora_linear(x, weight, lora_a, lora_b, scaling, dropout_p=dropout_p, backend=backend)


class PeftLinear:
    """PEFT's own layers around the tensors that it is called with."""

    def __init__(self) -> None:
        self._package = import_peft()
        self._layers: dict[int, nn.Module] = {}

    def __call__(self, x, weight, lora_a, lora_b, scaling, dropout_p) -> Tensor:
        if id(lora_a) not in self._layers:
            with torch.device("meta"):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            rank = lora_a.shape[0]
            config = self._package.LoraConfig(r=rank, lora_dropout=dropout_p)
            layer = self._package.tuners.lora.layer.Linear(
                linear, "default", config=config, r=rank, lora_alpha=scaling * rank
            ).train()
            layer.lora_A["default"].weight, layer.lora_B["default"].weight = lora_a, lora_b
            self._layers[id(lora_a)] = layer
        return self._layers[id(lora_a)](x)


@dataclass(frozen=True)
class LayerProvider:
    linear: LinearFunction | type[PeftLinear]
    adapter_dtype: torch.dtype | None = torch.float32  # None: that of the base
    adapted: bool = True


PROVIDERS = {
    "frozen": LayerProvider(frozen_linear, adapted=False),
    "naive": LayerProvider(naive_linear, adapter_dtype=None),
    "naive-fp32": LayerProvider(naive_fp32_linear),
    "peft": LayerProvider(PeftLinear),
    "composed": LayerProvider(functools.partial(our_linear, "composed")),
    "triton-hybrid": LayerProvider(functools.partial(our_linear, "triton")),
    "triton-fused": LayerProvider(functools.partial(our_linear, "triton")),
    "native": LayerProvider(functools.partial(our_linear, "native")),
    "ours": LayerProvider(functools.partial(our_linear, "auto")),
}


class DecoderLayer(nn.Module):
    """x [B, T, hidden] -> [B, T, hidden]; every linear goes through ``linear``."""

    def __init__(
        self, case: LayerCase, weights: dict[str, Tensor], provider: LayerProvider
    ) -> None:
        super().__init__()
        self.case, self._weights = case, weights
        linear = provider.linear
        self._linear = linear() if isinstance(linear, type) else linear
        norm = torch.ones(case.hidden, dtype=case.torch_dtype, device=case.device)
        self.register_buffer("_norm", norm)
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

        normed = F.rms_norm(x, (case.hidden,), self._norm, 1e-5)
        q, k, v = (
            self._project(name, normed).view(batch, length, heads, head).transpose(1, 2)
            for name, heads in (("q", case.heads), ("k", case.kv_heads), ("v", case.kv_heads))
        )
        q, k = rotated(q), rotated(k)
        groups = case.heads // case.kv_heads
        k, v = (each.repeat_interleave(groups, dim=1) for each in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self._project("o", mixed.transpose(1, 2).reshape(batch, length, -1))

        normed = F.rms_norm(x, (case.hidden,), self._norm, 1e-5)
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
        self._around = functools.partial(around, name, self.device)
        self._x, self._dy = inputs_of(case)
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


def inputs_of(case: LayerCase) -> tuple[Tensor, Tensor]:
    """x and dy"""
    generator = torch.Generator().manual_seed(4)
    shape = (case.batch, case.length, case.hidden)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    return x.to(case.device, case.torch_dtype), dy.to(case.device, case.torch_dtype)


def base_weights(case: LayerCase) -> dict[str, Tensor]:
    generator = torch.Generator(case.device).manual_seed(2)
    return {
        name: (
            torch.randn(n, k, generator=generator, device=case.device) * k**-0.5
        ).to(case.torch_dtype)
        for name, (n, k) in case.linears().items()
    }  # fmt: skip


def results_of(layer: DecoderLayer, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, dx and the adapters' gradients."""
    x = x.detach().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.adapters.values()], dy)
    return dict(zip(("y", "x", *layer.adapters), (y.detach(), *gradients), strict=True))


def exact_results(case: LayerCase, weights: dict[str, Tensor], adapters: torch.dtype | None):
    """In fp64, a sequence at a time: the memory of all at once is not everywhere."""
    weights = {name: weight.double() for name, weight in weights.items()}
    layer = DecoderLayer(case, weights, LayerProvider(naive_linear, adapters)).double()
    x, dy = (each.double().split(1) for each in inputs_of(case))
    parts = [results_of(layer, *pair) for pair in zip(x, dy, strict=True)]
    summed = {name: sum(part[name] for part in parts) for name in layer.adapters}
    return {name: torch.cat([part[name] for part in parts]) for name in ("y", "x")} | summed


def hold_to_policy(case: LayerCase, weights: dict[str, Tensor], name: str, known: dict) -> None:
    """Raises an AssertionError where a result breaks the package's error policy; without dropout.

    known: what results are held to, by the adapters' dtype, kept between the providers.
    """
    provider, case = PROVIDERS[name], replace(case, dropout=0.0)
    if not provider.adapted:
        return
    if provider.adapter_dtype not in known:
        naive = DecoderLayer(case, weights, PROVIDERS["naive"])
        exact = exact_results(case, weights, provider.adapter_dtype)
        known[provider.adapter_dtype] = results_of(naive, *inputs_of(case)), exact
    eager, oracle = known[provider.adapter_dtype]
    with around(name, torch.device(case.device)):
        ours = results_of(DecoderLayer(case, weights, provider), *inputs_of(case))
    for what, exact in oracle.items():
        like = eager[what].to(ours[what].dtype)  # an fp32 adapter over a half base
        assert_within_policy(what, ours[what], like, exact, case.torch_dtype)


def prepare(case: LayerCase, names: list[str]) -> tuple[dict[str, LayerStep], dict[str, str]]:
    weights, known = base_weights(case), {}

    def make(name: str) -> LayerStep:
        hold_to_policy(case, weights, name, known)
        step = LayerStep(case, name, weights)
        for _ in range(2):
            step.run()  # warms up: compilation, the allocator
        return step

    return prepare_each(names, make)
