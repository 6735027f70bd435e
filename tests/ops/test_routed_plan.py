"""A call of routed_lora whose plan is known is not checked: its key tells all that the check reads.

Plans are kept with the version of a bank. What a call is given, the bank and the routing all change
here after a valid call; then it has to end as on a bank that has never been called.
"""

import sys
import threading
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from padded_weight import PaddedWeight
from test_plan import TENSORS, leaving_out
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.base_weights import DenseWeight, base_of
from lora_kernels.ops import routed
from lora_kernels.ops.routed import AdapterBank, AdapterSlots, Routing
from lora_kernels.ops.routed.bank.versions import BankVersion
from lora_kernels.runtime import dispatch
from lora_kernels.runtime.dropout import MaskPlace
from lora_kernels.runtime.plan import forget_plans

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("plans_forgotten"),
]

K, N, ROWS, ROOM = 8, 6, 5, 9
FUNCTIONS = {
    "routed_lora": routed.routed_lora,
    "routed_lora_linear": routed.routed_lora_linear,
    "routed_shrink": routed.routed_shrink,
    "routed_expand": routed.routed_expand,
}
# No full check looks for them, and kernels read memory.
UNCHECKED = {"freed", "freed behind an offset", "of functionalize", "fake"}


class World:
    """A valid call, and the modes that it is made in. Two of a kind are equal, bit for bit."""

    def __init__(self, function: str, trained: bool = False, dropout: float = 0.0) -> None:
        self.function = function
        self.generator = torch.Generator().manual_seed(3)
        self.bank = self.bank_of(AdapterSlots(4), dropout).requires_grad_(trained)
        self.routing = Routing.empty(ROOM, self.bank).set_tokens_([0, 1, -1, 1, 0])
        self.modes: dict[str, object] = {}
        self.arguments = {"bank": self.bank, "routing": self.routing, "backend": "auto"}
        if function == "routed_expand":
            self.arguments["h"] = self.draw(ROOM, 3)
        else:
            self.arguments |= {"x": self.draw(ROWS, K), "seed": None}
        if function == "routed_lora_linear":
            self.arguments |= {"weight": self.draw(N, K), "bias": self.draw(N)}

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def bank_of(self, slots: AdapterSlots, dropout: float = 0.0, columns: int = K, **options):
        bank = AdapterBank(columns, N, slots=slots, **options)
        for name, rank in (("a", 2), ("b", 3)):
            bank.add(name, self.draw(rank, columns), self.draw(N, rank), 0.5, dropout)
        return bank

    def replace(self, name: str, make) -> None:
        """Change an argument by what makes another of it."""
        value = self.arguments[name]
        if name == "weight" and isinstance(value, (DenseWeight, PaddedWeight)):
            value = value.dequantise()
        self.arguments[name] = make(value.detach().clone() if isinstance(value, Tensor) else value)

    def call(self):
        """The result and its gradients as numbers, classes and dtypes; or the error."""
        torch.manual_seed(7)
        try:
            with ExitStack() as stack:
                for enter in self.modes.values():
                    stack.enter_context(enter())
                given = dict(self.arguments)
                if isinstance(given.get("out"), Tensor):
                    given["out"] = given["out"].clone()
                y = FUNCTIONS[self.function](**given)
                results = [y]
                leaves = [*self.bank.parameters(), *self.arguments.values()]
                leaves = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
                if y.requires_grad and leaves:
                    gradients = torch.autograd.grad(
                        y, leaves, torch.ones_like(y), allow_unused=True
                    )
                    results += [gradient for gradient in gradients if gradient is not None]
        except Exception as error:
            return type(error), str(error)
        return [described(result) for result in results]

    def in_its_modes(self, function):
        with ExitStack() as stack:
            for enter in self.modes.values():
                stack.enter_context(enter())
            return function()

    def key(self) -> tuple | None:
        """Under which the plan of this call is kept, and in whose plans; None where it is checked.

        As ``_prepared`` has it.
        """
        given, base = self.arguments, None
        x, bank, routing = given.get("h", given.get("x")), given["bank"], given["routing"]
        place = {name: given[name] for name in PLACE if name in given}
        if not routed.is_plain_eager(x) or MaskPlace(**place) != MaskPlace():
            return None
        if not (isinstance(bank, AdapterBank) and isinstance(routing, Routing)):
            return None
        if routing.slots is not bank.slots:
            return None
        version = bank.version_for(routing.pinned, routing.trained_slots(), routing.capacity)
        if alone := self.function != "routed_lora_linear":
            of_h = bank.dtype if self.function == "routed_expand" else None
        else:
            base, of_h = base_of(given["weight"]), None
        bias, seed, backend = given.get("bias"), given.get("seed"), given["backend"]
        device = None if routing.pinned is None else bank.device
        key = routed._key_of(x, base, bias, routing, seed, backend, alone, of_h, device)
        return None if key is None else (version.plans, key)

    def verdict(self):
        """What the full check says and what is chosen; or the error."""
        given, layer, of_h = self.arguments, None, None
        x, bank, routing = given.get("h", given.get("x")), given["bank"], given["routing"]
        try:
            if self.function == "routed_expand":
                of_h = bank.dtype
                routed.check_h(x, bank, routing)
            if self.function == "routed_lora_linear":
                layer = base_of(given["weight"]), given["bias"]
            place = MaskPlace(*(given.get(name, default) for name, default in PLACE.items()))
            routed._check(x, bank, routing, given.get("seed"), place, layer, of_h)
            return dispatch.choose(given["backend"], x.device, x.dtype)
        except Exception as error:
            return type(error), str(error)


