"""The cells of the GPU benchmark, the resumable grid, and the decoder layer."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from lora_kernels.bench.case import LayerCase, OpCase

from lora_kernels.__main__ import main
from lora_kernels.bench import cells, grid, layer, op, providers, report
from lora_kernels.measuring import timing as measure
from lora_kernels.ops.linear.triton import tiles

PROVIDERS = "--providers=frozen,naive,composed"
SMALL = ["bench", "grid", "--device=cpu", "--shrink=512", "--no-memory", "--reps=2"]


def test_core_and_grid_are_what_the_issue_names():
    core, full = cells.core(), cells.grid()
    assert len(core) == len(set(core)) == 24 and full[:24] == core
    assert len(full) == len(set(full))
    linears = {(case.k, case.n) for case in full}
    assert len(linears) == 9 and (8192, 28672) in linears and (5120, 5120) in linears
    combinations = {(c.m, c.rank, c.dropout, c.k, c.n) for c in full}
    assert len(combinations) == 4 * 4 * 2 * 9
    assert (core[0].m, core[0].k, core[0].n, core[0].rank) == (8192, 4096, 4096, 16)
    assert all(case.dtype == "bf16" and case.scaling == 2 for case in full)


@pytest.fixture
def three_cells(monkeypatch):
    monkeypatch.setitem(grid.CELLS, "core", lambda *args: cells.core(*args)[:3])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_grid_goes_on_where_it_stopped(three_cells, tmp_path, monkeypatch, capsys):
    out = tmp_path / "grid.jsonl"
    argv = [*SMALL, "--cells=core", PROVIDERS, f"--out={out}"]
    clock = iter([0.0, 0.0, 61.0])
    monkeypatch.setattr(grid.time, "monotonic", lambda: next(clock))
    assert main([*argv, "--minutes=1"]) == 0
    assert "2 cells left" in capsys.readouterr().err
    assert [row["provider"] for row in rows(out)] == ["frozen", "naive", "composed"]
    first = rows(out)

    monkeypatch.setattr(grid.time, "monotonic", lambda: 0.0)
    assert main(argv) == 0
    assert "3 cells, 1 of them" in capsys.readouterr().err
    assert rows(out)[:3] == first and len(rows(out)) == 9
    assert str(tmp_path) not in out.read_text()

    # Another provider needs the whole cell again: ratios are taken within a repetition.
    assert main([*argv, PROVIDERS + ",naive-fp32"]) == 0
    assert len(rows(out)) == 12 and rows(out)[0]["meta"] != first[0]["meta"]
    assert main(argv) == 0
    assert "3 cells, 3 of them" in capsys.readouterr().err


def test_grid_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "grid"]) == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_grid_refuses_unknown_providers(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "grid", "--providers=fast"])
    assert stopped.value.code == 2 and "got fast" in capsys.readouterr().err


# ---- providers


def test_naive_fp32_is_pefts_default(monkeypatch):
    pytest.importorskip("peft")
    case = OpCase(m=24, k=40, n=56, dtype="bf16", rank=4)
    inputs = op.make_inputs(case, 0)
    results = []
    for name in ("peft", "naive-fp32"):
        call = providers.OP_PROVIDERS[name](inputs, case)
        y = call.forward()
        results.append([y, *torch.autograd.grad(y, call.leaves, inputs.dy)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_a_forced_strategy_holds_for_shipped_cells_too(monkeypatch):
    shipped = {"key": {"strategy": "hybrid", "gemm": {"num_stages": 4}}}
    monkeypatch.setattr(tiles, "shipped_cells", lambda name: shipped)
    with providers.forced_strategy("fused", torch.device("cpu")):
        cells_in_use = tiles._replacement
        assert cells_in_use["key"] == {"strategy": "fused", "gemm": {"num_stages": 4}}
        assert cells_in_use["*"] == {"strategy": "fused"}
    assert shipped["key"]["strategy"] == "hybrid" and tiles._replacement is None


def test_the_strategy_is_forced_in_forward_and_backward(monkeypatch):
    seen = []

    def our_op(inputs, case, backend):
        lora_a = inputs.lora_a.clone().requires_grad_()

        class Spy(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, a):
                seen.append(tiles._replacement)
                return x @ torch.randn(case.k, case.n)

            @staticmethod
            def backward(ctx, dy):
                seen.append(tiles._replacement)
                return torch.zeros(case.m, case.k), torch.zeros_like(lora_a)

        return providers.Call(lambda: Spy.apply(inputs.x, lora_a), [inputs.x, lora_a])

    monkeypatch.setattr(providers, "our_op", our_op)
    case = OpCase(m=8, k=4, n=6, dtype="fp32", rank=2)
    timed = op.Op(case, "triton-fused", [op.make_inputs(case, 0)])
    timed.warm_up()
    timed.run()
    timed.peak()
    assert len(seen) == 6 and all(cells["*"] == {"strategy": "fused"} for cells in seen)
    assert tiles._replacement is None


# ---- the layer

LAYER = layer.small(LayerCase(device="cpu", dtype="fp32", rank=4))


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
    names = ["frozen", "naive", "naive-fp32", "composed", "ours"]
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
    from lora_kernels.bench.rows import measure_case

    case = replace(LAYER, dropout=0.1, dtype="bf16", length=64)
    meta = {"device": "a", "device_type": "cpu", "threads": 1, "versions": {"torch": "2"}}
    meta["time"] = "now"
    names = ["frozen", "naive", "ours", "triton-fused"]
    found = {row["provider"]: row for row in measure_case("layer", case, names, meta, 2, True)}
    assert found["ours"]["saved_bytes"] < found["naive"]["saved_bytes"]
    assert found["triton-fused"]["skipped"] and found["ours"]["case"] == asdict(case)
    assert math.isfinite(found["ours"]["over_frozen"]["step"]["median"])
    assert "decoder layer" in report.markdown(list(found.values()))
