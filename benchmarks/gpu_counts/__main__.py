"""Prints the counts of every case, ours beside PEFT's and a handwritten function's.

python -m benchmarks.gpu_counts [--only TEXT] [--out FILE] [--operations]

Nothing is measured: see :mod:`device` for the GPU that is pretended, :mod:`table` for what an
operation is there. Launches of a split reduction (``splits``) are not among the launches.
"""

import argparse
import json
import sys
from collections import Counter as Tally
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import bounds
from .cases import Launched
from .cost import total
from .counter import counting
from .every_case import count, every_case
from .stand_ins import missing, stand_ins

COLUMNS = ("launches", "splits", "syncs", "atomics", "copies")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_counts", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, help="a file of all counts, JSON lines")
    parser.add_argument("--operations", action="store_true", help="launches by operation, too")
    options = parser.parse_args(arguments)
    console, rows = Console(width=None if sys.stdout.isatty() else 150), []
    table = Table("case", "provider", *COLUMNS, "GB", "bound", "over")
    with stand_ins(), counting() as counter:
        for case in every_case():
            if options.only in case.name:
                found = count(case, counter)
                bound = bounds.of(case)
                for provider, launched in found.items():
                    rows.append(_row(case.name, provider, launched))
                    mine = provider == "ours"
                    is_broken = mine and bool(bounds.broken(case, found))
                    _print_row(table, rows[-1], bound if mine else None, is_broken)
    console.print(table)
    if options.operations:
        for row in rows:
            console.print(f"{row['case']}, {row['provider']}: {row['operations']}")
    for name in missing():
        console.print(f"{name} has a stand-in, and is not in the package")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(case: str, provider: str, launched: Launched) -> dict:
    cost, operations = total(launched), Tally()
    for name, each in launched:
        operations[name] += each.launches
    ordered = {name: count for name, count in operations.most_common() if count}
    return {"case": case, "provider": provider, **asdict(cost), "operations": ordered}


def _print_row(table: Table, row: dict, bound: bounds.Bound | None, is_broken: bool) -> None:
    moved = f"{(row['read'] + row['written']) / 1e9:.3f}"
    said = "" if bound is None else str(bound)
    cells = [row["case"], row["provider"], *(str(row[name]) for name in COLUMNS), moved, said]
    table.add_row(*cells, "x" if is_broken else "", style="red" if is_broken else None)


if __name__ == "__main__":
    main(sys.argv[1:])
