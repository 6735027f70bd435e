"""Who competes in one call of ``lora_linear``.

A provider is a function from the inputs of a call to a `Call`. To add one, write it and put it in
`PROVIDERS`: the command line, the memory process and the reports know it by that name.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.naive import naive_fp32_linear, naive_linear
from benchmarks.preparing import import_peft
from lora_kernels.measuring.linear_call import Call, our_call
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime.device_limits import limits_of
from lora_kernels.testing import LoRAProblem


def in_base_dtype(problem: LoRAProblem) -> LoRAProblem:
    """The same problem with adapters in x's dtype."""
    dtype = problem.x.dtype
    return problem.with_(lora_a=problem.lora_a.to(dtype), lora_b=problem.lora_b.to(dtype))


def frozen(problem: LoRAProblem) -> Call:
    return Call(lambda: F.linear(problem.x, problem.weight), [problem.x])


def by_formula(formula: Callable[..., Tensor], problem: LoRAProblem) -> Call:
    lora_a, lora_b = (
        factor.detach().clone().requires_grad_() for factor in (problem.lora_a, problem.lora_b)
    )
    x, weight, scaling, p = problem.x, problem.weight, problem.scaling.item(), problem.dropout_p
    return Call(lambda: formula(x, weight, lora_a, lora_b, scaling, p), [x, lora_a, lora_b])


def naive(problem: LoRAProblem) -> Call:
    return by_formula(naive_linear, in_base_dtype(problem))


def compiled(problem: LoRAProblem) -> Call:
    return by_formula(torch.compile(naive_linear), in_base_dtype(problem))


def peft(problem: LoRAProblem, base_dtype: bool = False) -> Call:
    package = import_peft()
    out_features, in_features = problem.weight.shape
    with torch.device("meta"):
        linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    rank = problem.lora_a.shape[0]
    config = package.LoraConfig(
        r=rank, lora_alpha=problem.scaling.item() * rank, lora_dropout=problem.dropout_p,
        target_modules=["linear"],
    )  # fmt: skip
    model = package.get_peft_model(
        nn.ModuleDict({"linear": linear}), config, autocast_adapter_dtype=not base_dtype
    ).train()
    layer = model.base_model.model["linear"]
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        lora_a.copy_(problem.lora_a)
        lora_b.copy_(problem.lora_b)
    return Call(lambda: layer(problem.x), [problem.x, lora_a, lora_b])


PROVIDERS: dict[str, Callable[[LoRAProblem], Call]] = {
    "frozen": frozen,
    "naive": naive,
    "naive-fp32": functools.partial(by_formula, naive_fp32_linear),
    "compile": compiled,
    "peft": peft,
    "peft-base-dtype": functools.partial(peft, base_dtype=True),
    "ours": our_call,
    "ours-base-dtype": lambda problem: our_call(in_base_dtype(problem)),
    "reference": functools.partial(our_call, backend="reference"),
    "composed": functools.partial(our_call, backend="composed"),
    "triton": functools.partial(our_call, backend="triton"),
    "triton-hybrid": functools.partial(our_call, backend="triton"),
    "triton-fused": functools.partial(our_call, backend="triton"),
    "native": functools.partial(our_call, backend="native"),
}


def around(name: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """What a provider is called in: our kernels with the strategy of its name, the tile sizes
    those of the shipped table."""
    backend, _, strategy = name.partition("-")
    if backend != "triton" or not strategy:
        return contextlib.nullcontext()
    shipped = tiles.shipped_cells(limits_of(device).name)
    cells = {key: cell | {"strategy": strategy} for key, cell in shipped.items()}
    return tiles.use_cells({"*": {"strategy": strategy}} | cells)
