"""The cells of a GPU, `gpu` as somebody without one tries it, and the decoder layer."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import cells, driver, gpu, layer, op, op_providers, report
from benchmarks.__main__ import main
from benchmarks.layer import LayerCase
from lora_kernels.measuring import cells as linear_cells
from lora_kernels.measuring import timing as measure
from lora_kernels.measuring.linear_call import Call, LinearCase, problem_of
from lora_kernels.ops.linear.triton import tiles

ROOT = Path(__file__).parents[2]


# ---- cells


def test_core_and_grid_are_what_they_were():
    core, full = linear_cells.core(), linear_cells.grid()
    assert len(core) == len(set(core)) == 24 and full[:24] == core
    assert len(full) == len(set(full))
    linears = {(case.k, case.n) for case in full}
    assert len(linears) == 9 and (8192, 28672) in linears and (5120, 5120) in linears
    combinations = {(c.m, c.rank, c.dropout, c.k, c.n) for c in full}
    assert len(combinations) == 4 * 4 * 2 * 9
    assert (core[0].m, core[0].k, core[0].n, core[0].rank) == (8192, 4096, 4096, 16)
    assert all(case.dtype == "bf16" and case.alpha / case.rank == 2 for case in full)


def test_sections_are_in_order_of_worth_and_no_case_is_twice():
    found = cells.sections("cpu")
    assert list(found) == ["core", "decode", "routed", "gemm", "layer", "grid"]
    listed = [cell for section in found.values() for cell in section]
    assert len({(cell.kind, cell.case) for cell in listed}) == len(listed)
    assert [len(found[name]) for name in ("core", "decode", "routed", "gemm")] == [24, 16, 4, 18]
    assert [cell.case.m for cell in found["decode"][:4]] == [1, 8, 16, 64]
    assert [cell.case.m for cell in cells.sections("cpu", 64)["decode"][:4]] == [1, 8, 16, 64]
    # Beside naive LoRA everywhere; the GEMMs alone have none.
    assert all(
        ("naive" in cell.names) == (getattr(cell.case, "what", "decode") == "decode")
        for cell in listed
    )


def test_what_was_not_built_is_no_row_of_every_case():
    names = cells.sections("cpu")["gemm"][0].names
    assert not any(name.startswith(("native", "triton")) for name in names)


# ---- the command


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# What a process runs before anything else. Without PEFT: it takes long to import.
PRELUDE = "import sys; sys.modules['peft'] = None\n"


def in_a_process(tmp_path, *argv, prelude=""):
    """`gpu --dry-run` into gpu.jsonl."""
    (tmp_path / "sitecustomize.py").write_text(PRELUDE + prelude)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    out = f"--out={tmp_path / 'gpu.jsonl'}"
    words = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", out, *argv]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_dry_run_writes_every_section_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "gpu.jsonl"
    done = in_a_process(tmp_path, "--only=core,decode")
    assert done.returncode == 0, done.stderr
    first = rows_of(out)
    kinds = {(row["kind"], row["title"]) for row in first}
    assert len(kinds) == 4 and {kind for kind, _ in kinds} == {"op", "kernel"}
    assert all(row["seconds"] for row in first if not row["skipped"])
    assert str(tmp_path) not in out.read_text()
    done = in_a_process(tmp_path)
    assert done.returncode == 0 and "12 cases, 4 of them in" in done.stderr
    assert rows_of(out)[: len(first)] == first
    assert {row["kind"] for row in rows_of(out)} == {"op", "kernel", "routed", "layer"}
    assert "all measured" in done.stderr


# Without the machine's ceilings: they take seconds where bf16 has no instructions.
QUICKLY = """
from benchmarks import op
op.limits = lambda case: {"flops_per_second": 1e9, "bytes_per_second": 1e9}
"""
HANGS = """
import time
prepare = op.prepare
def hang(case, names):
    if case.dropout:
        {fault}
    return prepare(case, names)
