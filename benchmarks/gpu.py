"""The grid of calls around Llama-3's linears, resumable: what is in the result file is skipped.

    python -m lora_kernels bench grid --minutes 25 --out benchmarks/results/h200/grid.jsonl

Stops after the cell in which the minutes run out; the same command goes on from there. A cell is
measured as a whole, because ratios are taken within a repetition.
"""

import argparse
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from lora_kernels.bench import cells, report
from lora_kernels.bench.case import OpCase
from lora_kernels.bench.providers import OP_PROVIDERS, MissingExtra
from lora_kernels.bench.rows import measure_case, say
from lora_kernels.measuring import machine

CELLS = {"core": cells.core, "full": cells.grid}


def main(argv: list[str]) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    names = list(dict.fromkeys(args.providers.split(",")))
    if unknown := [name for name in names if name not in OP_PROVIDERS]:
        parser.error(
            f"--providers: expected names of {', '.join(OP_PROVIDERS)}; got {', '.join(unknown)}"
        )
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        say("lora_kernels bench grid: no CUDA device here; --device=cpu --shrink=64 tries it out")
        return 2
    cases = CELLS[args.cells](args.device, args.shrink)
    rows = report.read_rows(args.out) if args.out.is_file() else []
    todo = [case for case in cases if not is_done(case, names, rows)]
    say(f"{len(cases)} cells, {len(cases) - len(todo)} of them in {args.out} already")
    # Without where the output went: a path says nothing about the measurement.
    options = [f"--cells={args.cells}", f"--providers={args.providers}", f"--reps={args.reps}"]
    command = shlex.join(["python", "-m", "lora_kernels", "bench", "grid", *options])

    began = time.monotonic()
    for index, case in enumerate(todo):
        if time.monotonic() - began > 60 * args.minutes:
            say(f"{len(todo) - index} cells left; the same command goes on with them")
            break
        say(f"[{index + 1}/{len(todo)}] {case.title}")
        meta = machine.meta(torch.device(case.device), command)
        try:
            group = measure_case("op", case, names, meta, args.reps, not args.no_memory)
        except MissingExtra as error:
            say(f"lora_kernels bench grid: {error}")
            return 2
        except KeyboardInterrupt:
            say("interrupted; the cells finished before are in the file")
            return 130
        rows = [row for row in rows if not is_of(row, case)] + group
        report.write_rows(args.out, rows)
        report.print_case(group, plain=not sys.stdout.isatty())
    return 0


def is_of(row: dict, case: OpCase) -> bool:
    return row["kind"] == "op" and row["case"] == asdict(case)


def is_done(case: OpCase, names: list[str], rows: list[dict]) -> bool:
    return set(names) <= {row["provider"] for row in rows if is_of(row, case)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels bench grid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cells", choices=CELLS, default="full", help="which cells (%(default)s)")
    add("--providers", default=",".join(cells.PROVIDERS), help="comma-separated (%(default)s)")
    add("--minutes", type=float, default=25, help="start no cell after these (%(default)s)")
    add("--reps", type=int, default=7, help="interleaved repetitions (%(default)s)")
    add("--device", default="cuda", help="(%(default)s)")
    add("--no-memory", action="store_true", help="skip the peak memory")
    add(
        "--out",
        type=Path,
        default=Path("bench-report") / "grid.jsonl",
        help="result file (%(default)s)",
    )
    # Divides M, K and N: the grid can be tried out where it could never be measured.
    add("--shrink", type=int, default=1, help=argparse.SUPPRESS)
    return parser
