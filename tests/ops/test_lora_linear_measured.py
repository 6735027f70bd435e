"""What auto takes where a table has recorded measurements; CUDA tensors are fakes here."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import explain, lora_linear
from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight, base_of
from lora_kernels.ops.linear import choice as measured
from lora_kernels.ops.linear import composed, cost
from lora_kernels.ops.linear import cpu as cpu_module
from lora_kernels.ops.linear.plan import PLANS, Guarded, key_of, make_plan, module_of
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime import dispatch, machine_files, tables, verdicts
from lora_kernels.runtime.dropout import drop_threshold
from lora_kernels.runtime.plan import forget_plans
from lora_kernels.self_test.families import FAMILIES
from lora_kernels.testing import (
    LoRAProblem,
    assert_draws_within_policy,
    oracle_results,
    run_forward_backward,
)

H200 = tiles.DeviceLimits("NVIDIA H200", 90, 132, 232_448)
COUNTED = Path(__file__).resolve().parents[2] / "benchmarks/results/counted/gpu.jsonl"
KIND = machine_files.kind_of_gpu(H200)
FORWARD = "forward/bfloat16/M8192/K4096/N1024/R16/p0"
BACKWARD = "backward/bfloat16/M8192/K4096/N1024/R16/p0"
CELLS = {
    FORWARD: {
        "backend": "triton",
        "strategy": "fused",
        "seconds": {"composed": 4e-4, "hybrid": 3.9e-4, "fused": 3.5e-4},
    },
    BACKWARD: {"backend": "composed", "strategy": "hybrid", "seconds": {"composed": 5e-4}},
}


@pytest.fixture(autouse=True)
def h200(monkeypatch, plans_forgotten):
    unavailable = dispatch.unavailable
    monkeypatch.setattr(
        dispatch,
        "unavailable",
        lambda backend, device, dtype=None: (
            None if backend == "triton" else unavailable(backend, device, dtype)
        ),
    )
    for module in (measured, machine_files):
        monkeypatch.setattr(module, "limits_of", lambda device: H200)
    monkeypatch.setattr(verdicts, "known", lambda: {})


def proven(monkeypatch, **states):
    """Verdicts of the self-test by family, with ``_`` for what a name cannot hold."""
    names = {family.replace("/", "_").replace(" ", "_"): family for family in FAMILIES}
    found = {
        names[name]: verdicts.Verdict(state, "as it was", dtypes=("bfloat16",))
        for name, state in states.items()
    }
    monkeypatch.setattr(verdicts, "known", lambda: {KIND: found})
    forget_plans()


def call(shape=(4, 2048, 4096), out_features=1024, rank=16, dtype=torch.bfloat16, device="cuda"):
    with FakeTensorMode():
        return (
            torch.empty(shape, dtype=dtype, device=device),
            torch.empty(out_features, shape[-1], dtype=dtype, device=device),
            torch.empty(rank, shape[-1], device=device),
            torch.empty(out_features, rank, device=device),
        )


def sizes_of(weight, lora_a, lora_b, dropout_p=0.0):
    return measured.Sizes.of(base_of(weight), lora_a, lora_b, drop_threshold(dropout_p) > 0)


def chosen(direction="forward", dropout_p=0.0, backend="auto", **options):
    x, weight, lora_a, lora_b = call(**options)
    activation = x if direction == "forward" else x.new_empty(*x.shape[:-1], lora_b.shape[0])
    return measured.choose(
        backend, direction, activation, sizes_of(weight, lora_a, lora_b, dropout_p)
    )


def test_a_recorded_cell_takes_its_fastest_backend():
    with tiles.use_cells(CELLS):
        choice = chosen()
        assert choice.backend == "triton"
        assert (
            "linear/triton fused was the fastest" in choice.reason
            and "NVIDIA H200" in choice.reason
        )
        assert FORWARD in choice.reason and "composed 0.400 ms" in choice.reason
        assert chosen("backward").backend == "composed"


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({"shape": (4097, 4096), "rank": 9}, "triton"),  # the same powers of two
        ({"shape": (4096, 4096)}, "triton"),  # within a factor of two
        ({"shape": (2048, 4096)}, "composed"),
        ({"rank": 17}, "composed"),
        ({"out_features": 2048}, "triton"),
        ({"out_features": 2056}, "composed"),
        ({"shape": (8192, 2048)}, "triton"),
        ({"shape": (8192, 2040)}, "composed"),
        ({"dtype": torch.float16}, "composed"),
        ({"dtype": torch.float32}, "composed"),
        ({"dropout_p": 0.1}, "composed"),
        ({"dropout_p": 1e-9}, "triton"),  # rounds to no dropout at all
    ],
    ids=str,
)
def test_only_what_was_measured_and_its_neighbours(options, backend, monkeypatch):
    monkeypatch.setattr(tables, "_known", lambda kind: {KIND: {"lora_linear": CELLS}})
    choice = chosen(**options)
    assert choice.backend == backend
    assert ("fastest measured" in choice.reason) == (backend == "triton")


def test_what_was_not_measured_stays_composed():
    x, weight, lora_a, lora_b = call()
    with FakeTensorMode():  # slicing a fake CUDA tensor needs a CUDA build
        strided = [
            torch.empty_strided(x.shape, stride, dtype=x.dtype, device="cuda")
            for stride in ((4096, 4 * 4096, 1), (2048 * 8192, 8192, 2), (2048 * 8192, 8192, 1))
        ]
    with tiles.use_cells(CELLS):
        for activation, base in (*((each, weight) for each in strided), (x, None)):
            sizes = sizes_of(base, lora_a, lora_b)
            choice = measured.choose("auto", "forward", activation, sizes)
            assert choice.backend == "composed" and "measured" in choice.reason
    with tiles.use_cells({"*": {"strategy": "fused"}}):  # tile options are no measurement
        assert "nothing is measured" in chosen().reason


def test_without_a_table_the_reason_names_the_command():
    choice = chosen(shape=(3, 4096))
    assert choice.backend == "composed"
    assert "forward/bfloat16/M4/" in choice.reason and "lora_kernels tune" in choice.reason


def test_a_backend_that_cannot_run_is_not_taken(monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda *args: "triton is broken here")
    with tiles.use_cells(CELLS):
        choice = chosen()
    assert choice.backend == "composed" and choice.reason.endswith(
        "but for triton: triton is broken here"
    )


def test_a_named_backend_and_the_process_override_come_before_the_table(monkeypatch):
    with tiles.use_cells(CELLS):
        assert chosen(backend="composed").reason.startswith("asked for")
        assert chosen("backward", backend="triton").backend == "triton"
        monkeypatch.setattr(dispatch, "PROCESS_DEFAULT", "composed")
        assert chosen().reason.startswith("asked for")


# ---- what the self-test has proven


def test_what_is_proven_is_taken_where_it_should_gain(monkeypatch):
    assert chosen(dropout_p=0.1).backend == "composed"
    assert "not tested here: python -m lora_kernels self-test" in chosen(dropout_p=0.1).reason
    proven(monkeypatch, linear_triton_hybrid=verdicts.PROVEN)
    choice = chosen(dropout_p=0.1)
    assert choice.backend == "triton" and "proven by the self-test" in choice.reason
    assert (
        "modelled as 1.4" in choice.reason and "nothing is measured of NVIDIA H200" in choice.reason
    )
    assert chosen(shape=(32, 4096), dropout_p=0.1).backend == "composed", "bound by the host"
    assert chosen(dtype=torch.float16, dropout_p=0.1).backend == "composed"
    assert "not tested with float16" in chosen(dtype=torch.float16, dropout_p=0.1).reason
    assert chosen(dtype=torch.float32, dropout_p=0.1).backend == "composed"


@pytest.mark.parametrize("state", [verdicts.BROKEN, verdicts.UNPROVEN, verdicts.ABSENT])
def test_what_is_not_proven_is_not_taken(monkeypatch, state):
    proven(monkeypatch, linear_triton_hybrid=state)
    choice = chosen(dropout_p=0.1)
    assert choice.backend == "composed" and f"{state} here: as it was" in choice.reason


def test_what_is_measured_here_goes_before_what_is_modelled(monkeypatch):
    proven(monkeypatch, linear_triton_hybrid=verdicts.PROVEN)
    cell = {"backend": "composed", "seconds": {"composed": 1e-3, "hybrid": 2e-3}}
    with tiles.use_cells({FORWARD: cell}):
        assert chosen().backend == "composed"
    assert chosen("backward").backend == "triton"


def test_broken_kernels_are_not_taken_though_they_were_measured(monkeypatch):
    proven(monkeypatch, linear_triton_fused=verdicts.BROKEN)
    with tiles.use_cells(CELLS):
        choice = chosen()
    assert choice.backend == "composed" and "broken here: as it was" in choice.reason


def test_a_shipped_table_needs_the_proof_and_ones_own_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    folder = tmp_path / "NVIDIA_H200"
    folder.mkdir()
    (folder / "lora_linear.json").write_text(json.dumps({"cells": CELLS}))
    tiles.shipped_cells.cache_clear()
    forget_plans()
    try:
        assert chosen().backend == "composed" and "not tested here" in chosen().reason
        proven(monkeypatch, linear_triton_fused=verdicts.PROVEN)
        assert chosen().backend == "triton" and "shipped with the package" in chosen().reason
        proven(monkeypatch)
        monkeypatch.setattr(tables, "_known", lambda kind: {KIND: {"lora_linear": CELLS}})
        forget_plans()
        assert chosen().backend == "triton" and "tune on this machine" in chosen().reason
        torch.use_deterministic_algorithms(True)
        try:
            assert chosen().backend == "composed", "the bits may not follow from what was measured"
        finally:
            torch.use_deterministic_algorithms(False)
        assert chosen().backend == "triton"
    finally:
        tiles.shipped_cells.cache_clear()


# ---- on a CPU


def test_a_cpu_takes_what_tune_has_measured(monkeypatch, request, tmp_path):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    request.addfinalizer(tables.forget)
    tables.forget()
    x, weight, lora_a, lora_b = (torch.randn(size) for size in ((3, 8), (6, 8), (2, 8), (6, 2)))
    cpu, unmeasured = torch.device("cpu"), explain(x, weight, lora_a, lora_b)
    other = "composed" if unmeasured.backend == "native" else "native"
    if dispatch.unavailable(other, cpu, torch.float32):
        pytest.skip("there are no compiled kernels")
    sizes = sizes_of(weight, lora_a, lora_b)
    key = measured._cell_of("forward", torch.float32, 3, sizes).key
    tables.add(cpu, "lora_linear", {key: {"backend": other, "seconds": {other: 1e-6}}})
    choice = explain(x, weight, lora_a, lora_b)
    assert choice.backend == other and "taken by tune on this machine" in choice.reason
    assert choice.reason.endswith(f"backward {unmeasured.backend}: {unmeasured.reason}")
    # A plan of another number of tokens is another plan.
    y = [lora_linear(each, weight, lora_a, lora_b, 1.0) for each in (x, x.repeat(8, 1), x)]
    assert torch.equal(y[0], y[2])
    assert {plan.choice.backend for plan in PLANS.values()} == {"native", "composed"}
    assert explain(x.repeat(8, 1), weight, lora_a, lora_b) == explain(
        x.repeat(9, 1), weight, lora_a, lora_b
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ways", [("native", "composed"), ("composed", "native")], ids="-".join)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_directions_of_a_cpu_may_differ(monkeypatch, request, tmp_path, dtype, ways, dropout_p):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    request.addfinalizer(tables.forget)
    cpu = torch.device("cpu")
    if dispatch.unavailable("native", cpu, dtype):
        pytest.skip("there are no compiled kernels")
    problem = LoRAProblem.random((19,), 24, 40, 5, dtype=dtype, dropout_p=dropout_p)
    sizes = measured.Sizes("dense", 24, 40, 5, dropout_p > 0)
    cells = {
        measured._cell_of(direction, dtype, 19, sizes).key: {"backend": backend}
        for direction, backend in zip(("forward", "backward"), ways, strict=True)
    }
    tables.add(cpu, "lora_linear", cells)

    def draw(number):
        drawn = problem.redrawn(number)
        return (
            run_forward_backward(lora_linear, drawn),
            run_forward_backward(lora_linear_reference, drawn),
            oracle_results(drawn),
        )

    assert_draws_within_policy(draw, dtype)
    (plan,) = PLANS.values()
    served = {"native": cpu_module, "composed": composed}
    assert (plan.forward, plan.backward) == tuple(served[name] for name in ways)


def test_explain_names_both_directions():
    with tiles.use_cells(CELLS):
        choice = explain(*call())
    assert choice.backend == "triton"
    assert FORWARD in choice.reason and "; backward composed: " in choice.reason
    assert BACKWARD in choice.reason


def test_shipped_tables_are_read_once_and_hits_are_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    folder = tmp_path / "NVIDIA_H200"
    folder.mkdir()
    (folder / "lora_linear.json").write_text(json.dumps({"cells": CELLS}))
    tiles.shipped_cells.cache_clear()
    proven(monkeypatch, linear_triton_fused=verdicts.PROVEN)
    try:
        first = chosen()
        (folder / "lora_linear.json").unlink()
        assert chosen() is first and first.backend == "triton"
        with tiles.use_cells({}):  # and the cache does not hide a replacement
            assert chosen().backend == "composed"
        monkeypatch.setattr(measured, "limits_of", lambda d: replace(H200, name="another"))
        forget_plans()
        assert chosen().backend == "composed"
    finally:
        tiles.shipped_cells.cache_clear()


@pytest.mark.parametrize("seen", [False, True], ids=["by a plan", "through the op"])
def test_how_often_a_call_asks(seen, monkeypatch):
    """A plan once, for all calls like it; the op once per direction, with its activation."""
    asked = []
    choose = measured.choose

    def spy(backend, direction, activation, sizes):
        asked.append((direction, tuple(activation.shape), sizes))
        return choose(backend, direction, activation, sizes)

    monkeypatch.setattr(measured, "choose", spy)
    lora_a, lora_b = torch.randn(2, 8), torch.randn(6, 2)
    weight, sizes = torch.randn(6, 8), measured.Sizes("dense", 8, 6, 2, False)
    forward, backward = ("forward", (3, 5, 8), sizes), ("backward", (3, 5, 6), sizes)
    for expected in ([forward], []) if not seen else ([forward, backward],) * 2:
        x = torch.randn(3, 5, 8, requires_grad=True)
        with FlopCounterMode(display=False) if seen else nullcontext():
            lora_linear(x, weight, lora_a, lora_b, 1.0).sum().backward()
        assert asked == expected
        asked.clear()


def test_a_plan_has_a_backend_for_each_direction():
    """And composed for a dy that no table knows of, which is not contiguous."""
    x, weight, lora_a, lora_b = call()
    base, factors = DenseWeight(weight), LoRAFactors(lora_a, lora_b, 1.0)
    with tiles.use_cells(CELLS):
        plan = make_plan("auto", x, base, factors, 0.0)
        assert isinstance(plan.forward, Guarded) and plan.choice.backend == "triton"
        assert plan.forward is module_of("triton", base, x, "linear/triton fused")
        assert plan.backward is plan.strided_backward is composed and not plan.drops
        named = make_plan("triton", x, DenseWeight(weight), factors, 0.3)
        assert named.forward is named.backward is named.strided_backward
        assert named.forward is module_of("triton", base, x)
        assert named.drops
    with tiles.use_cells({FORWARD: CELLS[BACKWARD], BACKWARD: CELLS[FORWARD]}):
        plan = make_plan("auto", x, DenseWeight(weight), factors, 0.0)
        assert plan.forward is plan.strided_backward is composed
        assert plan.backward is module_of("triton", base, x, "linear/triton fused")
        alone = make_plan("auto", x, None, factors, 0.0)
        assert alone.forward is alone.backward is alone.strided_backward is composed


def test_other_tables_forget_what_was_planned():
    x, weight, lora_a, lora_b = (torch.randn(size) for size in ((3, 8), (6, 8), (2, 8), (6, 2)))
    lora_linear(x, weight, lora_a, lora_b, 1.0)
    assert PLANS
    with tiles.use_cells({}):
        assert not PLANS
        lora_linear(x, weight, lora_a, lora_b, 1.0)
        assert PLANS
    assert not PLANS


# ---- keys of plans


@pytest.mark.parametrize("first", ["not contiguous", "deterministic", "nothing"])
def test_the_first_call_does_not_hide_a_table(tmp_path, monkeypatch, first):
    """Read when a CPU's first plan is made, whatever that one is."""
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    x, weight, lora_a, lora_b = (torch.randn(size) for size in ((3, 8), (6, 8), (2, 8), (6, 2)))
    cpu = torch.device("cpu")
    other = "composed" if dispatch.choose("auto", cpu, x.dtype).backend == "native" else "native"
    if dispatch.unavailable(other, cpu, torch.float32):
        pytest.skip("there are no compiled kernels")
    key = measured._cell_of("forward", x.dtype, 3, sizes_of(weight, lora_a, lora_b)).key
    tables.add(cpu, "lora_linear", {key: {"backend": other}})
    monkeypatch.setattr(tables, "FOR_CPU", False)  # as in a fresh process
    tables.forget()
    threads = torch.get_num_threads()
    try:
        if first == "not contiguous":
            lora_linear(x.t().contiguous().t(), weight, lora_a, lora_b, 1.0)
        elif first == "deterministic":
            torch.use_deterministic_algorithms(True)
            lora_linear(x, weight, lora_a, lora_b, 1.0)
            torch.use_deterministic_algorithms(False)
        before = set(PLANS)
        for _ in range(2):
            lora_linear(x, weight, lora_a, lora_b, 1.0)
        made = [PLANS[key] for key in PLANS.keys() - before]
        assert made and made[-1].choice.backend == other
        assert explain(x, weight, lora_a, lora_b).backend == other
        torch.set_num_threads(threads + 1)
        assert explain(x, weight, lora_a, lora_b).backend != other, "measured on fewer"
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        monkeypatch.undo()
        tables.forget()