PLACE = {"row_offset": 0, "column_offset": 0, "pitch": None}


def described(result: Tensor) -> tuple:
    kind = type(result).__name__, result.dtype, result.shape, result.requires_grad
    if result.is_meta or isinstance(result, torch._subclasses.FakeTensor):
        return kind
    values = result.detach().as_subclass(Tensor).clone(memory_format=torch.contiguous_format)
    return *kind, bytes(values.view(-1).view(torch.uint8).tolist())


# --- what may change -------------------------------------------------------------------------


def of_argument(name: str, make):
    def change(world: World) -> None:
        if name in world.arguments:
            world.replace(name, make)

    return change


def of_bank(act):
    """Where it is one: another change may have put something else there."""

    def change(world: World) -> None:
        if isinstance(world.arguments["bank"], AdapterBank):
            act(world, world.arguments["bank"])

    return change


def of_routing(act):
    def change(world: World) -> None:
        if isinstance(world.arguments["routing"], Routing):
            act(world, world.arguments["routing"])

    return change


def put(**arguments):
    """Arguments that the function has, given the world or as they are."""

    def change(world: World) -> None:
        for name, value in arguments.items():
            world.arguments[name] = value(world) if callable(value) else value

    return change


def mode(enter):
    return lambda world: world.modes.update({str(len(world.modes)): enter})


def add_another(world: World, bank: AdapterBank) -> None:
    if "new" not in bank:
        bank.add("new", world.draw(4, bank.in_features), world.draw(N, 4), -1.0)


def remove(name: str):
    return of_bank(lambda world, bank: bank.remove(name) if name in bank else None)


def swap_data(change):
    def act(world: World, bank: AdapterBank) -> None:
        for parameter in bank.parameters():
            parameter.data = change(parameter.data)

    return of_bank(act)


def set_adapter(**attributes):
    def act(world: World, bank: AdapterBank) -> None:
        for name in bank:
            for attribute, value in attributes.items():
                setattr(bank[name], attribute, value)

    return of_bank(act)


class Named(Tensor):
    """A class that only extends Tensor."""


