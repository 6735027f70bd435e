"""What `tune` takes on this machine, held to composed: `python -m benchmarks tuned`.

Each call is tuned first (unless the user's table has it), then timed as `auto` serves it and as
composed does, in interleaved repetitions. A cell is held where auto's median is at most composed's
and composed's own interquartile range.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import op, provenance, report
from benchmarks.driver import command_of, say
from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight
from lora_kernels.measuring import timing, tuning
from lora_kernels.measuring.linear_call import LinearCase
from lora_kernels.ops.linear.plan import make_plan

# K x N of the linears of a model.
MODELS = {
    "smollm2": ((576, 576), (576, 192), (576, 1536), (1536, 576)),
    "llama3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
}
DIRECTIONS = ("forward", "backward")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tuned",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", default="smollm2", help=f"comma-separated, of: {', '.join(MODELS)}")
    add("--tokens", default="1,16,128", help="comma-separated (%(default)s)")
    add("--dtypes", default="fp32,bf16", help="comma-separated (%(default)s)")
    add("--dropouts", default="0,0.05", help="comma-separated (%(default)s)")
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--reps", type=int, default=15, help="interleaved repetitions (%(default)s)")
    add("--threads", type=int, help="CPU threads (torch's default when not given)")
    add("--out", type=Path, default=Path("bench-report/tuned.jsonl"), help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows, held = [], 0
    for case in cases_of(args):
        for row in measure(case, args.reps):
            row["meta"] = provenance.meta(torch.device(case.device), command_of("tuned", argv))
            rows.append(row)
            held += row["held"]
            say(line_of(row))
        report.write_rows(args.out, rows)
    print(f"{held} of {len(rows)} cells are held; rows in {args.out}")
    return 0 if held == len(rows) else 1


def cases_of(args: argparse.Namespace) -> Iterator[LinearCase]:
    for model in args.models.split(","):
        for dtype in args.dtypes.split(","):
            for dropout in map(float, args.dropouts.split(",")):
                for m in map(int, args.tokens.split(",")):
                    for k, n in MODELS[model]:
                        yield LinearCase(m, k, n, dtype, dropout, device=args.device)


def measure(case: LinearCase, reps: int) -> Iterator[dict]:
    """A row for each direction."""
    device = torch.device(case.device)
    tuning.tune_calls({case: 1}, device, 600.0, progress=False)
    prepared, skipped = op.prepare(case, ["ours", "composed"])
    if skipped:
        raise RuntimeError(f"{case.title}: {skipped}")
    runs = {name: timed.run for name, timed in prepared.items()}
    samples = timing.interleave(runs, reps)
    taken = dict(zip(DIRECTIONS, backends_of(case), strict=True))
    for direction in DIRECTIONS:
        spread = {
            name: timing.Spread.of([sample[direction] for sample in found])
            for name, found in samples.items()
        }
        composed, ours = spread["composed"], spread["ours"]
        yield {
            "schema": report.SCHEMA,
            "kind": "tuned",
            "case": asdict(case),
            "title": f"{direction} of {case.title}",
            "direction": direction,
            "taken": taken[direction],
            "seconds": {name: asdict(each) for name, each in spread.items()},
            "ratio": ours.median / composed.median,
            "held": ours.median <= composed.median + (composed.q3 - composed.q1),
        }


def backends_of(case: LinearCase) -> tuple[str, str]:
    """That auto takes for the forward and the backward."""
    dtype, device = case.torch_dtype, case.device
    x, weight = (torch.empty(rows, case.k, dtype=dtype, device=device) for rows in (case.m, case.n))
    a, b = (torch.empty(s, device=device) for s in ((case.rank, case.k), (case.n, case.rank)))
    plan = make_plan("auto", x, DenseWeight(weight), LoRAFactors(a, b, 2.0), case.dropout)
    return plan.choice.backend, (plan.backward_choice or plan.choice).backend


def line_of(row: dict) -> str:
    composed = row["seconds"]["composed"]
    spread = (composed["q3"] - composed["q1"]) / composed["median"]
    mark = "" if row["held"] else "  NOT HELD"
    return (
        f"{row['title']}: {row['taken']}, {row['ratio']:.3f} of composed "
        f"(interquartile range {spread:.3f}){mark}"
    )
