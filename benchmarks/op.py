"""One `lora_linear` call, forward and backward, at one shape.

Every timed run goes through several sets of inputs, together larger than the last-level cache, so
that x, W and dy come from memory as they do between the layers of a model. On CUDA the sets are
captured in two graphs, forward and backward, so that no launch is timed that a graph would hide.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.bench.case import OpCase
from lora_kernels.bench.memory import (
    PeakMemory,
    SavedStorage,
    describe,
    peak_of,
    saved_for_backward,
)
from lora_kernels.bench.providers import OP_PROVIDERS, Call, MissingExtra, OpInputs, naive_formula
from lora_kernels.measuring import machine, timing
from lora_kernels.testing import error_bound

MAX_SETS = 64


def make_inputs(case: OpCase, seed: int) -> OpInputs:
    generator = torch.Generator(case.device).manual_seed(seed)

    def draw(rows: int, columns: int, spread: float, dtype: torch.dtype) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=case.device)
        return (values * spread).to(dtype)

    dtype = case.torch_dtype
    return OpInputs(
        x=draw(case.m, case.k, 1.0, dtype).requires_grad_(),
        weight=draw(case.n, case.k, case.k**-0.5, dtype),
        lora_a=draw(case.rank, case.k, case.k**-0.5, torch.float32),
        lora_b=draw(case.n, case.rank, 0.01, torch.float32),
        dy=draw(case.m, case.n, 1.0, dtype),
    )


def inputs_to_exceed_cache(case: OpCase) -> int:
    """Enough for three times the last-level cache, and at least two."""
    elements = case.m * case.k + case.n * case.k + case.m * case.n
    cache = machine.last_level_cache_bytes(torch.device(case.device))
    return min(MAX_SETS, max(2, math.ceil(3 * cache / (elements * case.torch_dtype.itemsize))))


class Op:
    """One provider's calls on all sets of inputs; ``calls`` where no provider makes them."""

    def __init__(
        self, case: OpCase, name: str, sets: list[OpInputs], calls: list[Call] | None = None
    ) -> None:
        self.device = torch.device(case.device)
        self._sets = sets
        self._rank = case.rank
        self._calls = calls or [OP_PROVIDERS[name](inputs, case) for inputs in sets]
        self._around = self._calls[0].around
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None
        self._static: list[Tensor] = []
        self.timing = "events" if self.device.type == "cuda" else "wall clock"

    def warm_up(self) -> None:
        self._forward_and_backward(timing.Clock(self.device))
        if self.device.type == "cuda":
            self._capture()

    def run(self) -> timing.Sample:
        """Seconds per call, over all sets."""
        clock = timing.Clock(self.device)
        if self._graphs:
            forward, backward = self._graphs
            clock.start()
            forward.replay()
            clock.mark("forward")
            backward.replay()
            clock.mark("backward")
        else:
            self._forward_and_backward(clock)
        sample = {name: took / len(self._calls) for name, took in clock.seconds().items()}
        sample["both"] = sample["forward"] + sample["backward"]
        return sample

    def saved(self) -> list[SavedStorage]:
        call, inputs = self._calls[0], self._sets[0]
        # x is counted, unlike the weights: it is an activation, kept alive for backward.
        own = [*call.frozen, *(leaf for leaf in call.leaves if leaf is not inputs.x)]
        with self._around():
            return saved_for_backward(
                call.forward, own, lambda saved: self._name(saved, inputs.x, self._rank)
            )

    def peak(self) -> PeakMemory:
        """Of one more forward and backward, after :meth:`warm_up`."""
        return peak_of(lambda: forward_and_backward(self._calls[0], self._sets[0]), self.device)

    @staticmethod
    def _name(saved: Tensor, x: Tensor, rank: int) -> str:
        if saved.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            return "x"
        if saved.dim() == 0:
            return "seed" if saved.dtype is torch.int64 else "scalar"
        if saved.dtype in (torch.bool, torch.uint8):
            return "mask"
        rank_sized = saved.dim() == 2 and saved.shape[1] == rank
        return f"h {describe(saved)}" if rank_sized else describe(saved)

    def _forward_and_backward(self, clock: timing.Clock) -> None:
        with self._around():
            for call, inputs in zip(self._calls, self._sets, strict=True):
                clock.start()
                y = call.forward()
                clock.mark("forward")
                grads = torch.autograd.grad(y, call.leaves, inputs.dy)
                clock.mark("backward")
                del y, grads

    def _capture(self) -> None:
        """Two graphs in one pool, replayed in the order of their capture: what backward frees of
        the forward's memory it may use again, since forward is replayed before it each time."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._forward_and_backward(timing.Clock(self.device))
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        try:
            with self._around(), torch.cuda.graph(forward, pool=pool):
                outputs = [call.forward() for call in self._calls]
            with self._around(), torch.cuda.graph(backward, pool=pool):
                for y, call, inputs in zip(outputs, self._calls, self._sets, strict=True):
                    self._static.extend(torch.autograd.grad(y, call.leaves, inputs.dy))
        except RuntimeError:  # a provider that synchronises: events then, and the row says so
            torch.cuda.synchronize()
            self._static.clear()
            return
        self._static.extend(y.detach() for y in outputs)
        self._graphs = (forward, backward)
        self.timing = "cuda graph"


def wrong(case: OpCase, name: str, inputs: OpInputs) -> str | None:
    """What in this provider's results breaks the package's error policy; None when nothing does.

    Without dropout, whose masks differ between providers. Against fp64 on the provider's own
    adapters; allowed is what the policy allows beside the plain formula in x's dtype.
    """
    case = replace(case, dropout=0.0)
    call = OP_PROVIDERS[name](inputs, case)
    if len(call.leaves) == 1:  # frozen has no adapter to get wrong
        return None

    def results(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad(y, leaves, inputs.dy.to(y.dtype))]

    def formula(dtype: torch.dtype) -> list[Tensor]:
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in call.leaves]
        x, lora_a, lora_b = leaves
        weight = inputs.weight.to(dtype)
        return results(naive_formula(x, weight, lora_a, lora_b, case.scaling, 0.0), leaves)

    with call.around():
        ours = results(call.forward(), call.leaves)
    compared = zip(ours, formula(case.torch_dtype), formula(torch.float64), strict=True)
    for what, (got, eager, oracle) in zip(("y", "dx", "dA", "dB"), compared, strict=True):
        error = (got.double() - oracle).abs().max().item()
        bound = error_bound(eager, oracle, case.torch_dtype)
        if not error <= bound:  # so that a NaN is refused
            return f"{what} is off by {error:.3g}, allowed is {bound:.3g}"
    return None


def prepare(case: OpCase, names: list[str]) -> tuple[dict[str, Op], dict[str, str]]:
    """The calls that can run here, and for those that cannot, why."""
    sets = [make_inputs(case, seed) for seed in range(inputs_to_exceed_cache(case))]
    ops, skipped = {}, {}
    for name in names:
        try:
            if reason := wrong(case, name, sets[0]):
                skipped[name] = f"not timed, its result is wrong: {reason}"
                continue
            op = Op(case, name, sets)
            op.warm_up()
            ops[name] = op
        except MissingExtra:
            raise
        except Exception as error:  # one provider's trouble is not the others'
            skipped[name] = f"{type(error).__name__}: {error}"
    return ops, skipped


def peak_memory(case: OpCase, name: str) -> PeakMemory:
    """Peak of one warmed-up forward and backward; to be called in a process of its own."""
    inputs = make_inputs(case, seed=0)
    call = OP_PROVIDERS[name](inputs, case)
    forward_and_backward(call, inputs)
    return peak_of(lambda: forward_and_backward(call, inputs), torch.device(case.device))


def forward_and_backward(call: Call, inputs: OpInputs) -> None:
    with call.around():
        torch.autograd.grad(call.forward(), call.leaves, inputs.dy)


def floor(case: OpCase, ceilings: dict[str, float]) -> timing.Sample:
    """The time nothing can beat: the frozen GEMMs at the measured ceilings, and the passes over
    x (forward), dy and x (backward) that the adapter's products need."""
    size = case.torch_dtype.itemsize
    x, weight, y = (size * count for count in (case.m * case.k, case.n * case.k, case.m * case.n))
    gemm_flops = 2 * case.m * case.k * case.n
    gemm = max(
        gemm_flops / ceilings["flops_per_second"],
        (x + weight + y) / ceilings["bytes_per_second"],
    )
    sample = {
        "forward": gemm + x / ceilings["bytes_per_second"],
        "backward": gemm + (x + y) / ceilings["bytes_per_second"],
    }
    sample["both"] = sample["forward"] + sample["backward"]
    return sample
