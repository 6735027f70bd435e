"""Bad input: the message names the argument, what was expected and what came."""

import pytest
import torch
from torch.autograd import forward_ad

from lora_kernels.ops.routed import (
    AdapterBank,
    Routing,
    explain,
    routed_expand,
    routed_lora,
    routed_lora_linear,
    routed_shrink,
)

K, N, ROWS = 8, 6, 5
FUNCTIONS = {
    "routed_lora": routed_lora,
    "routed_lora_linear": routed_lora_linear,
    "routed_shrink": routed_shrink,
    "routed_expand": routed_expand,
    "explain": explain,
}
OF_X = ("routed_lora", "routed_lora_linear", "routed_shrink", "explain")
OF_OUT = ("routed_lora", "routed_expand")
ALL = tuple(FUNCTIONS)


def a_bank(**options) -> AdapterBank:
    bank = AdapterBank(K, N, **options)
    for name, rank in (("a", 2), ("b", 3)):
        kind = {"device": bank.device, "dtype": bank.dtype}
        bank.add(name, torch.randn(rank, K, **kind), torch.randn(N, rank, **kind), 0.5)
    return bank


def arguments(function: str) -> dict:
    bank = a_bank()
    given = {"bank": bank, "routing": Routing.from_tokens([0, 1, -1, 1, 0], bank)}
    if function == "routed_expand":
        return {"h": torch.randn(ROWS, 3), **given}
    given["x"] = torch.randn(ROWS, K)
    if function == "routed_lora_linear":
        given["weight"] = torch.randn(N, K)
    return given


def other_routing(count: int = ROWS, **options):
    """For the bank of the call."""
    return lambda given: {"routing": Routing.empty(count, given["bank"], **options)}


def out_that_is_x(shift: int):
    def change(given):
        bank = AdapterBank(K, K)
        bank.add("a", torch.randn(2, K), torch.randn(K, 2), 0.5)
        memory = torch.randn(ROWS + shift, K)
        routing = Routing.from_tokens([0] * ROWS, bank)
        return {"bank": bank, "routing": routing, "x": memory[:ROWS], "out": memory[shift:]}

    return change


def removed(given):
    given["bank"].remove("a")
    return {}


def out_that_is_h(given):
    bank = AdapterBank(K, 3)
    bank.add("a", torch.randn(3, K), torch.randn(3, 3), 0.5)
    h = torch.randn(ROWS, 3)
    return {"bank": bank, "routing": Routing.from_tokens([0] * ROWS, bank), "h": h, "out": h}


