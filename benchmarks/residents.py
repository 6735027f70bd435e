"""What a batch and a change of adapters cost beside many adapters that they do not use.

    python benchmarks/residents.py [--out results.json]

One layer of 2048 x 2048, a batch of 8 tokens with 8 names: calls beside 8, 1,000 and 10,000
residents, interleaved; the time to add one. And SmolLM2-135M's 210 layers: the time to load an
adapter beside none and beside 64, next to PEFT's.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from lora_kernels import AdapterBank, AdapterSlots, Routing, route, routed_lora_linear

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.provenance import meta

WIDTH, RANK, NAMES = 2048, 8, [f"n{index}" for index in range(8)]


def seconds_of(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def summary(samples: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(samples, n=4)
    return {"median": middle, "quartiles": [low, high], "count": len(samples)}


def one_layer(residents: tuple[int, ...], repetitions: int) -> dict:
    """Calls and additions, in seconds, by the number of residents."""
    x, weight = torch.randn(len(NAMES), WIDTH), torch.randn(WIDTH, WIDTH) * WIDTH**-0.5
    used = torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)
    small = torch.randn(1, WIDTH), torch.randn(WIDTH, 1)
    banks = {}
    for count in residents:
        bank = banks[count] = AdapterBank(WIDTH, WIDTH, slots=AdapterSlots())
        for index in range(count):
            bank.add(f"n{index}", *(used if index < len(NAMES) else small), 1.0, trainable=False)
    calls = {count: {"call": [], "routing and call": [], "add": []} for count in residents}
    routings = {c: Routing.from_sequences(NAMES, 1, bank) for c, bank in banks.items()}
    with torch.no_grad():
        for repetition in range(repetitions + 3):
            for count, bank in banks.items():
                found = {
                    "call": seconds_of(
                        lambda b=bank, c=count: routed_lora_linear(x, weight, b, routings[c])
                    ),
                    "routing and call": seconds_of(
                        lambda b=bank: routed_lora_linear(
                            x, weight, b, Routing.from_sequences(NAMES, 1, b)
                        )
                    ),
                    "add": seconds_of(
                        lambda b=bank: b.add("another", *small, 1.0, trainable=False)
                    ),
                }
                bank.remove("another")
                if repetition >= 3:
                    for what, took in found.items():
                        calls[count][what].append(took)
    few = calls[residents[0]]
    return {
        str(count): {
            what: {
                **summary(samples),
                "ratio": statistics.median(
                    own / least for own, least in zip(samples, few[what], strict=True)
                ),
            }
            for what, samples in found.items()
        }
        for count, found in calls.items()
    }


def whole_model(repetitions: int) -> dict:
    """Loads of an adapter of all 210 linear layers, beside none, beside 64, and PEFT's."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    settings = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, settings)
        wrapped.save_pretrained(folder)
        samples = {"none": [], "64": [], "peft": []}
        for index in range(repetitions):
            samples["peft"].append(
                seconds_of(lambda i=index: wrapped.load_adapter(folder, f"more{i}"))
            )
            wrapped.delete_adapter(f"more{index}")
        model = wrapped.unload()
        routed = {
            count: route(AutoModelForCausalLM.from_config(config)) for count in ("none", "64")
        }
        for index in range(64):
            routed["64"].load(f"resident{index}", folder)
        for _ in range(repetitions):
            for count, each in routed.items():
                samples[count].append(seconds_of(lambda r=each: r.load("another", folder)))
                each.remove("another")
    none = statistics.median(samples["none"][1:])  # the first one wraps the layers
    return {
        **{what: summary(each[1:]) for what, each in samples.items()},
        "first load": samples["none"][0],
        "beside 64 / beside none": statistics.median(samples["64"][1:]) / none,
        "beside 64 / PEFT's": statistics.median(samples["64"][1:])
        / statistics.median(samples["peft"][1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--residents", type=int, nargs="+", default=[8, 1000, 10_000])
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    found = {
        "one layer": one_layer(tuple(arguments.residents), arguments.repetitions),
        "whole model": whole_model(max(4, arguments.repetitions // 4)),
    }
    for count, entries in found["one layer"].items():
        for what, entry in entries.items():
            took = f"{entry['median'] * 1e6:8.0f} us, {entry['ratio']:.2f} of few"
            print(f"{count:>6} residents, {what:17} {took}")
    for what, entry in found["whole model"].items():
        print(f"{what}: {entry if isinstance(entry, float) else entry['median']:.4f}")
    if arguments.out is not None:
        facts = meta(torch.device("cpu"), "python benchmarks/residents.py")
        arguments.out.write_text(json.dumps({"meta": facts, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
