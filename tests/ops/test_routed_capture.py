"""What a captured CUDA graph computes after its routing was filled again: the new filling's result,
or it could not be captured. Without a GPU: see pretended_capture."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from pretended_capture import Recording, pretended_capture
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight
from lora_kernels.nn import batch_choice
from lora_kernels.nn.active_adapters import ActiveAdapters
from lora_kernels.nn.batch_choice import Choice
from lora_kernels.nn.batch_rows import Runs
from lora_kernels.ops import routed
from lora_kernels.ops.routed import (
    AdapterBank,
    AdapterSlots,
    Routing,
    explain,
    routed_expand,
    routed_lora,
    routed_lora_linear,
    routed_shrink,
    unpacked,
)
from lora_kernels.ops.routed.bank import layouts, versions
from lora_kernels.ops.routed.bank.storage import anchor
from lora_kernels.ops.routed.bank.tables import SlotTables
from lora_kernels.ops.routed.choice import named
from lora_kernels.ops.routed.tensors import check_groups_can_be_read
from lora_kernels.ops.routed.unpacked import routed_linear_unpacked
from lora_kernels.runtime import dispatch, dropout
from lora_kernels.runtime.capture import kept_per_device

K, N, M = 16, 12, 6
FIRST, SECOND = [0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0]
CANNOT = r"cannot be captured in a CUDA graph; use backend='triton', or leave the call out"


def reserved_bank(trains: bool = False) -> AdapterBank:
    bank = AdapterBank(K, N, rank_capacity=32, max_rank=8)
    for name, rank in (("a", 4), ("b", 3)):
        bank.add(name, torch.randn(rank, K), torch.randn(N, rank), 0.5, trainable=trains)
    return bank


CALLS = {
    "lora": lambda x, bank, routing: routed_lora(x, bank, routing, backend="composed"),
    "linear": lambda x, bank, routing: routed_lora_linear(
        x, torch.eye(N, K), bank, routing, backend="composed"
    ),
    "in_place": lambda x, bank, routing: routed_lora(
        x, bank, routing, torch.zeros(M, N), backend="composed"
    ),
    "shrink": lambda x, bank, routing: routed_shrink(x, bank, routing, backend="composed"),
    "expand": lambda x, bank, routing: routed_expand(
        x[:, :8].contiguous(), bank, routing, backend="composed"
    ),
}


@pytest.mark.parametrize("warm", ["warm", "cold"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_replay_has_the_new_filling_or_there_is_none(call, warm):
    bank, x = reserved_bank(), torch.randn(M, K)
    routing = Routing.empty(M, bank).set_tokens_(FIRST)
    if warm == "warm":  # as torch demands it before every capture
        call(x, bank, routing)
    else:
        routing._plan, routing._as_tensors = None, {}
    graph, y = Recording(), None
    try:
        with pretended_capture(), graph:
            y = call(x, bank, routing)
    except RuntimeError as error:
        assert re.search(CANNOT, str(error))
        return
    routing.set_tokens_(SECOND)
    graph.replay()
    assert torch.equal(y, call(x, bank, routing))


def test_the_recording_replays_what_was_computed():
    """The check above can fail: operations that read a routing's buffers follow its filling, the
    loops of the host do not."""
    routing = Routing.empty(M, reserved_bank()).set_tokens_(FIRST)
    graph = Recording()
    with graph:
        counts = routing._offsets[1:3] - routing._offsets[:2]
        rows = torch.arange(M)[int(counts[0]) :] * 1
    routing.set_tokens_([0, 0, 1, 1, 1, 1])
    graph.replay()
    assert counts.tolist() == [2, 4] and rows.tolist() == [4, 5]


def test_a_plan_that_is_known_cannot_be_captured():
    """Nor the tensors that hold it."""
    routing = Routing.from_tokens(FIRST, reserved_bank())
    assert routing.plan().shape[0] == 2 and routing.tensors(with_plan=True).plan.shape[0] == 2
    with pretended_capture():
        for read in (routing.plan, lambda: routing.tensors(with_plan=True)):
            with pytest.raises(RuntimeError, match=CANNOT):
                read()
        assert routing.tensors(with_plan=False).plan.shape[0] == 0
    check_groups_can_be_read(torch.device("cpu"))
    routing.plan()


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_alone_cannot_be_captured(create_graph):
    """Its forward was not, and has read the groups."""
    bank, x = reserved_bank(trains=True), torch.randn(M, K, requires_grad=True)
    y = routed_lora(x, bank, Routing.from_tokens(FIRST, bank), backend="composed")
    with pretended_capture(), pytest.raises(RuntimeError, match=CANNOT):
        torch.autograd.grad(y.sum(), [x, *bank.parameters()], create_graph=create_graph)


def test_the_op_of_a_compiled_graph_cannot_be_captured():
    """It has the groups as an argument."""
    bank, x = reserved_bank(), torch.randn(M, K)
    routing = Routing.from_tokens(FIRST, bank)
    recorded = Recording()
    with recorded:
        routed_lora(x, bank, routing, backend="composed")
    ((op, args, kwargs),) = [
        operation[:3] for operation in recorded._operations if "lora_kernels" in str(operation[0])
    ]
    op(*args, **kwargs)
    with pretended_capture(), pytest.raises(RuntimeError, match=CANNOT):
        op(*args, **kwargs)


def test_explain_says_so(monkeypatch):
    bank = reserved_bank()
    routing = Routing.from_tokens(FIRST, bank)
    monkeypatch.setattr(routed, "check_input", lambda *arguments: None)  # the bank is on a CPU
    with FakeTensorMode():
        choice = explain(torch.empty(M, K, device="cuda"), bank, routing, backend="composed")
    assert choice.reason.endswith("so the call cannot be captured in a CUDA graph")


# --- weights --------------------------------------------------------------------------------------


def captured(routing: Routing) -> tuple[Recording, torch.Tensor]:
    """A graph that reads the weights by pair, as a kernel does: 1 where it was given none."""
    graph = Recording()
    with pretended_capture():
        tensors = routing.tensors(with_plan=False)
    with graph:
        weights = torch.ones(M) if tensors.pair_weights is None else tensors.pair_weights * 1.0
    return graph, weights


@pytest.mark.parametrize("at_a_version", [False, True])
def test_a_graph_with_weights_is_replayed_without_any(at_a_version):
    bank = reserved_bank()
    routing = Routing.from_weighted([[0]] * M, torch.full((M, 1), 3.0), bank)
    reader = routing.at(bank.slots.current) if at_a_version else routing
    graph, weights = captured(reader)
    routing.set_weighted_([[1]] * M, torch.full((M, 1), 5.0, dtype=torch.float64))
    graph.replay()
    assert weights.tolist() == [5.0] * M
    routing.set_tokens_(SECOND)
    graph.replay()
    assert weights.tolist() == [1.0] * M and routing.pair_weights() is None
    routing.set_weighted_([[1]] * M, torch.full((M, 1), 7.0))
    graph.replay()
    assert weights.tolist() == [7.0] * M


@pytest.mark.parametrize("at_a_version", [False, True])
@pytest.mark.parametrize("per_token", [1, 2])
def test_a_graph_without_weights_gets_none(per_token, at_a_version):
    bank = reserved_bank()
    routing = Routing.empty(M, bank, per_token)
    ids, weights = [[0] * per_token] * M, torch.ones(M, per_token)
    captured(routing.at(bank.slots.current) if at_a_version else routing)
    with pytest.raises(RuntimeError, match="weights: a CUDA graph was captured with this routing"):
        routing.set_weighted_(ids, weights)
    copy.deepcopy(routing).set_weighted_(ids, weights)


# --- what is kept between calls -------------------------------------------------------------------


def test_a_routing_of_fewer_slots_cannot_be_captured():
    """Its tokens without an adapter are behind its last slot, where the graph's tables have one."""
    bank = AdapterBank(K, N, slots=AdapterSlots(2))
    for name in "ab":
        bank.add(name, torch.randn(2, K), torch.randn(N, 2), 1.0)
    routing = Routing.from_tokens([0, -1], bank)
    bank.add("c", torch.randn(2, K), torch.randn(N, 2), 1.0)
    bank.reserve()
    version, expected = bank.version_for(), routed_lora(torch.ones(2, K), bank, routing)
    assert not expected[1].any()
    with pretended_capture(), pytest.raises(RuntimeError, match="4 slots now and were 2 when it"):
        version.tensors(routing.trained_slots(), routing.capacity)


