"""Fills the README's benchmark tables from the result files, and draws the plots.

    python benchmarks/readme_tables.py            rewrites README.md
    python benchmarks/readme_tables.py --check    fails if README.md is not what the results say
    python benchmarks/readme_tables.py --plots    also draws an SVG beside each result file used

`<!-- bench:cpu/step -->` ... `<!-- /bench:cpu/step -->` holds the tables of
`benchmarks/results/cpu/step.jsonl`.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lora_kernels.bench import report  # noqa: E402  (the tree's package, also when not installed)


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
