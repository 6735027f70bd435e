"""`python -m lora_kernels tune`: measures what `auto` may take on this GPU, and the tiles.

For every cell (a call of the grid, forward and backward each) the candidates are composed, our
Triton kernels with the base in the vendor's GEMM (hybrid) or in ours (fused), and the extension's
CUDA kernels where they were built (native), first with the tiles that `tiles.py` computes, then
with a short list of others. A candidate whose result breaks the error policy, with dropout where
the cell has it, is not timed. The file is rewritten after every cell and cells that are in it are
skipped, so the command goes on where it stopped.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.bench import cells, op
from lora_kernels.bench.case import OpCase
from lora_kernels.bench.providers import Call, OpInputs, cell_of, our_op
from lora_kernels.bench.rows import say
from lora_kernels.measuring import machine, timing
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime import cuda_extension, dispatch
from lora_kernels.runtime.device_limits import limits_of
from lora_kernels.testing import LoRAProblem, error_bound, oracle_results, run_forward_backward

DIRECTIONS = ("forward", "backward")
SEED = 20_240_607

STRATEGIES = ("hybrid", "fused")

# Short lists: every entry is compiled for every variant of its kernel.
GEMM_TILES = (
    {"BLOCK_M": 128, "BLOCK_C": 256, "num_stages": 4},
    {"BLOCK_M": 128, "BLOCK_C": 256, "num_stages": 3, "GROUP_M": 16},
    {"BLOCK_M": 256, "BLOCK_C": 128, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_C": 128, "num_stages": 4},
)
SHRINK_TILES = (
    {"BLOCK_M": 32},
    {"BLOCK_M": 128, "num_warps": 8},
    {"BLOCK_D": 256, "num_stages": 3},
    {"num_warps": 8},
)
RANK_GRADIENT_TILES = (
    {"BLOCK_D": 128},
    {"BLOCK_D": 64},
    {"BLOCK_M": 128, "num_stages": 2},
    {"num_warps": 4},
)
NATIVE_TILES = tuple(
    {"tile_columns": columns, "cluster": cluster} for columns, cluster in cuda_extension.TILES
)


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if not torch.cuda.is_available() and not args.on_cpu:
        say(
            "lora_kernels tune: torch sees no CUDA device; there is nothing to tune for. "
            "Without a table auto takes composed."
        )
        return 2
    device = torch.device("cpu" if args.on_cpu else "cuda")
    limits = limits_of(device)
    out = args.out or tiles.TUNED / limits.name.replace(" ", "_") / "lora_linear.json"
    table = json.loads(out.read_text()) if out.is_file() else {"cells": {}}
    lists = {"core": cells.core, "decode": cells.decode_steps, "full": cells.grid}
    chosen = lists[args.cells](device.type, args.shrink)
    todo = [case for case in chosen if not is_done(case, table["cells"])]
    say(f"{limits.name}: {len(chosen)} calls, {len(chosen) - len(todo)} of them in the table")
    # Not to be confused with another installation's measurements.
    table["measured_with"] = machine.versions() | {"device": machine.device_name(device)}

    began = time.monotonic()
    for index, case in enumerate(todo):
        if time.monotonic() - began > 60 * args.minutes:
            say(f"{len(todo) - index} calls left; the same command goes on with them")
            break
        say(f"[{index + 1}/{len(todo)}] {case.title}")
        table["cells"] |= tune(case, args.reps)
        write(out, table)
    say(f"{len(table['cells'])} cells in {out}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    choices = ("core", "decode", "full")
    add("--cells", choices=choices, default="core", help="which calls (%(default)s)")
    add("--minutes", type=float, default=20, help="start no cell after these (%(default)s)")
    add("--reps", type=int, default=7, help="interleaved repetitions (%(default)s)")
    add("--out", type=Path, help="the file (lora_kernels/tuned/<gpu>/lora_linear.json)")
    # To try the command out: composed alone, M, K and N divided.
    add("--on-cpu", action="store_true", help=argparse.SUPPRESS)
    add("--shrink", type=int, default=1, help=argparse.SUPPRESS)
    return parser


def write(path: Path, table: dict) -> None:
    """Replaces the file at once: an interrupted run leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    os.replace(draft, path)