def test_nothing_of_a_version_is_kept_that_a_graph_has_made():
    bank = AdapterBank(K, N, slots=AdapterSlots(40))
    bank.add("a", torch.randn(2, K), torch.randn(N, 2), 1.0)
    version = bank.version_for()
    with pretended_capture(), torch.no_grad():
        made = version.part((0,), 31), version.gradients((0,), 31)[0].table
        assert version.part((0,), 31).tensors.slot_table is not made[0].tensors.slot_table
    with torch.no_grad():
        part, (layout, _) = version.part((0,), 31), version.gradients((0,), 31)
    assert part is not made[0] and part is version.part((0,), 31)
    assert part.tensors.slot_table is not made[0].tensors.slot_table
    assert layout.table is not made[1]


def test_constants_are_not_kept_from_a_graph_or_a_fake():
    made = []

    @kept_per_device
    def table(size, device):
        made.append(torch.full((size,), 7, device=device))
        return made[-1]

    cpu = torch.device("cpu")
    with pretended_capture():
        assert table(3, cpu) is not table(3, cpu)
    with FakeTensorMode():
        assert isinstance(table(3, cpu), FakeTensor)
    with torch.inference_mode():
        first = table(3, cpu)
    assert not first.is_inference() and first is made[3]
    with pretended_capture(), torch.no_grad():
        assert table(3, cpu) is first and table(4, cpu) is not table(4, cpu)
    with FakeTensorMode():
        assert isinstance(table(3, cpu), FakeTensor)
    assert table(3, cpu) is first


