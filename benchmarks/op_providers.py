"""Who competes.

An op provider is a function from the inputs of one call to a `Call`; a step provider is a function
from the shared base model to a `StepProvider`. To add one, write the function and put it in the
table below it: the command line, the memory process and the reports know it by that name.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.bench.case import KernelCase, OpCase, StepCase
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime.device_limits import limits_of


class Unavailable(Exception):
    """A provider that cannot run here; the message says why."""


class MissingExtra(Exception):
    """A package of the `bench` extra is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(
            f"this benchmark needs {package}, which is not installed: "
            'pip install "lora_kernels[bench]"'
        )


# ---- the op: y = x Wᵀ + s · D(x) Aᵀ Bᵀ


@dataclass(frozen=True)
class OpInputs:
    """What every provider of the op gets, bit for bit the same."""

    x: Tensor  # [M, K], requires grad
    weight: Tensor  # [N, K], frozen
    lora_a: Tensor  # [R, K], fp32
    lora_b: Tensor  # [N, R], fp32
    dy: Tensor  # [M, N]


@dataclass(frozen=True)
class Call:
    """One provider's call on one set of inputs."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]  # what backward makes gradients for
    frozen: list[Tensor] = field(default_factory=list)  # weights that nobody trains
    # Entered around forward and backward, not around the replay of a graph that has captured them.
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def _adapters(inputs: OpInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return tuple(
        tensor.detach().to(dtype, copy=True).requires_grad_()
        for tensor in (inputs.lora_a, inputs.lora_b)
    )


def frozen_op(inputs: OpInputs, case: OpCase) -> Call:
    return Call(lambda: F.linear(inputs.x, inputs.weight), [inputs.x], frozen=[inputs.weight])


def naive_formula(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scaling: float,
    dropout_p: float,
) -> Tensor:  # [M, N]
    h = F.linear(F.dropout(x, dropout_p), lora_a)  # [M, R]
    return F.linear(x, weight) + scaling * F.linear(h, lora_b)


def naive_op(inputs: OpInputs, case: OpCase, formula: Callable = naive_formula) -> Call:
    lora_a, lora_b = _adapters(inputs, inputs.x.dtype)
    return Call(
        lambda: formula(inputs.x, inputs.weight, lora_a, lora_b, case.scaling, case.dropout),
        [inputs.x, lora_a, lora_b],
        frozen=[inputs.weight],
    )


def naive_fp32_formula(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [R, K], fp32
    lora_b: Tensor,  # [N, R], fp32
    scaling: float,
    dropout_p: float,
) -> Tensor:  # [M, N]
    """PEFT's default arithmetic without PEFT: x goes to the fp32 adapters as an fp32 copy."""
    h = F.linear(F.dropout(x.to(lora_a.dtype), dropout_p), lora_a)  # [M, R]
    return (F.linear(x, weight) + scaling * F.linear(h, lora_b)).to(x.dtype)


def naive_fp32_op(inputs: OpInputs, case: OpCase) -> Call:
    lora_a, lora_b = _adapters(inputs, torch.float32)
    return Call(
        lambda: naive_fp32_formula(
            inputs.x, inputs.weight, lora_a, lora_b, case.scaling, case.dropout
        ),
        [inputs.x, lora_a, lora_b],
        frozen=[inputs.weight],
    )


def compiled_op(inputs: OpInputs, case: OpCase) -> Call:
    return naive_op(inputs, case, torch.compile(naive_formula))


def peft_op(inputs: OpInputs, case: OpCase, base_dtype: bool = False) -> Call:
    peft = _peft()
    out_features, in_features = inputs.weight.shape
    with torch.device("meta"):
        linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight = nn.Parameter(inputs.weight, requires_grad=False)
    config = peft.LoraConfig(
        r=case.rank, lora_alpha=case.alpha, lora_dropout=case.dropout, target_modules=["linear"]
    )
    model = peft.get_peft_model(
        nn.ModuleDict({"linear": linear}), config, autocast_adapter_dtype=not base_dtype
    ).train()
    layer = model.base_model.model["linear"]
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        lora_a.copy_(inputs.lora_a)
        lora_b.copy_(inputs.lora_b)
    return Call(lambda: layer(inputs.x), [inputs.x, lora_a, lora_b], frozen=[inputs.weight])


def our_op(inputs: OpInputs, case: OpCase, backend: str = "auto", base_dtype: bool = False) -> Call:
    from lora_kernels import lora_linear

    # fp32 adapters unless asked: that is what PEFT makes, over any base.
    lora_a, lora_b = _adapters(inputs, inputs.x.dtype if base_dtype else torch.float32)
    return Call(
        lambda: lora_linear(
            inputs.x,
            inputs.weight,
            lora_a,
            lora_b,
            case.scaling,
            dropout_p=case.dropout,
            backend=backend,
        ),
        [inputs.x, lora_a, lora_b],
        frozen=[inputs.weight],
    )


def triton_op(inputs: OpInputs, case: OpCase, strategy: str) -> Call:
    """Our kernels with the strategy forced; tile sizes stay those of the shipped table."""
    return replace(
        our_op(inputs, case, "triton"), around=lambda: forced_strategy(strategy, inputs.x.device)
    )


def cell_of(case: OpCase | KernelCase, direction: str) -> tiles.LinearCell:
    return tiles.LinearCell(
        direction=direction,
        dtype=str(case.torch_dtype).removeprefix("torch."),
        itemsize=case.torch_dtype.itemsize,
        tokens=case.m,
        in_features=case.k,
        out_features=case.n,
        rank=case.rank,
        dropout=case.dropout > 0,
        ieee=False,
    )


