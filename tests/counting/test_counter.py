"""The counter itself: its table, sequences whose counts are known, and faults that it must find.

Dimensions: M 8192 tokens, K = N = 4096 features, R 16.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora_kernels
from benchmarks.gpu_counts.bounds import broken
from benchmarks.gpu_counts.cases import BF16, FP32, LinearCase, count_linear
from benchmarks.gpu_counts.cost import Cost, total
from benchmarks.gpu_counts.counter import counting
from benchmarks.gpu_counts.routed_cases import RoutedCase, count_routed
from lora_kernels import AdapterBank, Routing
from lora_kernels.ops.linear import composed
from lora_kernels.ops.linear import op as linear_op
from lora_kernels.ops.routed import composed as routed_composed
from lora_kernels.ops.routed import op as routed_op

WIDE = LinearCase(8192)
_MATRIX = 64 * 64 * 2  # bytes of the tests' square matrices


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def square() -> Tensor:
    return empty(64, 64)


def apart() -> Tensor:
    """A matrix of which neither dimension has stride 1."""
    return empty(64, 128)[:, ::2]


def index(count: int) -> Tensor:
    return torch.arange(count).to("cuda")


# Name, operands made before, the operation, and its cost in matrices [64, 64] where no bytes are
# given: launches, read, written.
OPERATIONS = [
    ("views", [square], lambda a: a.t()[3:].unsqueeze(0), (0, 0, 0)),
    ("pointwise", [square, square], lambda a, b: a + b, (1, 2, 1)),
    ("pointwise in place", [square, square], lambda a, b: a.add_(b), (1, 2, 1)),
    ("a number rides along", [square], lambda a: a * torch.tensor(2.0), (1, 1, 1)),
    ("cast", [square], lambda a: a.float(), (1, 1, 2)),
    ("cast to the same", [square], lambda a: a.to(BF16), (0, 0, 0)),
    ("copy", [square, square], lambda a, b: a.copy_(b), (1, 1, 1)),
    ("fill", [square], lambda a: a.zero_(), (1, 0, 1)),
    ("expanded", [square], lambda a: a * a[:1].expand(64, 64), (1, 1 + 1 / 64, 1)),
    ("nothing", [], lambda: torch.zeros(0, 3, device="cuda"), (0, 0, 0)),
    ("mm", [square, square], lambda a, b: a @ b, (1, 2, 1)),
    ("mm of a transpose", [square, square], lambda a, b: a.t() @ b, (1, 2, 1)),
    ("mm of neither stride 1", [apart, square], lambda a, b: a @ b, (2, 3, 2)),
    ("mm in fp32", [square, square], lambda a, b: torch.mm(a, b, out_dtype=FP32), (1, 2, 2)),
    ("addmm", [square] * 3, lambda c, a, b: torch.addmm(c, a, b), (2, 4, 2)),
    ("addmm, beta 0", [square] * 3, lambda c, a, b: torch.addmm(c, a, b, beta=0), (1, 2, 1)),
    ("addmm in place", [square] * 3, lambda c, a, b: c.addmm_(a, b), (1, 3, 1)),
    ("addmm in place, beta 0", [square] * 3, lambda c, a, b: c.addmm_(a, b, beta=0), (1, 2, 1)),
    ("addmm into its addend", [square] * 3, lambda c, a, b: torch.addmm(c, a, b, out=c), (1, 3, 1)),
    ("bias", [square, square, lambda: empty(64)], F.linear, (1, 2 + 1 / 64, 1)),
    (
        "bias that is scaled", [square, square, lambda: empty(64)],
        lambda a, b, c: torch.addmm(c, a, b, beta=0.5), (2, 3 + 1 / 64, 2),
    ),
    (
        "bias of neither stride 1", [square, square, lambda: empty(128)[::2]],
        lambda a, b, c: torch.addmm(c, a, b), (2, 3 + 1 / 64, 2),
    ),
    ("cat", [square, square], lambda a, b: torch.cat([a, b]), (1, 2, 2)),
    ("cat of 129", [square], lambda a: torch.cat([a] * 129), (2, 129, 129)),
    ("65 copies", [square], lambda a: torch._foreach_copy_([a] * 65, [a] * 65), (2, 65, 65)),
    (
        "copies and casts", [square],
        lambda a: torch._foreach_copy_([a] * 3, [a.new_empty(a.shape, dtype=FP32)] * 3), (1, 6, 3),
    ),
    (
        "copies into other strides", [square],
        lambda a: torch._foreach_copy_([a] * 3, [a.t()] * 3), (3, 3, 3),
    ),
    ("copies of gaps", [apart], lambda a: torch._foreach_copy_([a] * 3, [a] * 3), (3, 3, 3)),
    ("sum", [square], lambda a: a.sum(0), (1, 1, 1 / 64)),
    ("dropout", [square], lambda a: F.dropout(a, 0.5, True), (1, 1, 1.5)),
    (
        "gather rows", [square, lambda: index(8)], lambda a, i: a.index_select(0, i),
        (1, 1 / 8 + 1 / 128, 1 / 8),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("made", "operation", "cost"), [each[1:] for each in OPERATIONS],
    ids=[each[0] for each in OPERATIONS],
)  # fmt: skip
def test_the_table(counter, made, operation, cost):
    operands = [make() for make in made]
    with counter.recording() as launched:
        operation(*operands)
    found = total(launched)
    counted = found.launches, found.read / _MATRIX, found.written / _MATRIX
    assert counted == pytest.approx(cost, rel=1e-12)
    assert (found.syncs, found.atomics, found.copies) == (0, 0, 0)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda a, i: i[0].item(), {"syncs": 1, "copies": 1}),
        (lambda a, i: i.tolist(), {"syncs": 1, "copies": 1}),
        (lambda a, i: torch.nonzero(i), {"syncs": 1, "copies": 1}),
        (lambda a, i: torch.unique(i), {"syncs": 1, "copies": 1}),
        (lambda a, i: torch.zeros(3).to("cuda"), {"syncs": 1, "copies": 1}),
        (lambda a, i: torch.zeros(3).to("cuda", non_blocking=True), {"syncs": 0, "copies": 1}),
        (lambda a, i: a[[0, 3]], {"syncs": 1, "copies": 1}),
        (lambda a, i: a.index_add_(0, i, a[:8]), {"atomics": 1}),
        (lambda a, i: i.clone().scatter_add_(0, i, i), {"atomics": 0}),  # integers are exact
        (lambda a, i: empty(16, 4096) @ empty(4096, 64), {"splits": 1}),
        (lambda a, i: empty(8192, 4096) @ empty(4096, 4096), {"splits": 0}),
    ],
    ids=[
        "item", "tolist", "nonzero", "unique", "upload", "upload that is not waited for",
        "index that is a list", "index_add_", "scatter_add_ of integers", "long sum", "wide",
    ],
)  # fmt: skip
def test_columns_of_their_own(counter, operation, expected):
    operands = square(), index(8)
    with counter.recording() as launched:
        operation(*operands)
    found = total(launched)
    assert {name: getattr(found, name) for name in expected} == expected


def test_an_operation_that_is_not_in_the_table_raises(counter):
    a = square()
    with (
        counter.recording(),
        pytest.raises(NotImplementedError, match=r"unknown op: renorm.default is not in"),
    ):
        torch.renorm(a, 2, 0, 1.0)


def test_values_that_nobody_knows_cannot_be_read(counter):
    with pytest.raises(RuntimeError, match="values that are not known"):
        torch.randint(0, 9, (3,), device="cuda")[0].item()
    written = index(8)
    written[:2].random_(9)
    with pytest.raises(RuntimeError, match="whose values are not known"):
        written.tolist()


def test_the_device_has_the_values_of_a_routing():
    ids = torch.randint(-1, 5, (97,), generator=torch.Generator().manual_seed(1))

    def plan(device: str) -> Tensor:
        bank = AdapterBank(16, 8, device=device)
        for number in range(5):
            lora_a, lora_b = torch.empty(3, 16, device=device), torch.empty(8, 3, device=device)
            bank.add(f"adapter {number}", lora_a, lora_b, 1.0)
        return Routing.from_tokens(ids, bank).plan()

    expected = plan("cpu")
    with counting():
        assert torch.equal(plan("cuda"), expected)


def test_nothing_is_left_behind():
    with counting():
        x = torch.empty(3, device="cuda")
        assert (x.device.type, x.is_cuda, x.is_meta) == ("cuda", True, False)
        assert lora_kernels.explain(empty(2, 8), empty(4, 8), empty(1, 8), empty(4, 1))[0] == (
            "composed"
        )
    assert (x.device.type, x.is_cuda, x.is_meta) == ("meta", False, True)
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not torch.empty(3).is_cuda


def test_calls_take_the_way_that_they_take_on_a_gpu(counter, monkeypatch):
    """Nothing sees that something is watching: no call goes through a registered op."""

    def refuse(*_):
        raise AssertionError("the call went through the op")

    monkeypatch.setattr(linear_op, "through_the_op", refuse)
    monkeypatch.setattr(routed_op, "_op", refuse)
    count_linear(LinearCase(1, dropout_p=0.05), counter)
    count_routed(RoutedCase("decode"), counter)


# --- known sequences -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter_dtype", "dropout_p", "peft", "handwritten"),
    [
        (FP32, 0.05, (19, 3.830), (20, 1.515)),
        (BF16, 0.05, (14, 1.747), (14, 1.513)),
        (FP32, 0.0, (17, 3.226), (16, 0.878)),
        (BF16, 0.0, (12, 1.412), (10, 0.875)),
    ],
    ids=["fp32, p 0.05", "bf16, p 0.05", "fp32, p 0", "bf16, p 0"],
)
def test_known_sequences(counter, adapter_dtype, dropout_p, peft, handwritten):
    """Counted by hand before, forward and backward; GB."""
    case = LinearCase(8192, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    found = {name: total(launched) for name, launched in count_linear(case, counter).items()}
    for name, (launches, moved) in (("PEFT", peft), ("handwritten", handwritten)):
        assert found[name].launches == launches
        assert found[name].bytes / 1e9 == pytest.approx(moved, abs=1e-3)


def test_pefts_mixed_batch_uploads_its_indices(counter):
    """Three lists of rows for each of eight adapters, and 9 launches for each beside the base."""
    found = total(count_routed(RoutedCase("decode"), counter)["PEFT"])
    assert (found.launches, found.copies, found.syncs) == (73, 24, 24)


# --- planted faults --------------------------------------------------------------------------


def reads_x_again(call) -> None:
    call.x = call.x.clone()


def waits(call) -> None:
    torch.zeros((), dtype=torch.int64, device=call.x.device).item()


def adds_by_atomics(call) -> None:
    rows = torch.zeros(1, dtype=torch.int64, device=call.x.device)
    call.x.clone().index_add_(0, rows, call.x[:1])


def uploads(call) -> None:
    torch.zeros(3).to(call.x.device)


FAULTS = [
    (reads_x_again, Cost(launches=1, read=1 << 26, written=1 << 26), "bytes: "),
    (waits, Cost(launches=1, read=8, written=8, syncs=1, copies=1), "waits of the host: 1 "),
    (adds_by_atomics, Cost(atomics=1), "launches with atomic adds: "),
    (uploads, Cost(written=12, syncs=1, copies=1), "copies between host and device: 1 "),
]


@pytest.mark.parametrize(
    ("fault", "cost", "sentence"), FAULTS, ids=[each[0].__name__ for each in FAULTS]
)
def test_planted_faults_of_a_linear_layer(counter, monkeypatch, fault, cost, sentence):
    before = count_linear(WIDE, counter)
    forward = composed.forward

    def faulty(call):
        with torch.no_grad():
            fault(call)
        return forward(call)

    monkeypatch.setattr(composed, "forward", faulty)
    after = count_linear(WIDE, counter)
    assert total(after["PEFT"]) == total(before["PEFT"])
    found = total(after["ours"])
    if fault is not adds_by_atomics:
        assert found == total(before["ours"]) + cost
    said = broken(WIDE, after)
    assert any(each.startswith(sentence) for each in said), said
    assert not any(each.startswith(sentence) for each in broken(WIDE, before))


def test_planted_faults_of_a_routed_layer(counter, monkeypatch):
    case = RoutedCase("decode", order="sorted")
    before = total(count_routed(case, counter)["ours"])
    forward = routed_composed.forward

    def faulty(call):
        waits(call)
        adds_by_atomics(call)
        return forward(call)

    monkeypatch.setattr(routed_composed, "forward", faulty)
    found = count_routed(case, counter)
    after = total(found["ours"])
    assert (after.syncs, after.atomics) == (before.syncs + 1, before.atomics + 1)
    said = " ".join(broken(case, found))
    assert "launches with atomic adds" in said


def test_a_launcher_in_triton_is_counted_by_its_stand_in(counter):
    from benchmarks.gpu_counts.stand_ins import STAND_INS
    from lora_kernels.runtime.dropout import ActiveDropout

    by_name = {name: stand_in for (_, name), stand_in in STAND_INS.items()}
    x, seed = empty(64, 64), torch.zeros((), dtype=torch.int64, device="cuda")
    with counter.recording() as launched:
        kept, mask = by_name["masked_copy"](x, ActiveDropout(0.5, seed))
    assert launched == [("masked_copy", Cost(1, _MATRIX + 8, _MATRIX + 64 * 8))]
    assert (kept.shape, mask.shape, mask.dtype) == ((64, 64), (64, 8), torch.uint8)
