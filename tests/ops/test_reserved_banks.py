"""What a captured CUDA graph reads of a bank, replayed without a GPU: the kernels' operands as they
were when it was captured, at the addresses that they had."""

import gc
from types import SimpleNamespace

import pytest
import torch

from lora_kernels.ops.routed import AdapterBank, AdapterSlots, Routing, routed_lora
from lora_kernels.ops.routed.bank import bank as bank_module
from lora_kernels.ops.routed.bank import versions
from lora_kernels.ops.routed.bank.storage import is_moved_anchor
from lora_kernels.ops.routed.tensors import in_one_piece
from lora_kernels.runtime import cpu_extension as native

K, N = 24, 16


def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, K), torch.randn(N, rank)


def bank_with(*names: str, reserve: int | None = 64, **options) -> AdapterBank:
    bank = AdapterBank(K, N, **options)
    for index, name in enumerate(names):
        bank.add(name, *factors(1 + index), 0.5 + index)
    if reserve:
        bank.reserve(reserve, 8)
    return bank


@pytest.fixture
def captured(monkeypatch):
    """The operands that a graph would hold."""

    def capture(bank: AdapterBank):
        with monkeypatch.context() as patched:
            patched.setattr(versions, "is_captured", lambda device: True)
            patched.setattr(bank_module, "is_captured", lambda device: True)
            return bank.version_for().tensors()

    return capture


def replayed(operands, routing: Routing, x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(x.shape[0], N)
    groups = native.RoutedGroups(operands, routing.tensors(with_plan=True), K, None)
    groups.expand_(y, groups.shrink(x, None, zeros=True))
    return y


def test_only_reserved_banks_are_captured(captured):
    with pytest.raises(RuntimeError, match=r"captured CUDA graph holds addresses: call reserve"):
        captured(bank_with("a", reserve=None))
    assert captured(bank_with("a")).max_total_rank == 8


def test_reserved_for_what_there_is(captured):
    bank = bank_with("a", "b", "c", reserve=None)
    bank.reserve()
    assert captured(bank).max_total_rank == 3
    with pytest.raises(RuntimeError, match="rank 4 is above max_rank 3"):
        bank.add("d", *factors(4), 1.0)
    with pytest.raises(ValueError, match="rank_capacity: expected at least 1, got 0"):
        AdapterBank(K, N).reserve()


@pytest.mark.parametrize("change", ["added", "removed", "again", "scaled", "dropped", "slots"])
def test_a_replay_follows_where_a_routing_is_filled(captured, change):
    slots = AdapterSlots(4)
    bank, x = bank_with("a", "b", slots=slots), torch.randn(4, K)
    routing = Routing.empty(4, bank).set_sequences_(["a", "b"], 2)
    operands = captured(bank)
    tables = operands.slot_table, operands.scaling, operands.threshold_table
    first = replayed(operands, routing, x)
    assert torch.equal(first, routed_lora(x, bank, routing, backend="native"))
    names = ["a", "b"]
    if change == "added":
        bank.add("c", *factors(8), 3.0)
        names = ["c", "b"]
    elif change == "removed":
        bank.remove("a")
        names = ["__base__", "b"]
    elif change == "again":  # the same name, and its slot
        bank.remove("a")
        bank.add("a", *factors(5), -1.0)
    elif change == "scaled":
        bank["a"].scaling = 10.0
    elif change == "dropped":
        bank["a"].dropout_p = 0.5
        bank.eval()
    else:
        bank.add("c", *factors(2), 1.0)
        bank.add("d", *factors(2), 1.0)
        with pytest.raises(RuntimeError, match="there are 4 slots, all of them taken"):
            bank.add("e", *factors(2), 1.0)
    assert torch.equal(replayed(operands, routing, x), first), "until a routing is filled"
    routing.set_sequences_(names, 2)
    expected = routed_lora(x, bank, routing, backend="native")
    assert torch.equal(replayed(operands, routing, x), expected)
    now = captured(bank)
    for before, after in zip(tables, now[6:9], strict=True):
        assert before.data_ptr() == after.data_ptr()
    assert operands.storage.data_ptr() == now.storage.data_ptr()


def test_what_a_graph_may_still_read_is_nobody_elses(captured):
    bank = bank_with("a", reserve=1)
    routing, x = Routing.empty(2, bank).set_sequences_(["a"], 2), torch.randn(2, K)
    operands = captured(bank)._replace(factors=[])  # a graph has addresses and no tensors
    first = replayed(operands, routing, x)
    free = bank._latest.reserved.arena.largest_free()
    bank.remove("a")
    gc.collect()
    assert bank._latest.reserved.arena.largest_free() == free, "its region is still taken"
    assert torch.equal(replayed(operands, routing, x), first)
    routing.set_sequences_(["__base__"], 2)
    gc.collect()
    assert bank._latest.reserved.arena.largest_free() > free
    assert not replayed(operands, routing, x).any()


def test_replaced_data_is_not_followed_under_a_capture(captured):
    bank = bank_with("a")
    bank["a"].lora_a.data = torch.randn(1, K)
    with pytest.raises(RuntimeError, match=r"holds addresses: call rebind\(\) before"):
        captured(bank)
    bank.rebind()
    captured(bank)


def test_data_that_is_replaced_between_a_forward_and_its_backward_raises():
    """It is copied over what the backward would read."""
    bank, x = bank_with("a"), torch.randn(2, K, requires_grad=True)
    y = routed_lora(x, bank, Routing.from_sequences(["a"], 2, bank))
    bank["a"].lora_a.data = torch.zeros(1, K)
    routed_lora(x, bank, Routing.from_sequences(["a"], 2, bank))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_memory_is_kept_for_every_stream_that_reads_it(monkeypatch):
    """Once for each: the allocator looks at what is enqueued when the memory is given back."""
    noted, streams = [], {number: SimpleNamespace(stream_id=number) for number in (0, 7)}
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: noted.append((t.data_ptr(), s)))
    version = bank_with("a", "b", reserve=None).version_for()
    for number in (0, 7, 0, 7):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, n=number: streams[n])
        version.note_stream((1,))
    assert version._made is None  # there is nothing to wait for on a CPU
    (entry,) = version.entries_in((1,))
    read = [*version.tables, entry.factors[0]]
    assert noted == [(each.data_ptr(), streams[number]) for number in (0, 7) for each in read]


