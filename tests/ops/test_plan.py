"""A call whose plan is known is not checked: so its key has to tell all that the check looks at."""

import gc
import threading
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from padded_weight import PaddedWeight
from torch import Tensor, nn

from lora_kernels import lora_linear
from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight
from lora_kernels.ops import linear
from lora_kernels.ops.linear import plan as plans
from lora_kernels.ops.linear.call import LinearCall
from lora_kernels.ops.linear.checks import check_call
from lora_kernels.ops.linear.plan import PLANS, key_of, make_plan
from lora_kernels.runtime import dispatch, tensor_state
from lora_kernels.runtime import plan as keeping
from lora_kernels.runtime.dropout import MaskPlace
from lora_kernels.runtime.plan import Plans, forget_plans

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("plans_forgotten"),
]


class Derived(torch.Tensor):
    """Dispatches as its values would."""


class Wrapper(torch.Tensor):
    """Holds a tensor; what is done to it is seen."""

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)

    def __init__(self, tensor):
        self.tensor = tensor

    def __tensor_flatten__(self):
        return ["tensor"], None

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise AssertionError("nothing is launched")


def freed(tensor: Tensor, offset: int = 0) -> Tensor:
    storage = torch.zeros(offset + tensor.numel(), dtype=tensor.dtype)
    storage[offset:] = tensor.flatten()
    view = storage[offset:].view(tensor.shape)
    storage.untyped_storage().resize_(0)
    return view


def outlived(transform, tensor: Tensor) -> Tensor:
    kept = []
    transform(lambda t: kept.append(t) or t.sum())(tensor)
    return kept[0]


def in_inference_mode(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


# What becomes of a tensor, be it right or wrong.
TENSORS = {
    "bf16": lambda t: t.to(torch.bfloat16),
    "fp16": lambda t: t.to(torch.float16),
    "fp32": lambda t: t.to(torch.float32),
    "fp64": lambda t: t.to(torch.float64),
    "fp8": lambda t: t.to(torch.float8_e4m3fn),
    "int32": lambda t: t.to(torch.int32),
    "int64": lambda t: t.to(torch.int64),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t.to(torch.bool),
    "one row": lambda t: t[:1],
    "a row less": lambda t: t[1:],
    "one column": lambda t: t[..., :1],
    "a column less": lambda t: t[..., 1:],
    "no column": lambda t: t[..., :0],
    "no row": lambda t: t[:0],
    "twice the rows": lambda t: torch.cat([t, t]),
    "one more dimension": lambda t: t[None],
    "turned": lambda t: t.t(),
    "a row": lambda t: t[0],
    "0-d": lambda t: t.sum(),
    "flat": lambda t: t.flatten(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.to_sparse_csr(),
    "for MKL-DNN": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t, t], layout=torch.strided),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "derived": lambda t: t.as_subclass(Derived),
    "wrapper": Wrapper,
    "parameter": lambda t: nn.Parameter(t, requires_grad=False),
    "trained parameter": nn.Parameter,
    "buffer": nn.Buffer,
    "trained": lambda t: t.clone().requires_grad_(),
    "of a graph": lambda t: t.clone().requires_grad_() * 1,
    "inference": in_inference_mode,
    "freed": freed,
    "freed behind an offset": lambda t: freed(t, 1000),
    "lazy zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "lazily negated": lambda t: torch.complex(t * 0, -t).conj().imag,
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "of a gradient's transform": lambda t: outlived(torch.func.grad, t),
    "of functionalize": lambda t: outlived(torch.func.functionalize, t),
    "fake": lambda t: torch._subclasses.FakeTensorMode().from_tensor(t),
    "list": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "None": lambda t: None,
    "number": lambda t: 3,
    "text": lambda t: "tensor",
}
NUMBERS = {
    "0": 0, "0.0": 0.0, "-0.0": -0.0, "0.1": 0.1, "0.5": 0.5, "1e-9": 1e-9, "1": 1, "1.0": 1.0,
    "2": 2, "1 - 1e-9": 1 - 1e-9, "-0.1": -0.1, "nan": float("nan"), "inf": float("inf"),
    "True": True, "False": False, "None": None, "text": "0.5", "list": [0.5],
    "numpy fp32": np.float32(0.5), "numpy fp64": np.float64(0.5), "numpy int": np.int64(0),
    "fraction": Fraction(1, 2), "complex": 0.5j,
}  # fmt: skip
ZERO_D = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
    "int32": torch.int32, "int64": torch.int64, "bool": torch.bool, "complex": torch.complex64,
}  # fmt: skip
SEEDS = {"none": None, "number": 3, "text": "3", "list": [3], "numpy": np.int64(3), "True": True}


