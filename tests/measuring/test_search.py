"""What is measured of one call: the search on made-up times, and candidates that are wrong."""

import pytest
import torch

from lora_kernels.measuring import linear_call, routed_call, search, taking
from lora_kernels.measuring.linear_call import LinearCase, LinearInputs
from lora_kernels.measuring.routed_call import RoutedCase, RoutedInputs
from lora_kernels.measuring.search import Candidate
from lora_kernels.measuring.taking import Times
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime import cpu_extension

CASE = LinearCase(m=64, k=48, n=40, rank=4, dropout=0.25, dtype="fp32")
FORWARD, BACKWARD = CASE.keys.values()
ROUTED = RoutedCase(m=40, k=48, widths=(24, 16), rank=5, adapters=3, dropout=0.25, dtype="fp32")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(search, "SECONDS", 0.0)
    monkeypatch.setattr(search, "REPETITIONS", (1, 1))
    for module in (linear_call, routed_call):
        monkeypatch.setattr(module, "sets_past_cache", lambda *sizes: 2)


def made_up(monkeypatch, seconds, backends=("composed", "triton")):
    """Times by a function of (direction, candidate) in place of measured ones."""
    compared = []

    def times_of(case, inputs, candidates, *, say):
        compared.append(candidates)
        return {
            direction: {
                name: Times([[took]] * 3, [[took / 2]] * 3)
                for name, candidate in candidates.items()
                if (took := seconds(direction, candidate)) is not None
            }
            for direction in case.keys
        }

    monkeypatch.setattr(search, "times_of", times_of)
    monkeypatch.setattr(search, "backends_of", lambda case: list(backends))
    return compared


def without_spread(cells):
    return {
        key: {name: each for name, each in cell.items() if name not in ("spread", "graph_seconds")}
        for key, cell in cells.items()
    }


def dropped(said):
    """What puts into a list why candidates were dropped."""
    return lambda **line: said.extend([line["dropped"]] if "dropped" in line else [])


def best_cells(case=CASE):
    return search.best_cells(case, lambda **line: None)


def test_the_search_finds_the_fastest_tiles_of_each_direction(monkeypatch):
    def seconds(direction, candidate):
        if candidate.backend == "composed":
            return 1.0 if direction == "forward" else 0.5
        options = candidate.options[direction]
        took = {"fused": 0.9, "hybrid": 0.95}[options["strategy"]]
        if options.get("gemm") == search.TILES["gemm"][2] and options["strategy"] == "fused":
            took -= 0.1
        if direction == "backward" and options.get("shrink") == search.TILES["shrink"][0]:
            took -= 0.05
        if options.get("rank_gradient"):
            took -= 0.001  # noise
        return took

    compared = made_up(monkeypatch, seconds)
    measured = best_cells()
    found = without_spread(measured)
    assert set(found) == {FORWARD, BACKWARD}
    assert measured[FORWARD]["graph_seconds"] == {"composed": 0.5, "hybrid": 0.475, "fused": 0.4}
    assert measured[FORWARD]["spread"] == {"composed": 0.0, "hybrid": 0.0, "fused": 0.0}
    assert found[FORWARD] == {
        "backend": "triton", "strategy": "fused", "gemm": search.TILES["gemm"][2],
        "seconds": {"composed": 1.0, "hybrid": 0.95, "fused": 0.8},
    }  # fmt: skip
    assert found[BACKWARD]["backend"] == "composed" and found[BACKWARD]["strategy"] == "fused"
    assert found[BACKWARD]["shrink"] == search.TILES["shrink"][0]
    assert "rank_gradient" not in found[BACKWARD]
    assert len(compared) == 5 and list(compared[0]) == list(compared[-1])
    # What tiles.py reads is what was written.
    with tiles.use_cells(found):
        cell = CASE.cell("forward")
        assert tiles.strategy(cell, tiles.DeviceLimits()) == "fused"
        assert tiles.tuned(cell, tiles.DeviceLimits())["gemm"]["BLOCK_M"] == 256


def test_where_our_kernels_do_not_run_the_cell_says_composed(monkeypatch):
    made_up(monkeypatch, lambda d, c: 1.0 if c.backend == "composed" else None)
    found = without_spread(best_cells())
    assert found[FORWARD] == {
        "backend": "composed", "strategy": "hybrid", "seconds": {"composed": 1.0},
    }  # fmt: skip


