"""`python -m lora_kernels tune`: the search on made-up times, and the command on a CPU."""

import json

import pytest
import torch

from lora_kernels import testing
from lora_kernels.__main__ import main
from lora_kernels.measuring import cells, tuning
from lora_kernels.measuring.linear_call import LinearCase, problem_of
from lora_kernels.measuring.tuning import Candidate
from lora_kernels.ops.linear.triton import tiles

CASE = LinearCase(m=64, k=48, n=40, rank=4, dropout=0.25, dtype="fp32")
FORWARD, BACKWARD = (CASE.cell(direction).key for direction in tuning.DIRECTIONS)


def made_up(monkeypatch, seconds):
    """Times by a function of (direction, name, candidate) in place of measured ones."""
    rounds = []

    def seconds_of(case, problems, references, reps, candidates):
        rounds.append(candidates)
        return {
            direction: {
                name: took
                for name, candidate in candidates.items()
                if (took := seconds(direction, candidate)) is not None
            }
            for direction in tuning.DIRECTIONS
        }

    monkeypatch.setattr(tuning, "seconds_of", seconds_of)
    return rounds


def test_the_search_finds_the_fastest_tiles_of_each_direction(monkeypatch):
    def seconds(direction, candidate):
        if candidate.backend == "composed":
            return 1.0 if direction == "forward" else 0.5
        options = candidate.options[direction]
        took = {"fused": 0.9, "hybrid": 0.95}[options["strategy"]]
        if options.get("gemm") == tuning.TILES["gemm"][2] and options["strategy"] == "fused":
            took -= 0.1
        if direction == "backward" and options.get("shrink") == tuning.TILES["shrink"][0]:
            took -= 0.05
        if options.get("rank_gradient"):
            took -= 0.001  # noise
        return took

    rounds = made_up(monkeypatch, seconds)
    found = tuning.best_cells(CASE, reps=1)
    assert set(found) == {FORWARD, BACKWARD}
    assert found[FORWARD] == {
        "backend": "triton", "strategy": "fused", "gemm": tuning.TILES["gemm"][2],
        "seconds": {"composed": 1.0, "hybrid": 0.95, "fused": 0.8},
    }  # fmt: skip
    assert found[BACKWARD]["backend"] == "composed" and found[BACKWARD]["strategy"] == "fused"
    assert found[BACKWARD]["shrink"] == tuning.TILES["shrink"][0]
    assert "rank_gradient" not in found[BACKWARD]
    assert len(rounds) == 5 and list(rounds[0]) == list(rounds[-1])
    # What tiles.py reads is what was written.
    with tiles.use_cells(found):
        cell = CASE.cell("forward")
        assert tiles.strategy(cell, tiles.DeviceLimits()) == "fused"
        assert tiles.tuned(cell, tiles.DeviceLimits())["gemm"]["BLOCK_M"] == 256


def test_where_our_kernels_do_not_run_the_cell_says_composed(monkeypatch):
    made_up(monkeypatch, lambda d, c: 1.0 if c.backend == "composed" else None)
    found = tuning.best_cells(CASE, reps=1)
    assert found[FORWARD] == {
        "backend": "composed", "strategy": "hybrid", "seconds": {"composed": 1.0},
    }  # fmt: skip


def test_where_only_fused_is_wrong_hybrid_is_taken(monkeypatch):
    def seconds(direction, candidate):
        if candidate.backend == "composed":
            return 1.0
        return 0.9 if candidate.options[direction]["strategy"] == "hybrid" else None

    made_up(monkeypatch, seconds)
    assert tuning.best_cells(CASE, reps=1)[FORWARD]["strategy"] == "hybrid"


@pytest.mark.parametrize("gemm", [True, False], ids=["gemm_tail", "decode_alone"])
def test_native_competes_where_its_kernels_were_built(gemm, monkeypatch):
    monkeypatch.setattr(tuning, "runs_native", lambda case: True)
    missing = None if gemm else "not built"
    monkeypatch.setattr(tuning.cuda_extension, "missing_gemm_tail", lambda device: missing)
    wide = {"tile_columns": 256, "cluster": 2}

    def seconds(direction, candidate):
        if candidate.backend != "native":
            return 1.0
        took = 0.9 if direction == "forward" else 1.1
        return took - 0.05 * (candidate.options[direction].get("native") == wide)

    rounds = made_up(monkeypatch, seconds)
    found = tuning.best_cells(CASE, reps=1)
    assert list(rounds[0]) == ["composed", "hybrid", "fused", "native"]
    assert len(rounds) == 5 + gemm
    assert found[FORWARD]["backend"] == "native"
    assert found[FORWARD]["seconds"]["native"] == (0.85 if gemm else 0.9)
    assert found[BACKWARD]["backend"] == "composed"
    for key in (FORWARD, BACKWARD):
        assert found[key].get("native") == (wide if gemm else None)
        assert found[key]["strategy"] == "hybrid"


