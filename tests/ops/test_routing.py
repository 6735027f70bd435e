"""Routing: what it holds, against a plain loop; how it is built and filled again."""

import runpy
from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.ops.routed import AdapterBank, AdapterSlots, Routing, routed_lora
from lora_kernels.ops.routed import routing as routing_module

K, N = 9, 7


def slots_with(count: int, capacity: int | None = None) -> AdapterSlots:
    slots = AdapterSlots(capacity or max(count, 1))
    for index in range(count):
        slots.acquire(f"a{index}")
    return slots


def bank_with(count: int, slots: AdapterSlots | None = None) -> AdapterBank:
    bank = AdapterBank(K, N, slots=slots)
    for index in range(count):
        bank.add(f"a{index}", torch.randn(2 + index, K), torch.randn(N, 2 + index), 0.5)
    return bank


def check(routing: Routing, ids: list[list[int]], weights: torch.Tensor | None = None) -> None:
    """Every field against loops over ``ids`` ``[num_tokens][k]``."""
    k, none, tokens = routing.pairs_per_token, routing.slots.capacity, routing.max_tokens
    fields = routing.tensors(with_plan=True)
    assert routing.num_tokens == len(ids) and fields.pairs_per_token == k
    assert fields.block == routing.block and routing.block in (16, 64)
    pairs_of = defaultdict(list)
    for m in range(tokens):
        for j in range(k):
            slot = ids[m][j] if m < len(ids) else -1
            pairs_of[slot if 0 <= slot < none else none].append((m, j))
    expected = [pair for slot in range(none + 1) for pair in pairs_of[slot]]
    assert fields.tokens.dtype == fields.offsets.dtype == fields.inverse.dtype == torch.int32
    assert fields.tokens.tolist() == [m for m, _ in expected]
    offsets = fields.offsets.tolist()
    assert len(offsets) == none + 2 and offsets[0] == 0 and offsets[-1] == tokens * k
    for slot in range(none + 1):
        assert offsets[slot + 1] - offsets[slot] == len(pairs_of[slot])
    place = {pair: index for index, pair in enumerate(expected)}
    inverse = fields.inverse.tolist()
    assert inverse == [place[m, j] for m in range(tokens) for j in range(k)]
    if weights is None:
        assert fields.pair_weights is None
    else:
        actual = fields.pair_weights.tolist()
        for (m, j), index in place.items():
            assert actual[index] == (weights[m, j].item() if m < len(ids) else 0.0)
    check_tiles(fields, offsets)
    check_plan(fields, offsets, none)


def check_tiles(fields, offsets: list[int]) -> None:
    """Every pair in exactly one tile, at most a block of them, of one slot; the rest says -1."""
    covered = []
    for slot, first in fields.tiles.tolist():
        if slot == -1:
            assert first == 0
            continue
        end = min(first + fields.block, offsets[slot + 1])
        assert offsets[slot] <= first < end
        assert (first - offsets[slot]) % fields.block == 0
        covered += range(first, end)
    assert sorted(covered) == list(range(offsets[-1]))
    used = [slot for slot, _ in fields.tiles.tolist()]
    assert used == sorted(used, key=lambda slot: slot if slot >= 0 else 1 << 40)


def check_plan(fields, offsets: list[int], none: int) -> None:
    groups = [slot for slot in range(none) if offsets[slot] < offsets[slot + 1]]
    assert fields.plan.dtype == torch.int64 and fields.plan.device.type == "cpu"
    plan = fields.plan.tolist()
    assert [row[0] for row in plan] == groups
    for slot, start, end, first in plan:
        assert (start, end) == (offsets[slot], offsets[slot + 1])
        tokens = fields.tokens[start:end].tolist()
        neighbours = tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        assert first == (tokens[0] if neighbours else -1)