TENSOR_CHANGES = {
    **{kind: make for kind, make in TENSORS.items() if kind not in UNCHECKED},
    "as many rows as there is room": lambda t: t.new_ones(ROOM, *t.shape[1:]),
    "in two dimensions": lambda t: t.unflatten(0, (1, -1)),
}
CHANGES = {
    f"{name} {kind}": of_argument(name, make)
    for name in ("x", "h", "weight", "bias")
    for kind, make in TENSOR_CHANGES.items()
}
CHANGES |= {
    f"weight as a value, {kind}": of_argument(
        "weight", lambda t, k=kind: DenseWeight(TENSORS[k](t))
    )
    for kind in ("fp32", "bf16", "a row less", "trained", "meta", "list", "None", "sparse")
}
CHANGES |= {
    "padded weight": of_argument("weight", PaddedWeight.of),
    "padded weight, a row less": of_argument("weight", lambda t: PaddedWeight.of(t[1:])),
    "weight a module": of_argument("weight", lambda t: torch.nn.Linear(K, N)),
}
CHANGES |= {
    f"seed {kind}": of_argument("seed", lambda _, seed=seed: seed)
    for kind, seed in {
        "none": None, "0-d": torch.tensor(3), "number": 3, "True": True, "text": "3",
        "int32": torch.tensor(3, dtype=torch.int32), "fp32": torch.tensor(3.0),
        "one element": torch.tensor([3]), "meta": torch.tensor(3).to("meta"),
        "derived": torch.tensor(3).as_subclass(Named),
    }.items()
}  # fmt: skip
CHANGES |= {
    f"backend {backend}": put(backend=backend)
    for backend in (*dispatch.BACKENDS, "auto", "cuda", None, 3, ["auto"], ("auto",))
}
CHANGES |= {
    f"{name} {value}": put(**{name: value})
    for name, values in {
        "row_offset": (0, 3, -1, True, 1.0, None), "column_offset": (0, 8, 4), "pitch": (K, 16, 3),
    }.items()
    for value in values
}  # fmt: skip
CHANGES |= {
    "routing of other tokens": of_routing(lambda _, routing: routing.set_tokens_([1, 1, 1, -1, 0])),
    "routing of fewer tokens": of_routing(lambda _, routing: routing.set_tokens_([0, 1, 1])),
    "routing full": of_routing(lambda _, routing: routing.set_tokens_([0, 1, 1] * 3)),
    "routing of no adapter": of_routing(lambda _, routing: routing.set_tokens_([-1] * ROWS)),
    "routing with more room": put(routing=lambda w: Routing.empty(12, w.bank)),
    "routing without more room": put(routing=lambda w: Routing.from_tokens([0] * ROWS, w.bank)),
    "routing of another bank": put(
        routing=lambda w: Routing.from_tokens([0] * ROWS, w.bank_of(AdapterSlots(4)))
    ),
    "routing on meta": put(routing=lambda w: Routing.empty(ROWS, w.bank, device="meta")),
    "routing of pairs": put(
        routing=lambda w: Routing.from_weighted([[0, 1]] * ROWS, [[0.5, 2.0]] * ROWS, w.bank)
    ),
    "routing with bounds": put(
        routing=lambda w: Routing.from_tokens([0] * ROWS, w.bank, adapters=["a"])
    ),
    "routing a tensor": put(routing=lambda w: torch.zeros(ROWS)),
    "routing pinned": of_routing(
        lambda w, routing: w.arguments.update(routing=routing.at(w.bank.slots.current))
    ),
    "bank a dict": put(bank=lambda w: {}),
    "bank of the same slots": put(bank=lambda w: w.bank_of(w.bank.slots)),
    "bank of the same slots, wider": put(bank=lambda w: w.bank_of(w.bank.slots, columns=K + 1)),
    "bank of the same slots, fp64": put(
        bank=lambda w: w.bank_of(w.bank.slots, dtype=torch.float64)
    ),
    "bank of other slots": put(bank=lambda w: w.bank_of(AdapterSlots(4))),
    "adapter added": of_bank(add_another),
    "adapter removed": remove("a"),
    "other adapter removed": remove("b"),
    "adapter replaced": of_bank(
        lambda w, bank: bank.remove("a") if "a" not in bank else
        (bank.remove("a"), bank.add("a", w.draw(5, bank.in_features), w.draw(N, 5), 1.0))
    ),
    "scaling": set_adapter(scaling=3.0),
    "dropout on": set_adapter(dropout_p=0.5),
    "dropout off": set_adapter(dropout_p=0.0),
    "evaluation": of_bank(lambda _, bank: bank.eval()),
    "training": of_bank(lambda _, bank: bank.train()),
    "trained": of_bank(lambda _, bank: bank.requires_grad_()),
    "frozen": of_bank(lambda _, bank: bank.requires_grad_(False)),
    "bank to bf16": of_bank(lambda _, bank: bank.to(torch.bfloat16)),
    "bank to fp64": of_bank(lambda _, bank: bank.double()),
    "bank to meta": of_bank(lambda _, bank: bank.to("meta")),
    "data in other memory": swap_data(lambda data: 2 * data),
    "data of another dtype": swap_data(lambda data: data.to(torch.float16)),
    "no_grad": mode(torch.no_grad),
    "enable_grad": mode(torch.enable_grad),
    "inference": mode(torch.inference_mode),
    "autocast": mode(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "forward AD": mode(forward_ad.dual_level),
}  # fmt: skip
OF_EXPAND = {
    "dtype bf16": put(dtype=torch.bfloat16),
    "dtype fp64": put(dtype=torch.float64),
    "dtype int": put(dtype=torch.int32),
    "out": put(out=lambda w: torch.ones(ROWS, N)),
}
OF_LORA = {
    "out": put(out=lambda w: torch.ones(ROWS, N)),
    "out too wide": put(out=lambda w: torch.ones(ROWS, N + 1)),
    "out bf16": put(out=lambda w: torch.ones(ROWS, N, dtype=torch.bfloat16)),
}


def changes_of(function: str) -> dict:
    found = CHANGES
    if function == "routed_expand":
        found = {k: v for k, v in found.items() if not k.startswith(tuple(PLACE))} | OF_EXPAND
    return found | OF_LORA if function == "routed_lora" else found


class NotPossible(Exception):
    """A change that cannot be made of what there is by now."""


def apply(world: World, change: str) -> None:
    try:
        changes_of(world.function)[change](world)
    except Exception as error:
        raise NotPossible(change) from error


def same_key(one: tuple | None, other: tuple | None) -> bool:
    return None not in (one, other) and one[0] is other[0] and one[1] == other[1]


def hidden_by_the_key(change: str, *options) -> str | None:
    """What the key of a changed call does not tell, if it is that of the valid call."""
    world = World(*options)
    known, valid = world.key(), world.verdict()
    assert known is not None and valid.backend in ("native", "composed")
    try:
        apply(world, change)
    except NotPossible:
        return None
    try:
        key = world.in_its_modes(world.key)
    except Exception:  # the bank is broken, or the call is no call: it raises before any plan
        return None
    verdict = world.in_its_modes(world.verdict)
    if not same_key(known, key) or verdict == valid:
        return None
    return f"{change}: {verdict}"


KINDS = [(function, False, 0.0) for function in FUNCTIONS] + [
    ("routed_lora_linear", True, 0.25), ("routed_lora", False, 0.25),
]  # fmt: skip


def test_the_changes_are_right_and_wrong():
    """What follows would hold of changes that nobody minds, or that cannot be made."""
    refused, accepted, total = set(), 0, 0
    for function in FUNCTIONS:
        for change in changes_of(function):
            world = World(function)
            try:
                apply(world, change)
            except NotPossible:
                continue
            total += 1
            verdict = world.in_its_modes(world.verdict)
            if isinstance(verdict[0], type):
                refused.add(verdict)
            else:
                accepted += 1
    assert total > 600 and accepted > 300 and len(refused) > 60
    named = {message.partition(":")[0] for _, message in refused}
    assert named >= {"x", "h", "weight", "bias", "seed", "backend", "bank", "routing", *PLACE}


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_changed_verdict_is_another_key(options):
    hidden = [hidden_by_the_key(change, *options) for change in changes_of(options[0])]
    assert not any(hidden), [each for each in hidden if each]


def differs_once_known(changes: list[str], *options) -> str | None:
    """The first of these changes, made one after the other, after which a call that follows others
    does not end as one on a bank that has never been called."""
    known = World(*options)
    assert isinstance(known.call(), list) and known.key()[0]
    for count, change in enumerate(changes, 1):
        fresh = World(*options)
        try:
            apply(known, change)
            for each in changes[:count]:
                apply(fresh, each)
        except NotPossible:
            return None
        for _ in range(2):
            got, expected = known.call(), fresh.call()
            if got != expected:
                return f"{change}: {got}, and of a fresh bank {expected}"
    return None


@pytest.mark.parametrize("pinned", [False, True], ids=["", "pinned"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_changed_call_ends_as_on_a_fresh_bank(options, pinned):
    """Also in a batch that reads the version that it began with."""
    before = ["routing pinned"] if pinned else []
    found = (differs_once_known([*before, change], *options) for change in changes_of(options[0]))
    assert [each for each in found if each] == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_bank_that_moves_between_check_and_call(function, monkeypatch):
    """What was checked of one version is not kept with the next."""
    world, check = World(function), routed._check

    def then_move(*arguments):
        check(*arguments)
        world.bank.to("meta")

    with monkeypatch.context() as patched:
        patched.setattr(routed, "_check", then_move)
        patched.setattr(routed.op, "run", lambda name, call: torch.zeros(()))
        world.call()
    assert world.call() == (ValueError, "bank: expected x's device cpu, got meta")


@settings(
    max_examples=400,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), function=st.sampled_from(list(FUNCTIONS)), trained=st.booleans())
def test_many_changes_end_as_on_a_fresh_bank(data, function, trained):
    names = list(changes_of(function))
    changes = data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=5))
    dropout = data.draw(st.sampled_from([0.0, 0.25]))
    assert differs_once_known(changes, function, trained, dropout) is None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_known_call_is_not_checked_again(function, monkeypatch):
    world = World(function)
    expected = world.call()
    for name in ("_check", "make_plan"):
        monkeypatch.setattr(routed, name, None)
    assert world.call() == expected
    if function != "routed_expand":  # leading dimensions and the tokens are no part of it
        world.replace("x", lambda x: x[None])
        world.routing.set_tokens_([1, 1, 0, -1, 1])
        assert world.call()[0][2] != expected[0][2] or function == "routed_shrink"