def test_native_is_no_candidate_where_there_is_no_gpu():
    assert not tuning.runs_native(CASE)


def test_every_tile_option_is_a_field_of_its_tile():
    for options, tile in (
        ("gemm", tiles.GemmTile),
        ("shrink", tiles.ShrinkTile),
        ("rank_gradient", tiles.RankGradientTile),
    ):
        for option in tuning.TILES[options]:
            assert set(option) <= set(tile.__dataclass_fields__)


def test_the_key_is_the_one_the_launcher_looks_up():
    for case in (CASE, LinearCase(m=100, k=8, n=24, rank=3, dtype="bf16")):
        x = torch.empty(case.m, case.k, dtype=case.torch_dtype)
        cell = tiles.cell_of("forward", x, case.k, case.n, case.rank, case.dropout > 0)
        assert cell.key == case.cell("forward").key


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_wrong_candidate_is_not_timed(dropout, monkeypatch):
    case = LinearCase(m=64, k=48, n=40, rank=4, dropout=dropout, dtype="fp32")
    problems = [problem_of(case, 0)]
    eager = testing.run_forward_backward(tuning.lora_linear_reference, problems[0])
    references = eager, testing.oracle_results(problems[0])
    said = []
    monkeypatch.setattr(tuning, "say", said.append)
    candidates = {"composed": Candidate("composed"), "absent": Candidate("triton")}

    def seconds():
        return tuning.seconds_of(case, problems, references, 2, candidates)

    times = seconds()
    assert list(times["forward"]) == list(times["backward"]) == ["composed"]
    assert times["forward"]["composed"] > 0 and "absent is no candidate" in said[0]

    lora_linear = tuning.lora_linear
    for factor, what in ((1.001, "y: maximum error"), (float("nan"), "y")):
        said.clear()
        monkeypatch.setattr(
            tuning, "lora_linear", lambda *args, f=factor, **kw: lora_linear(*args, **kw) * f
        )
        assert seconds()["forward"] == {}
        assert f"composed is no candidate: AssertionError: {what}" in said[0]


def test_a_wrong_gradient_is_noticed(monkeypatch):
    case = LinearCase(m=64, k=48, n=40, rank=4, dtype="fp32")
    problem = problem_of(case, 0)
    eager = testing.run_forward_backward(tuning.lora_linear_reference, problem)
    references = eager, testing.oracle_results(problem)
    said = []
    monkeypatch.setattr(tuning, "say", said.append)
    lora_linear = tuning.lora_linear

    def doubled_b(*args, lora_b, **kw):
        return lora_linear(*args, lora_b=2 * lora_b - lora_b.detach(), **kw)

    monkeypatch.setattr(tuning, "lora_linear", doubled_b)
    candidates = {"composed": Candidate("composed")}
    assert tuning.seconds_of(case, [problem], references, 1, candidates)["forward"] == {}
    assert "AssertionError: lora_b" in said[0]


def test_the_command_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    core = cells.core
    monkeypatch.setattr(cells, "core", lambda *args: core(*args)[:2])
    out = tmp_path / "NVIDIA_X" / "lora_linear.json"
    argv = ["tune", "--on-cpu", "--shrink=256", "--reps=1", f"--out={out}"]
    clock = iter([0.0, 0.0, 61.0])
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(clock))
    assert main([*argv, "--minutes=1"]) == 0
    assert "1 calls left" in capsys.readouterr().err
    first = json.loads(out.read_text())
    assert len(first["cells"]) == 2 and first["measured_with"]["torch"] == torch.__version__
    for cell in first["cells"].values():
        assert cell["backend"] == "composed" and cell["seconds"]["composed"] > 0
    monkeypatch.setattr(tuning.time, "monotonic", lambda: 0.0)
    assert main(argv) == 0
    both = json.loads(out.read_text())["cells"]
    assert len(both) == 4 and first["cells"].items() <= both.items()
    assert main(argv) == 0 and "2 of them in the table" in capsys.readouterr().err
    assert not list(out.parent.glob("*.tmp"))


def test_without_a_gpu_it_says_so_and_ends_with_2(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