@pytest.mark.parametrize(
    "cell",
    [
        {"backend": "foo"},
        {"backend": "reference"},
        {"backend": "native?"},
        {"backend": "native", "seconds": None},
        {"backend": "native", "seconds": {"native": "fast"}},
        {"backend": "triton", "strategy": "other"},
        {"backend": "triton", "gemm": 3},
        {},
    ],
    ids=str,
)
def test_a_cell_that_says_nothing_is_left_out(tmp_path, monkeypatch, cell):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    cpu, good = torch.device("cpu"), {"backend": "composed", "seconds": {"composed": 1}}
    tables.add(cpu, "lora_linear", {"bad": cell, "good": good})
    try:
        assert tables.cells_of("lora_linear", cpu) == {"good": good}
    finally:
        monkeypatch.undo()
        tables.forget()


def test_few_rows_of_a_cell_have_another_choice_and_key(monkeypatch):
    """Fewer than a tile of the fused GEMM take hybrid."""
    proven(monkeypatch, linear_triton_fused=verdicts.PROVEN, linear_triton_hybrid=verdicts.BROKEN)
    cells = {FORWARD.replace("M8192", "M128"): CELLS[FORWARD]}
    monkeypatch.setattr(tables, "_known", lambda kind: {KIND: {"lora_linear": cells}})
    forget_plans()
    assert chosen(shape=(128, 4096)).backend == "triton"
    assert chosen(shape=(100, 4096)).backend == "composed"
    monkeypatch.setattr(tables, "FOR_CPU", True)
    weight, a, b = (torch.randn(size) for size in ((6, 8), (2, 8), (6, 2)))
    base, factors = DenseWeight(weight), LoRAFactors(a, b, 1.0)
    keys = [
        key_of(torch.randn(rows, 8), base, factors, None, 0.0, None, "auto", None)
        for rows in (128, 100, 127, 65)
    ]
    assert keys[0] != keys[1] == keys[2] == keys[3] is not None


# ---- the model of cost


@pytest.mark.parametrize("dropout_p", [0, 0.05])
@pytest.mark.parametrize("adapters", ["fp32", "bf16"])
def test_the_model_moves_what_was_counted(adapters, dropout_p):
    """Of composed, with the base's product; the counter counts on its own."""
    name = f"linear lora_linear, M 8192, r 16, bf16 x, {adapters} adapters, p {dropout_p}, training"
    rows = map(json.loads, COUNTED.read_text().splitlines())
    counted = next(row for row in rows if (row["case"], row["provider"]) == (name, "ours"))
    m, k, n = 8192, 4096, 4096
    # Either way the base's product reads its operands and adds to the tail.
    moved, launches = 2 * (2 * (m * k + n * k + 2 * m * n)), 0
    for direction in ("forward", "backward"):
        cell = tiles.LinearCell(direction, "bfloat16", 2, m, k, n, 16, dropout_p > 0, False)
        work = cost.work_of("composed", cell)
        moved += work.narrow_bytes + work.stream_bytes
        launches += work.calls + work.launches
    assert moved == pytest.approx(counted["read"] + counted["written"], rel=0.02)
    assert abs(launches - counted["launches"]) <= 4
