"""`python -m lora_kernels tune`: measures what `auto` may take on this GPU, and the tiles.

For every call, forward and backward each, the candidates are composed, our Triton kernels with the
base in the vendor's GEMM (hybrid) or in ours (fused), and the extension's CUDA kernels where they
were built (native), first with the tiles that `tiles.py` computes, then with a short list of
others. A candidate whose result breaks the error policy, with dropout where the call has it, is not
timed. The file is rewritten after every call, and calls that are in it are skipped: the command
goes on where it stopped.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_kernels import testing
from lora_kernels.measuring import cells, machine, timing
from lora_kernels.measuring.linear_call import LinearCase, our_call, parts_of, problems_of
from lora_kernels.measuring.replay import TimedCalls
from lora_kernels.ops.linear import lora_linear
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime import cuda_extension, dispatch
from lora_kernels.runtime.device_limits import limits_of

DIRECTIONS = ("forward", "backward")
STRATEGIES = ("hybrid", "fused")

# Short lists: every entry is compiled for every variant of its kernel.
TILES: dict[str, tuple[dict, ...]] = {
    "gemm": (
        {"BLOCK_M": 128, "BLOCK_C": 256, "num_stages": 4},
        {"BLOCK_M": 128, "BLOCK_C": 256, "num_stages": 3, "GROUP_M": 16},
        {"BLOCK_M": 256, "BLOCK_C": 128, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_C": 128, "num_stages": 4},
    ),
    "shrink": (
        {"BLOCK_M": 32}, {"BLOCK_M": 128, "num_warps": 8}, {"BLOCK_D": 256, "num_stages": 3},
        {"num_warps": 8},
    ),
    "rank_gradient": (
        {"BLOCK_D": 128}, {"BLOCK_D": 64}, {"BLOCK_M": 128, "num_stages": 2}, {"num_warps": 4},
    ),
    "native": tuple({"tile_columns": c, "cluster": n} for c, n in cuda_extension.TILES),
}  # fmt: skip


def main(argv: list[str]) -> int:
    lists = {"core": cells.core, "decode": cells.decode, "full": cells.grid}
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cells", choices=lists, default="core", help="which calls (%(default)s)")
    add("--minutes", type=float, default=20, help="start no call after these (%(default)s)")
    add("--reps", type=int, default=7, help="interleaved repetitions (%(default)s)")
    add("--out", type=Path, help="the file (lora_kernels/tuned/<gpu>/lora_linear.json)")
    # To try the command out: composed alone, M, K and N divided.
    add("--on-cpu", action="store_true", help=argparse.SUPPRESS)
    add("--shrink", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.on_cpu:
        say("lora_kernels tune: torch sees no CUDA device; there is nothing to tune for.")
        say("Without a table auto takes composed.")
        return 2
    device = torch.device("cpu" if args.on_cpu else "cuda")
    gpu = limits_of(device).name
    out = args.out or tiles.TUNED / gpu.replace(" ", "_") / "lora_linear.json"
    table = json.loads(out.read_text()) if out.is_file() else {"cells": {}}
    chosen = lists[args.cells](device.type, args.shrink)
    keys = {case: {case.cell(direction).key for direction in DIRECTIONS} for case in chosen}
    todo = [case for case in chosen if not keys[case] <= set(table["cells"])]
    say(f"{gpu}: {len(chosen)} calls, {len(chosen) - len(todo)} of them in the table")
    # Not to be confused with another installation's measurements.
    table["measured_with"] = machine.versions() | {"device": machine.device_name(device)}

    began = time.monotonic()
    for index, case in enumerate(todo):
        if time.monotonic() - began > 60 * args.minutes:
            say(f"{len(todo) - index} calls left; the same command goes on with them")
            break
        say(f"[{index + 1}/{len(todo)}] {case.title}")
        table["cells"] |= best_cells(case, args.reps)
        write(out, table)
    say(f"{len(table['cells'])} cells in {out}")
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write(path: Path, table: dict) -> None:
    """Replaces the file at once: an interrupted run leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    os.replace(draft, path)


@dataclass(frozen=True)
class Candidate:
    """A way to serve the call: a backend, and what the table would say of each direction."""

    backend: str
    options: dict[str, dict] = field(default_factory=dict)  # by direction

    def in_use(self, case: LinearCase) -> contextlib.AbstractContextManager:
        named = {case.cell(direction).key: cell for direction, cell in self.options.items()}
        return tiles.use_cells(named) if named else contextlib.nullcontext()