BAD = {
    "x_list": (OF_X, {"x": [1.0]}, TypeError, "x: expected a tensor of floating point, got list"),
    "x_integer": (OF_X, {"x": torch.ones(ROWS, K).int()}, TypeError, "x: expected a tensor of"),
    "x_complex": (OF_X, {"x": torch.ones(ROWS, K) + 0j}, TypeError, "got torch.complex64"),
    "x_float8": (
        OF_X, {"x": torch.ones(ROWS, K).to(torch.float8_e4m3fn)}, TypeError, "x: expected a tensor",
    ),
    "x_0d": (OF_X, {"x": torch.tensor(1.0)}, ValueError, "x: expected [..., 8], got []"),
    "x_columns": (OF_X, {"x": torch.randn(ROWS, 7)}, ValueError, "x: expected [..., 8], got [5,"),
    "x_rows": (
        OF_X, {"x": torch.randn(4, K)}, ValueError,
        "x: expected 5 tokens (or 5, all it has room for), as in the routing, got 4",
    ),
    "x_sparse": (OF_X, {"x": torch.ones(ROWS, K).to_sparse()}, TypeError, "x: expected a dense"),
    "x_nested": (
        OF_X,
        {"x": torch.nested.nested_tensor([torch.randn(ROWS, K)], layout=torch.jagged)},
        TypeError, "x: expected a dense tensor, got a sparse or nested one",
    ),
    "x_device": (
        OF_X, {"x": torch.randn(ROWS, K, device="meta")}, ValueError,
        "bank: expected x's device meta, got cpu",
    ),
    "bank_type": (ALL, {"bank": {}}, TypeError, "bank: expected an AdapterBank, got dict"),
    "bank_device": (
        ALL, lambda given: {"bank": a_bank(device="meta", slots=given["bank"].slots)}, ValueError,
        "bank: expected x's device cpu, got meta",
    ),
    "routing_type": (
        ALL, {"routing": torch.zeros(ROWS)}, TypeError, "routing: expected a Routing, got Tensor",
    ),
    "routing_device": (
        ALL, other_routing(device="meta"), ValueError, "routing: expected x's device cpu, got meta",
    ),
    "routing_of_other_slots": (
        ALL, {"routing": Routing.from_tokens([0] * ROWS, a_bank())}, ValueError,
        "routing: expected one made for the bank's slots, got one of other slots",
    ),
    "routing_out_of_date": (ALL, removed, ValueError, "routing: adapters were removed"),
    "routing_rows": (
        OF_X, other_routing(9), ValueError,
        "x: expected 0 tokens (or 9, all it has room for), as in the routing, got 5",
    ),
    "weight_none": (
        ("routed_lora_linear",), {"weight": None}, TypeError, "weight: expected a tensor, got None",
    ),
    "weight_shape": (
        ("routed_lora_linear",), {"weight": torch.randn(K, N)}, ValueError,
        "weight: expected [6, 8], got [8, 6]",
    ),
    "weight_dtype": (
        ("routed_lora_linear",), {"weight": torch.randn(N, K).half()}, TypeError,
        "weight: expected x's dtype torch.float32, got torch.float16",
    ),
    "weight_device": (
        ("routed_lora_linear",), {"weight": torch.randn(N, K, device="meta")}, ValueError,
        "weight: expected x's device cpu, got meta",
    ),
    "weight_trains": (
        ("routed_lora_linear",), {"weight": torch.randn(N, K, requires_grad=True)}, ValueError,
        "weight: expected a frozen tensor",
    ),
    "weight_sparse": (
        ("routed_lora_linear",), {"weight": torch.randn(N, K).to_sparse()}, TypeError,
        "weight: expected",
    ),
    "bias_shape": (
        ("routed_lora_linear",), {"bias": torch.randn(N + 1)}, ValueError,
        "bias: expected [6], got [7]",
    ),
    "bias_list": (
        ("routed_lora_linear",), {"bias": [0.0] * N}, TypeError, "bias: expected a tensor",
    ),
    "bias_dtype": (
        ("routed_lora_linear",), {"bias": torch.randn(N).double()}, TypeError,
        "bias: expected x's dtype torch.float32, got torch.float64",
    ),
    "bias_device": (
        ("routed_lora_linear",), {"bias": torch.randn(N, device="meta")}, ValueError,
        "bias: expected x's device cpu, got meta",
    ),
    "seed_number": (
        OF_X[:3], {"seed": 3}, TypeError, "seed: expected a 0-d int64 tensor, got int",
    ),
    "seed_dtype": (
        OF_X[:3], {"seed": torch.tensor(3.0)}, TypeError, "seed: expected a 0-d int64 tensor, got",
    ),
    "seed_shape": (
        OF_X[:3], {"seed": torch.tensor([3])}, TypeError, "seed: expected a 0-d int64 tensor",
    ),
    "seed_device": (
        OF_X[:3], {"seed": torch.empty((), dtype=torch.int64, device="meta")}, ValueError,
        "seed: expected it on cpu, got meta",
    ),
    "backend_unknown": (ALL, {"backend": "cuda"}, ValueError, "backend: expected 'auto' or one of"),
    "backend_list": (ALL, {"backend": ["auto"]}, ValueError, "backend: expected 'auto' or one of"),
    "backend_absent": (ALL, {"backend": "triton"}, ValueError, "backend='triton' cannot serve"),
    "out_list": (OF_OUT, {"out": [0.0]}, TypeError, "out: expected a tensor, got list"),
    "out_shape": (OF_OUT, {"out": torch.zeros(ROWS, N + 1)}, ValueError, "out: expected [5, 6] in"),
    "out_rows": (OF_OUT, {"out": torch.zeros(ROWS + 1, N)}, ValueError, "out: expected"),
    "out_0d": (OF_OUT, {"out": torch.tensor(0.0)}, ValueError, "out: expected"),
    "out_dtype": (
        ("routed_lora",), {"out": torch.zeros(ROWS, N).half()}, ValueError,
        "out: expected [5, 6] in torch.float32 on cpu, got [5, 6] in torch.float16 on cpu",
    ),
    "out_dtype_of_expand": (
        ("routed_expand",), {"out": torch.zeros(ROWS, N).half(), "dtype": torch.float32},
        ValueError, "out: expected",
    ),
    "out_integer": (
        ("routed_expand",), {"out": torch.zeros(ROWS, N).int()}, (TypeError, ValueError), "",
    ),
    "out_device": (
        OF_OUT, {"out": torch.zeros(ROWS, N, device="meta")}, ValueError, "out: expected [5, 6] in",
    ),
    "out_overlaps_itself": (
        OF_OUT, {"out": torch.zeros(N).expand(ROWS, N)}, ValueError,
        "out: expected rows that do not overlap",
    ),
    "out_rows_overlap": (
        OF_OUT, {"out": torch.zeros(50).as_strided((ROWS, N), (2, 1))}, ValueError, "overlap",
    ),
    "out_is_x": (("routed_lora",), out_that_is_x(0), ValueError, "out: expected"),
    "out_overlaps_x": (("routed_lora",), out_that_is_x(1), ValueError, "out: expected"),
    "out_is_h": (("routed_expand",), out_that_is_h, ValueError, "out: expected"),
    "h_list": (
        ("routed_expand",), {"h": [1.0]}, TypeError, "h: expected a tensor of floating point",
    ),
    "h_shape": (
        ("routed_expand",), {"h": torch.randn(ROWS, 2)}, ValueError,
        "h: expected [5, 3] (pairs, widest rank), got [5, 2]",
    ),
    "h_pairs": (("routed_expand",), {"h": torch.randn(4, 3)}, ValueError, "h: expected [5, 3]"),
    "h_0d": (("routed_expand",), {"h": torch.tensor(1.0)}, ValueError, "h: expected [5, 3]"),
    "h_sparse": (
        ("routed_expand",), {"h": torch.randn(ROWS, 3).to_sparse()}, TypeError, "h: expected",
    ),
    "h_device": (
        ("routed_expand",), {"h": torch.randn(ROWS, 3, device="meta")}, ValueError,
        "device meta, got cpu",
    ),
    "dtype_integer": (
        ("routed_expand",), {"dtype": torch.int32}, TypeError, "dtype: expected a floating point",
    ),
}  # fmt: skip
CASES = [(case, function) for case, (functions, *_) in BAD.items() for function in functions]


