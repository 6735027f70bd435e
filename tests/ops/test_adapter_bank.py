"""AdapterSlots and AdapterBank: what lives where, through everything that moves a module."""

import copy
import gc
import io
import pickle
from itertools import pairwise

import pytest
import torch
from gemm_that_reads_gaps import gemm_that_reads_gaps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_kernels.ops.routed import AdapterBank, AdapterSlots, Routing, routed_lora

K, N = 21, 17
SLICES = (5, 7, 11)
RANKS = {"a": 3, "b": 1, "c": 8}
SLICED_RANKS = {"a": (3, 0, 2), "b": (0, 1, 0), "c": (4, 4, 4)}


def factors(rank: int, width: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, K), torch.randn(width, rank)


def add(bank: AdapterBank, name: str, rank, scaling: float = 0.5, **options):
    if isinstance(rank, int):
        return bank.add(name, *factors(rank), scaling, **options)
    pairs = [
        factors(r, width) if r else (None, None) for r, width in zip(rank, SLICES, strict=True)
    ]
    return bank.add(name, *map(list, zip(*pairs, strict=True)), scaling, **options)


def filled(sliced: bool = False, **options) -> AdapterBank:
    bank = AdapterBank(K, SLICES if sliced else N, **options)
    for index, (name, rank) in enumerate((SLICED_RANKS if sliced else RANKS).items()):
        add(bank, name, rank, 0.5 + index)
    return bank


