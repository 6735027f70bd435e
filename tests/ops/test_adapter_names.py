"""Names of adapters as they come: with dots, and with what stands for a dot in a state dict."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_kernels.ops.routed import AdapterBank, Routing, routed_lora
from lora_kernels.ops.routed.bank.adapters_by_name import key_of, name_of

K, N = 13, 11
KEYS = {
    "a.b": "a%2Eb",
    "org/model-v1.5": "org/model-v1%2E5",
    ".": "%2E",
    "a..b.": "a%2E%2Eb%2E",
    "a%2Eb": "a%252Eb",
    "a%252Eb": "a%25252Eb",
    "%.25": "%%2E25",
    # As before there were dots: their own keys.
    "sql": "sql",
    "100%": "100%",
    "50%2": "50%2",
}


@pytest.mark.parametrize(("name", "key"), KEYS.items(), ids=KEYS)
def test_keys(name, key):
    assert key_of(name) == key
    assert name_of(key) == name


@given(st.text("%25E.a", max_size=8), st.text("%25E.a", max_size=8))
def test_a_key_is_of_one_name(one, other):
    assert "." not in key_of(one)
    assert name_of(key_of(one)) == one
    assert (key_of(one) == key_of(other)) == (one == other)


def whole_numbers(*shape: int) -> torch.Tensor:
    """Of which products and sums are exact, in whatever order they come."""
    return torch.randint(-4, 5, shape).float()


def filled() -> AdapterBank:
    torch.manual_seed(3)
    bank = AdapterBank(K, N)
    for rank, name in enumerate(KEYS, 1):
        bank.add(name, whole_numbers(rank, K), whole_numbers(N, rank), 0.5 * rank)
    return bank


X = whole_numbers(len(KEYS), K)


def result(bank) -> torch.Tensor:
    return routed_lora(X, bank.eval(), Routing.from_sequences(list(KEYS), 1, bank))


def assert_serves_the_same(bank, original) -> None:
    assert list(bank) == list(original) == list(KEYS)
    assert torch.equal(result(bank), result(original))


def test_all_names_are_served():
    bank = filled()
    expected = [
        bank[name].scaling * x @ bank[name].lora_a.T @ bank[name].lora_b.T
        for x, name in zip(X, KEYS, strict=True)
    ]
    assert torch.equal(result(bank), torch.stack(expected))
    assert len(bank) == len(KEYS) and all(name in bank for name in KEYS)
    assert 3 not in bank and "a" not in bank and "a%2E%2Eb" not in bank
    with pytest.raises(KeyError, match=r"no adapter 'a\.c' in this bank"):
        bank["a.c"]
    with pytest.raises(ValueError, match=r"there is an adapter 'a\.b' already"):
        bank.add("a.b", torch.ones(1, K), torch.ones(N, 1), 1.0)


def test_the_state_dicts_keys():
    state = filled().state_dict()
    assert {key.split(".")[1] for key in state} == set(KEYS.values())
    assert all(key.count(".") == 2 for key in state)


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_goes_around(assign):
    bank, other = filled(), filled()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    assert not torch.equal(result(other), result(bank))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert_serves_the_same(other, bank)


def test_a_state_dict_from_before_there_were_dots():
    """Whose keys are the names as they stand."""
    bank = AdapterBank(K, N)
    names = [name for name, key in KEYS.items() if name == key]
    for name in names:
        bank.add(name, torch.zeros(2, K), torch.zeros(N, 2), 1.0)
    old = {}
    for place, name in enumerate(names, 1):
        for part in bank[name].state_dict():
            old[f"adapters.{name}.{part}"] = torch.full_like(bank[name].state_dict()[part], place)
    bank.load_state_dict(old)
    for place, name in enumerate(names, 1):
        assert (bank[name].lora_a == place).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_copies(copied):
    bank = filled()
    other = copied(bank)
    assert_serves_the_same(other, bank)
    other.remove("a.b")
    assert "a.b" in bank and "a.b" not in other and "a%2Eb" in other


def test_a_name_comes_and_goes():
    bank = filled()
    kept = {name: bank[name].lora_a.clone() for name in KEYS if name != "a.b"}
    removed = bank.remove("a.b")
    assert "a.b" not in bank and "a.b" not in bank.slots and "a%2Eb" in bank
    bank.add("a.b", removed.lora_a, removed.lora_b, 2.0)
    assert all(torch.equal(bank[name].lora_a, before) for name, before in kept.items())
    assert bank["a.b"].scaling == 2.0
    bank.double()
    assert all(torch.equal(bank[name].lora_a, before.double()) for name, before in kept.items())