def changes() -> dict[str, tuple[str, object]]:
    """By name: an argument, and its other value, or what makes it of the one that is there."""
    found = {}
    for name in ("x", "weight", "lora_a", "lora_b", "bias", "output_scale", "rank_scale"):
        for kind, change in TENSORS.items():
            found[f"{name} {kind}"] = name, change
    for name in ("dropout_p", "scaling"):
        for kind, number in NUMBERS.items():
            found[f"{name} {kind}"] = name, lambda _, number=number: number
    for name in ("scaling", "seed"):
        for kind, dtype in ZERO_D.items():
            found[f"{name} 0-d {kind}"] = name, lambda _, dtype=dtype: torch.tensor(1, dtype=dtype)
        dtype = torch.float32 if name == "scaling" else torch.int64
        for kind in ("one more dimension", "meta", "derived", "parameter", "freed", "lazy zero",
                     "trained", "wrapper", "inference", "fake"):  # fmt: skip
            if (name, kind) != ("seed", "trained"):
                found[f"{name} tensor {kind}"] = (
                    name,
                    lambda _, k=kind, d=dtype: TENSORS[k](torch.tensor(1, dtype=d)),
                )
    for kind, seed in SEEDS.items():
        found[f"seed {kind}"] = "seed", lambda _, seed=seed: seed
    for backend in (*dispatch.BACKENDS, "auto", "cuda", None, 3, ["auto"]):
        found[f"backend {backend}"] = "backend", lambda _, backend=backend: backend
    for kind in ("bf16", "fp64", "one row", "one column", "trained", "meta", "freed", "list"):
        found[f"weight as a value, {kind}"] = (
            "weight", lambda t, k=kind: DenseWeight(TENSORS[k](t)),
        )  # fmt: skip
        if kind != "list":
            found[f"padded weight, {kind}"] = (
                "weight", lambda t, k=kind: PaddedWeight.of(TENSORS[k](t)),
            )  # fmt: skip
    found["weight as a value"] = "weight", lambda t: DenseWeight(t)
    found["padded weight"] = "weight", lambda t: PaddedWeight.of(t)
    found["padded weight, a row less"] = (
        "weight", lambda t: PaddedWeight(torch.cat([t, t[:3]]), t.shape[0] - 1),
    )  # fmt: skip
    return found


