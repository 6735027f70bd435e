"""A frozen weight as a value: what takes a tensor takes it, and computes the same bits."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from linear_calls import BACKWARD, FORWARD, OP
from linear_target import check_policy
from padded_weight import PaddedWeight
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import explain, lora_linear, lora_weight_norm
from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight, base_of, dense, product_or_bias, rebuild
from lora_kernels.nn.merging import merged_weight
from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime import dispatch
from lora_kernels.testing import LoRAProblem, check_linear, run_forward_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = {"dense": DenseWeight, "padded": PaddedWeight.of}
CPU = torch.device("cpu")
BACKENDS = ["reference", "composed", "auto", *([] if native.missing() else ["native"])]


def same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return ours.keys() == expected.keys() and all(
        ours[name].dtype == expected[name].dtype and torch.equal(ours[name], expected[name])
        for name in expected
    )


def with_value(kind: str, **options):
    def function(weight, **inputs):
        return lora_linear(weight=KINDS[kind](weight), **inputs, **options)

    return function


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("scaled", [True, False], ids=["output_scale", ""])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_lora_linear(kind, dtype, scaled, dropout_p, backend):
    if dtype == torch.float64 and backend == "native":
        return
    problem = LoRAProblem.random(
        (2, 9), 21, 13, 3, dtype=dtype, with_output_scale=scaled, dropout_p=dropout_p
    )
    expected = run_forward_backward(lambda **i: lora_linear(**i, backend=backend), problem)
    ours = with_value(kind, backend=backend)
    first, as_known = (run_forward_backward(ours, problem) for _ in range(2))
    assert same(first, as_known)
    if kind == "dense" or backend in ("reference", "native"):
        assert same(first, expected)
    else:  # composed adds a dense weight's product in the GEMM itself
        check_linear(ours, problem)


@pytest.mark.parametrize("way", ["op", "forward's op", "compile", "checkpoint", "autocast"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_linear_by_other_ways(kind, dropout_p, way):
    problem = LoRAProblem.random((2, 9), 21, 13, 3, with_output_scale=True, dropout_p=dropout_p)
    function = with_value(kind)
    autocast = torch.bfloat16 if way == "autocast" else None
    if autocast:
        problem = problem.with_(dy=problem.dy.to(autocast))
    expected = run_forward_backward(lora_linear, problem, autocast=autocast)
    torch._dynamo.reset()
    ours = {
        "compile": lambda: torch.compile(function, backend="aot_eager", fullgraph=True),
        "checkpoint": lambda: lambda **inputs: checkpoint(function, **inputs, use_reentrant=False),
        "forward's op": lambda: seen(function),
    }.get(way, lambda: function)()
    if autocast and kind != "dense" and dispatch.choose("auto", CPU, autocast).backend != "native":
        # composed adds a dense weight's product in the GEMM itself
        check_policy(SimpleNamespace(call=ours), problem, autocast=autocast)
        return
    with FlopCounterMode(display=False) if way == "op" else nullcontext():
        assert same(run_forward_backward(ours, problem, autocast=autocast), expected)


def seen(function):
    def under_a_mode(**inputs):
        with FlopCounterMode(display=False):
            return function(**inputs)

    return under_a_mode


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    problem = LoRAProblem.random((9,), 21, 13, 3, dtype=torch.float64, with_output_scale=True)

    def penalty(function) -> list[Tensor]:
        x, b = problem.x.detach().requires_grad_(), problem.lora_b.detach().requires_grad_()
        y = function(x=x, weight=problem.weight, lora_a=problem.lora_a, lora_b=b, scaling=0.7)
        (dx,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, b])

    for ours, expected in zip(penalty(with_value(kind)), penalty(lora_linear), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        assert kind == "padded" or torch.equal(ours, expected)


@pytest.mark.parametrize("backend", ["auto", "composed", "reference"])
def test_explain(backend):
    p = LoRAProblem.random((9,), 21, 13, 3)
    factors = p.lora_a, p.lora_b
    expected = explain(p.x, p.weight, *factors, backend=backend)
    for kind in KINDS.values():
        assert explain(p.x, kind(p.weight), *factors, backend=backend) == expected
    with pytest.raises(ValueError, match=r"^weight: expected \[13, 21\] .* got \[12, 21\]"):
        explain(p.x, PaddedWeight.of(p.weight[1:]), *factors)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck_of_another_format(requires_grad):
    p = LoRAProblem.random((2, 9), 21, 13, 3, with_output_scale=True, dropout_p=0.3)
    for tensor in (p.x, p.lora_a, p.lora_b, p.bias, p.output_scale):
        tensor.requires_grad_(requires_grad)
    base = PaddedWeight.of(p.weight)
    crossing = list(base.tensors()), base.format, list(base.meta)
    factors, dropout = (p.lora_a, p.lora_b, p.scaling), (0.3, p.seed, 0, 0, 21)
    operands = p.x, *crossing, *factors, p.bias, p.output_scale, *dropout
    torch.library.opcheck(OP, (*operands, "auto"))
    if requires_grad:
        return
    torch.library.opcheck(FORWARD, (*operands, True, "auto"))
    _, h, mask, unscaled = FORWARD(*operands, True, "auto")
    torch.library.opcheck(
        BACKWARD,
        (p.dy, p.x, *crossing, *factors, h, p.output_scale, unscaled, mask, *dropout, [True] * 5,
         "auto"),
    )  # fmt: skip


def test_a_format_saves_its_own_tensors():
    p = LoRAProblem.random((9,), 21, 13, 3)
    base, saved = PaddedWeight.of(p.weight), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(p.x, base, p.lora_a.requires_grad_(), p.lora_b, 0.7)
    assert base.tall.data_ptr() in {tensor.data_ptr() for tensor in saved}
    y = lora_linear(p.x, base, p.lora_a, p.lora_b, 0.7)
    base.tall.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_norm(kind, dtype, transposed):
    p = LoRAProblem.random((), 101, 67, 9, dtype=dtype)
    weight = p.weight.t().contiguous().t() if transposed and kind == "dense" else p.weight
    expected = lora_weight_norm(weight, p.lora_a, p.lora_b, 0.7)
    norm = lora_weight_norm(KINDS[kind](weight), p.lora_a, p.lora_b, 0.7)
    assert norm.dtype == expected.dtype and torch.equal(norm, expected)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda weight: lora_weight_norm(KINDS[kind](weight), p.lora_a, p.lora_b, 0.7),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    assert torch.equal(compiled(weight), expected)
    base = KINDS[kind](weight)
    torch.library.opcheck(
        torch.ops.lora_kernels.lora_weight_norm.default,
        (list(base.tensors()), base.format, list(base.meta), p.lora_a, p.lora_b, p.scaling),
    )


def test_the_norm_of_a_value_that_does_not_fit():
    p = LoRAProblem.random((), 21, 13, 3)
    with pytest.raises(ValueError, match=r"^lora_b: expected \[12, 3\] to match weight \[12, 21\]"):
        lora_weight_norm(PaddedWeight.of(p.weight[1:]), p.lora_a, p.lora_b, 0.7)
    with pytest.raises(TypeError, match=r"^weight: expected a tensor, got list"):
        lora_weight_norm(DenseWeight([1.0]), p.lora_a, p.lora_b, 0.7)


@pytest.mark.parametrize("block", [7, 1 << 19])
@pytest.mark.parametrize("scaled", [True, False], ids=["output_scale", ""])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging(dtype, scaled, block, monkeypatch):
    """The same values in either format, and another weight that nothing shares."""
    monkeypatch.setattr(dense, "_CPU_BLOCK", block)
    p = LoRAProblem.random((), 31, 22, 3, dtype=dtype, with_output_scale=scaled)
    factors = LoRAFactors(p.lora_a, p.lora_b, 0.7, p.output_scale)
    merged = {name: merged_weight(kind(p.weight), factors) for name, kind in KINDS.items()}
    assert [base.format for base in merged.values()] == list(KINDS)
    values = [base.dequantise() for base in merged.values()]
    assert torch.equal(*values) and not torch.equal(values[0], p.weight)
    plain = lora_linear(p.x[None], p.weight, p.lora_a, p.lora_b, 0.7, output_scale=p.output_scale)
    by_merged = torch.nn.functional.linear(p.x[None], values[0])
    torch.testing.assert_close(by_merged, plain, rtol=0.02, atol=0.02)
    broken = factors._replace(b=p.lora_b * float("inf"))
    with pytest.raises(ValueError, match=r"^merge: the merged weight is not finite"):
        merged_weight(DenseWeight(p.weight), broken)


def test_products():
    p = LoRAProblem.random((2, 9), 21, 13, 3, dtype=torch.float64)
    for kind in KINDS.values():
        base = kind(p.weight)
        assert base.shape == (13, 21) and base.dtype == torch.float64
        assert base.to(torch.float32).dtype == torch.float32
        rows, dy = p.x.flatten(0, 1), p.dy.flatten(0, 1)
        out, back = torch.ones(18, 13).double(), torch.ones(18, 21).double()
        base.add_matmul_(out, rows)
        base.add_matmul_t_(back, dy)
        torch.testing.assert_close(out, 1 + rows @ p.weight.t())
        torch.testing.assert_close(back, 1 + dy @ p.weight)
        torch.testing.assert_close(base.matmul(p.x, p.bias), p.x @ p.weight.t() + p.bias)
        assert torch.equal(base.dequantise(slice(2, 5)), p.weight[2:5])
        again = rebuild(base.tensors(), base.format, base.meta)
        assert type(again) is type(base) and torch.equal(again.dequantise(), p.weight)
    assert rebuild([], "", []) is None and base_of(None) is None and base_of(base) is base
    assert base_of(p.weight) == DenseWeight(p.weight)


def test_what_an_adapters_part_is_added_to(poisoned_memory):
    p = LoRAProblem.random((2, 9), 21, 13, 3)
    y, holds = product_or_bias(DenseWeight(p.weight), p.x, p.bias, 13)
    assert holds and torch.equal(y, torch.nn.functional.linear(p.x, p.weight, p.bias))
    y, holds = product_or_bias(None, p.x, p.bias, 13)
    assert holds and torch.equal(y, p.bias.expand(2, 9, 13))
    y, holds = product_or_bias(None, p.x, None, 13)
    assert not holds and y.shape == (2, 9, 13)


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_kernels_of_a_gpu_read_plain_weights_alone(backend, monkeypatch):
    """Whoever names them is told, auto takes composed; on meta tensors, nothing is launched."""
    from lora_kernels.ops.linear import plan, triton

    x, factors = torch.randn(5, 12), LoRAFactors(torch.randn(3, 12), torch.randn(7, 3), 1.0)
    padded, dense = PaddedWeight.of(torch.randn(7, 12)), DenseWeight(torch.randn(7, 12))
    monkeypatch.setattr(plan, "cpu", triton)  # what serves native here has their conditions
    monkeypatch.setattr(plan.dispatch, "unavailable", lambda *_: None)
    monkeypatch.setattr(plan.dispatch, "_native_unavailable", lambda *_: None)
    assert plan.module_of(backend, dense, x) is triton
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot serve .* is padded"):
        plan.make_plan(backend, x, padded, factors, 0.0)