def is_done(case: OpCase, found: dict) -> bool:
    return all(cell_of(case, direction).key in found for direction in DIRECTIONS)


@dataclass(frozen=True)
class Candidate:
    """A way to serve the call: a backend, and what the table would say of each direction."""

    backend: str
    options: dict[str, dict] = field(default_factory=dict)  # by direction


def tune(case: OpCase, reps: int) -> dict[str, dict]:
    """The two cells of a call: tiles, the fastest backend, and the seconds it was chosen by."""
    sets = [op.make_inputs(case, seed) for seed in range(op.inputs_to_exceed_cache(case))]
    allowed = expected(case, sets[0])
    measured = functools.partial(seconds_of, case, sets, allowed, reps)

    native = runs_native(case)
    times = measured(finalists({direction: {} for direction in DIRECTIONS}, native))
    # The faster strategy of each direction, and the tiles found so far.
    best = {direction: {"strategy": fastest_strategy(times[direction])} for direction in DIRECTIONS}
    for part, tile_options in (
        ("gemm", GEMM_TILES),
        ("shrink", SHRINK_TILES),
        ("rank_gradient", RANK_GRADIENT_TILES),
        *([("native", NATIVE_TILES)] if native and runs_gemm_tail(case) else []),
    ):
        backend = "native" if part == "native" else "triton"
        # Hybrid leaves the GEMM to the vendor: its tiles are found with fused.
        base = {
            direction: options | ({"strategy": "fused"} if part == "gemm" else {})
            for direction, options in best.items()
        }
        candidates = {"as it is": Candidate(backend, base)} | {
            str(tile): Candidate(backend, {d: base[d] | {part: tile} for d in DIRECTIONS})
            for tile in tile_options
        }
        times = measured(candidates)
        for direction in DIRECTIONS:
            name, gain = better_than_it_is(times[direction])
            if name is not None:
                best[direction][part] = candidates[name].options[direction][part]
                say(f"  {direction}: {part} {name} takes {gain:.3f} of the time")
    times = measured(finalists(best, native))
    for direction in DIRECTIONS:
        shown = (f"{name} {1e3 * took:.3f} ms" for name, took in times[direction].items())
        say(f"  {direction}: {', '.join(shown)}")
    return {
        cell_of(case, direction).key: entry(times[direction], best[direction])
        for direction in DIRECTIONS
        if times[direction]
    }


def runs_native(case: OpCase) -> bool:
    """Whether there are CUDA kernels to time. On a CPU native is another thing."""
    device = torch.device(case.device)
    return device.type == "cuda" and not dispatch.unavailable("native", device, case.torch_dtype)


def runs_gemm_tail(case: OpCase) -> bool:
    return cuda_extension.missing_gemm_tail(torch.device(case.device)) is None


def finalists(tiles_found: dict[str, dict], native: bool) -> dict[str, Candidate]:
    """composed, hybrid, fused and maybe native, all but the first with the tiles found."""
    return (
        {"composed": Candidate("composed")}
        | {
            strategy: Candidate(
                "triton",
                {d: options | {"strategy": strategy} for d, options in tiles_found.items()},
            )
            for strategy in STRATEGIES
        }
        | ({"native": Candidate("native", tiles_found)} if native else {})
    )


def fastest_strategy(times: dict[str, float]) -> str:
    """Of those that ran; hybrid, the rule for unmeasured cells, where neither did."""
    return min((name for name in STRATEGIES if name in times), key=times.get, default="hybrid")


def better_than_it_is(times: dict[str, float]) -> tuple[str | None, float]:
    """The fastest other candidate and its share of the time, or None.

    Less than one per cent is noise, and a table should say only what matters.
    """
    before = times.get("as it is")
    name = min(times, key=times.get, default=None)
    if before is None or times[name] > 0.99 * before:
        return None, 1.0
    return name, times[name] / before