CHANGES = changes()
MODES = {"": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
NAMES = ("x", "lora_a", "lora_b", "bias", "output_scale", "rank_scale")


def valid_call(
    dtype=torch.float32, adapter_dtype=torch.float32, leading=(3,), base="tensor", vectors=True,
    trained=False, scaling=0.5, dropout_p=0.0, seed=None, backend="auto",
) -> dict:  # fmt: skip
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int, dtype=dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    call = {
        "x": draw(*leading, 8), "weight": draw(6, 8), "lora_a": draw(4, 8, dtype=adapter_dtype),
        "lora_b": draw(6, 4, dtype=adapter_dtype), "scaling": scaling,
        "bias": draw(6) if vectors else None,
        "output_scale": draw(6, dtype=adapter_dtype) if vectors else None,
        "rank_scale": draw(4, dtype=adapter_dtype) if vectors else None,
        "dropout_p": dropout_p, "seed": seed, "backend": backend,
    }  # fmt: skip
    if trained:
        for name in ("lora_a", "lora_b"):
            call[name].requires_grad_()
    call["weight"] = {
        "tensor": lambda t: t, "none": lambda t: None, "value": DenseWeight,
        "padded": PaddedWeight.of,
    }[base](call["weight"])  # fmt: skip
    return call


def changed(call: dict, change: str) -> dict | None:
    """The call with one argument changed; None where that argument cannot be changed so.

    One that is absent is first what it might be.
    """
    name, make = CHANGES[change]
    value = call[name]
    if value is None and name != "seed":
        dtypes = call["x"].dtype, call["lora_a"].dtype
        value = valid_call(*dtypes)[name]
    if name == "weight" and isinstance(value, (DenseWeight, PaddedWeight)):
        value = value.dequantise()
    if isinstance(value, Tensor):
        value = value.detach().clone()
    try:
        return call | {name: make(value)}
    except (AttributeError, RuntimeError, TypeError, IndexError, NotImplementedError):
        return None


def operands(call: dict) -> tuple:
    weight = call["weight"]
    base = DenseWeight(weight) if isinstance(weight, Tensor) else weight
    factors = LoRAFactors(*(
        call[name] for name in ("lora_a", "lora_b", "scaling", "output_scale", "rank_scale")
    ))  # fmt: skip
    return call["x"], base, factors, call["bias"], call["dropout_p"], call["seed"]


def key(call: dict) -> tuple | None:
    """As :func:`lora_linear` makes it; None also where the call is not eager and plain."""
    if not linear.is_plain_eager(call["x"]):
        return None
    return key_of(*operands(call), call["backend"], None)


def error_of(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        return type(error), str(error)


def verdict(call: dict):
    """What is decided for a call without a plan: all of it has to follow from the key."""
    x, base, factors, bias, dropout_p, seed = operands(call)
    found = error_of(check_call, x, base, factors, bias, dropout_p, seed, MaskPlace())
    if found is not None:
        return found
    alone = linear._is_for_us_alone(LinearCall(x, base, factors, bias, None))
    return alone, error_of(make_plan, call["backend"], x, base, factors, dropout_p)


def hidden_by_the_key(call: dict, change: str) -> str | None:
    """What the key of a changed call does not tell, if it is the valid call's."""
    other = changed(call, change)
    if other is None:
        return None
    known = key(call)
    assert known is not None and verdict(call)[0] is True
    if key(other) != known or verdict(other) == verdict(call):
        return None
    return f"{change}: {verdict(other)}"


valid_calls = st.builds(
    valid_call,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    adapter_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    leading=st.sampled_from([(3,), (), (2, 3)]),
    base=st.sampled_from(["tensor", "none", "value", "padded"]),
    vectors=st.booleans(),
    trained=st.booleans(),
    scaling=st.sampled_from([0.5, 2, torch.tensor(0.5), torch.tensor(0.5).double()]),
    dropout_p=st.sampled_from([0.0, 0, 0.3]),
    seed=st.sampled_from([None, torch.tensor(3)]),
    backend=st.sampled_from(["auto", "composed"]),
)


def test_the_changes_are_right_and_wrong():
    """What follows would hold of changes that nobody minds, or that cannot be made."""
    call = valid_call(seed=torch.tensor(3))
    made = {change: other for change in CHANGES if (other := changed(call, change)) is not None}
    verdicts = {change: verdict(other) for change, other in made.items()}
    refused = {found for found in verdicts.values() if isinstance(found[0], type)}
    accepted = [change for change, found in verdicts.items() if found[0] is True]
    seen_by_others = [change for change, found in verdicts.items() if found[0] is False]
    assert len(made) > 0.95 * len(CHANGES)
    assert len(refused) > 90 and len(accepted) > 90 and len(seen_by_others) > 10
    named = {message.partition(":")[0] for _, message in refused}
    assert named >= {"x", "weight", "lora_a", "lora_b", "bias", "output_scale", "rank_scale",
                     "scaling", "dropout_p", "seed"}  # fmt: skip


@settings(max_examples=300)
@given(call=valid_calls, mode=st.sampled_from(list(MODES)), data=st.data())
def test_a_changed_verdict_is_another_key(call, mode, data):
    """For every change of one argument."""
    some = data.draw(st.lists(st.sampled_from(list(CHANGES)), min_size=5, max_size=25))
    with MODES[mode]():
        for change in some:
            assert hidden_by_the_key(call, change) is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", ["tensor", "padded"])
def test_every_change_of_one_call(base, mode):
    for trained in (False, True):
        for seed in (None, torch.tensor(3)):
            call = valid_call(base=base, trained=trained, seed=seed)
            with MODES[mode]():
                hidden = [hidden_by_the_key(call, change) for change in CHANGES]
            assert hidden == [None] * len(CHANGES)


@pytest.mark.parametrize("made_with", MODES)
@pytest.mark.parametrize("called_with", MODES)
def test_a_trained_weight_is_refused_where_gradients_are_recorded(called_with, made_with):
    """The mode is no argument; what the check makes of it is."""
    call = valid_call()
    call["weight"].requires_grad_()
    with MODES[made_with]():
        first = outcome(call)
    assert isinstance(first[0], type) == (made_with == "")
    with MODES[called_with]():
        assert isinstance(outcome(call)[0], type) == (called_with == "")


def outcome(call: dict):
    """The result and its gradients as bits and classes; or the error."""
    torch.manual_seed(7)
    try:
        y = lora_linear(**call)
        if isinstance(y, torch._subclasses.FakeTensor) or y.is_meta:
            return "fake", type(y).__name__, y.dtype, y.shape
        results = [y]
        leaves = [call[name] for name in NAMES]
        leaves = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        if y.requires_grad and leaves:
            results += torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
    except Exception as error:
        return type(error), str(error)
    return [None if result is None else bits(result) for result in results]


def bits(result: Tensor) -> tuple:
    values, functional = result.detach().as_subclass(Tensor), torch._is_functional_tensor(result)
    if functional:
        values = torch._from_functional_tensor(values)
    values = values.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    kind = type(result).__name__, result.dtype, result.shape, result.requires_grad, functional
    return *kind, bytes(values.tolist())


@settings(max_examples=200)
@given(call=valid_calls, mode=st.sampled_from(list(MODES)), data=st.data())
def test_what_was_called_before_changes_nothing(call, mode, data):
    """A changed call gives what it gives alone, after the valid call has been made and after it has
    been made itself."""
    if call["x"].dtype == torch.float64 and call["backend"] == "native":
        return
    some = data.draw(st.lists(st.sampled_from(list(CHANGES)), min_size=1, max_size=6))
    with MODES[mode]():
        for change in some:
            other = changed(call, change)
            if other is None:
                continue
            PLANS.clear()
            alone, found = outcome(other), verdict(other)
            if isinstance(found[0], type):
                assert alone == found, "the check's own sentence"
            for first in ([call], [call, other], [call, call]):
                PLANS.clear()
                for each in first:
                    outcome(each)
                assert len(PLANS) >= 1
                assert outcome(other) == alone, change


def test_the_known_call_is_not_checked_again(monkeypatch):
    call = valid_call(trained=True)
    expected = outcome(call)
    for name in ("check_call", "make_plan"):
        monkeypatch.setattr(linear, name, None)
    assert outcome(call) == expected
    assert outcome(call | {"x": call["x"][None, :2]})[0][2] == (1, 2, 6)  # another number of rows


# --- planted faults --------------------------------------------------------------------------

FACTS = ("class", "dtype", "shape", "device")


def leaving_out(fact: str, only: str):
    """:func:`metadata_of` without one fact, of x or of the others."""
    whole, place = keeping.metadata_of, FACTS.index(fact)

    def metadata_of(x, *others):
        found = whole(x, *others)
        if found is None:
            return None
        found = list(found)
        kept = [found.pop(0) for _ in FACTS]
        if only == "x":
            kept.pop(place)
        for other in others:
            facts = [found.pop(0)] if other is None else [found.pop(0) for _ in FACTS]
            if only == "others" and other is not None:
                facts.pop(place)
            kept += facts
        assert not found
        return tuple(kept)

    return metadata_of


def hidden_changes(seed=None) -> list[str]:
    """Of calls in their several kinds, the changes that their keys do not tell."""
    hidden = []
    for call in (
        valid_call(seed=seed), valid_call(base="padded"), valid_call(scaling=torch.tensor(0.5)),
        valid_call(dropout_p=0.3, seed=torch.tensor(3)), valid_call(backend="composed"),
    ):  # fmt: skip
        hidden += [change for change in CHANGES if hidden_by_the_key(call, change)]
    return hidden


def test_no_fault_no_complaint():
    assert hidden_changes() == []


@pytest.mark.parametrize("only", ["x", "others"])
@pytest.mark.parametrize("fact", ["class", "dtype", "shape"])
def test_a_fact_that_the_key_left_out_is_found(fact, only, monkeypatch):
    """x's class is known before, from what asks whether anything has to see the call."""
    monkeypatch.setattr(plans, "metadata_of", leaving_out(fact, only))
    hidden = hidden_changes()
    if (fact, only) == ("class", "x"):
        assert hidden == []
        monkeypatch.setattr(linear, "is_plain_eager", lambda x: True)
        hidden = hidden_changes()
    expected = {"class": "derived", "dtype": "fp8", "shape": "one column"}[fact]
    named = ("x",) if only == "x" else ("lora_a", "lora_b")
    assert {f"{name} {expected}" for name in named} <= set(hidden)


def test_a_device_that_the_key_left_out_is_found(monkeypatch):
    """Where a tensor of the other device has an address, which meta's have not; that of x is also
    told by what the key has of x on a device."""
    monkeypatch.setattr(tensor_state, "LOWEST_ADDRESS", 0)
    monkeypatch.setattr(linear, "is_plain_eager", lambda x: True)
    on_meta = {change for change in CHANGES if change.endswith(" meta")}
    call = valid_call(seed=torch.tensor(3), scaling=torch.tensor(0.5))
    assert not any(hidden_by_the_key(call, change) for change in on_meta)
    monkeypatch.setattr(plans, "metadata_of", leaving_out("device", "others"))
    hidden = {change for change in on_meta if hidden_by_the_key(call, change)}
    assert hidden == on_meta - {"x meta", "padded weight, meta"}


def test_a_layout_is_also_told_by_the_memory():
    """Nothing that is not strided has an address, so that leaving the layout out hides nothing."""
    for kind in ("sparse", "compressed", "for MKL-DNN"):
        with pytest.raises(RuntimeError):
            TENSORS[kind](torch.ones(3, 4)).data_ptr()


def test_memory_that_the_key_does_not_look_at_is_found(monkeypatch):
    monkeypatch.setattr(tensor_state, "LOWEST_ADDRESS", -1)
    found = []
    for name in ("x", "lora_a", "lora_b"):
        for kind in ("freed", "freed behind an offset"):
            call = valid_call()
            other = changed(call, f"{name} {kind}")
            found.append(key(other) == key(call))
    assert all(found)  # and the check, which asks the storage, refuses all of them
    monkeypatch.undo()
    for name in ("x", "lora_a", "lora_b"):
        for kind in ("freed", "freed behind an offset"):
            other = changed(valid_call(), f"{name} {kind}")
            assert key(other) is None and verdict(other)[0] is ValueError


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (1, "scaling tensor trained"),
        (2, "dropout_p 1.0"),
        (4, "padded weight, a row less"),
        (6, "backend composed"),
    ],
    ids=["scaling", "dropout_p", "format", "backend"],
)
def test_a_part_that_the_key_left_out_is_found(part, expected, monkeypatch):
    whole = plans.key_of

    def key_of(*arguments):
        found = whole(*arguments)
        return found if found is None else (*found[:part], *found[part + 1 :])

    monkeypatch.setitem(globals(), "key_of", key_of)
    assert expected in hidden_changes()


