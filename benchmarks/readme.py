"""The pages' tables and their plot, from the result files.

    python -m benchmarks readme            rewrites README.md, docs/benchmarks.md and the plot
    python -m benchmarks readme --check    fails if one of them is not what the results say

`<!-- bench:cpu/step -->` ... `<!-- /bench:cpu/step -->` holds the tables of
`benchmarks/results/cpu/step.jsonl`; names below `counted/` are counts (`benchmarks/gpu_counts`).
`<!-- bench:figures -->` holds a few rows for a reader in a hurry.
"""

import argparse
import json
from pathlib import Path

from benchmarks import plot, report
from benchmarks.driver import ROOT, shown_by

# The marks that each page has.
PAGES = {
    "README.md": ("figures",),
    "docs/benchmarks.md": ("cpu/step", "cpu/routed", "cpu/joint", "cpu/infer", "counted/gpu"),
}
PLOT = "docs/assets/step.svg"
STEP, ROUTED, COUNTS = "cpu/step", "cpu/routed", "counted/gpu"

# What the pages show of the counts: a label, and the name of the case.
_TRAINING = "linear accelerate, M 8192, r 16, {} x, {} adapters, p {}, training"
_ROUTED = "routed routed_lora_linear, {}, {} bank, p {}, {}"
COUNTED = {
    "training, bf16, fp32 adapters": _TRAINING.format("bf16", "fp32", "0"),
    "the same, dropout 0.05": _TRAINING.format("bf16", "fp32", "0.05"),
    "training, bf16, bf16 adapters": _TRAINING.format("bf16", "bf16", "0"),
    "the same, dropout 0.05 ": _TRAINING.format("bf16", "bf16", "0.05"),
    "training, fp16, fp32 adapters, dropout 0.05": _TRAINING.format("fp16", "fp32", "0.05"),
    "training, DoRA, fp32 adapters": _TRAINING.format("bf16", "fp32", "0") + ", DoRA",
    "one token, bf16 adapters": "linear accelerate, M 1, r 16, bf16 x, bf16 adapters, p 0, forward",
    "8 adapters, 32 tokens": _ROUTED.format("decode, one output", "fp32", "0", "interleaved"),
    "8 adapters, 32 tokens, q k v": _ROUTED.format("decode, q k v", "fp32", "0", "interleaved"),
    "training, 16 adapters, dropout 0.05": _ROUTED.format(
        "training, one output", "fp32", "0.05", "sorted"
    ),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="where the pages are")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if it would")
    args = parser.parse_args(argv)
    complaints = [
        complaint
        for page, marks in PAGES.items()
        for complaint in fill_page(args.root / page, page, marks, args.results, args.check)
    ]
    complaints += draw_plot(args.root / PLOT, args.results, args.check)
    for complaint in complaints:
        print(complaint)
    return int(bool(complaints))


def fill_page(
    path: Path, page: str, marks: tuple[str, ...], results: Path, check: bool
) -> list[str]:
    """What is wrong with a page, after writing it where nothing forbids."""
    if not path.is_file():
        return [f"{page} is missing"]
    before = path.read_text(encoding="utf-8")
    wanted = [f"<!-- bench:{mark} -->" for mark in marks]
    missing = [f"{page} has no {mark}" for mark in wanted if mark not in before]
    after = report.fill_markers(before, lambda name: render(name, page, results))
    if before == after:
        return missing
    if check:
        return [*missing, f"{page} is not what the results say: run python -m benchmarks readme"]
    path.write_text(after, encoding="utf-8")
    return missing


def draw_plot(path: Path, results: Path, check: bool) -> list[str]:
    shown = plot.facts(report.by_case(rows_of(STEP, PLOT, results)))
    if path.is_file() and plot.facts_in(path) == shown:
        return []
    if check:
        return [f"{PLOT} is not what the results say: run python -m benchmarks readme"]
    plot.draw(shown, path)
    return []


def rows_of(name: str, page: str, results: Path) -> list[dict]:
    path = results / f"{name}.jsonl"
    if not path.is_file():
        raise SystemExit(f"{page} wants bench:{name}, but there is no {path.name} in the results")
    if name.startswith("counted/"):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return report.read_rows(path)


def render(name: str, page: str, results: Path) -> str:
    if name == "figures":
        return figures(
            rows_of(STEP, page, results),
            rows_of(ROUTED, page, results),
            rows_of(COUNTS, page, results),
        )
    rows = rows_of(name, page, results)
    if name.startswith("counted/"):
        return counted(rows)
    return report.markdown(rows, shown_by(rows[0]["kind"]))


