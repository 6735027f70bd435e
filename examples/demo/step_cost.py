"""What a training step costs: the frozen model, PEFT, and PEFT accelerated, side by side.

Time: all three in this process, one step each in turn, so that a busy machine slows all alike.
Memory: a process for each, since one model's peak would hide another's.
"""

import multiprocessing
import os
import signal
import statistics
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lora_kernels
from benchmarks.memory import STABLE_MALLOC, peak_of
from demo.progress import Advance, quieten
from demo.settings import Settings
from demo.train import adapter_optimizer, add_adapter, loss_of
from lora_kernels.measuring.timing import Clock, Sample, interleave, ratios

FROZEN, PEFT, OURS = "frozen model", "PEFT", "PEFT + accelerate"
PROVIDERS = (FROZEN, PEFT, OURS)

Step = Callable[[Tensor], Sample]


@dataclass
class StepCost:
    """Medians in seconds. vs_frozen, vs_peft: medians of the ratios taken turn by turn. Peak in
    bytes, of the process and of the step alone; None if not measured, `peak_method` says why."""

    forward: float
    backward: float
    optimizer: float
    step: float
    vs_frozen: float
    vs_peft: float
    peak: int | None = None
    step_peak: int | None = None
    peak_method: str = ""


def training_step(provider: str, base: nn.Module, settings: Settings) -> Step:
    """A function that does one whole training step on a batch and says how long its parts took.

    base: the frozen model, which becomes part of what the step trains.
    """
    if provider == FROZEN:
        embed = base.get_input_embeddings()

        def frozen_step(batch: Tensor) -> Sample:
            # Gradients flow to the embedded tokens, as they flow to the first adapter.
            embedded = embed(batch).detach().requires_grad_()
            clock = Clock(settings.device)
            clock.start()
            loss = base(inputs_embeds=embedded, labels=batch, use_cache=False).loss
            clock.mark("forward")
            loss.backward()
            clock.mark("backward")
            return clock.seconds()

        base.train()
        return frozen_step

    model = add_adapter(base, settings)
    if provider == OURS:
        lora_kernels.accelerate(model)
    model.train()
    optimizer = adapter_optimizer(model, settings)

    def adapter_step(batch: Tensor) -> Sample:
        clock = Clock(settings.device)
        clock.start()
        loss = loss_of(model, batch)
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark("optimizer")
        return clock.seconds()

    return adapter_step


def time_steps(
    base: nn.Module, batches: list[Tensor], settings: Settings, advance: Advance
) -> dict[str, StepCost]:
    """Medians over `settings.reps` turns after one that warms up; a batch of `batches` for each."""
    steps = {name: training_step(name, deepcopy(base), settings) for name in PROVIDERS}
    warm_up, *rest = (batch.to(settings.device) for batch in batches)
    for step in steps.values():
        step(warm_up)
        advance("warming up")
    turn = {name: iter(rest) for name in steps}
    samples = interleave(
        {name: lambda name=name: steps[name](next(turn[name])) for name in steps},
        len(rest),
        lambda _, name, took: advance(f"{name}: {sum(took.values()):.3f} s"),
    )
    return costs_of(samples)


def costs_of(samples: dict[str, list[Sample]]) -> dict[str, StepCost]:
    """The medians of each provider; a step is the sum of its parts."""
    steps = {
        name: [{"step": sum(sample.values())} for sample in turns]
        for name, turns in samples.items()
    }

    def median(turns: list[Sample], part: str) -> float:
        return statistics.median(sample.get(part, 0.0) for sample in turns)

    return {
        name: StepCost(
            forward=median(turns, "forward"),
            backward=median(turns, "backward"),
            optimizer=median(turns, "optimizer"),
            step=median(steps[name], "step"),
            vs_frozen=ratios(steps[name], steps[FROZEN])["step"].median,
            vs_peft=ratios(steps[name], steps[PEFT])["step"].median,
        )
        for name, turns in samples.items()
    }


def measure_peaks(
    base: nn.Module,
    batch: Tensor,
    costs: dict[str, StepCost],
    settings: Settings,
    advance: Advance,
) -> None:
    """Add the peak memory of a step to each of `costs`."""
    with tempfile.TemporaryDirectory(prefix="lora-demo-") as folder:
        base.save_pretrained(folder)
        for name, cost in costs.items():
            try:
                peak = peak_in_own_process(name, Path(folder), batch, settings)
                cost.peak, cost.step_peak = peak["peak_bytes"], peak["step_bytes"]
                cost.peak_method = peak["method"]
                advance(f"{name}: {cost.peak / 2**20:.0f} MiB")
            except RuntimeError as error:
                cost.peak_method = f"not measured: {error}"
                advance(f"{name}: {cost.peak_method}")


def peak_in_own_process(name: str, folder: Path, batch: Tensor, settings: Settings) -> dict:
    """The `PeakMemory` of a step, as a dict, measured in a new process.

    Raises:
        RuntimeError: the process failed.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    # As a list: a tensor would travel through shared memory that outlives neither process surely.
    arguments = (theirs, name, str(folder), batch.tolist(), replace(settings, out=Path()))
    process = spawn.Process(target=_measure_peak, args=arguments, daemon=True)
    with _environment(STABLE_MALLOC), _interrupts_ignored():
        process.start()
    theirs.close()
    try:
        answer = ours.recv()
        process.join()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process ended with exit code {process.exitcode}") from None
    except BaseException:
        process.terminate()
        process.join()
        raise
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def _measure_peak(
    connection: Connection, name: str, folder: str, batch: list, settings: Settings
) -> None:
    quieten()
    try:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=settings.dtype)
        base = base.to(settings.device).requires_grad_(False)
        step = training_step(name, base, settings)
        tokens = torch.tensor(batch, device=settings.device)
        step(tokens)
        connection.send(asdict(peak_of(lambda: step(tokens), settings.device)))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


@contextmanager
def _environment(variables: dict[str, str]):
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_ignored():
    """A process started in here is ended by us on Ctrl-C, and prints nothing of its own."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
