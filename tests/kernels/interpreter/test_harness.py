"""What a GPU run will do, through the interpreter: the strategies as providers, and tuning."""

import sys
from pathlib import Path

import pytest

from lora_kernels.measuring import linear_call, search
from lora_kernels.measuring.linear_call import LinearCase, problem_of
from lora_kernels.ops.linear.triton import tiles

sys.path.insert(0, str(Path(__file__).parents[3]))  # for benchmarks

from benchmarks import layer, op
from benchmarks.layer import LayerCase

STRATEGIES = ["triton-hybrid", "triton-fused"]


@pytest.fixture(autouse=True)
def one_set_of_inputs(monkeypatch):
    monkeypatch.setattr(linear_call, "sets_past_cache", lambda *sizes: 1)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_op_providers_run_and_are_right(dropout):
    case = LinearCase(m=40, k=48, n=56, rank=4, dtype="fp16", dropout=dropout)
    ops, skipped = op.prepare(case, ["frozen", *STRATEGIES])
    assert list(ops) == ["frozen", *STRATEGIES], skipped
    assert all(each.run()["both"] > 0 and each.peak() for each in ops.values())


def test_the_strategy_reaches_the_launcher(monkeypatch):
    asked = []
    strategy = tiles.strategy
    monkeypatch.setattr(tiles, "strategy", lambda *args: asked.append(strategy(*args)) or asked[-1])
    case = LinearCase(m=24, k=16, n=24, rank=4, dtype="fp32")
    for name in STRATEGIES:
        asked.clear()
        timed = op.Op(case, name, [problem_of(case, 0)])
        timed.run()
        assert set(asked) == {name.removeprefix("triton-")} and len(asked) == 2


def test_layer_providers_agree():
    case = LayerCase(device="cpu", dtype="fp32", **layer.SMALL)
    steps, skipped = layer.prepare(case, ["naive", *STRATEGIES])
    assert not skipped
    for name in STRATEGIES:
        assert steps[name].first_loss == pytest.approx(steps["naive"].first_loss, rel=1e-4)


def test_tuning_a_cell_from_end_to_end(monkeypatch):
    """Few options; a tile that cannot be launched is left out, the cell is what tiles.py reads."""
    few = {
        "gemm": ({"BLOCK_M": 64}, {"BLOCK_M": 48}),
        "shrink": ({"BLOCK_M": 32},),
        "rank_gradient": ({"BLOCK_D": 64},),
    }
    monkeypatch.setattr(search, "TILES", few)
    monkeypatch.setattr(search, "SECONDS", 0.0)
    monkeypatch.setattr(search, "REACH", float("inf"))
    monkeypatch.setattr(search, "REPETITIONS", (1, 1))
    case = LinearCase(m=40, k=48, n=56, rank=4, dtype="fp16", dropout=0.25)
    seen = []
    said = []
    times_of = search.times_of

    def spy(*args, **kwargs):
        seen.append(times_of(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(search, "times_of", spy)
    monkeypatch.setattr(search, "backends_of", lambda case: ["composed", "triton"])
    found = search.best_cells(case, lambda **line: said.append(str(line)))
    assert list(seen[0]["forward"]) == ["composed", "hybrid", "fused"], said
    assert list(seen[1]["backward"]) == ["as it is", "{'BLOCK_M': 64}"]
    assert any("{'BLOCK_M': 48} is no candidate" in line for line in said), said
    for key in case.keys.values():
        assert set(found[key]["seconds"]) == {"composed", "hybrid", "fused"}
