"""The fastest way to serve one call on this machine: candidates, tiles, and the cells of a table.

The candidates of ``lora_linear`` on a GPU are composed, our Triton kernels with the base in the
vendor's GEMM (hybrid) or in ours (fused), and the extension's CUDA kernels where they were built
(native), first with the tiles that `tiles.py` computes, then, those within reach of the fastest,
with a short list of others. Those of ``routed_lora``, and of a CPU, are the backends. A candidate
whose result breaks the error policy, with dropout where the call has it, is not timed. Which is
taken `taking.py` says.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lora_kernels import testing
from lora_kernels.measuring import taking, timing
from lora_kernels.measuring.linear_call import LinearCase, LinearInputs
from lora_kernels.measuring.routed_call import RoutedCase, RoutedInputs
from lora_kernels.measuring.taking import Times
from lora_kernels.measuring.timed_calls import TimedCalls
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime import cuda_extension, dispatch
from lora_kernels.runtime.device_limits import clamp

Case = LinearCase | RoutedCase
Say = Callable[..., None]  # told, by keyword, what is prepared and timed, and what was dropped
TimesOf = dict[str, dict[str, Times]]  # by direction, by candidate

STRATEGIES = ("hybrid", "fused")

# Seconds that one comparison aims at, how many repetitions a round has at least and at most, and
# the seconds of one run through the sets of inputs on a CPU.
SECONDS, REPETITIONS, SECONDS_OF_RUN = 1.0, (3, 15), 0.02

# What another tile may gain, at most: kernels that are slower than that are left as they are.
REACH = 1.3

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


@dataclass(frozen=True)
class Candidate:
    """A way to serve the call: a backend, and what the table would say of each direction."""

    backend: str
    options: dict[str, dict] = field(default_factory=dict)  # by direction

    def in_use(self, case: Case) -> contextlib.AbstractContextManager:
        named = {case.keys[direction]: cell for direction, cell in self.options.items()}
        return tiles.use_cells(named) if named else contextlib.nullcontext()


def best_cells(case: Case, say: Say) -> dict[str, dict]:
    """The two cells of a call by key: the backend taken, tiles, and the seconds it was taken by.

    Raises:
        RuntimeError: composed itself did not run, so that nothing can be compared.
    """
    backends = backends_of(case)
    inputs = RoutedInputs(case) if isinstance(case, RoutedCase) else LinearInputs(case)
    if case.device == "cpu":
        del inputs.sets[_sets_of_a_run(inputs) :]
    measured = functools.partial(times_of, case, inputs, say=say)
    if isinstance(case, LinearCase) and "triton" in backends:
        return _searched(case, measured, "native" in backends)
    times = measured({name: Candidate(name) for name in backends})
    return {key: entry(times[direction], {}) for direction, key in case.keys.items()}


def backends_of(case: Case) -> list[str]:
    """What can serve the case: composed, and those of our kernels that were built."""
    device, dtype = torch.device(case.device), case.torch_dtype
    ours = ("triton", "native")
    return ["composed", *(each for each in ours if not dispatch.unavailable(each, device, dtype))]


def _sets_of_a_run(inputs: LinearInputs | RoutedInputs) -> int:
    """Not all where a call takes long: then it waits for products, and not for memory."""
    inputs.results("composed")
    began = time.perf_counter()
    inputs.results("composed")
    return max(2, int(SECONDS_OF_RUN / (time.perf_counter() - began)))


def _searched(
    case: LinearCase, measured: Callable[[dict[str, Candidate]], TimesOf], native: bool
) -> dict[str, dict]:
    """The faster strategy of each direction and its tiles, one kernel after the other."""
    gemm_tail = native and not cuda_extension.missing_gemm_tail(torch.device(case.device))
    first = times = measured(finalists({direction: {} for direction in case.keys}, native))
    best = {direction: {"strategy": fastest_strategy(times[direction])} for direction in case.keys}
    for part, options in TILES.items():
        whose = {"gemm": ("fused",), "native": ("native",) if gemm_tail else ()}
        if not any(within_reach(found, whose.get(part, STRATEGIES)) for found in first.values()):
            continue
        backend = "native" if part == "native" else "triton"
        # Hybrid leaves the GEMM to the vendor: its tiles are found with fused.
        forced = {"strategy": "fused"} if part == "gemm" else {}
        base = {direction: cell | forced for direction, cell in best.items()}
        candidates = {"as it is": Candidate(backend, base)} | {
            str(tile): Candidate(backend, {d: cell | {part: tile} for d, cell in base.items()})
            for tile in options
        }
        found = measured(candidates)
        for direction in case.keys:
            if name := better_than_it_is(found[direction]):
                best[direction][part] = candidates[name].options[direction][part]
    if any(len(cell) > 1 for cell in best.values()):
        times = measured(finalists(best, native))
    return {key: entry(times[d], best[d]) for d, key in case.keys.items()}


def within_reach(times: dict[str, Times], names: tuple[str, ...]) -> bool:
    """Whether another tile may make one of these candidates the fastest: compiling them all takes
    longer than anything else."""
    fastest = min((each.slower for each in times.values()), default=0.0)
    return any(name in times and times[name].slower <= REACH * fastest for name in names)


def finalists(best: dict[str, dict], native: bool) -> dict[str, Candidate]:
    """composed, hybrid, fused and maybe native, all but the first with the tiles found."""
    forced = {s: {d: cell | {"strategy": s} for d, cell in best.items()} for s in STRATEGIES}
    found = {strategy: Candidate("triton", cells) for strategy, cells in forced.items()}
    found = {"composed": Candidate("composed")} | found
    return found | ({"native": Candidate("native", best)} if native else {})


def fastest_strategy(times: dict[str, Times]) -> str:
    """Of those that ran; hybrid, the rule for unmeasured cells, where neither did."""
    ran = [name for name in STRATEGIES if name in times]
    return min(ran, key=lambda name: times[name].slower, default="hybrid")


def better_than_it_is(times: dict[str, Times]) -> str | None:
    """The fastest candidate, by more than the one per cent that is noise."""
    name = min(times, key=lambda name: times[name].slower, default=None)
    if name is None or "as it is" not in times:
        return None
    return name if times[name].slower <= 0.99 * times["as it is"].slower else None


def entry(times: dict[str, Times], best: dict) -> dict:
    """A cell of the table, from the times of the finalists."""
    if "composed" not in times:
        raise RuntimeError("composed itself does not run here")
    name = taking.taken(times)
    cell = best | {
        "backend": "triton" if name in STRATEGIES else name,
        "seconds": {each: _rounded(found.seconds) for each, found in times.items()},
        "spread": {each: _rounded(found.spread) for each, found in times.items()},
    }
    if best:
        cell["strategy"] = name if name in STRATEGIES else fastest_strategy(times)
    graphs = {each: found.graph_seconds for each, found in times.items()}
    if captured := {each: _rounded(took) for each, took in graphs.items() if took is not None}:
        cell["graph_seconds"] = captured
    return cell


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def times_of(
    case: Case, inputs: LinearInputs | RoutedInputs, candidates: dict[str, Candidate], *, say: Say
) -> TimesOf:
    """Of all candidates, without those that are wrong or do not run."""
    runs = {}
    for name, candidate in candidates.items():
        say(prepares=name)
        try:
            runs[name] = prepared(case, inputs, candidate)
        except Exception as error:  # too much shared memory, say: one candidate's trouble
            say(dropped=f"{name} is no candidate: {type(error).__name__}: {str(error)[:200]}")
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # but a broken context is everybody's
    began = time.perf_counter()
    for run in runs.values():
        run()
    of_all = taking.ROUNDS * (time.perf_counter() - began)
    reps = clamp(int(SECONDS / max(of_all, 1e-6)), *REPETITIONS)

    def alive(rep: int, name: str, took: timing.Sample) -> None:
        say(times=name)

    rounds = [timing.interleave(runs, reps, alive) for _ in range(taking.ROUNDS)]

    def seconds(name: str, part: str) -> taking.Rounds | None:
        found = [[sample[part] for sample in each[name] if part in sample] for each in rounds]
        return found if all(found) else None

    return {
        direction: {
            name: Times(seconds(name, direction) or [], seconds(name, _graph(direction)))
            for name in runs
        }
        for direction in case.keys
    }


def prepared(
    case: Case, inputs: LinearInputs | RoutedInputs, candidate: Candidate
) -> Callable[[], timing.Sample]:
    """What times the candidate's parts once, after its results were held to the error policy."""
    with candidate.in_use(case):
        results = inputs.results(candidate.backend)
    for what, ours in results.items():
        eager, oracle = inputs.eager[what], inputs.oracle[what]
        testing.assert_within_policy(what, ours, eager, oracle, case.torch_dtype)
    device, in_use = torch.device(case.device), functools.partial(candidate.in_use, case)
    calls = [
        TimedCalls(device, parts, len(inputs.sets), around=in_use)
        for parts in inputs.parts(candidate.backend)
    ]
    for each in calls:
        each.warm_up()

    def run() -> timing.Sample:
        sample: timing.Sample = {}
        for each in calls:
            sample |= each.run_eager()
            if each.captured:
                sample |= {_graph(part): took for part, took in each.run().items()}
        return sample

    return run


def _graph(part: str) -> str:
    return f"{part}, graph"
