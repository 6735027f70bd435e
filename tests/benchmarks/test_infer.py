"""The inference benchmark: what is timed computes what its name says, and its bounds hold."""

import json
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from torch.nn import functional as F

import lora_kernels
from benchmarks import driver, infer, infer_providers, infer_report, infer_serving, report
from benchmarks.__main__ import main
from benchmarks.infer_providers import PROVIDERS, Provider, Served

CASE = infer.InferCase(
    batch=3, prompt=7, new_tokens=2, rank=4, alpha=6, weights="random", layers=2, hidden=32,
    heads=4, kv_heads=2, intermediate=48, vocab=96,
)  # fmt: skip
OTHERS = ("base", "base-copy", "bottleneck")  # of other functions than the formula
ROWS = ("peft-rows", "ours-rows", "routed-rows")


@pytest.fixture
def model():
    return infer.base_model(CASE)


@pytest.fixture
def adapters(model):
    return infer_providers.draw_adapters(model, CASE.rank, CASE.batch)


def served(name, model, adapters):
    provider = PROVIDERS[name]
    used = adapters if provider.row_by_row else adapters[:2]
    return provider.serve(infer.copy_for(provider, model), used, CASE.scaling)


# ---- what is computed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_provider_computes_what_its_name_says(dtype):
    case = replace(CASE, dtype=dtype)
    timed, skipped = infer.prepare(case, list(PROVIDERS))
    assert skipped == {} and list(timed) == list(PROVIDERS)
    loss = {name: one.first_loss for name, one in timed.items()}
    rounding = {"fp32": 1e-5, "bf16": 1e-2}[dtype]
    for name, value in loss.items():
        if name not in OTHERS:
            rival = loss["peft-rows" if name in ROWS else "naive"]
            assert value == pytest.approx(rival, rel=rounding), name
    assert loss["base"] == loss["base-copy"]
    assert len({round(loss[name], 4) for name in ("base", "bottleneck", "peft", "peft-rows")}) == 4


def test_a_run_times_the_prompt_each_token_and_where_there_is_one_the_switch():
    names = ["base", "merged", "merged-switched", "ours", "routed-rows"]
    timed, _ = infer.prepare(CASE, names)
    samples = {name: one.run() for name, one in timed.items()}
    for name in ("base", "merged", "routed-rows"):
        assert set(samples[name]) == {"prefill", "token"}
    for name in ("merged-switched", "ours"):
        assert set(samples[name]) == {"prefill", "token", "switch", "switch and token"}
        assert samples[name]["switch and token"] > samples[name]["switch"] > 0


def test_a_token_is_the_mean_of_those_after_the_prompt(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(infer_serving.timing.time, "perf_counter", lambda: 2.0 ** next(ticks))
    timed, _ = infer.prepare(CASE, ["naive"])
    ticks = iter(range(1000))
    # start 1, prefill 2, tokens 4; then twice start, switch, token: 8 16 32, 64 128 256.
    assert timed["naive"].run() == {
        "prefill": 1.0, "token": 2.0 / CASE.new_tokens,
        "switch": (8.0 + 64.0) / 2, "switch and token": (8.0 + 64.0 + 16.0 + 128.0) / 2,
    }  # fmt: skip


def test_the_cache_grows_by_a_token_at_a_time(model, adapters):
    one = served("ours", model, adapters)
    seen = []
    one.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (
                kwargs["input_ids"].shape[1],
                cache.get_seq_length() if (cache := kwargs.get("past_key_values")) else 0,
            )
        ),
        with_kwargs=True,
    )
    ids = infer.token_ids(CASE, CASE.vocab)
    infer_serving.Inference(PROVIDERS["ours"], one, ids, CASE.new_tokens).run()
    assert seen == [(CASE.prompt, 0), *((1, CASE.prompt + i) for i in range(4))]


def test_the_oracle_has_no_fp32_in_it(model, adapters):
    ids = infer.token_ids(CASE, CASE.vocab)
    expected = infer_serving.Expected(model, adapters, CASE.scaling, ids)
    seen = set()
    for module in expected._oracle.model.modules():
        if isinstance(module, (torch.nn.RMSNorm, torch.nn.Linear)):
            module.register_forward_hook(lambda module, args, y: seen.add((args[0].dtype, y.dtype)))
    names = {type(module).__name__ for module in expected._oracle.model.modules()}
    assert "LlamaRMSNorm" not in names
    infer_serving.logits_of(expected._oracle, ids)
    assert seen == {(torch.float64, torch.float64)}


