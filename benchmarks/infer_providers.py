"""Who competes in serving a model with adapters.

A provider is a function from a model and the values of the adapters to a `Served` model. To add
one, write the function and put it in `PROVIDERS`: the command line, the check of its results, the
memory process and the tables know it by that name.

Dimensions: K in_features, N out_features, R rank, M tokens.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.naive import NaiveLinear
from benchmarks.preparing import import_peft
from benchmarks.step_providers import LINEARS, left_to_peft

if TYPE_CHECKING:
    from peft import PeftModel

# By the name of the linear layer: A [R, K] and B [N, R].
Factors = dict[str, tuple[Tensor, Tensor]]


def rank_of(factors: Factors) -> int:
    return next(iter(factors.values()))[0].shape[0]


@dataclass(frozen=True)
class Served:
    """A model with its adapters in it, the first of them active.

    switch: makes another adapter the active one. around: entered around a prompt and its tokens,
    as a server does that says there which adapters a batch uses. why_not: asked after a call, why
    the model is not what the provider's name says.
    """

    model: nn.Module
    switch: Callable[[int], None] | None = None
    around: Callable[[], AbstractContextManager] = nullcontext
    why_not: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Provider:
    """serve: makes the served model of a model, the adapters and their scaling.

    own_weights: whether it writes to the weights, so that it needs a copy of its own.
    row_by_row: whether row i of a batch uses adapter i; else all rows use one.
    same_function: whether it computes the formula with these adapters, and is held to it.
    """

    serve: Callable[[nn.Module, Sequence[Factors], float], Served]
    own_weights: bool = False
    row_by_row: bool = False
    same_function: bool = True


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that get adapters, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in LINEARS and isinstance(module, nn.Linear)
    }


def draw_adapters(model: nn.Module, rank: int, count: int) -> list[Factors]:
    """Values of some adapters in the model's dtype; B is not zero."""
    generator = torch.Generator().manual_seed(7)

    def drawn(rows: int, columns: int, spread: float, like: Tensor) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * spread).to(like)

    return [
        {
            name: (
                drawn(rank, linear.in_features, linear.in_features**-0.5, linear.weight),
                drawn(linear.out_features, rank, 0.01, linear.weight),
            )
            for name, linear in linears_of(model).items()
        }
        for _ in range(count)
    ]


