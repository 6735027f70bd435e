"""Who competes in a training step: a provider is a function from the shared base model."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.naive import NaiveLinear
from benchmarks.preparing import Unavailable, import_peft

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class StepProvider:
    """One provider's model, ready to train."""

    model: nn.Module
    # Entered around forward only, as trainers do.
    around_forward: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    # Entered around the whole step.
    around_step: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    # Asked after a step: why this model is not what its name says; None when it is.
    fallback_reason: Callable[[], str | None] = lambda: None


def own_copy(base: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters: all providers read the same weights."""
    memo = {id(parameter): parameter for parameter in base.parameters()}
    return copy.deepcopy(base, memo)


def frozen(base: nn.Module, case) -> StepProvider:
    model = own_copy(base)
    # Backward then makes dx down to the first layer, as it must below adapters.
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_()
    )
    return StepProvider(model)


def naive(base: nn.Module, case) -> StepProvider:
    model = own_copy(base)
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if name in LINEARS:
                setattr(parent, name, NaiveLinear(linear, case.rank, case.alpha, case.dropout))
    randomise_adapters(model.named_parameters())
    return StepProvider(model)


def with_adapters(base: nn.Module, case, base_dtype: bool) -> nn.Module:
    peft = import_peft()
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=case.alpha,
        lora_dropout=case.dropout,
        target_modules=list(LINEARS),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(own_copy(base), config, autocast_adapter_dtype=not base_dtype)
    randomise_adapters(model.train().named_parameters())
    return model


def randomise_adapters(named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Same values for every provider; B is not left at zero, where half the work multiplies 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in named_parameters:
            role = name.lower()
            if "lora_a" in role or "lora_b" in role:
                values = torch.randn(parameter.shape, generator=generator)
                spread = parameter.shape[1] ** -0.5 if "lora_a" in role else 0.01
                parameter.copy_(values * spread)


def peft(base: nn.Module, case, base_dtype: bool = False) -> StepProvider:
    return StepProvider(with_adapters(base, case, base_dtype))


def peft_autocast(base: nn.Module, case) -> StepProvider:
    if case.torch_dtype is torch.float32:
        raise Unavailable("autocast changes nothing for an fp32 run; use --dtype bf16 or fp16")
    return StepProvider(
        with_adapters(base, case, base_dtype=False),
        around_forward=lambda: torch.autocast(case.device, dtype=case.torch_dtype),
    )


def ours(
    base: nn.Module, case, backend: str | None = None, base_dtype: bool = False
) -> StepProvider:
    from lora_kernels import accelerate

    model = with_adapters(base, case, base_dtype)
    report = accelerate(model)
    around = contextlib.nullcontext if backend is None else lambda: forced_backend(backend)
    return StepProvider(model, around_step=around, fallback_reason=lambda: left_to_peft(report))


def joint(base: nn.Module, case, count: int = 8) -> StepProvider:
    """``count`` adapters trained at once: sequence i belongs to adapter i mod count."""
    from lora_kernels.integrations.routed import route

    routed = route(own_copy(base))
    names = [f"adapter{i}" for i in range(count)]
    for name in names:
        routed.add(
            name,
            rank=case.rank,
            alpha=case.alpha,
            target_modules=list(LINEARS),
            dropout_p=case.dropout,
        )
        first = routed.model.named_parameters()
        randomise_adapters((key, p) for key, p in first if f".{name}." in key)
    chosen = [names[i % count] for i in range(case.batch)]
    return StepProvider(routed.model.train(), around_step=lambda: routed.adapters(chosen))


def left_to_peft(report) -> str | None:
    """A layer that PEFT's own forward served: its time must not be published as ours."""
    report.refresh()
    for name, reason in report.delegated.items():
        return f"{name} is left to PEFT: {reason}"
    for name, reasons in report.delegated_calls.items():
        return f"calls of {name} are left to PEFT: {', '.join(reasons)}"
    return None


@contextlib.contextmanager
def forced_backend(backend: str):
    """What LORA_KERNELS_BACKEND does, which is read only once per process."""
    from lora_kernels.runtime import dispatch

    before = dispatch.PROCESS_DEFAULT
    dispatch.PROCESS_DEFAULT = backend
    try:
        yield
    finally:
        dispatch.PROCESS_DEFAULT = before


PROVIDERS: dict[str, Callable[..., StepProvider]] = {
    "frozen": frozen,
    "naive": naive,
    "peft": peft,
    "peft-base-dtype": functools.partial(peft, base_dtype=True),
    "peft-autocast": peft_autocast,
    "ours": ours,
    "ours-base-dtype": functools.partial(ours, base_dtype=True),
    "reference": functools.partial(ours, backend="reference"),
    "composed": functools.partial(ours, backend="composed"),
    "triton": functools.partial(ours, backend="triton"),
    "native": functools.partial(ours, backend="native"),
    "joint": joint,
}