def entry(times: dict[str, float], best: dict) -> dict:
    """A cell of the table, from the seconds of the finalists."""
    fastest = min(times, key=times.get)
    return best | {
        "backend": "triton" if fastest in STRATEGIES else fastest,
        "strategy": fastest_strategy(times),
        "seconds": {name: float(f"{took:.4g}") for name, took in times.items()},
    }


# ---- one round of candidates


def seconds_of(
    case: OpCase,
    sets: list[OpInputs],
    allowed: dict[str, tuple[Tensor, float]],
    reps: int,
    candidates: dict[str, Candidate],
) -> dict[str, dict[str, float]]:
    """direction -> candidate -> median seconds; without those that are wrong or do not run."""
    ops = {}
    for name, candidate in candidates.items():
        try:
            if reason := wrong(case, sets[0], allowed, candidate):
                say(f"  {name} is wrong: {reason}")
                continue
            calls = [call_of(candidate, inputs, case) for inputs in sets]
            timed = op.Op(case, name, sets, calls)
            timed.warm_up()
            ops[name] = timed
        except Exception as error:  # too much shared memory, say: one candidate's trouble
            say(f"  {name} does not run: {type(error).__name__}: {str(error)[:200]}")
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # but a broken context is everybody's
    samples = timing.interleave({name: each.run for name, each in ops.items()}, reps)
    return {
        direction: {
            name: statistics.median(sample[direction] for sample in taken)
            for name, taken in samples.items()
        }
        for direction in DIRECTIONS
    }


def around(candidate: Candidate, case: OpCase) -> contextlib.AbstractContextManager:
    if not candidate.options:
        return contextlib.nullcontext()
    named = candidate.options.items()
    return tiles.use_cells({cell_of(case, direction).key: cell for direction, cell in named})


def call_of(candidate: Candidate, inputs: OpInputs, case: OpCase) -> Call:
    call = our_op(inputs, case, candidate.backend)
    return replace(call, around=functools.partial(around, candidate, case))


def problem_of(case: OpCase, inputs: OpInputs) -> LoRAProblem:
    device = inputs.x.device
    return LoRAProblem(
        x=inputs.x.detach(),
        weight=inputs.weight,
        lora_a=inputs.lora_a,
        lora_b=inputs.lora_b,
        scaling=torch.tensor(case.scaling, dtype=torch.float64),
        bias=None,
        output_scale=None,
        dropout_p=case.dropout,
        seed=torch.tensor(SEED, device=device) if case.dropout else None,
        dy=inputs.dy,
    )


def expected(case: OpCase, inputs: OpInputs) -> dict[str, tuple[Tensor, float]]:
    """The call's results in fp64, kept as fp32, and how far from each one may be."""
    problem = problem_of(case, inputs)
    eager = run_forward_backward(lora_linear_reference, problem)
    oracle = oracle_results(problem)
    return {
        name: (exact.float(), error_bound(eager[name], exact, case.torch_dtype))
        for name, exact in oracle.items()
    }


def wrong(
    case: OpCase,
    inputs: OpInputs,
    allowed: dict[str, tuple[Tensor, float]],
    candidate: Candidate,
) -> str | None:
    """What breaks the error policy, with the cell's dropout; None when nothing does."""
    call = functools.partial(our_linear, candidate.backend)
    with around(candidate, case):
        ours = run_forward_backward(call, problem_of(case, inputs))
    for name, (exact, bound) in allowed.items():
        error = (ours[name].float() - exact).abs().max().item()
        if not error <= bound:  # so that a NaN is refused
            return f"{name} is off by {error:.3g}, allowed is {bound:.3g}"
    return None


def our_linear(backend: str, **inputs):
    from lora_kernels import lora_linear

    return lora_linear(**inputs, backend=backend)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