@settings(max_examples=150)
@given(data=st.data(), live=st.integers(1, 6), k=st.integers(1, 3), large=st.booleans())
def test_against_a_loop(data, live, k, large):
    draw = data.draw
    slots = slots_with(live, draw(st.integers(live, live + 4)))
    count = draw(st.integers(0, 30))
    room = count + draw(st.integers(0, 5)) + (300 if large else 0)
    few = draw(st.lists(st.integers(-1, live - 1), min_size=1, max_size=3))
    one = st.sampled_from(few)  # long runs and empty groups
    row = st.lists(one, min_size=k, max_size=k)
    ids = draw(st.lists(row, min_size=count, max_size=count))
    routing = Routing.empty(room, slots, k)
    check(routing, [])
    given_ids = torch.tensor(
        ids, dtype=draw(st.sampled_from([torch.int64, torch.int32, torch.int8]))
    )
    weights = torch.randn(count, k)
    for _ in range(2):
        if k > 1 or draw(st.booleans()):
            check(
                routing.set_weighted_(given_ids.reshape(count, k), weights),
                ids,
                padded(weights, room),
            )
        else:
            check(routing.set_tokens_(given_ids.flatten()), ids)


def test_lists_are_read_wherever_torch_makes_tensors_by_default():
    slots, ids, weights = slots_with(3), [[0, 2], [1, -1]], [[0.5, 1.0], [2.0, 0.0]]
    with torch.device("meta"):
        tokens = Routing.from_tokens([2, -1, 0], slots)
        sequences = Routing.from_sequences(["a1", "a0"], [2, 1], slots)
        segments = Routing.from_segments([1, 0], [0, 1, 3], slots)
        weighted = Routing.from_weighted(ids, weights, slots)
        with pytest.raises(ValueError, match="ids"):
            Routing.from_tokens([3], slots)
    check(tokens, [[2], [-1], [0]])
    check(sequences, [[1], [1], [0]])
    check(segments, [[1], [0], [0]])
    check(weighted, ids, torch.tensor(weights))


def padded(weights: torch.Tensor, room: int) -> torch.Tensor:
    return torch.nn.functional.pad(weights, (0, 0, 0, room - weights.shape[0]))


@pytest.mark.parametrize("tokens", [256, 257, 1000], ids=str)
@pytest.mark.parametrize("kind", ["one_group", "all_base", "alternating", "random"])
def test_both_block_sizes(tokens, kind):
    slots = slots_with(40)
    ids = {
        "one_group": torch.full((tokens,), 39),
        "all_base": torch.full((tokens,), -1),
        "alternating": torch.arange(tokens) % 41 - 1,
        "random": torch.randint(-1, 40, (tokens,)),
    }[kind]
    routing = Routing.from_tokens(ids, slots)
    assert routing.block == (16 if tokens <= 256 else 64)
    check(routing, ids.unsqueeze(1).tolist())


def test_the_constructors_agree():
    bank = bank_with(3)
    names = ["a2", "__base__", "a0", "a2", "a1"]
    lengths = [2, 1, 0, 3, 1]
    ids = [2, 2, -1, 2, 2, 2, 1]
    expected = [[slot] for slot in ids]
    offsets = [0, 2, 3, 3, 6, 7]
    segment_ids = [2, -1, 0, 2, 1]
    for routing in (
        Routing.from_tokens(ids, bank),
        Routing.from_tokens(torch.tensor(ids), bank.slots),
        Routing.from_tokens(torch.tensor([ids]).int(), bank),
        Routing.from_sequences(names, lengths, bank),
        Routing.from_segments(segment_ids, offsets, bank),
        Routing.from_segments(torch.tensor(segment_ids), torch.tensor(offsets), bank, num_tokens=7),
        Routing.empty(7, bank).set_tokens_(ids),
        Routing.empty(7, bank).set_sequences_(names, lengths),
        Routing.empty(7, bank).set_segments_(segment_ids, offsets),
    ):
        check(routing, expected)
    weights = torch.randn(7, 1)
    check(Routing.from_weighted([[slot] for slot in ids], weights, bank), expected, weights)
    check(Routing.from_sequences(["a1", "__base__"], 3, bank), [[1]] * 3 + [[-1]] * 3)
    check(Routing.from_sequences([], [], bank), [])
    check(Routing.from_tokens([], bank), [])