def test_the_backend_of_the_process_is_part_of_the_key(monkeypatch):
    call = valid_call(trained=True)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "PROCESS_DEFAULT", "composed")
        lora_linear(**call)
        (kept,) = PLANS.values()
        assert kept.backend == kept.choice.backend == "composed"
    lora_linear(**call)
    assert [each.backend for each in PLANS.values()] == ["composed", "auto"]


def test_conditions_of_a_caller_are_part_of_the_key():
    x, base, factors, bias, dropout_p, seed = operands(valid_call())
    call = x, base, factors, bias, dropout_p, seed
    serve = linear.adapted_linear
    assert serve(*call, known_as=(1,)) is None and not PLANS
    expected = serve(*call)
    assert serve(*call, known_as=(1,)) is None
    linear.remember(*call[:-1], known_as=(1,))
    assert torch.equal(serve(*call, known_as=(1,)), expected)
    assert serve(*call, known_as=(2,)) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert serve(*call, known_as=(1,)) is None
    linear.remember(x.double(), *call[1:-1], known_as=(3,))  # which was never served
    assert serve(x.double(), *call[1:], known_as=(3,)) is None


# --- what is kept ----------------------------------------------------------------------------


def test_as_many_plans_as_there_is_room_for(monkeypatch):
    monkeypatch.setattr(keeping, "_LIMIT", 5)
    some = Plans()
    for number in range(23):
        assert some.keep((number,), -number) == -number
        assert 1 <= len(some) <= 5 and some[number,] == -number
    assert some.keep(None, "unkept") == "unkept" and None not in some
    for columns in range(1, 30):
        a, b = torch.randn(2, columns), torch.randn(3, 2)
        lora_linear(torch.randn(4, columns), None, a, b, 1.0)
        assert 1 <= len(PLANS) <= 5


