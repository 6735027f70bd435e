"""Results as JSON lines, and every table made from them.

A row is one provider in one case:

    schema, kind (the benchmark's module), case, title, provider,
    skipped (why, or null), timing, reps
    seconds         quantity -> {median, q1, q3, samples}
    over_frozen     quantity -> {median, q1, q3} of this / frozen, repetition by repetition
    peft_over       quantity -> {median, q1, q3} of PEFT / this, likewise
    floor           quantity -> seconds (op only)
    saved_bytes     kept by autograd for backward, parameters not counted
    saved           the largest of these storages by name (op only)
    memory          {peak_bytes, step_bytes, method}, or null; on a CPU of a process of its own
    loss            of the first step (step, layer)
    meta            versions, device, threads, ceilings, command, time
"""

import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lora_kernels.measuring.timing import Sample, Spread, ratios

SCHEMA = 1
# What lays out a case: headers, cells and footnotes from its rows.
Shown = Callable[[list[dict]], tuple[list[str], list[list[str]], list[str]]]
# The columns of a table, the last of which is compared.
QUANTITIES = {
    "op": ("forward", "backward", "both"),
    "step": ("forward", "backward", "step"),
    "layer": ("forward", "backward", "step"),
    "routed": ("layer", "part"),
    "kernel": ("forward",),
}
# The quantity that is compared with the frozen layer or model, where it is not the last one.
OVER_FROZEN = {"routed": "layer"}


def rows_of(
    kind: str,
    case,
    meta: dict,
    samples: dict[str, list[Sample]],
    skipped: dict[str, str],
    details: dict[str, dict],
    floor: Sample | None = None,
) -> list[dict]:
    """One row per provider. details: what else is known of a provider (memory, saved bytes)."""
    rows = []
    for provider in [*samples, *skipped]:
        taken = samples.get(provider)
        row = {
            "schema": SCHEMA,
            "kind": kind,
            "case": asdict(case),
            "title": case.title,
            "provider": provider,
            "skipped": skipped.get(provider),
            "reps": len(taken) if taken else 0,
            "seconds": {},
            "over_frozen": _ratios(taken, samples.get("frozen")),
            "peft_over": _ratios(samples.get("peft"), taken),
            "floor": floor,
            "timing": None,
            "saved_bytes": None,
            "saved": None,
            "memory": None,
            "loss": None,
            "meta": meta,
        }
        for quantity in taken[0] if taken else ():
            values = [sample[quantity] for sample in taken]
            row["seconds"][quantity] = {**asdict(Spread.of(values)), "samples": values}
        rows.append(row | details.get(provider, {}))
    return rows


def _ratios(numerator: list[Sample] | None, denominator: list[Sample] | None) -> dict[str, dict]:
    if not numerator or not denominator:
        return {}
    return {name: asdict(spread) for name, spread in ratios(numerator, denominator).items()}


def write_rows(path: Path, rows: list[dict]) -> None:
    """Replaces the file at once, so that an interrupted run leaves no half-written line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def read_rows(path: Path) -> list[dict]:
    with open(path) as file:
        rows = [json.loads(line) for line in file if line.strip()]
    strange = {row.get("schema") for row in rows} - {SCHEMA}
    if strange:
        raise ValueError(f"{path}: expected rows of schema {SCHEMA}, got {sorted(strange)}")
    return rows


def key_of(case: dict) -> str:
    """The same for a case as a dataclass has it and as it was read from a file."""
    return json.dumps(case, sort_keys=True)


def by_case(rows: list[dict]) -> list[list[dict]]:
    """Rows grouped by case, in the order of their first row."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["kind"] + key_of(row["case"]), []).append(row)
    return list(groups.values())


# ---- one case as a table