def test_segments_with_gaps():
    """Tokens before the first, between none, after the last and in empty segments."""
    bank = bank_with(3)
    routing = Routing.from_segments([2, 1, 0, 2], [2, 4, 4, 4, 7], bank, num_tokens=9)
    check(routing, [[-1], [-1], [2], [2], [2], [2], [2], [-1], [-1]])
    check(Routing.from_segments([], [0], bank, num_tokens=3), [[-1]] * 3)
    check(Routing.from_segments([1], [0, 0], bank, num_tokens=2), [[-1]] * 2)
    check(Routing.from_segments([0, 1, 2], [0, 0, 3, 3], bank), [[1]] * 3)
    with pytest.raises(ValueError, match="offsets: expected ascending numbers from 0 to at most 4"):
        Routing.empty(4, bank).set_segments_([0, 1], [0, 3, 5])
    with pytest.raises(ValueError, match="offsets: expected ascending"):
        Routing.from_segments([0, 1], [3, 2, 4], bank)
    with pytest.raises(ValueError, match="offsets: expected one more than ids"):
        Routing.from_segments([0, 1], [0, 2], bank)
    with pytest.raises(ValueError, match="offsets: expected"):
        Routing.from_segments([0, 1], [], bank)


# --- filling again ----------------------------------------------------------------------------


def addresses(routing: Routing) -> list[int]:
    fields = routing.tensors(with_plan=False)
    tensors = [fields.tokens, fields.offsets, fields.tiles, fields.inverse]
    return [t.data_ptr() for t in tensors] + [t.numel() for t in tensors]