def test_an_operator_that_gets_copies_of_its_arguments():
    """As torch's own checks give it: the adapters lie elsewhere then, and are found."""
    bank, x = bank_with("a", "b", reserve=None), torch.randn(4, K)
    routing = Routing.from_sequences(["a", "b"], 2, bank)
    fields = bank.tensors()
    copied = fields._replace(
        storage=fields.storage.clone(), factors=[factor.clone() for factor in fields.factors]
    )
    assert is_moved_anchor(copied.storage) and not is_moved_anchor(fields.storage)
    single = in_one_piece(copied)
    assert not is_moved_anchor(single.storage)
    expected = routed_lora(x, bank, routing, backend="native")
    for factor in fields.factors:
        factor.detach().zero_()  # nobody reads them
    assert torch.equal(replayed(single, routing, x), expected)


class _Stream:
    """Of a device: what it waits for has been enqueued in another."""

    def __init__(self, number: int) -> None:
        self.stream_id, self.behind = number, set()

    def record_event(self) -> frozenset:
        return frozenset({self.stream_id, *self.behind})

    def wait_event(self, event: frozenset) -> None:
        self.behind |= event


@pytest.mark.parametrize("reserve", [None, 64])
@pytest.mark.parametrize("change", ["add", "remove", "scale", "drop", "reserve"])
def test_a_stream_waits_for_what_another_has_changed(monkeypatch, change, reserve):
    """And for what that was made of: the version before is a third stream's."""
    bank = bank_with("a", reserve=reserve)
    first, second, reader = [_Stream(number) for number in (3, 5, 7)]
    on = SimpleNamespace(stream=first)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: on.stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(
        versions.BankVersion, "published", lambda v: setattr(v, "_made", on.stream.record_event())
    )
    bank.add("b", *factors(2), 1.0)
    on.stream = second
    if change == "add":
        bank.add("c", *factors(2), 1.0)
    elif change == "remove":
        bank.remove("b")
    elif change == "scale":
        bank["b"].scaling = 3.0
    elif change == "drop":
        bank["b"].dropout_p = 0.25
    else:
        bank.reserve()
    on.stream = reader
    version = bank.version_for()
    for _ in range(2):
        version.note_stream((0,))
    assert reader.behind == {3, 5} and not first.behind
    if version.reserved is not None:  # the tables of graphs are filled in a stream, too
        on.stream = _Stream(9)
        version.reserved._holds = None
        Routing.empty(2, bank).set_sequences_(["a"], 2)
        assert on.stream.behind == {3, 5}


def test_only_what_is_on_a_gpu_has_events(monkeypatch):
    version, stream = bank_with("a", reserve=None).version_for(), _Stream(3)
    version.published()
    assert version._made is None
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    version.device = torch.device("cuda", 0)
    version.published()
    assert version._made == {3}
    monkeypatch.setattr(versions, "is_captured", lambda device: True)
    version.wait()
    assert not stream.behind
