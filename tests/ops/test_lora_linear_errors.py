"""Bad input: the message names the argument, what was expected and what came."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from lora_kernels import explain, lora_linear


def arguments():
    return {
        "x": torch.randn(3, 8),
        "weight": torch.randn(6, 8),
        "lora_a": torch.randn(2, 8),
        "lora_b": torch.randn(6, 2),
        "scaling": 0.5,
    }


BAD = {
    "no_columns": (
        {"x": torch.randn(3, 0), "lora_a": torch.randn(2, 0), "weight": torch.randn(6, 0)},
        ValueError,
        "lora_a: expected [rank, in_features], both at least 1, got [2, 0]",
    ),
    "no_outputs": (
        {"lora_b": torch.randn(0, 2), "weight": torch.randn(0, 8)},
        ValueError,
        "lora_b: expected [out_features >= 1, 2] to match lora_a [2, 8], got [0, 2]",
    ),
    "x_sparse": (
        {"x": torch.eye(8).to_sparse()},
        TypeError,
        "x: expected a dense tensor, got layout torch.sparse_coo",
    ),
    "x_nested": (
        {"x": torch.nested.nested_tensor([torch.randn(2, 8)], layout=torch.jagged)},
        TypeError,
        "x: expected a dense tensor, got a nested tensor",
    ),
    "scaling_complex": (
        {"scaling": torch.tensor(1 + 1j)},
        TypeError,
        "scaling: expected a real number, got dtype torch.complex64",
    ),
    "dropout_string": (
        {"dropout_p": "0.5"},
        TypeError,
        "dropout_p: expected a number, got str",
    ),
    "dropout_none": ({"dropout_p": None}, TypeError, "dropout_p: expected a number, got NoneType"),
    "lora_a_device": (
        {"lora_a": torch.randn(2, 8, device="meta")},
        ValueError,
        "lora_a: expected x's device cpu, got meta",
    ),
    "lora_b_device": (
        {"lora_b": torch.randn(6, 2, device="meta")},
        ValueError,
        "lora_b: expected x's device cpu, got meta",
    ),
    "bias_device": (
        {"bias": torch.randn(6, device="meta")},
        ValueError,
        "bias: expected x's device cpu, got meta",
    ),
    "output_scale_device": (
        {"output_scale": torch.randn(6, device="meta")},
        ValueError,
        "output_scale: expected x's device cpu, got meta",
    ),
    "seed_device": (
        {"dropout_p": 0.1, "seed": torch.empty((), dtype=torch.int64, device="meta")},
        ValueError,
        "seed: expected a 0-d tensor on x's device cpu, got shape [] on meta",
    ),
    "x_not_a_tensor": ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    "x_integer": (
        {"x": torch.ones(3, 8, dtype=torch.int32)},
        TypeError,
        "x: expected dtype bfloat16, float16, float32 or float64, got torch.int32",
    ),
    "x_0d": ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least one dimension"),
    "x_columns": (
        {"x": torch.randn(3, 7)},
        ValueError,
        "x: expected [..., 8] to match lora_a [2, 8], got [3, 7]",
    ),
    "lora_a_rank_0": (
        {"lora_a": torch.randn(0, 8), "lora_b": torch.randn(6, 0)},
        ValueError,
        "lora_a: expected [rank, in_features], both at least 1, got [0, 8]",
    ),
    "lora_a_1d": (
        {"lora_a": torch.randn(8)},
        ValueError,
        "lora_a: expected [rank, in_features], both at least 1, got [8]",
    ),
    "lora_a_float8": (
        {"lora_a": torch.randn(2, 8).to(torch.float8_e4m3fn)},
        TypeError,
        "lora_a: expected dtype",
    ),
    "lora_b_rank": (
        {"lora_b": torch.randn(6, 3)},
        ValueError,
        "lora_b: expected [out_features >= 1, 2] to match lora_a [2, 8], got [6, 3]",
    ),
    "weight_shape": (
        {"weight": torch.randn(8, 6)},
        ValueError,
        "weight: expected [6, 8] to match lora_b and lora_a, got [8, 6]",
    ),
    "weight_dtype": (
        {"weight": torch.randn(6, 8).half()},
        TypeError,
        "weight: expected x's dtype torch.float32, got torch.float16",
    ),
    "weight_trainable": (
        {"weight": torch.randn(6, 8, requires_grad=True)},
        ValueError,
        "weight: expected a frozen tensor (requires_grad=False)",
    ),
    "weight_device": (
        {"weight": torch.randn(6, 8, device="meta")},
        ValueError,
        "weight: expected x's device cpu, got meta",
    ),
    "bias_shape": ({"bias": torch.randn(5)}, ValueError, "bias: expected [6], got [5]"),
    "bias_dtype": (
        {"bias": torch.randn(6).double()},
        TypeError,
        "bias: expected x's dtype torch.float32, got torch.float64",
    ),
    "output_scale_shape": (
        {"output_scale": torch.randn(1, 6)},
        ValueError,
        "output_scale: expected [6], got [1, 6]",
    ),
    "scaling_string": (
        {"scaling": "2"},
        TypeError,
        "scaling: expected a number or a 0-d tensor, got str",
    ),
    "scaling_vector": (
        {"scaling": torch.ones(6)},
        ValueError,
        "scaling: expected a 0-d tensor, got shape [6]",
    ),
    "scaling_trainable": (
        {"scaling": torch.tensor(1.0, requires_grad=True)},
        ValueError,
        "scaling: expected a tensor without gradient",
    ),
    "scaling_device": (
        {"scaling": torch.tensor(1.0, device="meta")},
        ValueError,
        "scaling: expected the CPU or x's device cpu, got meta",
    ),
    "dropout_one": (
        {"dropout_p": 1.0},
        ValueError,
        "dropout_p: expected a probability in [0, 1), got 1.0",
    ),
    "dropout_negative": (
        {"dropout_p": -0.1},
        ValueError,
        "dropout_p: expected a probability in [0, 1), got -0.1",
    ),
    "dropout_nan": (
        {"dropout_p": float("nan")},
        ValueError,
        "dropout_p: expected a probability in [0, 1), got nan",
    ),
    "seed_number": (
        {"dropout_p": 0.1, "seed": 3},
        TypeError,
        "seed: expected a 0-d int64 tensor, got int",
    ),
    "seed_dtype": (
        {"dropout_p": 0.1, "seed": torch.tensor(3.0)},
        TypeError,
        "seed: expected a 0-d int64 tensor, got torch.float32",
    ),
    "seed_shape": (
        {"dropout_p": 0.1, "seed": torch.tensor([3])},
        ValueError,
        "seed: expected a 0-d tensor on x's device cpu, got shape [1]",
    ),
    "backend_list": (
        {"backend": ["auto"]},
        ValueError,
        "backend: expected 'auto' or one of ('reference', 'composed', 'triton', 'native'), "
        "got ['auto']",
    ),
    "weight_not_a_tensor": ({"weight": [1.0]}, TypeError, "weight: expected a tensor, got list"),
    "bias_not_a_tensor": ({"bias": [1.0]}, TypeError, "bias: expected a tensor, got list"),
    "rank_scale_shape": (
        {"rank_scale": torch.randn(6)},
        ValueError,
        "rank_scale: expected [2], got [6]",
    ),
    "rank_scale_integer": (
        {"rank_scale": torch.ones(2, dtype=torch.int32)},
        TypeError,
        "rank_scale: expected dtype bfloat16, float16, float32 or float64, got torch.int32",
    ),
    "rank_scale_device": (
        {"rank_scale": torch.randn(2, device="meta")},
        ValueError,
        "rank_scale: expected x's device cpu, got meta",
    ),
    "rank_scale_lazy_zero": (
        {"rank_scale": torch._efficientzerotensor((2,))},
        ValueError,
        "rank_scale: expected a tensor with memory, got one of torch's lazy zeros",
    ),
    "row_offset_negative": (
        {"row_offset": -1},
        ValueError,
        "row_offset: expected 0 or more, got -1",
    ),
    "row_offset_fraction": (
        {"row_offset": 1.5},
        TypeError,
        "row_offset: expected an integer, got 1.5",
    ),
    "row_offset_none": (
        {"row_offset": None},
        TypeError,
        "row_offset: expected an integer, got None",
    ),
    "row_offset_far": (
        {"row_offset": 1 << 62},
        ValueError,
        "row_offset: expected fewer than 2**62 groups of 8 columns before the activation, "
        f"got {1 << 62} rows",
    ),
    "column_offset_in_a_group": (
        {"column_offset": 4, "pitch": 80},
        ValueError,
        "column_offset: expected a multiple of 8, 0 or more, got 4",
    ),
    "column_offset_negative": (
        {"column_offset": -8, "pitch": 80},
        ValueError,
        "column_offset: expected a multiple of 8, 0 or more, got -8",
    ),
    "column_offset_without_pitch": (
        {"column_offset": 8},
        ValueError,
        "pitch: expected the columns of the whole activation, at least 8 + 8, got None",
    ),
    "pitch_too_small": (
        {"column_offset": 16, "pitch": 23},
        ValueError,
        "pitch: expected the columns of the whole activation, at least 16 + 8, got 23",
    ),
    "pitch_true": ({"pitch": True}, TypeError, "pitch: expected an integer, got True"),
    "backend_unknown": ({"backend": "cuda"}, ValueError, "backend: expected 'auto' or one of"),
    "backend_absent": (
        {"backend": "triton"},
        ValueError,
        "backend='triton' cannot serve this call",
    ),
}


@pytest.mark.parametrize("function", [lora_linear, explain])
@pytest.mark.parametrize("case", BAD)
def test_message(case, function):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        function(**{**arguments(), **changes})


@pytest.mark.parametrize("function", [lora_linear, explain])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_a", "output_scale"])
def test_what_is_no_tensor_is_named_under_autocast(name, function):
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=f"^{name}: expected a tensor, got list$"),
    ):
        function(**{**arguments(), name: [1.0]})


def test_trainable_weight_is_accepted_without_gradients():
    weight = torch.randn(6, 8, requires_grad=True)
    with torch.no_grad():
        y = lora_linear(**{**arguments(), "weight": weight})
    assert y.shape == (3, 6)


@pytest.mark.parametrize("mode", ["jvp", "dual_level"])
def test_forward_mode_is_refused(mode):
    """Its tangents would be dropped in silence; the definition has them."""
    inputs = arguments()
    x, tangent = inputs.pop("x"), torch.ones(3, 8)

    def derivative(backend):
        if mode == "jvp":
            function = lambda x: lora_linear(x, **inputs, backend=backend)  # noqa: E731
            return torch.func.jvp(function, (x,), (tangent,))[1]
        with torch.no_grad(), forward_ad.dual_level():
            y = lora_linear(forward_ad.make_dual(x, tangent), **inputs, backend=backend)
            return forward_ad.unpack_dual(y).tangent

    with pytest.raises(NotImplementedError, match="lora_linear: forward-mode differentiation"):
        derivative("auto")
    expected = tangent @ (inputs["weight"] + 0.5 * inputs["lora_b"] @ inputs["lora_a"]).t()
    torch.testing.assert_close(derivative("reference"), expected)


@pytest.mark.parametrize("backend", ["auto", "composed", "reference"])
def test_a_scaling_is_a_float_to_every_backend(backend):
    inputs = {**arguments(), "backend": backend}
    half = lora_linear(**{**inputs, "scaling": 0.5})
    assert torch.equal(lora_linear(**{**inputs, "scaling": Fraction(1, 2)}), half)
    with pytest.raises(OverflowError):
        lora_linear(**{**inputs, "scaling": 10**400})


def test_any_real_number_is_a_scaling():
    inputs = arguments()
    expected = lora_linear(**inputs)
    for scaling in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        assert torch.equal(lora_linear(**{**inputs, "scaling": scaling}), expected)
