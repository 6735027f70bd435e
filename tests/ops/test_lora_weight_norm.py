"""lora_weight_norm: the definition, where the factored sum fails, and torch's integration."""

import re

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight, dense
from lora_kernels.ops.norm import composed, lora_weight_norm
from lora_kernels.ops.norm.reference import lora_weight_norm_reference
from lora_kernels.testing import assert_draws_within_policy, redrawn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OP = torch.ops.lora_kernels.lora_weight_norm.default


def draw(rows, columns, rank, dtype=torch.float32, adapter_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, lora_a, lora_b = (
        torch.randn(shape, generator=generator, dtype=torch.float64) * shape[1] ** -0.5
        for shape in ((rows, columns), (rank, columns), (rows, rank))
    )
    adapter_dtype = adapter_dtype or dtype
    return weight.to(dtype), lora_a.to(adapter_dtype), lora_b.to(adapter_dtype)


def oracle(weight, lora_a, lora_b, scaling):
    return lora_weight_norm_reference(
        weight.double(), lora_a.double(), lora_b.double(), float(scaling)
    )


def wide_eager(weight, lora_a, lora_b, scaling):
    """The formula in the result's dtype: what the error policy compares with."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return lora_weight_norm_reference(
        weight.to(dtype), lora_a.to(dtype), lora_b.to(dtype), float(scaling)
    )


def assert_accurate(*arguments):
    *factors, scaling = arguments
    assert_draws_accurate(
        lambda number: (*(redrawn(f, number, str(i)) for i, f in enumerate(factors)), scaling)
    )


def assert_draws_accurate(arguments_of):
    def draw(number):
        arguments = arguments_of(number)
        return tuple({"norm": f(*arguments)} for f in (lora_weight_norm, wide_eager, oracle))

    assert_draws_within_policy(draw)


@settings(deadline=None)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 60),
    rank=st.integers(1, 20),
    block=st.integers(1, 500),
    dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["rows", "columns", "strided", "expanded"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_block_dtype_and_layout(
    rows, columns, rank, block, dtype, adapter_dtype, layout, seed
):
    weight, lora_a, lora_b = draw(rows, columns, rank, dtype, adapter_dtype, seed)
    if layout == "columns":
        weight, lora_a = weight.t().contiguous().t(), lora_a.t().contiguous().t()
    elif layout == "strided":
        weight, lora_b = weight.repeat(2, 3)[::2, 1::3], lora_b.repeat(1, 2)[:, ::2]
    elif layout == "expanded":
        weight = weight[:1].expand(rows, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "_CPU_BLOCK", block)
        assert_accurate(weight, lora_a, lora_b, -1.7)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_one_block_of_the_real_size(poisoned_memory, dtype, transposed):
    rows, columns = 1100, dense._CPU_BLOCK // 1024 + 3
    weight, lora_a, lora_b = draw(rows, columns, 7, dtype)
    if transposed:
        weight = weight.t().contiguous().t()
    assert_accurate(weight, lora_a, lora_b, torch.tensor(0.3))


@pytest.mark.parametrize("remainder", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_weight_and_adapter_nearly_cancel(dtype, remainder):
    """``W = -s B A`` but for a remainder: all rows are short, so no long row hides their error.

    The factored sum loses the square of the remainder to rounding; forming the rows loses the
    remainder only, which plain eager torch in fp32 loses as well.
    """

    def arguments_of(number):
        noise, lora_a, lora_b = draw(300, 200, 16, torch.float32, seed=number)
        return (remainder * noise - 2.0 * (lora_b @ lora_a)).to(dtype), lora_a, lora_b, 2.0

    assert_draws_accurate(arguments_of)
    weight, lora_a, lora_b, _ = arguments_of(0)

    def factored():
        w, gram = weight.float(), lora_a @ lora_a.t()
        cross = 4.0 * ((w @ lora_a.t()) * lora_b).sum(1)
        square = w.square().sum(1) + cross + 4.0 * ((lora_b @ gram) * lora_b).sum(1)
        return square.clamp_min(0).sqrt()

    exact = oracle(weight, lora_a, lora_b, 2.0)
    ours = (lora_weight_norm(weight, lora_a, lora_b, 2.0) - exact).abs().max()
    if dtype == torch.float32 and remainder <= 1e-2:
        assert ours < (factored() - exact).abs().max()


def test_exact_cancellation_and_zero_rows():
    _, lora_a, lora_b = draw(9, 8, 2, torch.float64)
    lora_b = torch.round(lora_b * 4)  # small integers times eighths: every product is exact
    lora_a = torch.round(lora_a * 8) / 8
    weight = -2.0 * (lora_b @ lora_a)
    weight[3] += 1
    for dtype in DTYPES:
        norm = lora_weight_norm(weight.to(dtype), lora_a.float(), lora_b.float(), 2.0)
        expected = torch.zeros(9).index_fill(0, torch.tensor(3), 8**0.5)
        assert torch.equal(norm.float(), expected)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0)])
def test_an_empty_weight(rows, columns):
    weight, lora_a, lora_b = (torch.ones(s) for s in ((rows, columns), (2, columns), (rows, 2)))
    assert torch.equal(lora_weight_norm(weight, lora_a, lora_b, 0.5), torch.zeros(rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_range_of_half_precision_is_no_limit(dtype, scale):
    """Squares of fp16 leave its range on both sides; they are taken in fp32."""
    weight, lora_a, lora_b = draw(30, 50, 4, torch.float32)
    assert_accurate((weight * scale).to(dtype), lora_a, lora_b * scale, 0.5)


@pytest.mark.parametrize("transposed", [False, True])
def test_no_wide_copy_of_the_weight_is_made(monkeypatch, transposed):
    class LargestWide(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                self.elements = max(self.elements, out.untyped_storage().nbytes() // 4)
            return out

    weight, lora_a, lora_b = draw(64, 48, 3, torch.bfloat16)
    if transposed:
        weight = weight.t().contiguous().t()
    monkeypatch.setattr(dense, "_CPU_BLOCK", 500)
    with LargestWide() as wide:
        composed.weight_norm(DenseWeight(weight), LoRAFactors(lora_a, lora_b, torch.tensor(1.0)))
    assert 48 <= wide.elements <= 500


def test_detached_whatever_requires_grad():
    weight, lora_a, lora_b = draw(9, 8, 2)
    for tensor in (weight, lora_a, lora_b):
        tensor.requires_grad_()
    assert not lora_weight_norm(weight, lora_a, lora_b, 1.0).requires_grad
    assert lora_a.requires_grad


def test_opcheck_and_compile_with_many_scalings():
    arguments = draw(33, 21, 5, torch.bfloat16, torch.float32)
    weight, *factors = arguments
    torch.library.opcheck(OP, ([weight], "dense", [], *factors, torch.tensor(0.5)))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: lora_weight_norm(*a) * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for step in range(12):
        weight, lora_a, lora_b = draw(33 + step, 21, 5, seed=step)
        scaling = torch.tensor(0.5 + step)
        expected = 2 * lora_weight_norm(weight, lora_a, lora_b, scaling)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            assert torch.equal(compiled(weight, lora_a, lora_b, scaling), expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_number_for_the_scaling_compiles_once_more_and_never_again(backend):
    """The second value makes it symbolic; a graph for each would end at the recompile limit."""
    weight, lora_a, lora_b = draw(33, 21, 5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: lora_weight_norm(weight, lora_a, lora_b, s), backend=backend)
    for step in range(12):
        scaling = 0.5 + step
        with torch.compiler.set_stance("default" if step < 2 else "fail_on_recompile"):
            norm = compiled(scaling)
        assert torch.equal(norm, lora_weight_norm(weight, lora_a, lora_b, scaling))


def test_numbers_of_numpy_are_numbers():
    arguments = draw(33, 21, 5)
    expected = lora_weight_norm(*arguments, 0.75)
    assert torch.equal(lora_weight_norm(*arguments, numpy.float32(0.75)), expected)


def test_autocast_changes_nothing():
    arguments = (*draw(33, 21, 5), 0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm = lora_weight_norm(*arguments)
    assert norm.dtype == torch.float32 and torch.equal(norm, lora_weight_norm(*arguments))


def test_meta_tensors():
    arguments = [tensor.to("meta") for tensor in draw(33, 21, 5, torch.bfloat16)]
    norm = lora_weight_norm(*arguments, 0.7)
    assert norm.is_meta and norm.shape == (33,) and norm.dtype == torch.float32


BAD = {
    "weight_list": ({"weight": [[1.0]]}, TypeError, "weight: expected a tensor, got list"),
    "weight_int": (
        {"weight": torch.ones(6, 8, dtype=torch.int8)},
        TypeError,
        "weight: expected dtype bfloat16, float16, float32 or float64, got torch.int8",
    ),
    "weight_1d": (
        {"weight": torch.ones(8)},
        ValueError,
        "weight: expected [out_features, in_features], got [8]",
    ),
    "weight_sparse": (
        {"weight": torch.ones(6, 8).to_sparse()},
        TypeError,
        "weight: expected a dense tensor, got a sparse or nested one",
    ),
    "scaling_complex": (
        {"scaling": torch.ones((), dtype=torch.complex64)},
        TypeError,
        "scaling: expected a real number, got dtype torch.complex64",
    ),
    "a_columns": (
        {"lora_a": torch.ones(2, 6)},
        ValueError,
        "lora_a: expected [rank, 8] with rank >= 1 to match weight [6, 8], got [2, 6]",
    ),
    "rank_0": (
        {"lora_a": torch.ones(0, 8), "lora_b": torch.ones(6, 0)},
        ValueError,
        "lora_a: expected [rank, 8] with rank >= 1",
    ),
    "b_shape": (
        {"lora_b": torch.ones(2, 6)},
        ValueError,
        "lora_b: expected [6, 2] to match weight [6, 8] and lora_a [2, 8], got [2, 6]",
    ),
    "a_device": (
        {"lora_a": torch.ones(2, 8, device="meta")},
        ValueError,
        "lora_a: expected weight's device cpu, got meta",
    ),
    "scaling_text": (
        {"scaling": "1"},
        TypeError,
        "scaling: expected a number or a 0-d tensor, got str",
    ),
    "scaling_1d": (
        {"scaling": torch.ones(1)},
        ValueError,
        "scaling: expected a 0-d tensor, got shape [1]",
    ),
    "scaling_device": (
        {"scaling": torch.ones((), device="meta")},
        ValueError,
        "scaling: expected the CPU or weight's device cpu, got meta",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes, error, message):
    arguments = {
        "weight": torch.ones(6, 8),
        "lora_a": torch.ones(2, 8),
        "lora_b": torch.ones(6, 2),
        "scaling": 0.5,
    }
    with pytest.raises(error, match=re.escape(message)):
        lora_weight_norm(**{**arguments, **changes})
