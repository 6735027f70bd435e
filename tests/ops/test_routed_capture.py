"""What a captured CUDA graph computes after its routing was filled again: the new filling's result,
or it could not be captured. Without a GPU: see pretended_capture."""

import re

import pytest
import torch
from pretended_capture import Recording, pretended_capture
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels.ops import routed
from lora_kernels.ops.routed import (
    AdapterBank,
    Routing,
    explain,
    routed_expand,
    routed_lora,
    routed_lora_linear,
    routed_shrink,
)
from lora_kernels.ops.routed.tensors import check_groups_can_be_read

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
