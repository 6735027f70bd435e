"""What auto takes for a routed call; no device is asked for anything here."""

import pytest
import torch

from lora_kernels import AdapterBank, Routing, explain, routed_lora
from lora_kernels.ops.routed import choice as choices
from lora_kernels.ops.routed.cells import TableCell
from lora_kernels.ops.routed.choice import choose
from lora_kernels.runtime import dispatch, machine_files, tables, verdicts
from lora_kernels.runtime.device_limits import DeviceLimits
from lora_kernels.runtime.plan import forget_plans

H200 = DeviceLimits("NVIDIA H200", 90, 132, 232_448)
KIND = machine_files.kind_of_gpu(H200)
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
CELL = TableCell("forward", torch.bfloat16, 32, 4096, 4096, 32, 8, False)


@pytest.fixture(autouse=True)
def h200(monkeypatch, plans_forgotten):
    unavailable = dispatch.unavailable
    monkeypatch.setattr(
        dispatch,
        "unavailable",
        lambda backend, device, dtype=None: (
            None if device.type == "cuda" else unavailable(backend, device, dtype)
        ),
    )
    for module in (choices, machine_files):
        monkeypatch.setattr(module, "limits_of", lambda device: H200)
    monkeypatch.setattr(verdicts, "known", lambda: {})


def proven(monkeypatch, state=verdicts.PROVEN):
    found = {"routed/triton": verdicts.Verdict(state, "as it was", dtypes=("bfloat16",))}
    monkeypatch.setattr(verdicts, "known", lambda: {KIND: found})
    forget_plans()


def measured(monkeypatch, cells):
    monkeypatch.setattr(tables, "_known", lambda kind: {KIND: {"routed_lora": cells}})
    forget_plans()


def test_what_is_proven_serves_two_adapters_and_graphs(monkeypatch):
    assert choose("auto", GPU, CELL).backend == "composed"
    assert "not tested here" in choose("auto", GPU, CELL).reason
    proven(monkeypatch)
    choice = choose("auto", GPU, CELL)
    assert choice.backend == "triton" and "8 adapters" in choice.reason
    assert "proven by the self-test on NVIDIA H200" in choice.reason
    one = CELL._replace(adapters=1)
    assert choose("auto", GPU, one).backend == "composed"
    assert choose("auto", GPU, one, is_captured=True).backend == "triton"
    for dtype in (torch.float16, torch.float32):
        assert choose("auto", GPU, CELL._replace(dtype=dtype)).backend == "composed"


@pytest.mark.parametrize("state", [verdicts.BROKEN, verdicts.UNPROVEN, verdicts.ABSENT])
def test_what_is_not_proven_does_not(monkeypatch, state):
    proven(monkeypatch, state)
    choice = choose("auto", GPU, CELL, is_captured=True)
    assert choice.backend == "composed" and f"{state} here: as it was" in choice.reason


def test_what_tune_has_measured_goes_first(monkeypatch):
    proven(monkeypatch)
    measured(monkeypatch, {CELL.key: {"backend": "composed", "seconds": {"composed": 1e-4}}})
    choice = choose("auto", GPU, CELL)
    assert choice.backend == "composed" and "composed 0.100 ms" in choice.reason
    assert choose("auto", GPU, CELL, is_captured=True).backend == "triton", "no other can"
    assert choose("auto", GPU, CELL._replace(direction="training")).backend == "triton"
    measured(monkeypatch, {CELL.key: {"backend": "native"}})
    assert choose("auto", GPU, CELL).backend == "native"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose("auto", GPU, CELL).backend == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
    proven(monkeypatch, verdicts.BROKEN)
    measured(monkeypatch, {CELL.key: {"backend": "triton"}})
    assert choose("auto", GPU, CELL).backend == "composed"


def test_a_compiled_graph_reads_no_table(monkeypatch):
    proven(monkeypatch)
    measured(monkeypatch, {CELL.key: {"backend": "composed"}})
    monkeypatch.setattr(choices, "is_compiling", lambda: True)
    assert choose("auto", GPU, CELL).backend == "triton"
    assert choose("auto", CPU, CELL) == dispatch.choose("auto", CPU, CELL.dtype)


def test_named_backends_and_other_devices_are_not_looked_up(monkeypatch):
    proven(monkeypatch)
    assert choose("composed", GPU, CELL).reason.startswith("asked for")
    assert choose("auto", torch.device("mps"), CELL).backend == "composed"
    monkeypatch.setattr(dispatch, "PROCESS_DEFAULT", "composed")
    assert choose("auto", GPU, CELL).reason.startswith("asked for")


def test_a_cpu_takes_what_tune_has_measured(request, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    request.addfinalizer(tables.forget)
    tables.forget()
    bank = AdapterBank(8, 6)
    for name in ("a", "b"):
        bank.add(name, torch.randn(2, 8), torch.randn(6, 2), scaling=0.5)
    x, routing = torch.randn(5, 8), Routing.from_tokens(torch.tensor([0, 1, -1, 0, 1]), bank)
    unmeasured = explain(x, bank, routing)
    before = routed_lora(x, bank, routing)
    other = "composed" if unmeasured.backend == "native" else "native"
    if dispatch.unavailable(other, CPU, x.dtype):
        pytest.skip("there are no compiled kernels")
    cell = TableCell("forward", x.dtype, 5, 8, 6, 2, 2, False)
    tables.add(CPU, "routed_lora", {cell.key: {"backend": other, "seconds": {other: 1e-6}}})
    assert explain(x, bank, routing) == unmeasured, "training is another cell"
    with torch.no_grad():
        choice = explain(x, bank, routing)
        assert choice.backend == other and "taken by tune on this machine" in choice.reason
        torch.testing.assert_close(routed_lora(x, bank, routing), before.detach())
