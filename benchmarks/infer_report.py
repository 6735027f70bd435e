"""The rows of `infer`, with bounds of every ratio, and their table.

A row is one provider in one case:

    schema, kind ("infer"), case, title, provider, skipped (why, or null), timing, reps
    seconds      quantity -> {median, q1, q3, samples}
    over_base    quantity -> {median, q1, q3, low, high} of this / base, repetition by repetition
    peft_over    quantity -> likewise of PEFT / this; `rival`: which of PEFT's ways that is
    memory       {peak_bytes, step_bytes, method, tensor_bytes, switch_bytes}, or null
    loss         of the token behind the prompt, before anything was timed
    meta         versions, device, threads, command, time

low and high bound the median with 95 % confidence: a bootstrap over the repetitions.
"""

from dataclasses import asdict

import torch

from lora_kernels.bench import report
from lora_kernels.measuring.timing import Sample, Spread, by_quantity

_DRAWS, _CONFIDENCE = 4000, 0.95
# PEFT's way to do the same, where it is not `peft`.
RIVALS = {
    "merged": "merged-peft",
    "merged-accelerated": "merged-peft",
    "merged-unloaded": "merged-peft",
    "merged-peft": "merged-peft",
    "ours-rows": "peft-rows",
    "routed-rows": "peft-rows",
    "peft-rows": "peft-rows",
}

write_rows = report.write_rows


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


def rows_of(
    case,
    meta: dict,
    samples: dict[str, list[Sample]],
    skipped: dict[str, str],
    details: dict[str, dict],
) -> list[dict]:
    """One row per provider. details: what else is known of a provider."""
    rows = []
    for provider in [*samples, *skipped]:
        taken, rival = samples.get(provider), RIVALS.get(provider, "peft")
        row = {
            "schema": report.SCHEMA,
            "kind": "infer",
            "case": asdict(case),
            "title": case.title,
            "provider": provider,
            "skipped": skipped.get(provider),
            "reps": len(taken) if taken else 0,
            "seconds": {},
            "over_base": ratios(taken, samples.get("base")),
            "peft_over": ratios(samples.get(rival), taken),
            "rival": rival,
            "timing": None,
            "memory": None,
            "loss": None,
            "meta": meta,
        }
        for quantity, values in by_quantity(taken).items() if taken else ():
            row["seconds"][quantity] = {**asdict(Spread.of(values)), "samples": values}
        rows.append(row | details.get(provider, {}))
    return rows


# ---- the table


HEADERS = (
    "provider", "prefill", "/ base", "token", "/ base", "PEFT / (token)", "switch",
    "switch and token", "tensors", "peak of run", "peak of switch",
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
    """What the numbers say about the two claims, a sentence each."""
    said = []
    by_name = {row["provider"]: row for row in rows if not row["skipped"]}
    for name in ("base-copy", "merged", "merged-accelerated", "merged-peft", "merged-unloaded"):
        for quantity, spread in by_name.get(name, {}).get("over_base", {}).items():
            verdict = (
                "slower than the base" if spread["low"] > 1
                else "faster than the base" if spread["high"] < 1
                else "no difference from the base shown"
            )  # fmt: skip
            said.append(f"{name}, {quantity}: {ratio(spread)} of the base, {verdict}.")
    for name in ("ours", "routed", "ours-rows", "routed-rows"):
        row = by_name.get(name, {})
        for quantity in ("prefill", "token", "switch and token"):
            if spread := row.get("peft_over", {}).get(quantity):
                verdict = (
                    "faster" if spread["low"] > 1
                    else "slower" if spread["high"] < 1
                    else "no difference shown"
                )  # fmt: skip
                said.append(f"{row['rival']} / {name}, {quantity}: {ratio(spread)}, {verdict}.")
    return said


def footnotes(rows: list[dict]) -> list[str]:
    """What the numbers of one case mean and where they come from."""
    meta = rows[0]["meta"]
    reps = max(row["reps"] for row in rows)
    how = sorted({row["timing"] for row in rows if row["timing"]})
    where = f"{meta['device']}, {meta['threads']} threads, torch {meta['versions']['torch']}"
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


def text(rows: list[dict]) -> str:
    """One case for the terminal."""
    cells = table(rows)
    measured = [["" if c.startswith("skipped") else c for c in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(HEADERS, *measured, strict=True)]
    lines = [rows[0]["title"]]
    for line in [HEADERS, *cells]:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, *footnotes(rows), *claims(rows), ""])