@pytest.mark.parametrize("case, function", CASES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_message(case, function, backend):
    _, changes, error, message = BAD[case]
    given = arguments(function)
    given |= changes(given) if callable(changes) else changes
    given.setdefault("backend", backend)
    with torch.set_grad_enabled(case == "weight_trains"), pytest.raises(error) as raised:
        FUNCTIONS[function](**given)
    assert message in str(raised.value)


@pytest.mark.parametrize("function", [name for name in ALL if name != "explain"])
def test_nothing_is_launched_and_no_seed_drawn_for_bad_input(function):
    given = arguments(function)
    given["bank"]["a"].dropout_p = 0.5
    first = {"h" if "h" in given else "x": torch.randn(1, K + 1)}
    state = torch.get_rng_state()
    for bad in ({"backend": "triton"}, first):
        with pytest.raises(ValueError):
            FUNCTIONS[function](**{**given, **bad})
    assert torch.equal(torch.get_rng_state(), state)


def test_trainable_weight_is_accepted_without_gradients():
    given = arguments("routed_lora_linear")
    given["weight"].requires_grad_()
    with torch.no_grad():
        assert routed_lora_linear(**given).shape == (ROWS, N)


@pytest.mark.parametrize("function", ["routed_lora", "routed_lora_linear", "routed_shrink"])
def test_forward_mode_is_refused(function):
    """Its tangents would be dropped in silence."""
    given = arguments(function)
    x = given.pop("x")
    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        torch.func.jvp(lambda x: FUNCTIONS[function](x, **given), (x,), (torch.ones_like(x),))
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            FUNCTIONS[function](dual, **given)


def test_forward_mode_of_h_is_refused():
    given = arguments("routed_expand")
    h = given.pop("h")
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(h, torch.ones_like(h))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            routed_expand(dual, **given)


def test_out_that_cannot_be_flattened():
    given = arguments("routed_lora")
    given["routing"] = Routing.from_tokens([0] * 6, given["bank"])
    given["x"] = torch.randn(2, 3, K)
    out = torch.zeros(3, 2, N).transpose(0, 1)
    with pytest.raises(ValueError, match="out: expected leading dimensions that can be flattened"):
        routed_lora(**given, out=out)


def test_explain():
    given = arguments("explain")
    choice = explain(**given)
    assert choice.backend in ("native", "composed") and choice.reason
    assert explain(**given, backend="composed").backend == "composed"
    assert explain(**given, backend="reference").backend == "reference"
    state = torch.get_rng_state()
    given["bank"]["a"].dropout_p = 0.5
    explain(**given)
    assert torch.equal(torch.get_rng_state(), state)