def test_versions_are_made_while_plans_are_forgotten():
    """Each has plans of its own, which must be found among all."""
    world, done, errors = World("routed_lora_linear"), threading.Event(), []

    def forget():
        try:
            while not done.is_set():
                forget_plans()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=forget)
        thread.start()
        for turn in range(1500):
            world.bank["a"].scaling = float(turn)
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not errors


# --- planted faults --------------------------------------------------------------------------


def hidden_changes() -> set[str]:
    return {
        change
        for options in KINDS
        for change in changes_of(options[0])
        if hidden_by_the_key(change, *options)
    }


@pytest.mark.parametrize(
    "fact, only, expected",
    [
        ("dtype", "x", {"x bf16", "x int32", "h bool"}),
        ("shape", "x", {"x a column less", "x one column"}),
        ("dtype", "others", {"weight bf16", "bias fp64"}),
        ("shape", "others", {"weight a row less", "bias a row less"}),
    ],
)
def test_a_fact_that_the_key_left_out_is_found(fact, only, expected, monkeypatch):
    monkeypatch.setattr(routed, "metadata_of", leaving_out(fact, only))
    assert expected <= hidden_changes()


@pytest.mark.parametrize(
    "part, expected",
    [(2, "padded weight, a row less"), (3, "routing on meta"), (4, "backend composed")],
    ids=["the weight's format", "routing's device", "backend"],
)
def test_a_part_that_the_key_left_out_is_found(part, expected, monkeypatch):
    whole = routed._key_of

    def key_of(*arguments):
        found = whole(*arguments)
        return found if found is None else (*found[:part], *found[part + 1 :])

    monkeypatch.setattr(routed, "_key_of", key_of)
    hidden = hidden_changes()
    if expected.startswith("padded"):  # of that weight, the format's integers
        world = World("routed_lora_linear")
        world.replace("weight", PaddedWeight.of)
        known, valid = world.key(), world.verdict()
        world.arguments["weight"] = PaddedWeight(world.arguments["weight"].tall, N - 1)
        assert same_key(known, world.key()) and world.verdict() != valid
    else:
        assert expected in hidden


