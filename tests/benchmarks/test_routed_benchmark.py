"""`routed`: its rows, its ratios, and that it refuses a provider whose result is wrong."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import report, routed
from benchmarks.__main__ import main
from benchmarks.routed import RoutedCase, hold_to_policy, make_inputs
from benchmarks.routed_providers import OTHER_FUNCTIONS, PROVIDERS

SMALL = RoutedCase(sequences=6, tokens=3, k=40, slices=(24, 16), adapters=4, ranks=(2, 5, 3))
ELSEWHERE = ("triton", "triton-fused")
ON_CPU = [n for n in PROVIDERS if n not in (*ELSEWHERE, *OTHER_FUNCTIONS)]


def test_the_command_writes_a_row_per_provider_with_the_adapters_part(tmp_path, capsys):
    out = tmp_path / "routed.jsonl"
    options = "--sequences 6 --tokens 2 --k 32 --slices 24+8 --adapters 3 --ranks 2+5 --reps 3"
    names = "--dtype fp32 --device cpu --no-memory --providers frozen,peft,composed"
    assert main(["routed", *options.split(), *names.split(), f"--out={out}"]) == 0
    rows = {row["provider"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["frozen", "peft", "composed"]
    assert rows["composed"]["title"] == (
        "routed, inference: 6x2 tokens, 3 fp32 adapters of r 2-5, 32 to 24+8, fp32"
    )
    frozen = rows["frozen"]["seconds"]["layer"]["samples"]
    for name in ("peft", "composed"):
        seconds = rows[name]["seconds"]
        for layer, part, base in zip(
            seconds["layer"]["samples"], seconds["part"]["samples"], frozen, strict=True
        ):
            assert part == pytest.approx(layer - base)
    assert "part" not in rows["frozen"]["seconds"]
    assert "part" in rows["composed"]["peft_over"]
    assert "| composed |" in report.markdown(list(rows.values()))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ON_CPU)
def test_every_provider_computes_the_same_function(name, dtype):
    case = replace(SMALL, dtype=dtype)
    inputs = make_inputs(case, seed=3)
    if name == "grouped-mm" and dtype == "fp32":
        pytest.skip("torch._grouped_mm takes bf16 only")
    hold_to_policy(case, PROVIDERS[name](inputs, case), inputs)


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("name", ["naive", "composed"])
def test_gradients_are_compared_in_training(name, base):
    case = replace(SMALL, train=True, dtype="fp32", base=base)
    inputs = make_inputs(case, seed=3)
    call = PROVIDERS[name](inputs, case)
    assert len(call.leaves) == 1 + 2 * 2 * 4
    hold_to_policy(case, call, inputs)


def test_a_forgotten_scaling_is_noticed():
    case = replace(SMALL, dtype="bf16")
    inputs = make_inputs(case, seed=3)
    forgetful = replace(inputs, scaling=[1.0] * case.adapters)
    with pytest.raises(AssertionError, match="y: maximum error"):
        hold_to_policy(case, PROVIDERS["naive"](forgetful, case), inputs)


def test_the_last_adapter_is_noticed():
    case = replace(SMALL, dtype="fp32", train=True)
    inputs = make_inputs(case, seed=3)
    other = [*inputs.lora_b[:-1], [torch.zeros_like(b) for b in inputs.lora_b[-1]]]
    call = PROVIDERS["naive"](replace(inputs, lora_b=other), case)
    with pytest.raises(AssertionError, match="y: maximum error"):
        hold_to_policy(case, call, inputs)


def test_without_a_base_the_part_is_the_whole():
    case = replace(SMALL, base=False)
    samples = {"composed": [{"layer": 2.0}, {"layer": 3.0}]}
    routed.derive(case, samples)
    assert [sample["part"] for sample in samples["composed"]] == [2.0, 3.0]


def test_a_provider_that_cannot_run_here_is_skipped_with_its_reason():
    layers, skipped = routed.prepare(replace(SMALL, train=True), ["peft", "naive"])
    assert list(layers) == ["naive"]
    assert skipped == {"peft": "Unavailable: PEFT refuses mixed batches in training"}