def test_filling_again_keeps_the_buffers():
    """What a captured CUDA graph reads."""
    bank = bank_with(3)
    routing = Routing.empty(20, bank)
    where = addresses(routing)
    for fill in (
        lambda: routing.set_tokens_(torch.randint(-1, 3, (20,))),
        lambda: routing.set_tokens_([]),
        lambda: routing.set_sequences_(["a1", "a0"], [3, 4]),
        lambda: routing.set_segments_([1, 0], [0, 9, 11]),
        lambda: routing.set_weighted_(torch.randint(-1, 3, (20, 1)), torch.randn(20, 1)),
        lambda: routing.set_tokens_([2] * 20),
    ):
        assert fill() is routing
        assert addresses(routing) == where
    routing = Routing.empty(20, bank, 2)
    routing.set_weighted_(torch.randint(-1, 3, (20, 2)), torch.randn(20, 2))
    where, weights = addresses(routing), routing.tensors(with_plan=False).pair_weights.data_ptr()
    routing.set_weighted_(torch.randint(-1, 3, (5, 2)), torch.randn(5, 2))
    assert addresses(routing) == where
    assert routing.tensors(with_plan=False).pair_weights.data_ptr() == weights


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("weighted", [False, True])
def test_filling_again_between_forward_and_backward(backend, weighted):
    """The gradients of the forward that was, or an error; never those of the next batch."""
    bank, x = bank_with(3), torch.randn(6, K, requires_grad=True)
    leaves = [x, *bank.parameters()]

    def fill(routing, ids):
        if weighted:
            return routing.set_weighted_([[i] for i in ids], [[1.0]] * 6)
        return routing.set_tokens_(ids)

    routing = fill(Routing.empty(6, bank), [0, 1, 2, 0, 1, -1])
    expected = torch.autograd.grad(routed_lora(x, bank, routing, backend=backend).sum(), leaves)
    y = routed_lora(x, bank, routing, backend=backend)
    fill(routing, [2, 2, 0, -1, 0, 1])
    try:
        actual = torch.autograd.grad(y.sum(), leaves)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_weights_are_copied_unless_they_train():
    bank, x = bank_with(2), torch.randn(3, K)
    weights = torch.ones(3, 1)
    routing = Routing.from_weighted([[0], [1], [-1]], weights, bank)
    before = routed_lora(x, bank, routing)
    weights.fill_(100.0)
    assert torch.equal(routed_lora(x, bank, routing), before)
    trained = torch.ones(3, 1, requires_grad=True)
    routing = Routing.from_weighted([[0], [1], [-1]], trained, bank)
    for _ in range(2):  # a graph of its own for each call
        (gradient,) = torch.autograd.grad(routed_lora(x, bank, routing).sum(), trained)
        expected = before.detach().sum(1, keepdim=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    assert gradient[2] == 0
    with torch.no_grad():
        trained.fill_(2.0)
    assert torch.equal(routed_lora(x, bank, routing), 2 * before)
    routing.set_weighted_([[0], [1], [-1]], torch.ones(3, 1))
    assert torch.equal(routed_lora(x, bank, routing), before)
    # Ones again, and not the buffer of before.
    assert routing.set_tokens_([0, 1, -1]).tensors(with_plan=False).pair_weights is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_weights_of_any_dtype(dtype):
    bank, x = bank_with(2), torch.randn(3, K)
    weights = torch.tensor([[0.5], [2.0], [3.0]], dtype=dtype, requires_grad=True)
    y = routed_lora(x, bank, Routing.from_weighted([[0], [1], [-1]], weights, bank))
    (gradient,) = torch.autograd.grad(y.sum(), weights)
    assert gradient.dtype == dtype
    alone = routed_lora(x, bank, Routing.from_tokens([0, 1, -1], bank)).sum(1, keepdim=True)
    torch.testing.assert_close(gradient.float(), alone.detach(), rtol=1e-2, atol=1e-2)


# --- versions ---------------------------------------------------------------------------------


def test_a_routing_raises_where_an_adapter_of_its_own_has_gone_and_nowhere_else():
    slots = AdapterSlots(capacity=4)
    bank, x = bank_with(3, slots), torch.randn(3, K)
    routing = Routing.from_tokens([0, 1, 2], bank)
    before = routed_lora(x, bank, routing)
    bank.add("d", torch.randn(50, K), torch.randn(N, 50), 1.0)
    assert torch.equal(routed_lora(x, bank, routing), before)
    without = Routing.from_tokens([0, -1, 2], bank)
    bank.remove("a1")
    with pytest.raises(ValueError, match="routing: adapters were removed"):
        routed_lora(x, bank, routing)
    assert torch.equal(routed_lora(x, bank, without)[[0, 2]], before[[0, 2]])
    with pytest.raises(ValueError, match=r"ids: expected -1 or slots of adapters.*got 1"):
        routing.set_tokens_([0, 1, 2])
    routing.set_tokens_([0, 3, 2])
    assert torch.equal(routed_lora(x, bank, routing)[[0, 2]], before[[0, 2]])
    bank.add("e", torch.randn(2, K), torch.randn(N, 2), 1.0)
    routed_lora(x, bank, routing)
    bank.add("f", torch.randn(2, K), torch.randn(N, 2), 1.0)  # the fifth of four
    assert bank.slots["f"] == 4 and slots.capacity == 8
    assert torch.equal(routed_lora(x, bank, routing)[[0, 2]], before[[0, 2]])
    y = routed_lora(x, bank, routing.set_tokens_([0, -1, 2]))
    assert torch.equal(y[[0, 2]], before[[0, 2]]) and not y[1].any(), "slot 4 is not none"
    with pytest.raises(ValueError, match="there are 8 slots now and were 4"):
        routing.set_tokens_([0, 4, 2])
    routed_lora(x, bank, Routing.from_tokens([0, 4, 2], bank))


@pytest.mark.parametrize("bound", [None, ["a0", "a2"]], ids=["all", "bound"])
def test_unread_ids_are_out_of_date_when_any_adapter_that_they_might_name_is(bound, monkeypatch):
    monkeypatch.setattr(routing_module, "is_fake", lambda tensor: True)  # ids are not looked at
    slots = AdapterSlots()
    bank, ids = bank_with(3, slots), torch.tensor([0, 2])
    routing = Routing.from_tokens(ids, bank, adapters=bound)
    assert routing.trained_slots() == (bound and (0, 2))
    bank.add("b", torch.randn(2, K), torch.randn(N, 2), 1.0)
    bank.remove("b")  # came later, and is none of its own
    routing.check_current()
    bank.remove("a1")
    if bound:
        routing.check_current()
    else:
        with pytest.raises(ValueError, match="routing: adapters were removed"):
            routing.check_current()


def test_one_routing_serves_the_banks_of_a_model_until_the_last_removes_a_name():
    slots = AdapterSlots()
    one, other = bank_with(2, slots), bank_with(2, slots)
    routing, x = Routing.from_tokens([0, 1], one), torch.randn(2, K)
    one.remove("a0")
    assert not routed_lora(x, one, routing)[0].any()
    assert routed_lora(x, other, routing)[0].any()
    other.remove("a0")
    for bank in (one, other):
        with pytest.raises(ValueError, match="routing: adapters were removed"):
            routed_lora(x, bank, routing)


# --- devices ----------------------------------------------------------------------------------


class NothingIsReadBack(TorchDispatchMode):
    """Fails where a device would have to be waited for, or a shape depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "unique", "masked_select", "is_nonzero",
                 "equal", "bincount", "repeat_interleave")  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name.startswith(bad) for bad in self.FORBIDDEN), name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [1, 2])
def test_nothing_is_read_back_where_ids_are_on_a_device(k):
    """CPU tensors stand for a device's: the mode tells the checks that it may not look."""
    slots = slots_with(3, 5)
    ids, weights = torch.randint(-1, 3, (40, k)), torch.randn(40, k)
    with NothingIsReadBack():
        routing = Routing.empty(50, slots, k)
        routing._fill(slots.current, ids.flatten(), 40)
        if k == 1:
            routing.set_tokens_(ids[:, 0])
        else:
            routing.set_weighted_(ids, weights)
        assert routing.tensors(with_plan=False).plan.shape == (0, 4)
    check(routing, ids.tolist(), padded(weights, 50) if k > 1 else None)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("how", ["tokens", "weighted", "trained", "segments"])
def test_building_and_filling_without_values(device, how):
    """Fixed shapes, which torch.compile and a CUDA graph need: fake and meta tensors do."""
    slots = slots_with(3, 5)
    with FakeTensorMode() if device == "cpu" else nullcontext():
        ids = torch.empty(40, dtype=torch.int64, device=device)
        if how == "tokens":
            routing = Routing.from_tokens(ids, slots)
            routing.set_tokens_(ids[:7])
        elif how == "segments":
            offsets = torch.empty(41, dtype=torch.int32, device=device)
            routing = Routing.from_segments(ids, offsets, slots, num_tokens=90)
        else:
            weights = torch.empty(20, 2, device=device, requires_grad=how == "trained")
            routing = Routing.from_weighted(ids.view(20, 2), weights, slots)
        fields = routing.tensors(with_plan=False)
    assert fields.tokens.device.type == device
    assert fields.tokens.shape == fields.inverse.shape
    assert fields.tokens.shape[0] == routing.max_tokens * routing.pairs_per_token
    assert fields.offsets.shape == (7,)


def test_ids_out_of_range_are_an_error_here_and_none_on_a_device():
    slots = slots_with(3, 5)
    for wrong in (3, 4, 5, -2, 1000):
        with pytest.raises(ValueError, match=rf"ids: expected -1 or slots of .* got {wrong}"):
            Routing.from_tokens([0, 1, wrong, 2], slots)
        with pytest.raises(ValueError, match=rf"got {wrong}"):
            Routing.from_weighted([[0, 1], [wrong, 2]], [[1.0, 1.0]] * 2, slots)
    routing = Routing.empty(7, slots)
    routing._fill(slots.current, torch.tensor([0, 5, -2, 2, 1 << 40, -(1 << 40), 6]), 7)
    check(routing, [[0], [-1], [-1], [2], [-1], [-1], [-1]])
    # A slot that is free has no adapter in any bank: as good as none.
    bank = bank_with(3, slots)
    routing._fill(slots.current, torch.tensor([0, 4, 3, 2, -1, 1, 3]), 7)
    y = routed_lora(torch.randn(7, K), bank, routing)
    assert y.any(1).tolist() == [True, False, False, True, False, True, False]


@pytest.mark.parametrize("value, expected", [("1", True), ("0", False), ("", False)])
def test_debug_mode_is_read_from_the_environment(value, expected, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_DEBUG", value)
    assert runpy.run_path(routing_module.__file__)["_DEBUG"] is expected


BAD = {
    "bank": (lambda s: Routing.from_tokens([0], 3), TypeError, "bank: expected an AdapterBank or"),
    "ids_float": (
        lambda s: Routing.from_tokens([0.5], s), TypeError, "ids: expected integers, got torch.flo",
    ),
    "ids_bool": (
        lambda s: Routing.from_tokens(torch.tensor([True]), s), TypeError, "ids: expected integers",
    ),
    "ids_weighted_1d": (
        lambda s: Routing.from_weighted([0, 1], [1.0, 1.0], s), ValueError,
        "ids: expected [tokens, adapters per token], got [2]",
    ),
    "weights_shape": (
        lambda s: Routing.from_weighted([[0, 1]], [[1.0]], s), ValueError,
        "weights: expected [1, 2] like ids, got [1, 1]",
    ),
    "weights_integer": (
        lambda s: Routing.from_weighted([[0, 1]], torch.ones(1, 2).int(), s), TypeError,
        "weights: expected floating point numbers, got torch.int32",
    ),
    "too_many": (
        lambda s: Routing.empty(2, s).set_tokens_([0, 1, 0]), ValueError,
        "ids: expected at most 2 tokens, which this routing was made for, got 3",
    ),
    "pairs": (
        lambda s: Routing.empty(2, s, 2).set_tokens_([0, 1]), ValueError,
        "this routing has 2 adapters per token; fill it with set_weighted_",
    ),
    "pairs_of_another_number": (
        lambda s: Routing.empty(2, s, 2).set_weighted_([[0], [1]], [[1.0], [1.0]]), ValueError,
        "ids: expected [tokens, 2], got [2, 1]",
    ),
    "max_tokens_negative": (
        lambda s: Routing.empty(-1, s), ValueError, "max_tokens: expected at least 0, got -1",
    ),
    "max_tokens_float": (
        lambda s: Routing.empty(2.0, s), TypeError, "max_tokens: expected an integer, got float",
    ),
    "max_tokens_huge": (
        lambda s: Routing.empty(2**30, s, 2), ValueError, "expected fewer than 2^31 pairs",
    ),
    "pairs_zero": (
        lambda s: Routing.empty(2, s, 0), ValueError, "pairs_per_token: expected at least 1, got 0",
    ),
    "names_string": (
        lambda s: Routing.from_sequences("a0", 3, s), TypeError, "names: expected a list of names",
    ),
    "names_unknown": (
        lambda s: Routing.from_sequences(["a0", "zz"], 3, s), ValueError,
        "names: expected '__base__' or one of ['a0', 'a1', 'a2'], got 'zz'",
    ),
    "lengths_number": (
        lambda s: Routing.from_sequences(["a0"], [3, 4], s), ValueError,
        "lengths: expected 1, one per name, got 2",
    ),
    "lengths_negative": (
        lambda s: Routing.from_sequences(["a0", "a1"], [3, -4], s), ValueError,
        "lengths: expected numbers of tokens, got -4",
    ),
    "lengths_float": (
        lambda s: Routing.from_sequences(["a0"], [1.5], s), TypeError,
        "lengths: expected integers",
    ),
    "lengths_one_float": (
        lambda s: Routing.from_sequences(["a0"], 1.5, s), TypeError, "lengths: expected",
    ),
    "ids_on_meta": (
        lambda s: Routing.empty(2, s).set_tokens_(torch.empty(2, dtype=torch.int64, device="meta")),
        ValueError, "ids: expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_message(case):
    function, error, message = BAD[case]
    with pytest.raises(error) as raised:
        function(slots_with(3))
    assert message in str(raised.value)


def test_a_refused_filling_changes_nothing():
    slots = slots_with(3)
    routing = Routing.from_tokens([0, 2, -1], slots)
    for wrong in ([0, 7, 1], [0, 1, 2, 0], [0.5, 1, 1]):
        with pytest.raises((ValueError, TypeError)):
            routing.set_tokens_(wrong)
        check(routing, [[0], [2], [-1]])
    routing = Routing.from_weighted([[0, 1]], [[0.5, 2.0]], slots)
    for ids, weights in (([[0, 7]], [[1.0, 1.0]]), ([[0, 1]], [[1.0]]), ([[0, 1]], [["x", 1.0]])):
        with pytest.raises((ValueError, TypeError)):
            routing.set_weighted_(ids, weights)
        check(routing, [[0, 1]], torch.tensor([[0.5, 2.0]]))