def replace_layers(model: nn.Module, made: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Put what `made` returns in the place of each layer that gets adapters."""
    for name, linear in linears_of(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made(name, linear))


# ---- without LoRA


def base(model: nn.Module, adapters: Sequence[Factors], scaling: float) -> Served:
    return Served(model)


class Bottleneck(nn.Module):
    """An adapter layer after Houlsby et al. 2019: ``x + up(gelu(down(x)))``, size ``width``."""

    def __init__(self, features: int, width: int, like: Tensor) -> None:
        super().__init__()
        made = {"device": like.device, "dtype": like.dtype}
        self.down = nn.Linear(features, width, **made)
        self.up = nn.Linear(width, features, **made)

    def forward(self, x: Tensor) -> Tensor:  # [..., features]
        return x + self.up(F.gelu(self.down(x)))


def bottleneck(model: nn.Module, adapters: Sequence[Factors], scaling: float) -> Served:
    """Two in each block, behind attention's and the MLP's last projection, before the residual is
    added; in all about as many parameters as one of the LoRA adapters."""
    places = {
        name: linear
        for name, linear in linears_of(model).items()
        if name.endswith(("o_proj", "down_proj"))
    }
    parameters = sum(factor.numel() for pair in adapters[0].values() for factor in pair)
    features = sum(linear.out_features for linear in places.values())
    width = max(1, round(parameters / (2 * features)))
    torch.manual_seed(11)
    for name, linear in places.items():
        parent, _, child = name.rpartition(".")
        added = Bottleneck(linear.out_features, width, linear.weight)
        setattr(model.get_submodule(parent), child, nn.Sequential(linear, added))
    return Served(model.requires_grad_(False))


# ---- the formula


def naive(model: nn.Module, adapters: Sequence[Factors], scaling: float) -> Served:
    rank = rank_of(adapters[0])
    layers: dict[str, NaiveLinear] = {}

    def made(name: str, linear: nn.Linear) -> NaiveLinear:
        layers[name] = NaiveLinear(linear, rank, scaling * rank, dropout_p=0.0)
        return layers[name]

    def switch(index: int) -> None:
        for name, layer in layers.items():
            layer.lora_A.data, layer.lora_B.data = adapters[index][name]

    replace_layers(model, made)
    switch(0)
    return Served(model.requires_grad_(False), switch)


# ---- PEFT


def name_of(index: int) -> str:
    return f"adapter{index}"


def with_peft(model: nn.Module, adapters: Sequence[Factors], scaling: float) -> "PeftModel":
    """A PEFT model that reads these very tensors; in the base's dtype, as every other provider."""
    peft = import_peft()
    rank = rank_of(adapters[0])
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=scaling * rank,  # pyright: ignore[reportArgumentType]: not of whole numbers alone
        target_modules=list(LINEARS),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    wrapped = peft.get_peft_model(model, config, name_of(0), autocast_adapter_dtype=False)
    for index in range(1, len(adapters)):
        wrapped.add_adapter(name_of(index), config, autocast_adapter_dtype=False)
    for index, factors in enumerate(adapters):
        for name, (lora_a, lora_b) in factors.items():
            # It changes the model in place.
            model.get_parameter(f"{name}.lora_A.{name_of(index)}.weight").data = lora_a
            model.get_parameter(f"{name}.lora_B.{name_of(index)}.weight").data = lora_b
    return wrapped.eval()


def peft_unmerged(
    model: nn.Module, adapters: Sequence[Factors], scaling: float, accelerated: bool = False
) -> Served:
    wrapped = with_peft(model, adapters, scaling)
    why_not = _accelerate(wrapped) if accelerated else lambda: None
    # Without PeftModel's own forward: `generate` goes by it for every token too.
    return Served(
        wrapped.get_base_model(),
        switch=lambda index: wrapped.set_adapter(name_of(index), inference_mode=True),
        why_not=why_not,
    )


def peft_merged(
    model: nn.Module, adapters: Sequence[Factors], scaling: float, accelerated: bool = False
) -> Served:
    """Merged into the weights in place; taken out again by subtraction."""
    wrapped = with_peft(model, adapters, scaling)
    why_not = _accelerate(wrapped) if accelerated else lambda: None
    wrapped.merge_adapter()

    def switch(index: int) -> None:
        wrapped.unmerge_adapter()
        wrapped.set_adapter(name_of(index), inference_mode=True)
        wrapped.merge_adapter()

    return Served(wrapped.get_base_model(), switch, why_not=why_not)


def peft_unloaded(model: nn.Module, adapters: Sequence[Factors], scaling: float) -> Served:
    """Merged for good: the layers are plain ``nn.Linear`` again, and nothing can be switched."""
    return Served(with_peft(model, adapters[:1], scaling).merge_and_unload())


def peft_rows(
    model: nn.Module, adapters: Sequence[Factors], scaling: float, accelerated: bool = False
) -> Served:
    """PEFT's mixed batch, an adapter for each row."""
    wrapped = with_peft(model, adapters, scaling)
    why_not = _accelerate(wrapped) if accelerated else lambda: None
    names = [name_of(index) for index in range(len(adapters))]
    # What PeftModel.generate enters, once for all of its tokens.
    around = partial(wrapped._enable_peft_forward_hooks, adapter_names=names)
    return Served(wrapped.get_base_model(), around=around, why_not=why_not)


def _accelerate(wrapped: nn.Module) -> Callable[[], str | None]:
    """Our forward in the layers; returns what tells whether PEFT's own has served any of them."""
    from lora_kernels import accelerate

    report = accelerate(wrapped)
    return lambda: left_to_peft(report)


# ---- ours without PEFT


def our_merged(
    model: nn.Module, adapters: Sequence[Factors], scaling: float, switched: bool = False
) -> Served:
    """``LoRALinear``, merged for good; or so that its frozen weight is kept, and that very one put
    back for a switch."""
    from lora_kernels import LoRALinear

    layers: dict[str, LoRALinear] = {}
    rank = rank_of(adapters[0])

    def made(name: str, linear: nn.Linear) -> LoRALinear:
        layers[name] = LoRALinear.from_linear(
            linear, rank, scaling * rank, adapter_dtype=linear.weight.dtype
        )
        return layers[name]

    def switch(index: int) -> None:
        for name, layer in layers.items():
            lora_a, lora_b = adapters[index][name]
            # It unmerges the layer first.
            layer.load_adapter({"lora_A.weight": lora_a, "lora_B.weight": lora_b})
            layer.merge("device" if switched else "none")

    replace_layers(model, made)
    switch(0)
    return Served(model.requires_grad_(False).eval(), switch if switched else None)


def routed(
    model: nn.Module, adapters: Sequence[Factors], scaling: float, row_by_row: bool = False
) -> Served:
    """``lora_kernels.route``: a name for the whole batch, or one for each row."""
    from lora_kernels import route

    handle = route(model, adapter_dtype=next(model.parameters()).dtype)
    for index, factors in enumerate(adapters):
        rank = rank_of(factors)
        handle.add(name_of(index), rank=rank, alpha=scaling * rank, target_modules=list(LINEARS))
        for name, pair in factors.items():
            for factor, value in zip(("lora_a", "lora_b"), pair, strict=True):
                parameter = model.get_parameter(f"{name}.bank.adapters.{name_of(index)}.{factor}")
                parameter.data.copy_(value)
    model.requires_grad_(False).eval()
    names = [name_of(index) for index in range(len(adapters))]
    if row_by_row:
        return Served(model, around=partial(handle.adapters, names))
    active = [names[0]]

    def switch(index: int) -> None:
        active[0] = names[index]

    @contextlib.contextmanager
    def around():
        with handle.adapters(active[0]):
            yield

    return Served(model, switch, around)


PROVIDERS = {
    "base": Provider(base, same_function=False),
    # The same again in other memory: what differs between these two is no provider's merit.
    "base-copy": Provider(base, own_weights=True, same_function=False),
    "bottleneck": Provider(bottleneck, same_function=False),
    "merged": Provider(our_merged),
    "merged-switched": Provider(partial(our_merged, switched=True)),
    "merged-accelerated": Provider(partial(peft_merged, accelerated=True), own_weights=True),
    "merged-peft": Provider(peft_merged, own_weights=True),
    "merged-unloaded": Provider(peft_unloaded, own_weights=True),
    "naive": Provider(naive),
    "peft": Provider(peft_unmerged),
    "ours": Provider(partial(peft_unmerged, accelerated=True)),
    "routed": Provider(routed),
    "peft-rows": Provider(peft_rows, row_by_row=True),
    "ours-rows": Provider(partial(peft_rows, accelerated=True), row_by_row=True),
    "routed-rows": Provider(partial(routed, row_by_row=True), row_by_row=True),
}