class Anything:
    def __eq__(self, other) -> bool:
        return True

    __hash__ = None


def test_rows_that_the_key_left_out_are_found(monkeypatch):
    whole = routed._key_of

    def key_of(x, base, bias, routing, *others):
        like = SimpleNamespace(num_tokens=Anything(), max_tokens=0, device=routing.device)
        return whole(x, base, bias, like, *others)

    monkeypatch.setattr(routed, "_key_of", key_of)
    assert {"x a row less", "routing of fewer tokens"} <= hidden_changes()


def test_plans_that_outlive_their_version_are_found(monkeypatch):
    """As if they were the bank's."""
    shared, make = {}, BankVersion.__init__

    def init(version, bank, *arguments, **options):
        make(version, bank, *arguments, **options)
        version.plans = shared.setdefault(bank, version.plans)

    monkeypatch.setattr(BankVersion, "__init__", init)
    assert "bank to meta" in hidden_changes()


def test_a_fault_is_found_by_calls(monkeypatch):
    monkeypatch.setattr(routed, "metadata_of", leaving_out("dtype", "others"))
    assert differs_once_known(["bias bf16"], "routed_lora_linear") is not None
    with pytest.raises(AssertionError, match="of a fresh bank"):
        test_many_changes_end_as_on_a_fresh_bank()