op.prepare = hang
"""


@pytest.mark.parametrize(
    ("fault", "code"),
    [("time.sleep(600)", "1"), ("__import__('os').abort()", "-6")],
    ids=["hangs", "aborts"],
)
def test_a_case_that_hangs_or_dies_costs_itself(fault, code, tmp_path):
    out = tmp_path / "gpu.jsonl"
    began = time.monotonic()
    prelude = QUICKLY + HANGS.format(fault=fault)
    options = "--only=core,gemm", "--case-seconds=20"
    done = in_a_process(tmp_path, *options, prelude=prelude)
    assert done.returncode == 1 and time.monotonic() - began < 300, done.stderr
    rows = rows_of(out)
    lost = [row for row in rows if row["skipped"] and "its process ended" in row["skipped"]]
    assert {row["case"]["dropout"] for row in lost} == {0.1} and not lost[0]["seconds"]
    assert lost[0]["skipped"] == f"its process ended with {code}"
    assert len({row["title"] for row in lost}) == 1
    # What comes before and what comes behind was measured.
    titles = {row["title"] for row in rows if not row["skipped"]}
    assert len(titles) == 3 and "lost" in done.stderr


def test_a_wrong_provider_is_not_timed_and_said(tmp_path):
    out = tmp_path / "gpu.jsonl"
    prelude = """
from benchmarks import op_providers
formula = op_providers.naive_linear
op_providers.PROVIDERS["naive"] = lambda problem: op_providers.by_formula(
    lambda *args: formula(*args) * 1.1, op_providers.in_base_dtype(problem))