def best_cells(case: LinearCase, reps: int) -> dict[str, dict]:
    """The two cells of a call: tiles, the fastest backend, and the seconds it was chosen by."""
    problems = problems_of(case)
    eager = testing.run_forward_backward(lora_linear_reference, problems[0])
    oracle = testing.oracle_results(problems[0])
    measured = functools.partial(seconds_of, case, problems, (eager, oracle), reps)
    native = runs_native(case)
    gemm_tail = native and not cuda_extension.missing_gemm_tail(torch.device(case.device))
    times = measured(finalists({direction: {} for direction in DIRECTIONS}, native))
    # The faster strategy of each direction, and the tiles found so far.
    best = {direction: {"strategy": fastest_strategy(times[direction])} for direction in DIRECTIONS}
    for part, options in TILES.items():
        if part == "native" and not gemm_tail:
            continue
        backend = "native" if part == "native" else "triton"
        # Hybrid leaves the GEMM to the vendor: its tiles are found with fused.
        forced = {"strategy": "fused"} if part == "gemm" else {}
        base = {direction: cell | forced for direction, cell in best.items()}
        candidates = {"as it is": Candidate(backend, base)} | {
            str(tile): Candidate(backend, {d: cell | {part: tile} for d, cell in base.items()})
            for tile in options
        }
        times = measured(candidates)
        for direction in DIRECTIONS:
            if name := better_than_it_is(times[direction]):
                best[direction][part] = candidates[name].options[direction][part]
                say(f"  {direction}: {part} {name} is faster")
    times = measured(finalists(best, native))
    for direction, found in times.items():
        shown = (f"{name} {1e3 * took:.3f} ms" for name, took in found.items())
        say(f"  {direction}: {', '.join(shown)}")
    return {case.cell(d).key: entry(times[d], best[d]) for d in DIRECTIONS if times[d]}


def runs_native(case: LinearCase) -> bool:
    """Whether there are CUDA kernels to time. On a CPU native is another thing."""
    device = torch.device(case.device)
    return device.type == "cuda" and not dispatch.unavailable("native", device, case.torch_dtype)


def finalists(best: dict[str, dict], native: bool) -> dict[str, Candidate]:
    """composed, hybrid, fused and maybe native, all but the first with the tiles found."""
    forced = {s: {d: cell | {"strategy": s} for d, cell in best.items()} for s in STRATEGIES}
    found = {strategy: Candidate("triton", cells) for strategy, cells in forced.items()}
    found = {"composed": Candidate("composed")} | found
    return found | ({"native": Candidate("native", best)} if native else {})


def fastest_strategy(times: dict[str, float]) -> str:
    """Of those that ran; hybrid, the rule for unmeasured cells, where neither did."""
    ran = [name for name in STRATEGIES if name in times]
    return min(ran, key=times.__getitem__, default="hybrid")


def better_than_it_is(times: dict[str, float]) -> str | None:
    """The fastest candidate, by more than the one per cent that is noise."""
    name = min(times, key=times.__getitem__, default=None)
    return name if name and times[name] <= 0.99 * times.get("as it is", 0.0) else None


def entry(times: dict[str, float], best: dict) -> dict:
    """A cell of the table, from the seconds of the finalists."""
    fastest = min(times, key=times.__getitem__)
    return best | {
        "backend": "triton" if fastest in STRATEGIES else fastest,
        "strategy": fastest_strategy(times),
        "seconds": {name: float(f"{took:.4g}") for name, took in times.items()},
    }


def seconds_of(
    case: LinearCase,
    problems: list[testing.LoRAProblem],
    references: tuple[dict[str, torch.Tensor], ...],  # of the first problem: eager's, and in fp64
    reps: int,
    candidates: dict[str, Candidate],
) -> dict[str, dict[str, float]]:
    """direction -> candidate -> median seconds; without those that are wrong or do not run."""
    runs = {}
    for name, candidate in candidates.items():
        call = functools.partial(lora_linear, backend=candidate.backend)
        try:
            with candidate.in_use(case):
                results = testing.run_forward_backward(call, problems[0])
            for what, ours in results.items():
                eager, oracle = (reference[what] for reference in references)
                testing.assert_within_policy(what, ours, eager, oracle, case.torch_dtype)
            parts = parts_of([our_call(each, candidate.backend) for each in problems], problems)
            in_use = functools.partial(candidate.in_use, case)
            timed = TimedCalls(torch.device(case.device), parts, len(problems), around=in_use)
            timed.warm_up()
            runs[name] = timed.run
        except Exception as error:  # too much shared memory, say: one candidate's trouble
            say(f"  {name} is no candidate: {type(error).__name__}: {str(error)[:200]}")
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # but a broken context is everybody's
    samples = timing.interleave(runs, reps)
    return {
        direction: {
            name: statistics.median(sample[direction] for sample in taken)
            for name, taken in samples.items()
        }
        for direction in DIRECTIONS
    }
