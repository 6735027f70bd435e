"""Fills the README's benchmark tables from the result files, and draws the plots.

    python benchmarks/readme_tables.py            rewrites README.md
    python benchmarks/readme_tables.py --check    fails if README.md is not what the results say
    python benchmarks/readme_tables.py --plots    also draws an SVG beside each result file used

`<!-- bench:cpu/step -->` ... `<!-- /bench:cpu/step -->` holds the tables of
`benchmarks/results/cpu/step.jsonl`. Names below `counted/` are counts (`benchmarks/gpu_counts`).
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lora_kernels.bench import report  # noqa: E402  (the tree's package, also when not installed)

# What the page shows of the counts: a label, and the name of the case.
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


def counted(path: Path) -> str:
    """Launches and gigabytes of a layer, by provider."""
    by_case: dict[str, dict[str, dict]] = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        by_case.setdefault(row["case"], {})[row["provider"]] = row

    def cells(row: dict | None) -> str:
        if row is None:
            return "- | -"
        return f"{row['launches']} | {(row['read'] + row['written']) / 1e9:.2f}"

    lines = [
        "| layer of 4096 x 4096, 8192 tokens | PEFT: launches | GB | by hand: launches | GB "
        "| ours: launches | GB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, case in COUNTED.items():
        found = by_case[case]
        columns = [cells(found.get(name)) for name in ("PEFT", "handwritten", "ours")]
        lines.append(f"| {label.strip()} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if it would")
    parser.add_argument("--plots", action="store_true", help="draw NAME.svg beside NAME.jsonl")
    args = parser.parse_args(argv)

    def render(name: str) -> str:
        path = args.results / f"{name}.jsonl"
        if not path.is_file():
            raise SystemExit(f"{args.readme.name} wants bench:{name}, but there is no {path.name}")
        if name.startswith("counted/"):
            return counted(path)
        rows = report.read_rows(path)
        if args.plots:
            report.plot(rows, path.with_suffix(".svg"))
        return report.markdown(rows)

    before = args.readme.read_text(encoding="utf-8")
    after = report.fill_markers(before, render)
    if args.check:
        if before != after:
            print(f"{args.readme.name} is not what the results say: run {Path(__file__).name}")
        return int(before != after)
    if before != after:
        args.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