def test_where_only_fused_is_wrong_hybrid_is_taken(monkeypatch):
    def seconds(direction, candidate):
        if candidate.backend == "composed":
            return 1.0
        return 0.9 if candidate.options[direction]["strategy"] == "hybrid" else None

    made_up(monkeypatch, seconds)
    assert best_cells()[FORWARD]["strategy"] == "hybrid"


@pytest.mark.parametrize("gemm", [True, False], ids=["gemm_tail", "decode_alone"])
def test_native_competes_where_its_kernels_were_built(gemm, monkeypatch):
    missing = None if gemm else "not built"
    monkeypatch.setattr(search.cuda_extension, "missing_gemm_tail", lambda device: missing)
    wide = {"tile_columns": 256, "cluster": 2}

    def seconds(direction, candidate):
        if candidate.backend != "native":
            return 1.0
        took = 0.9 if direction == "forward" else 1.1
        return took - 0.05 * (candidate.options[direction].get("native") == wide)

    compared = made_up(monkeypatch, seconds, ("composed", "triton", "native"))
    found = best_cells()
    assert list(compared[0]) == ["composed", "hybrid", "fused", "native"]
    assert len(compared) == (6 if gemm else 4), "once more where a tile was found"
    assert found[FORWARD]["backend"] == "native"
    assert found[FORWARD]["seconds"]["native"] == (0.85 if gemm else 0.9)
    assert found[BACKWARD]["backend"] == "composed"
    for key in (FORWARD, BACKWARD):
        assert found[key].get("native") == (wide if gemm else None)
        assert found[key]["strategy"] == "hybrid"


def test_a_gain_of_2_percent_leaves_composed_and_its_strategy_is_kept(monkeypatch):
    made_up(monkeypatch, lambda d, c: 1.0 if c.backend == "composed" else 0.98)
    assert best_cells()[FORWARD]["backend"] == "composed"


def test_tiles_are_searched_only_for_kernels_within_reach(monkeypatch):
    """fused is far from composed in both directions, hybrid in the backward alone."""

    def seconds(direction, candidate):
        if candidate.backend == "composed":
            return 1.0
        if candidate.options[direction]["strategy"] == "fused":
            return 1.4
        return 1.2 if direction == "forward" else 2.0

    compared = made_up(monkeypatch, seconds)
    found = best_cells()
    assert [list(each)[1] for each in compared] == ["hybrid", "{'BLOCK_M': 32}", "{'BLOCK_D': 128}"]
    assert {cell["backend"] for cell in found.values()} == {"composed"}
    compared = made_up(monkeypatch, lambda d, c: 1.0 if c.backend == "composed" else 1.4)
    assert best_cells() and len(compared) == 1


def test_the_strategy_is_the_one_that_was_taken(monkeypatch):
    """fused is the faster one and gains in one round alone; hybrid gains in all."""
    times = {
        "composed": Times([[1.0]] * 3),
        "hybrid": Times([[0.95]] * 3),
        "fused": Times([[0.1, 0.1, 0.1], [1.0], [1.0]]),
    }
    cell = search.entry(times, {"strategy": "fused"})
    assert (cell["backend"], cell["strategy"]) == ("triton", "hybrid")


def test_without_composed_there_is_nothing_to_compare(monkeypatch):
    made_up(monkeypatch, lambda d, c: None if c.backend == "composed" else 0.5)
    with pytest.raises(RuntimeError, match="composed itself"):
        best_cells()


@pytest.mark.skipif(cpu_extension.missing() is not None, reason="the extension is not built")
@pytest.mark.parametrize("case", [CASE, ROUTED], ids=["linear", "routed"])
def test_on_a_cpu_the_compiled_kernels_compete_with_composed(case):
    said = []
    found = search.best_cells(case, dropped(said))
    assert list(found) == list(case.keys.values()) and not said
    for cell in found.values():
        assert cell["backend"] in ("composed", "native")
        assert list(cell["seconds"]) == list(cell["spread"]) == ["composed", "native"]
        assert min(cell["seconds"].values()) > 0 and min(cell["spread"].values()) >= 0
        assert "graph_seconds" not in cell and "strategy" not in cell