# ---- what is wrong is not timed


def _scaled(model, adapters, scaling):
    return infer_providers.naive(model, adapters, scaling * (1 + 1e-3))


def _never_switches(model, adapters, scaling):
    return replace(infer_providers.naive(model, adapters, scaling), switch=lambda index: None)


def _never_comes_back(model, adapters, scaling):
    made = infer_providers.naive(model, adapters, scaling)
    return replace(made, switch=lambda index: made.switch(1))


def _not_a_number(model, adapters, scaling):
    return infer_providers.naive(model, adapters, float("nan"))


def _rows_exchanged(model, adapters, scaling):
    return infer_providers.routed(model, adapters[::-1], scaling, row_by_row=True)


def _no_cache(model, adapters, scaling):
    made = infer_providers.naive(model, adapters, scaling)
    forward = made.model.forward

    def forgets(past_key_values=None, **options):
        return forward(**options)

    made.model.forward = forgets
    return made


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (Provider(_scaled), "logits with adapter 0"),
        (Provider(_never_switches), "logits with adapter 1"),
        (Provider(_never_comes_back), "logits with adapter 0"),
        (Provider(_not_a_number), "logits with adapter 0"),
        (Provider(_rows_exchanged, row_by_row=True), "logits with an adapter for each row"),
        (Provider(_no_cache), "logits with adapter 0"),
        (Provider(infer_providers.base), "logits with adapter 0"),
    ],
    ids=["scaled", "never switches", "never comes back", "nan", "rows exchanged", "no cache",
         "no adapter"],
)  # fmt: skip
def test_a_provider_with_wrong_logits_is_not_timed(broken, what, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "broken", broken)
    timed, skipped = infer.prepare(CASE, ["base", "broken"])
    assert list(timed) == ["base"]
    assert skipped["broken"].startswith(f"not timed, its result is wrong: {what}")


def test_what_peft_serves_is_not_timed_as_ours(monkeypatch):
    accelerate = lora_kernels.accelerate

    def with_a_hook(model):
        layer = model.base_model.model.model.layers[1].mlp.up_proj
        layer.lora_A["adapter0"].register_forward_hook(lambda *args: None)
        return accelerate(model)

    monkeypatch.setattr(lora_kernels, "accelerate", with_a_hook)
    timed, skipped = infer.prepare(CASE, ["base", "ours"])
    assert list(timed) == ["base"]
    assert "not timed" in skipped["ours"] and "up_proj is left to PEFT" in skipped["ours"]


def test_a_provider_that_fails_is_skipped_with_its_reason(monkeypatch):
    def broken(model, adapters, scaling):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(PROVIDERS, "broken", Provider(broken))
    timed, skipped = infer.prepare(CASE, ["base", "broken"])
    assert list(timed) == ["base"] and skipped == {"broken": "RuntimeError: no such kernel"}


# ---- whose weights


def test_no_provider_writes_to_the_weights_that_others_read(model, adapters):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {p.data_ptr() for p in model.parameters()}
    for name, provider in PROVIDERS.items():
        one = served(name, model, adapters)
        ids = infer.token_ids(CASE, CASE.vocab)
        infer_serving.Inference(provider, one, ids, CASE.new_tokens).run()
        shared = weights & {p.data_ptr() for p in one.model.parameters()}
        assert not shared if provider.own_weights else shared, name
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key]), (name, key)


def test_the_adapters_are_small_against_the_weights_and_not_zero(model, adapters):
    for name, (lora_a, lora_b) in adapters[0].items():
        weight = model.get_submodule(name).weight
        added = CASE.scaling * (lora_b @ lora_a)
        assert 0.01 < added.norm() / weight.norm() < 10
        assert not torch.equal(lora_a, adapters[1][name][0])