# ---- the counts


def counts_of(rows: list[dict], case: str) -> dict[str, dict]:
    return {row["provider"]: row for row in rows if row["case"] == case}


def gigabytes(row: dict) -> str:
    return f"{(row['read'] + row['written']) / 1e9:.2f}"


def counted(rows: list[dict]) -> str:
    """Launches and gigabytes of a layer, by provider."""
    lines = [
        "| layer of 4096 x 4096, 8192 tokens | PEFT: launches | GB | by hand: launches | GB "
        "| ours: launches | GB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, case in COUNTED.items():
        found = counts_of(rows, case)
        columns = [
            f"{found[name]['launches']} | {gigabytes(found[name])}" if name in found else "- | -"
            for name in ("PEFT", "handwritten", "ours")
        ]
        lines.append(f"| {label.strip()} | {' | '.join(columns)} |")
    return "\n".join(lines)


# ---- the figures


# Columns of the figures: a provider's name, and what the page calls it.
COLUMNS = {
    "frozen": "frozen",
    "peft": "PEFT",
    "peft-base-dtype": "PEFT, bf16 adapters",
    "ours": "ours",
}


def figures(step: list[dict], routed: list[dict], counts: list[dict]) -> str:
    """A row each: what, who takes how much (in brackets over frozen's), where, the file."""
    plain = {"dtype": "bf16", "dropout": 0.0}
    single = {"dtype": "fp32", "dropout": 0.0}
    dropping = {"dtype": "bf16", "dropout": 0.05}
    decoding = {"dtype": "bf16", "train": False, "tokens": 1}
    lines = [
        f"| | {' | '.join(COLUMNS.values())} | on | results |",
        "|---|---:|---:|---:|---:|---|---|",
        timed("training step, bf16", step, plain, "step", STEP),
        timed("the same, dropout 0.05", step, dropping, "step", STEP),
        saved("memory kept for its backward", step, dropping, STEP),
        timed("training step, fp32", step, single, "step", STEP),
        timed("one layer, 64 tokens of 16 bf16 adapters", routed, decoding, "layer", ROUTED),
        launched("launches (GB moved), a layer's training, dropout 0.05", counts),
    ]
    return "\n".join(lines)


def providers_of(rows: list[dict], wanted: dict) -> dict[str, dict]:
    """The rows of the first case with these values, by provider."""
    groups = [g for g in report.by_case(rows) if wanted.items() <= g[0]["case"].items()]
    if not groups:
        raise SystemExit(f"the figures want a case of {wanted}, and no result has it")
    return {row["provider"]: row for row in groups[0] if not row["skipped"]}


def where(rows: dict[str, dict]) -> str:
    meta = rows["ours"]["meta"]
    return report.machine_of(meta)


def line_of(what: str, found: dict[str, str], on: str, name: str) -> str:
    values = [found.get(provider, "-") for provider in COLUMNS]
    link = f"[{name}](benchmarks/results/{name}.jsonl)"
    return f"| {' | '.join([what, *values, on, link])} |"


def timed(what: str, rows: list[dict], wanted: dict, quantity: str, name: str) -> str:
    found = providers_of(rows, wanted)
    texts = {}
    for provider, row in found.items():
        texts[provider] = report.format_seconds(row["seconds"][quantity]["median"])
        if provider != "frozen":
            texts[provider] += f" ({row['over_frozen'][quantity]['median']:.2f})"
    return line_of(what, texts, where(found), name)


def saved(what: str, rows: list[dict], wanted: dict, name: str) -> str:
    found = providers_of(rows, wanted)
    texts = {provider: report.format_bytes(row["saved_bytes"]) for provider, row in found.items()}
    return line_of(what, texts, where(found), name)


def launched(what: str, rows: list[dict]) -> str:
    """Counted in the same state of the layer: adapters in fp32, and in bf16."""
    found = counts_of(rows, COUNTED["the same, dropout 0.05"])
    half = counts_of(rows, COUNTED["the same, dropout 0.05 "])
    counted = {"peft": found["PEFT"], "peft-base-dtype": half["PEFT"], "ours": found["ours"]}
    texts = {name: f"{row['launches']} ({gigabytes(row)})" for name, row in counted.items()}
    return line_of(what, texts, "counted, not measured", COUNTS)