def format_seconds(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            return f"{_digits(seconds * scale)} {unit}"


def format_bytes(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{_digits(count / scale)} {unit}"
    return f"{count:.0f} B"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(spread: dict | None) -> str:
    if not spread:
        return "-"
    return f"{spread['median']:.2f} [{spread['q1']:.2f}-{spread['q3']:.2f}]"


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of one case."""
    kind = rows[0]["kind"]
    quantities = QUANTITIES[kind]
    total = quantities[-1]
    whole = OVER_FROZEN.get(kind, total)
    has_memory = any(row["memory"] for row in rows)
    headers = ["provider", *quantities, "/ frozen", "PEFT /"]
    headers += ["optimizer"] if kind == "step" else []
    headers += ["saved"] + (["peak of step"] if has_memory else [])

    cells = []
    for row in rows:
        if row["skipped"]:
            reason = row["skipped"].split("\n")[0]
            cells.append([row["provider"], f"skipped: {reason}", *[""] * (len(headers) - 2)])
            continue
        seconds = row["seconds"]
        line = [row["provider"]]
        line += [
            format_seconds(seconds[quantity]["median"]) if quantity in seconds else "-"
            for quantity in quantities
        ]
        line += [_ratio(row["over_frozen"].get(whole)), _ratio(row["peft_over"].get(total))]
        if kind == "step":
            line.append(
                format_seconds(seconds["optimizer"]["median"]) if "optimizer" in seconds else "-"
            )
        line.append("-" if row["saved_bytes"] is None else format_bytes(row["saved_bytes"]))
        if has_memory:
            line.append(format_bytes(row["memory"]["step_bytes"]) if row["memory"] else "-")
        cells.append(line)

    floor = rows[0]["floor"]
    if floor:
        frozen = next((r for r in rows if r["provider"] == "frozen" and not r["skipped"]), None)
        over = f"{floor[total] / frozen['seconds'][total]['median']:.2f}" if frozen else "-"
        line = ["floor", *(format_seconds(floor[q]) for q in quantities), over]
        cells.append(line + ["-"] * (len(headers) - len(line)))
    return headers, cells


def machine_of(meta: dict) -> str:
    """The device; of a CPU with the instructions in use, which its name does not say."""
    _, _, level = meta.get("extension", "").partition("using ")
    level = f" ({level})" if level and meta.get("device_type") == "cpu" else ""
    return f"{meta['device']}{level}, {meta['threads']} threads"


def footnotes(rows: list[dict]) -> list[str]:
    """What the numbers of one case mean and where they come from."""
    meta = rows[0]["meta"]
    kind = rows[0]["kind"]
    reps = max(row["reps"] for row in rows)
    timing = sorted({row["timing"] for row in rows if row["timing"]})
    where = f"{machine_of(meta)}, torch {meta['versions']['torch']}"
    where += "".join(f", {name}={value}" for name, value in meta.get("malloc", {}).items())
    notes = [
        f"{where}, {meta['time']}. Medians of {reps} interleaved repetitions ({', '.join(timing)});"
        f" ratios of {_compared(kind)}, taken within a repetition, with quartiles."
    ]
    methods = sorted({row["memory"]["method"] for row in rows if row["memory"]})
    if methods:
        own = ", a process per provider" if meta.get("device_type") == "cpu" else ""
        notes.append(
            f"peak of step: above what was resident before it{own} ({', '.join(methods)})."
        )
    losses = [f"{row['provider']} {row['loss']:.4f}" for row in rows if row["loss"] is not None]
    if losses:
        notes.append(f"loss of the first step: {', '.join(losses)}.")
    for row in rows:
        if row["saved"]:
            parts = (f"{part['name']} {format_bytes(part['bytes'])}" for part in row["saved"])
            notes.append(f"saved by {row['provider']}: {', '.join(parts)}")
    return notes


def _compared(kind: str) -> str:
    total = QUANTITIES[kind][-1]
    whole = OVER_FROZEN.get(kind, total)
    return total if whole == total else f"{whole} (/ frozen) and {total} (PEFT /)"


def shown(rows: list[dict]) -> tuple[list[str], list[list[str]], list[str]]:
    """Headers, cells and footnotes of one case."""
    return *table(rows), footnotes(rows)


def print_case(rows: list[dict], shown: Shown = shown) -> None:
    headers, cells, notes = shown(rows)
    print(rows[0]["title"])
    widths = [max(map(len, column)) for column in zip(headers, *_short(cells), strict=True)]
    for line in [headers, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    for note in notes:
        print(note)


def _short(cells: list[list[str]]) -> list[list[str]]:
    """Cells for measuring widths: a reason for skipping does not widen its column."""
    return [["" if cell.startswith("skipped") else cell for cell in line] for line in cells]


# ---- documents


def markdown(rows: list[dict], shown: Shown = shown) -> str:
    """The tables of a result file, one per case."""
    parts = []
    for group in by_case(rows):
        headers, cells, notes = shown(group)
        lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *cells]
        drawn = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"**{group[0]['title']}**\n\n{drawn}\n\n" + "  \n".join(notes))
    return "\n\n".join(parts)


_MARKED = re.compile(
    r"(?P<open><!-- bench:(?P<name>[^\s>]+) -->\n).*?(?P<close><!-- /bench:(?P=name) -->)", re.S
)


def fill_markers(text: str, render: Callable[[str], str]) -> str:
    """Replaces what stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` by
    `render(NAME)`; everything else stays as it is."""
    opened = re.findall(r"<!-- bench:([^\s>]+) -->", text)
    closed = re.findall(r"<!-- /bench:([^\s>]+) -->", text)
    if opened != closed or len(set(opened)) != len(opened):
        raise ValueError(
            f"each <!-- bench:NAME --> needs its own closing marker; opened {opened}, "
            f"closed {closed}"
        )
    return _MARKED.sub(lambda m: f"{m['open']}{render(m['name']).strip()}\n{m['close']}", text)