"""
    done = in_a_process(tmp_path, "--only=core", prelude=QUICKLY + prelude)
    assert done.returncode == 1 and "wrong: naive: lora_linear: M 128" in done.stderr
    by_name = {row["provider"]: row for row in rows_of(out)}
    assert by_name["naive"]["skipped"].startswith("not timed, its result is wrong: y")
    assert not by_name["naive"]["seconds"] and by_name["ours"]["seconds"]


def test_no_case_is_started_when_the_time_is_over(tmp_path):
    out = tmp_path / "gpu.jsonl"
    done = in_a_process(tmp_path, "--seconds=0")
    assert done.returncode == 0 and "12 cases left" in done.stderr and not out.exists()


def test_gpu_without_a_gpu_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu", f"--out={tmp_path / 'gpu.jsonl'}"]) == 2
    assert "sees no CUDA device here" in capsys.readouterr().err


def test_gpu_refuses_unknown_sections(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["gpu", f"--out={tmp_path / 'gpu.jsonl'}", "--only=core,fast"])
    assert stopped.value.code == 2 and "got fast" in capsys.readouterr().err


def test_a_case_whose_oracle_does_not_fit_is_recorded(tmp_path, monkeypatch):
    def measure_case(*args):
        raise MemoryError("no room for fp64")

    monkeypatch.setattr(gpu, "measure_case", measure_case)
    out = tmp_path / "gpu.jsonl"
    argv = ["gpu", f"--out={out}", "--dry-run", "--only=core", "--child"]
    threads = torch.get_num_threads()
    try:
        assert main(argv) == 0
    finally:
        torch.set_num_threads(threads)
    assert {row["skipped"] for row in rows_of(out)} == {"MemoryError: no room for fp64"}


# ---- providers


def test_naive_fp32_is_pefts_default(monkeypatch):
    pytest.importorskip("peft")
    case = LinearCase(m=24, k=40, n=56, dtype="bf16", rank=4)
    problem = problem_of(case, 0)
    results = [
        op.results_of(op_providers.PROVIDERS[name](problem), problem.dy).values()
        for name in ("peft", "naive-fp32")
    ]
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_a_forced_strategy_holds_for_shipped_cells_too(monkeypatch):
    shipped = {"key": {"strategy": "hybrid", "gemm": {"num_stages": 4}}}
    monkeypatch.setattr(tiles, "shipped_cells", lambda name: shipped)
    with op_providers.around("triton-fused", torch.device("cpu")):
        cells_in_use = tiles._replacement
        assert cells_in_use["key"] == {"strategy": "fused", "gemm": {"num_stages": 4}}
        assert cells_in_use["*"] == {"strategy": "fused"}
    assert shipped["key"]["strategy"] == "hybrid" and tiles._replacement is None


def test_the_strategy_is_forced_in_forward_and_backward(monkeypatch):
    seen = []

    def our_call(problem):
        lora_a = problem.lora_a.clone().requires_grad_()

        class Spy(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, a):
                seen.append(tiles._replacement)
                return x @ torch.randn(case.k, case.n)

            @staticmethod
            def backward(ctx, dy):
                seen.append(tiles._replacement)
                return torch.zeros(case.m, case.k), torch.zeros_like(lora_a)

        return Call(lambda: Spy.apply(problem.x, lora_a), [problem.x, lora_a])

    monkeypatch.setitem(op_providers.PROVIDERS, "triton-fused", our_call)
    case = LinearCase(m=8, k=4, n=6, dtype="fp32", rank=2)
    timed = op.Op(case, "triton-fused", [problem_of(case, 0)])
    timed.warm_up()
    timed.run()
    timed.peak()
    assert len(seen) == 6 and all(cells["*"] == {"strategy": "fused"} for cells in seen)
    assert tiles._replacement is None


# ---- the layer

LAYER = LayerCase(device="cpu", dtype="fp32", **layer.SMALL)


def test_the_layer_is_llamas():
    """Against transformers' decoder layer with the same weights."""
    transformers = pytest.importorskip("transformers")
    case = LAYER
    config = transformers.LlamaConfig(
        hidden_size=case.hidden, num_attention_heads=case.heads, rms_norm_eps=1e-5,
        num_key_value_heads=case.kv_heads, intermediate_size=case.intermediate,
        num_hidden_layers=1, vocab_size=8, attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    model = transformers.LlamaModel(config)
    weights = layer.base_weights(case)
    theirs = dict(model.layers[0].named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            (target,) = (p for key, p in theirs.items() if key.endswith(f"{name}_proj.weight"))
            target.copy_(weight)
    x = torch.randn(case.batch, case.length, case.hidden)
    ours = layer.DecoderLayer(case, weights, layer.PROVIDERS["frozen"])(x)
    position = model.rotary_emb(x, torch.arange(case.length)[None])
    hidden = model.layers[0](x, position_embeddings=position, attention_mask=None)
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    torch.testing.assert_close(ours, hidden)


def test_layer_providers_agree_and_the_adapters_do_something():
    pytest.importorskip("peft")
    names = ["frozen", "naive", "naive-fp32", "peft", "composed", "ours"]
    steps, skipped = layer.prepare(LAYER, names)
    assert list(steps) == names and not skipped
    loss = {name: step.first_loss for name, step in steps.items()}
    for name in names[2:]:
        assert loss[name] == pytest.approx(loss["naive"], rel=1e-4)
    assert abs(loss["frozen"] - loss["naive"]) > 1e-6
    samples = measure.interleave({name: step.run for name, step in steps.items()}, 2)
    assert all(
        sample["step"] == sample["forward"] + sample["backward"] for sample in samples["ours"]
    )
    assert len(steps["frozen"]._trained) == 0 and len(steps["ours"]._trained) == 14


def test_layer_saves_less_than_naive_and_makes_rows():
    case = replace(LAYER, dropout=0.1, dtype="bf16", length=64)
    meta = {
        "device": "a",
        "device_type": "cpu",
        "threads": 1,
        "extension": "",
        "versions": {"torch": "2"},
    }
    meta["time"] = "now"
    names = ["frozen", "naive", "ours", "triton-fused"]
    rows = driver.measure_case("layer", case, names, meta, 2, memory=False)
    found = {row["provider"]: row for row in rows}
    assert found["ours"]["saved_bytes"] < found["naive"]["saved_bytes"]
    assert found["triton-fused"]["skipped"] and found["ours"]["case"] == asdict(case)
    assert math.isfinite(found["ours"]["over_frozen"]["step"]["median"])
    assert "decoder layer" in report.markdown(list(found.values()))


@pytest.mark.parametrize(
    ("what", "broken"),
    [
        ("y", lambda x, w, a, b, s, p: layer.naive_linear(x, w, a, b, 1.1 * s, p)),
        ("", lambda x, w, a, b, s, p: layer.naive_linear(x, w, a, b.detach(), s, p) + 0 * b.sum()),
    ],
    ids=["scaled", "no gradient"],
)
def test_a_wrong_layer_is_not_timed(what, broken, monkeypatch):
    monkeypatch.setitem(layer.PROVIDERS, "broken", layer.LayerProvider(broken))
    steps, skipped = layer.prepare(LAYER, ["frozen", "broken"])
    assert list(steps) == ["frozen"]
    assert skipped["broken"].startswith(f"not timed, its result is wrong: {what}")