def test_every_tile_option_is_a_field_of_its_tile():
    for options, tile in (
        ("gemm", tiles.GemmTile),
        ("shrink", tiles.ShrinkTile),
        ("rank_gradient", tiles.RankGradientTile),
    ):
        for option in search.TILES[options]:
            assert set(option) <= set(tile.__dataclass_fields__)


def test_the_key_is_the_one_the_launcher_looks_up():
    for case in (CASE, LinearCase(m=100, k=8, n=24, rank=3, dtype="bf16")):
        x = torch.empty(case.m, case.k, dtype=case.torch_dtype)
        cell = tiles.cell_of("forward", x, case.k, case.n, case.rank, case.dropout > 0)
        assert cell.key == case.cell("forward").key


INPUTS = {"linear": (CASE, LinearInputs), "routed": (ROUTED, RoutedInputs)}


@pytest.mark.parametrize("which", INPUTS)
@pytest.mark.parametrize(("factor", "what"), [(1.001, "y: maximum error"), (float("nan"), "y")])
def test_a_wrong_candidate_is_not_timed(which, factor, what, monkeypatch):
    case, make = INPUTS[which]
    inputs, said = make(case), []
    candidates = {name: Candidate(name) for name in ("composed", "wrong", "native_of_a_gpu")}

    def times():
        return search.times_of(case, inputs, candidates, say=dropped(said))

    results = inputs.results

    def changed(backend):
        found = results("composed" if backend == "wrong" else backend)
        return found | ({"y": found["y"] * factor} if backend == "wrong" else {})

    monkeypatch.setattr(inputs, "results", changed)
    for found in times().values():
        assert list(found) == ["composed"]
        assert len(found["composed"].eager) == taking.ROUNDS and found["composed"].seconds > 0
    assert f"wrong is no candidate: AssertionError: {what}" in said[0]
    assert "native_of_a_gpu is no candidate: ValueError" in said[1]


@pytest.mark.parametrize("which", INPUTS)
def test_a_wrong_gradient_is_noticed(which, monkeypatch):
    case, make = INPUTS[which]
    inputs, said = make(case), []
    results = inputs.results
    name = list(inputs.eager)[-1]
    monkeypatch.setattr(inputs, "results", lambda backend: results(backend) | {
        name: 2 * inputs.eager[name]
    })  # fmt: skip
    times = search.times_of(case, inputs, {"composed": Candidate("composed")}, say=dropped(said))
    assert all(not found for found in times.values())
    assert f"AssertionError: {name}" in said[0]


def test_each_direction_of_a_routed_call_is_timed():
    inputs = RoutedInputs(ROUTED)
    parts = {name: part for each in inputs.parts("composed") for name, part in each.items()}
    assert list(parts) == list(ROUTED.keys) == ["forward", "training"]
    assert not parts["forward"](1).requires_grad
    y, dx, *gradients = parts["training"](1)
    assert y.requires_grad and dx.shape == (40, 48) and len(gradients) == 2 * 2 * 3
    # Every adapter has tokens, rank 5 is 3 and 2.
    assert {g.shape for g in gradients} == {(3, 48), (2, 48), (24, 3), (16, 2)}
    assert ROUTED.keys["training"] == "training/float32/M64/K48/N40/R8/A4/p1"


def test_eager_calls_and_graphs_are_timed_apart(monkeypatch):
    """A part that could be captured has both times, another the wall clock's alone."""

    class Calls:
        def __init__(self, device, parts, count, around):
            (self._name,) = parts
            self.captured = self._name == "forward"

        def warm_up(self): ...

        def run_eager(self):
            return {self._name: 2.0}

        def run(self):
            return {self._name: 0.5}

    monkeypatch.setattr(search, "TimedCalls", Calls)
    found = search.best_cells(ROUTED, lambda **line: None)
    forward, training = (found[key] for key in ROUTED.keys.values())
    assert forward["seconds"]["composed"] == 2.0 and forward["graph_seconds"]["composed"] == 0.5
    assert training["seconds"]["composed"] == 2.0 and "graph_seconds" not in training
