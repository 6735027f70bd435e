"""The halves of ``lora_linear``: together they are the adapter's part of it."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lora_kernels import lora_linear
from lora_kernels.ops.linear.halves import lora_expand, lora_shrink
from lora_kernels.ops.narrow import masks
from lora_kernels.runtime.dropout import MaskPlace
from lora_kernels.testing import assert_within_policy

M, K, N, R = 37, 43, 21, 5


def operands(dtype, factors=None, leading=(M,)):
    factors = factors or dtype
    x = torch.randn(*leading, K, dtype=dtype, requires_grad=True)
    a = (torch.randn(R, K, dtype=factors) / K**0.5).requires_grad_()
    b = torch.randn(N, R, dtype=factors, requires_grad=True)
    return x, a, b


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("needs", ["x a b", "x", "a", "b", "x b"])
def test_the_halves_are_the_whole(p, needs):
    """In fp64, where nothing is rounded on the way: result and gradients, strided rows too."""
    x, a, b = operands(torch.float64, leading=(3, M))
    x = x.detach().transpose(0, 1).requires_grad_()
    for name, tensor in zip("xab", (x, a, b), strict=True):
        tensor.requires_grad_(name in needs.split())
    leaves = [tensor for tensor in (x, a, b) if tensor.requires_grad]
    seed, dy = torch.tensor(77), torch.randn(M, 3, N, dtype=torch.float64)
    whole = lora_linear(x, None, a, b, 1.7, dropout_p=p, seed=seed)
    halves = lora_expand(lora_shrink(x, a, dropout_p=p, seed=seed), b, 1.7)
    results = [[y, *torch.autograd.grad(y, leaves, dy)] for y in (whole, halves)]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factors", [torch.float32, None], ids=["fp32_factors", "same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_half_precision(dtype, factors):
    """h is fp32, whatever x is; against fp64 as accurate as eager torch in x's dtype."""
    x, a, _ = operands(dtype, factors)
    dh = torch.randn(M, R)
    h = lora_shrink(x, a)
    assert h.dtype == torch.float32
    ours = [h, *torch.autograd.grad(h, (x, a), dh)]

    def eager(to):
        x2, a2 = (t.detach().to(to).requires_grad_() for t in (x, a))
        h2 = x2 @ a2.t()
        return [h2, *torch.autograd.grad(h2, (x2, a2), dh.to(to))]

    for name, result, plain, exact in zip(
        ("h", "dx", "dA"), ours, eager(dtype), eager(torch.float64), strict=True
    ):
        assert_within_policy(name, result.to(plain.dtype), plain, exact)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_of_any_order(p):
    x, a, b = (t.detach()[:4].requires_grad_() for t in operands(torch.float64))
    seed = torch.tensor(5)

    def halves(x, a, b):
        return lora_expand(lora_shrink(x, a, dropout_p=p, seed=seed), b[:, :4], 0.5)

    assert gradcheck(halves, (x, a, b)) and gradgradcheck(halves, (x, a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_one_is_a_graph_of_torchs_operations(dtype, monkeypatch):
    """Dropout too, and no tracer is asked whether a driver starts."""
    x, a, _ = operands(dtype, torch.float32)
    seed, dh = torch.tensor(77), torch.randn(M, R)

    def shrink(x, a):
        return lora_shrink(x, a, dropout_p=0.3, seed=seed)

    expected = shrink(x, a)
    expected = [expected, *torch.autograd.grad(expected, (x, a), dh)]
    monkeypatch.setattr(masks, "_has_kernels", lambda device: pytest.fail("asked"))
    h = torch.compile(shrink, fullgraph=True, backend="aot_eager")(x, a)
    for found, ours in zip([h, *torch.autograd.grad(h, (x, a), dh)], expected, strict=True):
        torch.testing.assert_close(found, ours)


def test_a_slice_drops_what_the_whole_one_drops():
    x = torch.ones(20, 40, dtype=torch.float64)
    seed, eye = torch.tensor(9), torch.eye(40, dtype=torch.float64)
    whole = lora_shrink(x, eye, dropout_p=0.5, seed=seed)
    part = lora_shrink(
        x[4:9, 8:24], eye[:16, :16], dropout_p=0.5, seed=seed, place=MaskPlace(4, 8, 40)
    )
    assert torch.equal(part, whole[4:9, 8:24]) and 0 < (part == 0).sum() < part.numel()


def test_out_is_added_to_and_left_alone():
    h, b, out = torch.randn(6, R), torch.randn(N, R), torch.randn(6, N)
    kept = out.clone()
    assert torch.equal(lora_expand(h, b, torch.tensor(2.0), out), out + (h * 2.0) @ b.t())
    assert torch.equal(out, kept)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, a, b: lora_shrink(x[..., :-1], a), "x: expected"),
        (lambda x, a, b: lora_shrink(x, a[0]), "x: expected"),
        (lambda x, a, b: lora_shrink(x, a, dropout_p=1.0), "dropout_p: expected"),
        (lambda x, a, b: lora_shrink(x, a, place=MaskPlace(0, 4, 60)), "column_offset: expected"),
        (lambda x, a, b: lora_expand(x, b), "h: expected"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(*operands(torch.float32))