def definition(bank: AdapterBank, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Row by row from the parameters and scalings as a user reads them."""
    rows = []
    for row, name in zip(x.double(), names, strict=True):
        if name not in bank:
            rows.append(torch.zeros(bank.out_features, dtype=torch.float64))
            continue
        adapter, parts = bank[name], []
        for pair, width in zip(adapter.factors(), bank.slice_widths, strict=True):
            if pair is None:
                parts.append(torch.zeros(width, dtype=torch.float64))
            else:
                a, b = (p.detach().double() for p in pair)
                parts.append(adapter.scaling.double() * (b @ (a @ row)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def assert_sound(bank: AdapterBank) -> None:
    """Every parameter is a slab of its region, the slabs are apart, and the bank computes them."""
    fields = bank.tensors()
    assert fields.storage.dtype == bank.dtype and fields.storage.device == bank.device
    inside = [(f.data_ptr(), f.data_ptr() + f.numel() * f.itemsize) for f in fields.factors]
    regions = []
    for parameter in bank.parameters():
        assert type(parameter) is nn.Parameter and parameter.is_contiguous() and parameter.is_leaf
        start = parameter.data_ptr()
        regions.append((start, start + parameter.numel() * parameter.itemsize))
        first, last = regions[-1]
        assert any(start <= first and last <= end for start, end in inside)
    regions.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(regions))
    for adapter in bank.adapters.values():
        assert adapter.factors()[0] is None or adapter.factors()[0][0].data_ptr() % 64 == 0
    names = [*bank, "__base__", *reversed(list(bank))]
    x = torch.randn(len(names), K, dtype=bank.dtype)
    routing = Routing.from_sequences(names, 1, bank)
    expected = definition(bank, x, names)
    slack = 8 * torch.finfo(bank.dtype).eps * max(1.0, expected.abs().max().item())
    for backend in ("reference", "composed"):
        with torch.no_grad():
            y = routed_lora(x, bank, routing, backend=backend)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=8 * slack)
    y = routed_lora(x, bank, routing)
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, list(bank.parameters()), dy)
    mask = {name: [n == name for n in names] for name in bank}
    by_name = dict(zip((n for n, _ in bank.named_parameters()), gradients, strict=True))
    for name, adapter in bank.adapters.items():
        pairs, start = adapter.factors(), 0
        for s, (pair, width) in enumerate(zip(pairs, bank.slice_widths, strict=True)):
            columns, start = slice(start, start + width), start + width
            if pair is None:
                continue
            suffix = "" if len(pairs) == 1 else f"_{s}"
            rows, wide = x[mask[name]].double(), dy[mask[name]][:, columns].double()
            a, b = (p.detach().double() for p in pair)
            expected = adapter.scaling.double() * wide.T @ (rows @ a.T)
            ours = by_name[f"adapters.{name}.lora_b{suffix}"].double()
            torch.testing.assert_close(ours, expected, rtol=0, atol=64 * slack)
            expected = adapter.scaling.double() * (wide @ b).T @ rows
            ours = by_name[f"adapters.{name}.lora_a{suffix}"].double()
            torch.testing.assert_close(ours, expected, rtol=0, atol=64 * slack)


def values(bank: AdapterBank) -> dict[str, torch.Tensor]:
    state = {name: p.detach().clone() for name, p in bank.named_parameters()}
    return {**state, **{name: bank[name].scaling.clone() for name in bank}}


def assert_same_values(actual: dict, expected: dict, names=None) -> None:
    assert names is not None or actual.keys() == expected.keys()
    for name in names or expected:
        assert torch.equal(actual[name], expected[name]), name


both = pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])

# --- slots ------------------------------------------------------------------------------------


def test_slots_are_stable_and_reused_after_removal():
    bank = filled()
    slots = bank.slots
    assert [slots[name] for name in "abc"] == [0, 1, 2] and slots["__base__"] == -1
    version = slots.version
    add(bank, "d", 2)
    assert slots["d"] == 3 and slots.version == version, "nobody's slot has changed its meaning"
    bank.remove("b")
    assert "b" not in slots and slots.version != version and [slots[n] for n in "acd"] == [0, 2, 3]
    version = slots.version
    add(bank, "e", 5)
    assert slots["e"] == 1 and slots.version == version
    assert list(slots) == ["a", "e", "c", "d"] and len(slots) == 4
    assert slots.is_live(1) and not slots.is_live(4) and not slots.is_live(-1)
    with pytest.raises(KeyError, match="no adapter 'b'; there are"):
        slots["b"]


def test_a_slot_is_free_when_the_last_bank_has_removed_its_name():
    slots = AdapterSlots()
    one, other = filled(slots=slots), filled(slots=slots)
    version = slots.version
    one.remove("a")
    assert slots["a"] == 0 and slots.version == version
    other.remove("a")
    assert "a" not in slots and slots.version != version
    assert_sound(one)
    assert_sound(other)


def test_a_bank_that_is_gone_holds_no_slot():
    slots = AdapterSlots()
    one, other = filled(slots=slots), filled(slots=slots)
    del other
    gc.collect()
    one.remove("a")
    assert "a" not in slots


@both
def test_slots_grow_and_every_bank_follows(sliced):
    slots = AdapterSlots(capacity=2)
    one = AdapterBank(K, SLICES if sliced else N, slots=slots)
    other = AdapterBank(K, SLICES if sliced else N, slots=slots)
    ranks = SLICED_RANKS if sliced else RANKS
    for name in ("a", "b"):
        add(one, name, ranks[name], 1.5)
        add(other, name, ranks[name], -0.5)
    version = slots.version
    add(one, "c", ranks["c"], 2.5)
    assert slots.capacity == 4 and slots.version == version and slots["c"] == 2
    assert [one[name].scaling.item() for name in "abc"] == [1.5, 1.5, 2.5]
    assert [other[name].scaling.item() for name in "ab"] == [-0.5, -0.5]
    assert_sound(one)
    assert_sound(other)
    other["a"].scaling = 3.0
    assert_sound(other)


def test_a_name_that_one_bank_lacks_is_the_base_there():
    slots = AdapterSlots()
    one, other = filled(slots=slots), AdapterBank(K, N, slots=slots)
    add(other, "d", 4)
    add(other, "b", 2)
    names = ["a", "d", "b", "__base__", "c"]
    routing, x = Routing.from_sequences(names, 1, one), torch.randn(5, K)
    for bank in (one, other):
        for backend in ("reference", "composed"):
            y = routed_lora(x, bank, routing, backend=backend).detach()
            expected = definition(bank, x, names)
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
            absent = [name not in bank for name in names]
            assert not y[absent].any()


def test_slots_survive_pickling_and_deepcopy():
    slots = filled().slots
    for again in (copy.deepcopy(slots), pickle.loads(pickle.dumps(slots))):
        assert list(again) == ["a", "b", "c"] and again.capacity == slots.capacity
        bank = AdapterBank(K, N, slots=again)
        assert add(bank, "d", 2).slot == 3 and "d" not in slots


# --- binding ----------------------------------------------------------------------------------


@both
def test_growth_keeps_the_parameters(sliced):
    bank = filled(sliced)
    expected, identity = values(bank), {n: id(p) for n, p in bank.named_parameters()}
    bank["a"].factors()[0][0].grad = torch.ones_like(bank["a"].factors()[0][0])
    for index in range(12):
        add(bank, f"more{index}", (index, 1, 40) if sliced else 10 + index)
    assert_same_values(values(bank), expected, expected)
    assert identity.items() <= {n: id(p) for n, p in bank.named_parameters()}.items()
    assert bank["a"].factors()[0][0].grad.all()
    assert_sound(bank)


@both
def test_nothing_live_moves(sliced):
    bank = filled(sliced)
    ranks = SLICED_RANKS if sliced else RANKS
    where = {n: p.data_ptr() for n, p in bank.named_parameters()}
    expected = values(bank)
    removed = bank.remove("a")
    add(bank, "d", ranks["a"])
    for name, parameter in bank.named_parameters():
        assert name.startswith("adapters.d") or parameter.data_ptr() == where[name]
    assert_same_values(values(bank), expected, [n for n in expected if n.startswith("adapters.b")])
    assert_sound(bank)
    kept = {f"adapters.a.{n}": p.detach() for n, p in removed.named_parameters()}
    assert_same_values(kept, expected, kept)
    assert removed.scaling.item() == 0.5
    removed.scaling = 4.0
    assert bank["d"].scaling.item() == 0.5


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_to_dtype(sliced, dtype):
    bank = filled(sliced)
    expected, identity = values(bank), {n: id(p) for n, p in bank.named_parameters()}
    assert bank.to(dtype) is bank and bank.dtype == dtype
    assert {n: id(p) for n, p in bank.named_parameters()} == identity, "optimizers hold them"
    for name, parameter in bank.named_parameters():
        assert torch.equal(parameter, expected[name].to(dtype))
    assert [bank[name].scaling.item() for name in bank] == [0.5, 1.5, 2.5]
    assert bank["a"].scaling.dtype == torch.float64, "a scaling is not rounded by a cast"
    bank["a"].scaling = 1 / 3
    assert bank["a"].scaling.item() == 1 / 3, "nor where it is set"
    assert_sound(bank)


def test_to_dtype_of_an_empty_bank_and_inside_a_model():
    model = nn.Sequential(nn.Linear(3, 3), AdapterBank(K, N))
    model.to(torch.bfloat16)
    assert add(model[1], "a", 3).lora_a.dtype == torch.bfloat16
    assert_sound(model[1])


@both
def test_to_empty_and_load(sliced):
    bank = filled(sliced)
    state, expected = copy.deepcopy(bank.state_dict()), values(bank)
    bank.to_empty(device="cpu")
    bank.load_state_dict(state)
    assert_same_values(values(bank), expected)
    assert_sound(bank)


@both
@pytest.mark.parametrize("assign", [False, True])
def test_from_meta_to_a_device(sliced, assign):
    real = filled(sliced)
    with torch.device("meta"):
        bank = filled(sliced)
    assert bank.device.type == "meta" and all(p.is_meta for p in bank.parameters())
    if not assign:
        bank.to_empty(device="cpu")
    bank.load_state_dict(real.state_dict(), assign=assign)
    for index, name in enumerate(bank):
        bank[name].scaling = 0.5 + index
    assert_same_values(values(bank), values(real))
    assert_sound(bank)


@both
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch_save"])
def test_copies_are_whole_and_apart(sliced, how):
    bank = filled(sliced)
    bank["b"].dropout_p = 0.25
    bank["c"].eval()
    if how == "deepcopy":
        again = copy.deepcopy(bank)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(bank))
    else:
        file = io.BytesIO()
        torch.save(bank, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    expected = values(bank)
    assert_same_values(values(again), expected)
    assert [again[name].slot for name in again] == [0, 1, 2] and list(again.slots) == list("abc")
    assert again["b"].dropout_p == 0.25 and not again["c"].training and again["a"].training
    again.eval()
    assert_sound(again)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    for name in again:
        again[name].scaling = -3.0
    assert_sound(again)
    assert_same_values(values(bank), expected)
    add(again, "d", SLICED_RANKS["a"] if sliced else 2)
    again.remove("b")
    assert_sound(again)
    assert "d" not in bank.slots and "b" in bank.slots


def test_a_model_of_banks_that_share_slots_is_copied_as_one():
    slots = AdapterSlots()
    model = nn.ModuleList([filled(slots=slots), filled(slots=slots)])
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again[0].slots is again[1].slots is not slots
        again[0].remove("a")
        assert again[0].slots["a"] == 0, "the other bank has it"
        again[1].remove("a")
        assert "a" not in again[0].slots and "a" in slots
        routing, x = Routing.from_sequences(["b", "c"], 2, again[0]), torch.randn(4, K)
        for bank in again:
            expected = definition(bank, x, ["b", "b", "c", "c"])
            y = routed_lora(x, bank, routing).detach().double()
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True], ids=["", "in_a_model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dicts(sliced, assign, nested, dtype):
    bank, other = filled(sliced), filled(sliced)
    source, target = (nn.ModuleDict({"bank": bank}), nn.ModuleDict({"bank": other}))
    state = {n: t.to(dtype) for n, t in (source if nested else bank).state_dict().items()}
    prefix = "bank." if nested else ""
    assert set(state) == {prefix + n for n, _ in bank.named_parameters()}
    identity = {n: id(p) for n, p in other.named_parameters()}
    (target if nested else other).load_state_dict(state, assign=assign)
    assert other.dtype == (dtype if assign else torch.float32)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, state[prefix + name].to(other.dtype))
        assert assign or id(parameter) == identity[name]
    assert_sound(other)
    with torch.no_grad():
        other["c"].factors()[0][0].mul_(2)
    assert_sound(other)


def test_parameters_keep_requires_grad():
    bank = filled()
    bank["a"].requires_grad_(False)
    bank["b"].lora_b.requires_grad_(False)
    for moved in (bank.to(torch.float64), copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        add(moved, "d", 50)
        flags = {n: p.requires_grad for n, p in moved.named_parameters()}
        assert [n for n, flag in flags.items() if not flag] == [
            "adapters.a.lora_a", "adapters.a.lora_b", "adapters.b.lora_b",
        ]  # fmt: skip
        moved.remove("d")


def test_data_that_was_replaced_is_bound_again():
    bank = filled()
    new = torch.randn_like(bank["b"].lora_a)
    bank["b"].lora_a.data = new.clone()
    assert_sound(bank)
    assert torch.equal(bank["b"].lora_a, new)


def test_data_of_two_adapters_can_be_swapped():
    bank = filled()
    add(bank, "d", 3)
    one, other = bank["a"].lora_a, bank["d"].lora_a
    expected = other.detach().clone(), one.detach().clone()
    one.data, other.data = other.data, one.data
    assert_sound(bank)
    assert torch.equal(one, expected[0]) and torch.equal(other, expected[1])


@settings(max_examples=40)
@given(data=st.data(), sliced=st.booleans())
def test_any_history(data, sliced):
    """Adding, removing, growing and casting in any order: values stay, slabs are apart."""
    # Captured graphs read tables of a fixed size, so a bank reserved for them has room for all.
    actions = ["add", "add", "remove", "copy", "cast"]
    reserves = data.draw(st.booleans())
    actions += ["reserve"] if reserves else []
    slots = AdapterSlots(capacity=16 if reserves else 2)
    bank = AdapterBank(K, SLICES if sliced else N, slots=slots)
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for step in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(actions))
        if action == "add":
            rank = st.integers(1, 12)
            if sliced:
                rank = st.tuples(*[st.integers(0, 5)] * 3).filter(any)
            adapter = add(bank, f"n{step}", data.draw(rank), scaling=step - 3.0)
            expected[f"n{step}"] = {n: p.detach().clone() for n, p in adapter.named_parameters()}
        elif action == "remove" and expected:
            name = data.draw(st.sampled_from(sorted(expected)))
            bank.remove(name)
            del expected[name]
        elif action == "copy":
            bank = copy.deepcopy(bank)
        elif action == "cast":
            bank = bank.to(data.draw(st.sampled_from([torch.float32, torch.float64])))
        elif action == "reserve":
            bank.reserve(sum(a.rank for a in bank.adapters.values()) + 200)
    assert set(bank) == set(expected)
    for name, factors_of_it in expected.items():
        assert bank[name].scaling.item() == int(name[1:]) - 3.0
        for key, parameter in bank[name].named_parameters():
            assert torch.equal(parameter.float(), factors_of_it[key])
    if expected:
        assert_sound(bank)


# --- capacity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["none", "grown", "moved", "copied"])
def test_what_lies_behind_a_factor_is_zero(change):
    """So that a vendor's GEMM which reads on there (oneDNN on AMX) multiplies nothing by NaN."""
    bank = AdapterBank(K, SLICES, dtype=torch.bfloat16)
    add(bank, "gone", (3, 1, 3))
    for parameter in bank.parameters():
        parameter.data.fill_(torch.nan)
    bank.reserve(200)
    bank.tensors().storage.fill_(torch.nan)  # as memory may be that nobody has written
    bank.remove("gone")
    gc.collect()
    add(bank, "here", (1, 2, 3))
    if change == "grown":
        add(bank, "wide", (8, 8, 8))
    elif change == "moved":
        bank.to(torch.float64).to(torch.bfloat16)
    elif change == "copied":
        bank = copy.deepcopy(bank)
    with gemm_that_reads_gaps():
        for name in bank:
            for lora_a, lora_b in bank[name].factors():
                for left, right in ((lora_b, lora_a), (lora_a, lora_a.t())):
                    assert (left.detach() @ right.detach()).isfinite().all()


@settings(max_examples=40)
@given(ranks=st.lists(st.integers(1, 9), min_size=1, max_size=8), sliced=st.booleans())
def test_reserved_storage_takes_what_was_promised_and_does_not_move(ranks, sliced):
    bank = AdapterBank(K, SLICES if sliced else N, rank_capacity=sum(ranks))
    where = bank.tensors().storage.data_ptr()
    for index, rank in enumerate(ranks):
        split = (rank // 3, rank - 2 * (rank // 3), rank // 3)
        add(bank, f"n{index}", split if sliced else rank)
        assert bank.tensors().storage.data_ptr() == where
    assert_sound(bank)


def test_full_storage_says_so_and_stays_as_it_was():
    bank = AdapterBank(K, N, rank_capacity=8, max_rank=64)
    add(bank, "a", 8)
    before, where = values(bank), bank.tensors().storage.data_ptr()
    version, names = bank.slots.version, list(bank.slots)
    with pytest.raises(
        RuntimeError, match=r"do not fit in what rank_capacity reserved.*reserve\(\)"
    ):
        add(bank, "b", 64)
    assert bank.tensors().storage.data_ptr() == where and list(bank) == ["a"]
    assert bank.slots.version == version and list(bank.slots) == names
    assert_same_values(values(bank), before)
    bank.reserve(72)
    add(bank, "b", 64)
    assert_same_values(values(bank), before, before)
    assert_sound(bank)


def state_of(bank: AdapterBank) -> tuple:
    current = bank.slots.current
    return list(bank), list(bank.slots), current, current.of(bank), [*bank.adapters._modules]


REFUSED = {
    "name_type": ({"name": 3}, TypeError, "name: expected a string, got int"),
    "name_empty": ({"name": ""}, ValueError, "name: expected one that is not empty"),
    "name_base": ({"name": "__base__"}, ValueError, "name: expected one that is not empty"),
    "name_method": ({"name": "keys"}, ValueError, "name: expected one that is not empty"),
    "name_attribute": ({"name": "training"}, ValueError, "name: expected one that is not empty"),
    "name_private": ({"name": "_modules"}, ValueError, "name: expected one that is not empty"),
    "name_twice": ({"name": "a"}, ValueError, "there is an adapter 'a' already"),
    "lora_a_list": ({"lora_a": [[1.0]]}, (TypeError, ValueError), "lora_a: expected"),
    "lora_a_none": ({"lora_a": None}, TypeError, "lora_a: expected a tensor"),
    "lora_a_shape": ({"lora_a": torch.randn(2, K + 1)}, ValueError, "lora_a: expected [rank >= 1"),
    "lora_a_rank_0": (
        {"lora_a": torch.randn(0, K), "lora_b": torch.randn(N, 0)}, ValueError, "rank >= 1",
    ),
    "lora_a_1d": ({"lora_a": torch.randn(K)}, ValueError, "lora_a: expected [rank >= 1"),
    "lora_a_dtype": ({"lora_a": torch.ones(2, K).int()}, TypeError, "lora_a: expected a tensor of"),
    "lora_a_meta": ({"lora_a": torch.randn(2, K, device="meta")}, ValueError, "lora_a: expected"),
    "lora_a_sparse": ({"lora_a": torch.randn(2, K).to_sparse()}, TypeError, "lora_a: expected"),
    "lora_b_none": ({"lora_b": None}, (TypeError, ValueError), "lora_b"),
    "lora_b_shape": ({"lora_b": torch.randn(N, 3)}, ValueError, "lora_b: expected [17, 2] to"),
    "lora_b_transposed": ({"lora_b": torch.randn(2, N)}, ValueError, "lora_b: expected [17, 2]"),
    "scaling_string": ({"scaling": "1"}, TypeError, "scaling: expected a number"),
    "scaling_bool": ({"scaling": True}, TypeError, "scaling: expected a number"),
    "scaling_vector": ({"scaling": torch.ones(2)}, ValueError, "scaling: expected a number or a"),
    "scaling_trains": (
        {"scaling": torch.tensor(1.0, requires_grad=True)}, ValueError, "without gradient",
    ),
    "scaling_complex": ({"scaling": torch.tensor(1j)}, ValueError, "real 0-d tensor"),
    "scaling_meta": ({"scaling": torch.tensor(1.0, device="meta")}, ValueError, "scaling"),
    "dropout_one": ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a probability"),
    "dropout_nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p: expected a probability"),
    "dropout_string": ({"dropout_p": "0"}, TypeError, "dropout_p: expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_add_changes_nothing(case):
    changes, error, message = REFUSED[case]
    bank = filled()
    state, expected = state_of(bank), values(bank)
    a, b = factors(2)
    given = {"name": "new", "lora_a": a, "lora_b": b, "scaling": 1.0, **changes}
    try:
        with pytest.raises(error) as raised:
            bank.add(**given)
        assert message in str(raised.value)
    finally:
        assert state_of(bank) == state, "the bank has changed"
    assert_same_values(values(bank), expected)
    assert_sound(bank)


def test_a_captured_width_does_not_change():
    """h has as many columns as the bank reserved: a graph captured with it must stay right."""
    bank = AdapterBank(K, N, rank_capacity=12, max_rank=5)
    assert bank.tensors().max_total_rank == 5
    bank.add("a", torch.randn(2, K), torch.randn(N, 2), 1.0)
    bank.add("b", torch.randn(5, K), torch.randn(N, 5), 1.0)
    assert bank.tensors().max_total_rank == 5
    with pytest.raises(RuntimeError, match="rank 6 is above max_rank 5"):
        bank.add("c", torch.randn(6, K), torch.randn(N, 6), 1.0)
    assert list(bank) == ["a", "b"] and "c" not in bank.slots
    with pytest.raises(ValueError, match="max_rank: expected at least 5"):
        bank.reserve(20, 4)
    bank.reserve(20, 6)
    bank.add("c", torch.randn(6, K), torch.randn(N, 6), 1.0)
    x = torch.randn(4, K)
    routing = Routing.from_tokens([2, 1, -1, 0], bank)
    y = routed_lora(x, bank, routing)
    for row, name in ((0, "c"), (1, "b"), (3, "a")):
        expected = bank[name].lora_b @ (bank[name].lora_a @ x[row])
        torch.testing.assert_close(y[row], expected, rtol=1e-5, atol=1e-5)


def test_reserved_for_the_sum_of_ranks_unless_told():
    assert AdapterBank(K, N, rank_capacity=12).tensors().max_total_rank == 12
    with pytest.raises(ValueError, match="max_rank: expected None without rank_capacity"):
        AdapterBank(K, N, max_rank=3)


@pytest.mark.parametrize("out_features", [4.0, True, None, "4"])
def test_out_features_that_are_no_number_and_no_list(out_features):
    with pytest.raises(TypeError, match="out_features: expected an integer, got"):
        AdapterBank(K, out_features)