def test_a_bottleneck_is_houlsbys_and_as_large_as_an_adapter(model, adapters):
    one = served("bottleneck", model, adapters)
    found = [m for m in one.model.modules() if isinstance(m, infer_providers.Bottleneck)]
    assert len(found) == 2 * CASE.layers
    parameters = sum(p.numel() for module in found for p in module.parameters())
    lora = sum(factor.numel() for pair in adapters[0].values() for factor in pair)
    step = 2 * CASE.hidden * len(found)  # of a width larger by one
    assert abs(parameters - lora) <= step

    block = one.model.model.layers[0]
    x = torch.randn(2, 5, CASE.hidden)
    alone, added = block.self_attn.o_proj
    y = alone(x)
    below = F.gelu(F.linear(y, added.down.weight, added.down.bias))
    by_hand = y + F.linear(below, added.up.weight, added.up.bias)
    torch.testing.assert_close(block.self_attn.o_proj(x), by_hand)
    assert isinstance(block.mlp.down_proj[1], infer_providers.Bottleneck)


# ---- numbers


def test_bounds_hold_the_median_as_often_as_they_say():
    generator = torch.Generator().manual_seed(5)
    held = 0
    for _ in range(200):
        values = (1.1 + 0.05 * torch.randn(15, generator=generator)).tolist()
        found = infer_report.bounded(values)
        assert min(values) <= found["low"] <= found["median"] <= found["high"] <= max(values)
        held += found["low"] <= 1.1 <= found["high"]
    assert 180 <= held <= 199
    assert infer_report.bounded([2.0] * 5) == dict.fromkeys(
        ("median", "q1", "q3", "low", "high"), 2
    )


def test_ratios_are_taken_within_a_repetition():
    slow = [{"token": seconds, "switch": 1.0} for seconds in (10.0, 30.0, 10.0, 40.0, 40.0)]
    base = [{"token": sample["token"] / 2} for sample in slow]
    base[4]["token"] = 10.0
    found = infer_report.ratios(slow, base)
    assert set(found) == {"token"} and found["token"]["median"] == 2.0


def rows(reps=6, **seconds):
    """Rows of providers whose every repetition took so long."""
    samples = {name.replace("_", "-"): [{"token": value}] * reps for name, value in seconds.items()}
    meta = {
        "device": "a CPU", "threads": 2, "versions": {"torch": "2"}, "time": "now", "load": 0.1,
    }  # fmt: skip
    skipped = {"naive": "not timed: wrong"}
    details = infer.compared(samples)
    return report.rows_of("infer", CASE, meta, samples, skipped, details)


def test_claims_say_what_the_bounds_allow_and_no_more():
    said = infer_report.claims(
        rows(base=1.0, merged=1.0, merged_peft=1.2, peft=2.0, ours=1.0, routed=3.0)
    )
    assert said == [
        "merged / base: token 1.000 [1.000, 1.000], no difference shown.",
        "merged-peft / base: token 1.200 [1.200, 1.200], slower.",
        "peft / ours: token 2.000 [2.000, 2.000], faster.",
        "peft / routed: token 0.667 [0.667, 0.667], slower.",
    ]


def test_few_repetitions_claim_nothing():
    (said,) = infer_report.claims(rows(reps=5, base=1.0, merged=1.2))
    assert said == "Of fewer than 6 repetitions the bounds hold less than they say."


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.9, 0.99, "less"), (0.9, 1.0, "no difference shown"), (1.0, 1.1, "no difference shown"),
     (1.01, 1.1, "more")],
)  # fmt: skip
def test_a_verdict_needs_both_bounds_on_one_side(low, high, said):
    spread = {"median": (low + high) / 2, "low": low, "high": high}
    found = infer_report.verdicts({"token": spread, "switch": spread}, "more", "less")
    assert found.endswith(f"], {said}") and found.count("[") == 1


def test_the_table_has_a_line_for_each_provider_and_the_reason_of_those_without(capsys):
    report.print_case(rows(base=1.0, ours=1.25), infer.shown)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == CASE.title
    assert lines[2].startswith("base") and "1.000 [1.000, 1.000]" in lines[2]
    assert lines[3].startswith("ours") and "1.250 [1.250, 1.250]" in lines[3]
    assert lines[4].rstrip().split(maxsplit=1) == ["naive", "skipped: not timed: wrong"]
    assert "a CPU, 2 threads" in lines[5] and "95 % confidence" in lines[5]


def test_the_pages_have_the_same_table():
    drawn = report.markdown(rows(base=1.0, ours=1.25), driver.shown_by("infer"))
    assert "| / base | token | / base | PEFT / (token) |" in drawn
    assert "| ours | - | - | 1.25 s | 1.250 [1.250, 1.250] |" in drawn
    assert "95 % confidence" in drawn and "peak of run" not in drawn


