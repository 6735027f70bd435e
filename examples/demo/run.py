"""The demo from beginning to end."""

import argparse
import math
from copy import deepcopy
from itertools import islice

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

import lora_kernels
from demo.adapters import adapter_bytes, save_adapter
from demo.base import load_base, load_tokenizer
from demo.generate import generate
from demo.joint import run_joint
from demo.progress import elapsed, keep_interrupts, progress, quieten, say
from demo.report import FILES, cost_table, joint_table, loss_table, write_report
from demo.results import BASE, Results
from demo.settings import ROUNDING, Settings, settings_from
from demo.step_cost import PROVIDERS, measure_peaks, time_steps
from demo.texts import Text, load_texts
from demo.train import add_adapter, held_out_loss, shuffled_batches, train


def run(options: argparse.Namespace) -> int:
    """Does it all; returns the exit code."""
    quieten()
    keep_interrupts()
    settings = settings_from(**vars(options))
    settings.adapters.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # of an earlier run: they would stand beside this one's adapters
        (settings.out / name).unlink(missing_ok=True)

    dtype = str(settings.dtype).removeprefix("torch.")
    say(f"SmolLM2-135M-Instruct on {settings.device} in {dtype}, {settings.steps} steps per text")
    with progress("Loading", 3) as advance:
        tokenizer = load_tokenizer()
        advance("tokenizer")
        base = load_base(settings.device, settings.dtype)
        advance("weights, unpacked")
        results = Results(load_texts(tokenizer, settings.length, settings.held_out))
        advance("texts")
    for text in results.texts:
        tokens = f"{text.train.numel():,} training and {text.held_out.numel():,} held-out tokens"
        say(f"{text.title}: {tokens}")

    measure_base(base, tokenizer, settings, results)
    for text in results.texts:
        train_adapter(base, text, settings, results)
    for text in results.texts:
        use_adapter(base, tokenizer, text, settings, results)
    if settings.joint:
        run_joint(base, tokenizer, settings, results)
    measure_steps(base, settings, results)
    results.seconds = elapsed()
    write_report(results, settings)
    return conclude(settings, results)


def measure_base(
    base: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Settings, results: Results
) -> None:
    """The base model's held-out losses, and what it writes."""
    row = results.losses[BASE] = {}
    with progress("Base model", 2 * len(results.texts)) as advance:
        for text in results.texts:
            row[text.name] = held_out_loss(base, text.held_out, settings)
            advance(f"{text.name}: held-out loss {row[text.name]:.4f}")
            written = generate(base, tokenizer, text.prompt, settings.new_tokens)
            results.written.append((text.name, BASE, written))
            advance(f"{text.name}: wrote {len(written)} characters")


def train_adapter(base: nn.Module, text: Text, settings: Settings, results: Results) -> None:
    """Trains the adapter of a text on a copy of the base, and saves it."""
    model = add_adapter(deepcopy(base), settings)
    report = lora_kernels.accelerate(model)
    if not results.acceleration:
        print(report, flush=True)
    base_loss = results.losses[BASE][text.name]
    with progress(f"Training {text.name}", settings.steps) as advance:
        curve = train(model, text, base_loss, settings, advance)
    report.refresh()
    results.acceleration = str(report)
    results.check(
        f"{text.name}: every layer was accelerated, in every step",
        bool(report.fast) and not report.delegated and not report.delegated_calls,
        f"{len(report.fast)} layers; {len(report.delegated)} left to PEFT, "
        f"{len(report.delegated_calls)} in some calls",
    )
    last = curve.held_out[-1][1]
    results.check(
        f"{text.name}: training lowered the held-out loss of its own text",
        math.isfinite(last) and last < base_loss,
        f"{base_loss:.4f} → {last:.4f}",
    )
    results.curves[text.name] = curve
    folder = settings.adapters / text.name
    save_adapter(model, folder)
    results.adapter_bytes[text.name] = adapter_bytes(folder)
    say(f"Saved {folder} ({results.adapter_bytes[text.name] / 2**20:.1f} MiB)")


def use_adapter(
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    settings: Settings,
    results: Results,
) -> None:
    """Loads the adapter of a text onto a copy of the base: plain, accelerated, merged, writing."""
    trained = results.curves[text.name].held_out[-1][1]
    row = results.losses[text.name] = {}
    with progress(f"Using {text.name}", 3 + len(results.texts)) as advance:
        model = PeftModel.from_pretrained(deepcopy(base), settings.adapters / text.name).eval()
        plain = held_out_loss(model, text.held_out, settings)
        advance(f"PEFT: {plain:.4f}")
        lora_kernels.accelerate(model)
        for other in results.texts:
            row[other.name] = held_out_loss(model, other.held_out, settings)
            advance(f"accelerated, on {other.name}: {row[other.name]:.4f}")
        loaded = row[text.name]
        merged_model = model.merge_and_unload()
        merged = held_out_loss(merged_model, text.held_out, settings)
        advance(f"merged: {merged:.4f}")
        written = generate(merged_model, tokenizer, text.prompt, settings.new_tokens)
        results.written.append((text.name, f"{text.name}, merged", written))
        advance(f"wrote {len(written)} characters")
    results.check(
        f"{text.name}: saved and loaded again, the loss is the same, bit for bit",
        loaded == trained,
        f"{trained!r} → {loaded!r}",
    )
    results.check(
        f"{text.name}: PEFT without accelerate computes that loss, within {ROUNDING}",
        abs(plain - loaded) < ROUNDING,
        f"{loaded:.5f}, PEFT {plain:.5f}",
    )
    results.check(
        f"{text.name}: merged into the weights, the loss is the same within {ROUNDING}",
        abs(merged - loaded) < ROUNDING,
        f"{loaded:.5f}, merged {merged:.5f}",
    )
    results.check(
        f"{text.name}: the merged model writes", bool(written.strip()), f"{len(written)} characters"
    )


def measure_steps(base: nn.Module, settings: Settings, results: Results) -> None:
    """Time and peak memory of a training step of each provider."""
    sequences = results.texts[0].train
    batches = shuffled_batches(sequences, settings.batch, settings.seed)
    batches = list(islice(batches, 1 + settings.reps))
    with progress("Timing steps", len(PROVIDERS) * len(batches)) as advance:
        results.costs = time_steps(base, batches, settings, advance)
    with progress("Peak memory, a process each", len(PROVIDERS)) as advance:
        measure_peaks(base, batches[0], results.costs, settings, advance)
    measured = [name for name, cost in results.costs.items() if cost.peak is not None]
    results.check(
        "the peak memory of a step was measured for each provider",
        len(measured) == len(PROVIDERS),
        ", ".join(measured) or "none",
    )


def conclude(settings: Settings, results: Results) -> int:
    print(f"\nHeld-out loss\n\n{loss_table(results)}\n")
    print(f"A training step\n\n{cost_table(results.costs)}\n")
    if results.joint:
        print(f"All adapters in one batch\n\n{joint_table(results.joint)}\n")
    for check in results.checks:
        print(f"{'ok    ' if check.holds else 'FAILED'}  {check.claim} ({check.seen})")
    print()
    say(f"Report: {settings.out / FILES[0]}")
    if results.failed:
        say(f"{len(results.failed)} of {len(results.checks)} checks do not hold")
        return 1
    return 0