def test_the_stream_that_makes_a_constant_is_waited_for_once(monkeypatch):
    """Others read it without an event."""
    waited, stream = [], SimpleNamespace(synchronize=lambda: waited.append(len(made)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    made = []
    find = kept_per_device(lambda device: made.append(0) or torch.zeros(1))
    for _ in range(3):
        find(torch.device("cuda", 0))
    assert waited == [1]


def test_the_masks_of_a_dropout_are_right_where_a_graph_was_captured_first():
    """The table by which bits become lanes."""
    x, packed = torch.randn(3, K), torch.randint(0, 256, (3, K // 8), dtype=torch.uint8)
    find, kept = dropout._select_table, {}
    with pretended_capture():
        dropped = dropout.zero_dropped(x, packed)
        for bits in (torch.int8, torch.int16):
            kept[bits] = find(bits, torch.device("meta"))
    assert torch.equal(dropped, torch.where(dropout.unpacked_keep_mask(packed, K), x, 0))
    for bits, table in kept.items():
        assert find(bits, torch.device("meta")) is not table


def test_adapters_that_are_named_cannot_be_captured():
    """Neither an accelerated model's nor a routed one's: their routings end with the batch."""
    bank, x = reserved_bank(), torch.randn(2, 3, K)
    active = ActiveAdapters(bank.slots)
    factors = {"a": LoRAFactors(torch.randn(2, K), torch.randn(N, 2), 1.0)}
    base = DenseWeight(torch.randn(N, K))

    def named():
        with active.use(["a", "b"]):
            return active.routing_for(x)

    for call in (named, lambda: routed_linear_unpacked(x, base, None, factors, ["a", "a"])):
        call()
        with pretended_capture(), pytest.raises(RuntimeError, match="and cannot be captured in a"):
            call()
    routing = Routing.from_tokens(FIRST, bank)
    with active.use(routing), pretended_capture():
        assert active.routing_for(x)._tokens is routing._tokens


def test_streams_do_not_share_what_may_be_dropped(monkeypatch):
    cpu, bank = torch.device("cpu"), reserved_bank()
    choice = Choice("a", bank.slots)
    seen = []
    for stream in (0, 7, 0, 7):
        monkeypatch.setattr(batch_choice, "stream_of", lambda device, stream=stream: stream)
        seen.append(choice.routing_of(Runs(("a",), 3), cpu, bank.slots.current)._tokens)
    assert seen[0] is seen[2] and seen[1] is seen[3] and seen[0] is not seen[1]


def test_streams_do_not_share_what_a_bank_makes_for_calls(monkeypatch):
    """The tables of a routing of fewer slots, and where gradients go."""
    bank = reserved_bank()
    version, found = bank.slots.current.of(bank), []
    version.has_streams = True
    for stream in (0, 7, 0, 7):
        for module in (versions, layouts):
            monkeypatch.setattr(module, "stream_of", lambda device, stream=stream: stream)
        tables = version.part((0,), 31).tensors.slot_table, version.gradients((0,))[0].table
        found.append(tables)
    for first, second, third, fourth in zip(*found, strict=True):
        assert first is third and second is fourth and first is not second


@pytest.mark.parametrize(
    "backend, device, aligned",
    [("native", "cpu", False), ("native", "cuda", True), ("triton", "cuda", True)],
)
def test_kernels_that_count_on_alignment_get_no_view_without_it(
    backend, device, aligned, monkeypatch
):
    """Factors that are views of a flat buffer, one element behind a multiple."""
    memory = torch.zeros(4 * 64 * K)
    memory = memory[-(memory.data_ptr() // 4) % 64 + 1 :]
    a, b = memory[: 2 * K].view(2, K), memory[64 * K : 64 * K + 2 * N].view(N, 2)
    x = SimpleNamespace(
        device=torch.device(device, 0), dtype=torch.float32, new_empty=torch.empty, shape=(1, K),
        numel=lambda: K,
    )  # fmt: skip
    monkeypatch.setattr(unpacked, "choose", lambda *_: dispatch.Choice(backend, ""))
    monkeypatch.setattr(unpacked, "_anchor", lambda dtype, _: anchor(dtype, "cpu"))
    monkeypatch.setattr(unpacked, "_tables", lambda *_: SlotTables(x, x, x))
    _, chosen = unpacked._bank([(0, LoRAFactors(a, b, 1.0))], 1, x, N, "auto")
    assert named(chosen) == ("composed" if aligned else backend)
