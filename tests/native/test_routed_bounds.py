"""The compiled kernels take no rank, offset or slot from a table that the call has no room for."""

import subprocess
import sys
import textwrap

import pytest
import torch

from lora_kernels import AdapterBank, Routing
from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime.dropout import draw_seed

COLUMNS, WIDTHS = 24, (10, 7)


def bank_and_routing(tokens: int = 6):
    bank = AdapterBank(COLUMNS, list(WIDTHS))
    for name, (first, second) in {"a": (3, 2), "b": (5, 0)}.items():
        pairs = [
            None if rank == 0 else (torch.randn(rank, COLUMNS), torch.randn(width, rank))
            for rank, width in ((first, WIDTHS[0]), (second, WIDTHS[1]))
        ]
        bank.add(name, [p and p[0] for p in pairs], [p and p[1] for p in pairs], 0.5, 0.25)
    routing = Routing.from_tokens([1, 0, -1, 1, 0, 0][:tokens], bank)
    return bank, routing


def changed(table: torch.Tensor, *index_and_value: int) -> torch.Tensor:
    *index, value = index_and_value
    table = table.clone()
    table[tuple(index)] = value
    return table


@pytest.mark.parametrize(
    ("where", "value"),
    [
        pytest.param((1, 0, 0), 6, id="rank of A above the width"),
        pytest.param((0, 1, 0), 6, id="rank of B above the width"),
        pytest.param((0, 2, 1), 4, id="columns past the width"),
        pytest.param((0, 2, 1), -1, id="column before h"),
        pytest.param((0, 0, 2), -64, id="offset before the storage"),
        pytest.param((0, 0, 2), 1 << 40, id="offset past the storage"),
        pytest.param((1, 1, 2), 10_000, id="offset just past the storage"),
        pytest.param((1, 0, 0), -2, id="negative rank"),
        pytest.param((1, 0, 0), 1 << 61, id="rank whose size overflows"),
    ],
)
def test_a_table_that_does_not_fit_the_call(where, value):
    bank, routing = bank_and_routing()
    bank.reserve(40, 5)  # adapters that lie anywhere have no bounds but their rank's
    tensors = bank.tensors()
    tensors = tensors._replace(slot_table=changed(tensors.slot_table, *where, value))
    with pytest.raises(RuntimeError, match=rf"slot {where[0]} has rank"):
        native.RoutedGroups(tensors, routing.tensors(with_plan=True), COLUMNS, None)


@pytest.mark.parametrize(
    ("column", "value"),
    [(0, 1000), (0, -5), (1, -1), (2, 7), (2, 1 << 40)],
    ids=["slot past the table", "negative slot", "first pair", "end of the pairs", "far end"],
)
def test_a_plan_that_does_not_fit_the_call(column, value):
    bank, routing = bank_and_routing()
    tensors = routing.tensors(with_plan=True)
    plan = changed(tensors.plan, 0, column, value)
    with pytest.raises(RuntimeError, match="expected slots below"):
        native.RoutedGroups(bank.tensors(), tensors._replace(plan=plan), COLUMNS, None)


@pytest.mark.parametrize("of_a", [True, False], ids=["A", "B"])
def test_a_gradient_without_room(of_a):
    bank, routing = bank_and_routing()
    groups = native.RoutedGroups(bank.tensors(), routing.tensors(with_plan=True), COLUMNS, None)
    x, dy = torch.randn(6, COLUMNS), torch.randn(6, sum(WIDTHS))
    h = groups.shrink(x, None, zeros=True)
    layout, _ = bank.gradients(routing.trained_slots())
    layout = layout._replace(numel=1)  # as if the adapters had become wider since
    with pytest.raises(RuntimeError, match="its gradient has no room for it"):
        groups.gradients(None if of_a else dy, h, x if of_a else None, h, None, layout)


def test_what_a_call_was_made_with_is_what_it_computes():
    """Ranks, scalings and thresholds are copied: changing the tables beside a call changes none."""
    bank, routing = bank_and_routing()
    seed, x = draw_seed(torch.device("cpu")), torch.randn(6, COLUMNS)
    tensors = bank.tensors()
    tensors = tensors._replace(
        slot_table=tensors.slot_table.clone(), scaling=tensors.scaling.clone()
    )
    groups = native.RoutedGroups(tensors, routing.tensors(with_plan=True), COLUMNS, seed)
    mask = groups.draw_mask()
    h = groups.shrink(x, mask, zeros=True)
    expected, out = torch.zeros(6, sum(WIDTHS)), torch.zeros(6, sum(WIDTHS))
    groups.expand_(expected, h)
    tensors.slot_table.fill_(1 << 30)
    tensors.scaling.fill_(float("nan"))
    assert torch.equal(groups.draw_mask()[:5], mask[:5])  # the last pair has no adapter
    assert torch.equal(groups.shrink(x, mask, zeros=True), h)
    groups.expand_(out, h)
    assert torch.equal(out, expected) and out.abs().max() > 0


def test_a_bank_that_changes_beside_its_calls_crashes_nothing():
    """In a process of its own, which a kernel that trusts the table ends by a signal."""
    code = """
        import threading, time, torch
        from lora_kernels import AdapterBank, Routing, routed_lora
        torch.set_num_threads(1)
        bank, x, stop = AdapterBank(256, 256), torch.randn(64, 256), time.monotonic() + 4
        bank.add("c", torch.randn(2, 256), torch.randn(256, 2), 1.0)

        def serve():
            while time.monotonic() < stop:
                try:
                    routing = Routing.from_sequences(["c"], 64, bank)
                    routed_lora(x, bank, routing, backend="native")
                except (ValueError, KeyError, RuntimeError, IndexError, AttributeError, TypeError):
                    pass  # "c" is absent for most of the time

        server = threading.Thread(target=serve)
        server.start()
        while time.monotonic() < stop:
            bank.remove("c")
            bank.add("c", torch.randn(64, 256), torch.randn(256, 64), 1.0)
        server.join()
        print("alive")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "alive\n", (done.returncode, done.stderr[-2000:])
