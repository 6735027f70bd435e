"""The rows of `infer`, with bounds of every ratio, and their table.

A row has, beside what every benchmark's has,

    over_base    quantity -> {median, q1, q3, low, high} of this / base, repetition by repetition
    peft_over    quantity -> likewise of PEFT / this; `rival`: which of PEFT's ways that is
    memory       also tensor_bytes and switch_bytes
    loss         of the token behind the prompt, before anything was timed

low and high bound the median with 95 % confidence: a bootstrap over the repetitions.
"""

from dataclasses import asdict

import torch

from benchmarks import report
from lora_kernels.measuring.timing import Sample, Spread

_DRAWS, _CONFIDENCE = 4000, 0.95
# The least and the largest of fewer hold the median less often than that: 1 - 2 / 2**5 is 0.94.
_LEAST_REPS = 6
# PEFT's way to do the same, where it is not `peft`.
RIVALS = {
    "merged": "merged-peft",
    "merged-switched": "merged-peft",
    "merged-accelerated": "merged-peft",
    "merged-unloaded": "merged-peft",
    "merged-peft": "merged-peft",
    "ours-rows": "peft-rows",
    "routed-rows": "peft-rows",
    "peft-rows": "peft-rows",
}


def bounded(values: list[float]) -> dict[str, float]:
    """Median and quartiles of values, and the bounds of their median."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (_DRAWS, len(values)), generator=generator)
    medians = torch.tensor(values, dtype=torch.float64)[drawn].quantile(0.5, dim=1)
    tail = (1 - _CONFIDENCE) / 2
    low, high = medians.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return {**asdict(Spread.of(values)), "low": low, "high": high}


def ratios(numerator: list[Sample] | None, denominator: list[Sample] | None) -> dict[str, dict]:
    """Of the quantities that both have, taken repetition by repetition."""
    if not numerator or not denominator:
        return {}
    shared = [quantity for quantity in numerator[0] if quantity in denominator[0]]
    return {
        quantity: bounded(
            [a[quantity] / b[quantity] for a, b in zip(numerator, denominator, strict=True)]
        )
        for quantity in shared
    }


def compared(samples: dict[str, list[Sample]]) -> dict[str, dict]:
    """What a provider's row says beside its seconds."""
    found = {}
    for provider, taken in samples.items():
        rival = RIVALS.get(provider, "peft")
        found[provider] = {
            "over_base": ratios(taken, samples.get("base")),
            "peft_over": ratios(samples.get(rival), taken),
            "rival": rival,
        }
    return found


# ---- the table


MEMORY = ("tensors", "peak of run", "peak of switch")
HEADERS = (
    "provider", "prefill", "/ base", "token", "/ base", "PEFT / (token)", "switch",
    "switch and token", *MEMORY,
)  # fmt: skip


def table(rows: list[dict]) -> list[list[str]]:
    """Cells of one case, under `HEADERS`."""
    lines = []
    for row in rows:
        if row["skipped"]:
            reason = row["skipped"].split("\n")[0]
            lines.append([row["provider"], f"skipped: {reason}", *[""] * (len(HEADERS) - 2)])
            continue
        seconds, over, memory = row["seconds"], row["over_base"], row["memory"] or {}
        prefill, token, switch, both = (
            report.format_seconds(seconds[quantity]["median"]) if quantity in seconds else "-"
            for quantity in ("prefill", "token", "switch", "switch and token")
        )
        held = [
            report.format_bytes(memory[name]) if memory.get(name) is not None else "-"
            for name in ("tensor_bytes", "step_bytes", "switch_bytes")
        ]
        peft = ratio(row["peft_over"].get("token"))
        lines.append([
            row["provider"], prefill, ratio(over.get("prefill")), token, ratio(over.get("token")),
            peft, switch, both, *held,
        ])  # fmt: skip
    return lines


def ratio(spread: dict | None) -> str:
    """The median, and the bounds that it has with 95 % confidence."""
    if not spread:
        return "-"
    return f"{spread['median']:.3f} [{spread['low']:.3f}, {spread['high']:.3f}]"


def claims(rows: list[dict]) -> list[str]:
    """What the bounds allow to say: of merged and the base, and of PEFT and us."""
    if max(row["reps"] for row in rows) < _LEAST_REPS:
        return [f"Of fewer than {_LEAST_REPS} repetitions the bounds hold less than they say."]
    by_name = {row["provider"]: row for row in rows if not row["skipped"]}
    said = []
    for name in ("base-copy", *(name for name, rival in RIVALS.items() if rival == "merged-peft")):
        over = by_name.get(name, {}).get("over_base", {})
        if over and "base" in by_name:
            said.append(f"{name} / base: {verdicts(over, 'slower', 'faster')}.")
    for name in ("ours", "routed", "ours-rows", "routed-rows"):
        row = by_name.get(name, {})
        if over := row.get("peft_over"):
            said.append(f"{row['rival']} / {name}: {verdicts(over, 'faster', 'slower')}.")
    return said


def verdicts(over: dict[str, dict], above: str, below: str) -> str:
    """What ratios above and below 1 mean, as far as their bounds leave no doubt."""
    said = []
    for quantity in ("prefill", "token", "switch and token"):
        if spread := over.get(quantity):
            verdict = "no difference shown"
            if spread["low"] > 1:
                verdict = above
            elif spread["high"] < 1:
                verdict = below
            said.append(f"{quantity} {ratio(spread)}, {verdict}")
    return "; ".join(said)


def footnotes(rows: list[dict]) -> list[str]:
    """What the numbers of one case mean and where they come from."""
    meta = rows[0]["meta"]
    reps = max(row["reps"] for row in rows)
    how = sorted({row["timing"] for row in rows if row["timing"]})
    where = f"{report.machine_of(meta)}, torch {meta['versions']['torch']}"
    where += "".join(f", {name}={value}" for name, value in meta.get("malloc", {}).items())
    notes = [
        f"{where}, {meta['time']}, load {meta['load']}. Medians of {reps} interleaved repetitions "
        f"({', '.join(how)}); ratios taken within a repetition, in brackets the bounds of their "
        "median with 95 % confidence. PEFT /: of PEFT's way to do the same (mixed batches for "
        "rows, merge_adapter for merged)."
    ]
    methods = sorted({row["memory"]["method"] for row in rows if row["memory"]})
    if methods:
        notes.append(
            "tensors: all that live between two runs; peaks: above what was resident before "
            f"({', '.join(methods)}); a process per provider."
        )
    losses = [f"{row['provider']} {row['loss']:.4f}" for row in rows if row["loss"] is not None]
    return notes + [f"loss behind the prompt: {', '.join(losses)}."] * bool(losses)


def shown(rows: list[dict]) -> tuple[list[str], list[list[str]], list[str]]:
    """Headers, cells and footnotes of one case."""
    width = len(HEADERS) if any(row["memory"] for row in rows) else -len(MEMORY)
    cells = [line[:width] for line in table(rows)]
    return list(HEADERS[:width]), cells, footnotes(rows) + claims(rows)