def test_the_memory_of_those_that_were_measured_is_shown():
    found = rows(base=1.0, ours=1.25)
    held = {"tensor_bytes": 3000, "step_bytes": 20, "switch_bytes": None, "method": "VmHWM"}
    found[0]["memory"] = held
    headers, cells, notes = infer.shown(found)
    assert headers[-3:] == ["tensors", "peak of run", "peak of switch"]
    assert [line[-3:] for line in cells[:2]] == [["3.00 kB", "20 B", "-"], ["-", "-", "-"]]
    assert len(headers) == len(cells[2]) and "(VmHWM)" in notes[1]


# ---- memory and the command


def command(*more: str, **changed) -> list[str]:
    """What asks for the small case, or for another."""
    values = {name: value for name, value in asdict(CASE).items() if name != "device"} | changed
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return ["infer", *options, "--device=cpu", "--reps=2", *more]


def test_tensor_bytes_counts_a_storage_once():
    before = infer_serving.tensor_bytes()
    kept = torch.zeros(1000)
    others = [  # views, and what else may live in the process
        kept[10:],
        torch.nn.Parameter(kept),
        torch.sparse_coo_tensor(size=(3, 3)),
        torch._to_functional_tensor(kept[:3]),
        torch.zeros(3, device="meta"),
    ]
    torch.vmap(lambda row: others.append(row) or row * 2)(kept[:10])
    assert infer_serving.tensor_bytes() - before == 4000


def test_the_command_writes_rows_with_the_memory_of_a_provider(tmp_path, capsys, model):
    out = tmp_path / "infer.jsonl"
    assert main(command("--threads=1", "--providers=merged-switched", f"--out={out}")) == 0
    (row,) = report.read_rows(out)
    assert (row["kind"], row["case"], row["provider"]) == ("infer", asdict(CASE), "merged-switched")
    assert row["reps"] == 2 and len(row["seconds"]["token"]["samples"]) == 2
    assert row["meta"]["device"] and row["meta"]["command"].startswith("python -m benchmarks infer")
    assert str(tmp_path) not in json.dumps(row)
    assert "skipped" not in capsys.readouterr().out
    # The frozen weights and the merged ones beside them; the adapter, and both to switch between.
    linears = infer_providers.linears_of(model).values()
    adapter = sum(4 * CASE.rank * (layer.in_features + layer.out_features) for layer in linears)
    expected = sum(p.nbytes for p in model.parameters()) + 3 * adapter
    expected += sum(linear.weight.nbytes for linear in linears)
    assert 0 <= row["memory"]["tensor_bytes"] - expected < 2048
    assert row["memory"]["switch_bytes"] >= 0


def test_without_memory_there_is_no_other_process(tmp_path, monkeypatch):
    monkeypatch.setattr(driver.subprocess, "run", None)
    out = tmp_path / "infer.jsonl"
    more = ["--providers=base,naive", "--no-memory", f"--out={out}"]
    assert main(command(*more, batch="1,2")) == 0
    found = report.read_rows(out)
    assert [(row["case"]["batch"], row["provider"]) for row in found] == [
        (1, "base"), (1, "naive"), (2, "base"), (2, "naive"),
    ]  # fmt: skip
    for row in found:
        assert row["memory"] is None
        assert row["over_base"]["token"]["low"] <= row["over_base"]["token"]["high"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--providers=base,mine"], "--providers: expected names of base,"),
        (["--weights=mine"], "--weights: expected smollm2 or random, got 'mine'"),
        (["--hidden=100"], "--hidden must be a multiple of --heads"),
    ],
    ids=["providers", "weights", "heads"],
)
def test_a_wrong_option_is_named(argv, said, capsys, monkeypatch):
    monkeypatch.setattr(driver, "run", lambda *args: 0)
    with pytest.raises(SystemExit):
        main(["infer", *argv])
    assert said in capsys.readouterr().err


def test_the_default_is_a_prompt_and_many_with_an_adapter_for_all_rows():
    cases = infer.default_cases("cpu")
    assert [case.batch for case in cases] == [1, 16]
    for case in cases:
        assert case.dtype == "fp32" and not set(ROWS) & set(infer.default_providers(case))
    assert {case.dtype for case in infer.default_cases("cuda:1")} == {"bf16"}


def test_a_served_model_needs_no_switch():
    one = Served(torch.nn.Identity())
    assert one.switch is None and one.why_not() is None