def forced_strategy(strategy: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    shipped = tiles.shipped_cells(limits_of(device).name)
    cells = {key: cell | {"strategy": strategy} for key, cell in shipped.items()}
    return tiles.use_cells({"*": {"strategy": strategy}} | cells)


OP_PROVIDERS: dict[str, Callable[[OpInputs, OpCase], Call]] = {
    "frozen": frozen_op,
    "naive": naive_op,
    "naive-fp32": naive_fp32_op,
    "compile": compiled_op,
    "peft": peft_op,
    "peft-base-dtype": lambda inputs, case: peft_op(inputs, case, base_dtype=True),
    "ours": our_op,
    "ours-base-dtype": lambda inputs, case: our_op(inputs, case, base_dtype=True),
    "reference": lambda inputs, case: our_op(inputs, case, "reference"),
    "composed": lambda inputs, case: our_op(inputs, case, "composed"),
    "triton": lambda inputs, case: our_op(inputs, case, "triton"),
    "triton-hybrid": lambda inputs, case: triton_op(inputs, case, "hybrid"),
    "triton-fused": lambda inputs, case: triton_op(inputs, case, "fused"),
    "native": lambda inputs, case: our_op(inputs, case, "native"),
}


# ---- the training step


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


def _own_copy(base: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters: all providers read the same weights."""
    memo = {id(parameter): parameter for parameter in base.parameters()}
    return copy.deepcopy(base, memo)


def frozen_step(base: nn.Module, case: StepCase) -> StepProvider:
    model = _own_copy(base)
    # Backward then makes dx down to the first layer, as it must below adapters.
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_()
    )
    return StepProvider(model)


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _with_adapters(base: nn.Module, case: StepCase, base_dtype: bool) -> nn.Module:
    peft = _peft()
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=case.alpha,
        lora_dropout=case.dropout,
        target_modules=list(LINEARS),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(
        _own_copy(base), config, autocast_adapter_dtype=not base_dtype
    ).train()
    _randomise_adapters(model.named_parameters())
    return model


def _randomise_adapters(named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Same values for every provider; B is not left at zero, where half the work multiplies 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in named_parameters:
            role = name.lower()
            if "lora_a" in role or "lora_b" in role:
                values = torch.randn(parameter.shape, generator=generator)
                spread = parameter.shape[1] ** -0.5 if "lora_a" in role else 0.01
                parameter.copy_(values * spread)


def peft_step(base: nn.Module, case: StepCase, base_dtype: bool = False) -> StepProvider:
    return StepProvider(_with_adapters(base, case, base_dtype))


def peft_autocast_step(base: nn.Module, case: StepCase) -> StepProvider:
    if case.torch_dtype is torch.float32:
        raise Unavailable("autocast changes nothing for an fp32 run; use --dtype bf16 or fp16")
    return StepProvider(
        _with_adapters(base, case, base_dtype=False),
        around_forward=lambda: torch.autocast(case.device, dtype=case.torch_dtype),
    )


def our_step(
    base: nn.Module, case: StepCase, backend: str | None = None, base_dtype: bool = False
) -> StepProvider:
    from lora_kernels import accelerate

    model = _with_adapters(base, case, base_dtype)
    report = accelerate(model)
    around = contextlib.nullcontext if backend is None else lambda: _forced_backend(backend)
    return StepProvider(model, around_step=around, fallback_reason=lambda: _left_to_peft(report))


def joint_step(base: nn.Module, case: StepCase, count: int = 8) -> StepProvider:
    """``count`` adapters trained at once: sequence i belongs to adapter i mod count."""
    from lora_kernels.integrations.routed import route

    routed = route(_own_copy(base))
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
        _randomise_adapters((key, p) for key, p in first if f".{name}." in key)
    chosen = [names[i % count] for i in range(case.batch)]
    return StepProvider(routed.model.train(), around_step=lambda: routed.adapters(chosen))


def _left_to_peft(report) -> str | None:
    """A layer that PEFT's own forward served: its time must not be published as ours."""
    report.refresh()
    for name, reason in report.delegated.items():
        return f"{name} is left to PEFT: {reason}"
    for name, reasons in report.delegated_calls.items():
        return f"calls of {name} are left to PEFT: {', '.join(reasons)}"
    return None


@contextlib.contextmanager
def _forced_backend(backend: str):
    """What LORA_KERNELS_BACKEND does, which is read only once per process."""
    from lora_kernels.runtime import dispatch

    before = dispatch.PROCESS_DEFAULT
    dispatch.PROCESS_DEFAULT = backend
    try:
        yield
    finally:
        dispatch.PROCESS_DEFAULT = before


STEP_PROVIDERS: dict[str, Callable[[nn.Module, StepCase], StepProvider]] = {
    "frozen": frozen_step,
    "peft": peft_step,
    "peft-base-dtype": lambda base, case: peft_step(base, case, base_dtype=True),
    "peft-autocast": peft_autocast_step,
    "ours": our_step,
    "ours-base-dtype": lambda base, case: our_step(base, case, base_dtype=True),
    "reference": lambda base, case: our_step(base, case, "reference"),
    "composed": lambda base, case: our_step(base, case, "composed"),
    "triton": lambda base, case: our_step(base, case, "triton"),
    "native": lambda base, case: our_step(base, case, "native"),
    "joint": joint_step,
}


def default_providers(kind: str, dtype: torch.dtype) -> list[str]:
    if kind == "routed":
        return ["frozen", "peft", "loop", "gather-bmm", "grouped-mm", "composed", "ours"]
    names = ["frozen", "peft", "peft-base-dtype", "ours"]
    if kind == "op":
        names.insert(1, "naive")
    if dtype == torch.float32:  # where it would be the same measurement as peft
        names.remove("peft-base-dtype")
    return names


def _peft():
    try:
        import peft
    except ImportError:
        raise MissingExtra("peft") from None
    return peft