def test_forgetting_reaches_all_that_are_left():
    some, other = Plans(), Plans()
    some.keep(("one",), 1)
    other.keep(("one",), 1)
    lora_linear(**valid_call())
    assert PLANS
    forget_plans()
    assert not some and not other and not PLANS
    gc.collect()  # banks that nobody holds any more
    before = len(keeping._ALL)
    del some, other
    gc.collect()
    assert len(keeping._ALL) == before - 2


def test_threads_share_what_is_planned(monkeypatch):
    planned = []
    monkeypatch.setattr(linear, "make_plan", lambda *a: planned.append(a) or make_plan(*a))
    call, results = valid_call(trained=True), []

    def run():
        results.append(lora_linear(**call).detach())

    for _ in range(4):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    run()
    assert len(planned) == 1 and len(PLANS) == 1
    assert all(torch.equal(result, results[0]) for result in results)


def test_threads_that_plan_while_others_forget(monkeypatch):
    monkeypatch.setattr(keeping, "_LIMIT", 3)
    calls = [valid_call(leading=(rows,), vectors=vectors, trained=True, dropout_p=p)
             for rows in (1, 3) for vectors in (True, False) for p in (0.0, 0.5)]  # fmt: skip
    for call in calls:
        call["seed"] = torch.tensor(3)
    expected, wrong, done = [lora_linear(**call).detach() for call in calls], [], threading.Event()

    def run(first: int):
        try:
            for turn in range(200):
                at = (first + turn) % len(calls)
                if not torch.equal(lora_linear(**calls[at]).detach(), expected[at]):
                    wrong.append(at)
                error, message = outcome(calls[at] | {"bias": torch.zeros(5)})
                if error is not ValueError or not message.startswith("bias: expected [6]"):
                    wrong.append(message)
        except BaseException as error:
            wrong.append(error)

    def forget():
        while not done.wait(0.0005):
            forget_plans()

    forgetting = threading.Thread(target=forget)
    forgetting.start()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    forgetting.join()
    assert not wrong and len(PLANS) <= 3 + 4  # each of the others may be about to keep one
