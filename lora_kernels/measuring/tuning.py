"""``tune``: what `auto` may take on this machine, measured on a model's own shapes and kept.

Only here are choices written. Each shape has a process of its own (``child.py``): what hangs, dies
or raises there costs one call, and the report says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from lora_kernels.measuring import machine
from lora_kernels.measuring.linear_call import DTYPES
from lora_kernels.measuring.search import Case
from lora_kernels.measuring.shapes import Work, work_of
from lora_kernels.runtime import tables
from lora_kernels.runtime.checks import check_count, check_dropout_p
from lora_kernels.runtime.child_process import run_child
from lora_kernels.runtime.machine_files import kind_of

CHILD = "lora_kernels.measuring.child"
HUNG = 120.0  # seconds that a child may take over one run, or to compile a candidate's kernels
LONGEST = 900.0  # seconds that the call may take which is being measured when the time is over

TOKENS = {"cuda": (1, 32, 512, 8192), "cpu": (1, 16, 128)}


def tune(
    model: nn.Module,
    *,
    tokens: int | Sequence[int] | None = None,
    seconds: float = 20.0,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    dropout_p: float | None = None,
    again: bool = False,
    progress: bool = True,
) -> TuneReport:
    """Measure the calls that a model makes on this machine, and keep what ``auto`` may take.

    For every distinct shape of the model's layers, and every number of tokens, ``composed`` is
    timed beside our kernels in interleaved repetitions. A kernel is taken if it gains 3 % in the
    median and in two of three rounds (on a GPU by the wall clock of eager calls and by the replay
    of CUDA graphs); else ``composed`` is, and that is kept too. A kernel whose result breaks the
    error policy is not timed. Nothing but ``tune`` writes such choices, and with
    ``torch.use_deterministic_algorithms(True)`` none is taken.

    The layers are those of ``peft.tuners.lora.Linear``, accelerated or not, :class:`LoRALinear` and
    :class:`RoutedLoRALinear` with the adapters in its bank. For a model without any they are its
    ``torch.nn.Linear`` but for the head. Only shapes are read: the model may be on the meta device.

    Args:
        model: on a CUDA device or a CPU, where is measured; for one on the meta device that is a
            CUDA device if there is one.
        tokens: M, how many rows a call has (sequences times their length; sequences when tokens are
            generated), one number or several. None is 1, 32, 512 and 8192 on a GPU, 1, 16 and 128
            on a CPU. A choice holds for the next power of two and what rounds up to it.
        seconds: no shape is begun after so many. Another call of ``tune`` goes on with the rest.
        dtype: of the activations: float32, bfloat16 or float16. None is that of each base layer;
            name autocast's if the model runs under it.
        rank: in place of the layers' own; for a plain model and empty banks 16 if None.
        dropout_p: in place of the layers' own, in [0, 1). Calls with and without dropout are
            different ones: ``dropout_p=0`` measures what evaluation runs.
        again: measure also what has been measured in this state of the machine.
        progress: show a bar on standard error if tqdm is there, else lines.

    Returns:
        A :class:`TuneReport`; ``print`` it.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model has no layer to measure.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    device = device_of(model)
    tokens = TOKENS[device.type] if tokens is None else tokens
    tokens = [tokens] if isinstance(tokens, int) else list(tokens)
    for each in tokens:
        check_count("tokens", each)
    if rank is not None:
        check_count("rank", rank)
    if dropout_p is not None:
        check_dropout_p(dropout_p)
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    work = work_of(model, tokens, device, dtype=dtype, rank=rank, dropout_p=dropout_p)
    if not work:
        raise ValueError(
            f"model: expected linear layers in float32, bfloat16 or float16, got a "
            f"{type(model).__name__} without one"
        )
    return tune_calls(work, device, seconds, again=again, progress=progress)


def device_of(model: nn.Module) -> torch.device:
    device = next((p.device for p in model.parameters()), torch.device("meta"))
    if device.type == "meta":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in TOKENS:
        raise ValueError(f"model: expected it on a CUDA device or a CPU, got {device.type!r}")
    index = torch.cuda.current_device() if device.type == "cuda" else None
    return device if device.index is not None or index is None else torch.device("cuda", index)


@dataclass(repr=False)
class TuneReport:
    """What has been measured of a model's calls; ``print`` shows it as a table.

    Attributes:
        kind: of device, as the table knows it.
        cells: what the table holds for the calls, by operation and key: ``backend``, ``seconds``
            and their ``spread`` by candidate, ``graph_seconds`` where graphs were captured.
        left: calls for which there was no time; running ``tune`` again goes on with them.
        failed: calls that were not measured, and why.
        notes: which candidates were wrong or did not run.
        file: where the choices are kept; None where they hold for this process alone.
    """

    kind: str
    cells: dict[str, tables.Cells] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    file: Path | None = None
    _work: Work = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("layers", "call", "taken, and how many times as fast as composed")]
        rows += [(str(n), case.title, self._outcome(case)) for case, n in self._work.items()]
        counts, titles = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"{self.kind}", ""]
        lines += [f"{row[0]:>{counts}}  {row[1]:<{titles}}  {row[2]}" for row in rows]
        lines += ["", *self.notes]
        if self.left:
            lines.append(f"{len(self.left)} calls are left: tune again to go on with them")
        where = self.file or "nowhere (no file can be written: they hold for this process)"
        return "\n".join([*lines, f"choices are kept in {where}"])

    def __repr__(self) -> str:
        measured = sum(len(cells) for cells in self.cells.values())
        return f"TuneReport({measured} cells, {len(self.left)} left, {len(self.failed)} failed)"

    def _outcome(self, case: Case) -> str:
        if case.title in self.failed:
            return f"not measured: {self.failed[case.title]}"
        cells = self.cells.get(case.operation, {})
        if not set(case.keys.values()) <= set(cells):
            return "not measured yet"
        return ", ".join(f"{d} {_shown(cells[key])}" for d, key in case.keys.items())


def _shown(cell: dict) -> str:
    backend, seconds = cell["backend"], cell["seconds"]
    name = cell["strategy"] if backend == "triton" and "strategy" in cell else backend
    if name == "composed":
        return name
    times = seconds["composed"] / seconds[name]
    graphs = cell.get("graph_seconds", {})
    in_graph = f", {graphs['composed'] / graphs[name]:.2f} in a graph" if len(graphs) > 1 else ""
    return f"{backend if name == backend else f'triton ({name})'} ({times:.2f}{in_graph})"


def tune_calls(
    work: Work, device: torch.device, seconds: float, *, again: bool = False, progress: bool = True
) -> TuneReport:
    """Measure what is not in the table yet, in order; calls that differ in tokens alone share a
    process as long as it lives."""
    deadline = time.monotonic() + seconds
    path = tables.file_for(device)
    report = TuneReport(kind_of(device), file=path if path.is_file() else None, _work=work)
    known = {} if again else tables.all_of(device)
    todo: dict[Case, list[Case]] = {}
    for case in work:
        if not set(case.keys.values()) <= set(known.get(case.operation, {})):
            todo.setdefault(replace(case, m=0), []).append(case)
    if todo and (busy := machine.load()) > 1:
        report.notes.append(f"the CPU was busy before ({100 * busy:.0f} %): times are less certain")
    with Progress(sum(map(len, todo.values())), shown=progress) as bar:
        for calls in todo.values():
            while calls and (left := deadline - time.monotonic()) > 0:
                for case, outcome in _measured(calls[:], left, report, bar):
                    if isinstance(outcome, str):
                        report.failed[case.title] = outcome
                        bar.say(f"{case.title}: not measured: {outcome}")
                    else:
                        report.file = tables.add(device, case.operation, outcome)
                    calls.remove(case)
                    bar.step()
            report.left += [case.title for case in calls]
    for case in work:
        found = tables.all_of(device).get(case.operation, {})
        cells = {key: found[key] for key in case.keys.values() if key in found}
        report.cells.setdefault(case.operation, {}).update(cells)
    return report


def _measured(
    calls: list[Case], seconds: float, report: TuneReport, bar: Progress
) -> Iterator[tuple[Case, tables.Cells | str]]:
    """Cells of the calls that one child measures, or why there are none; at least of one call."""
    order = {
        "operation": calls[0].operation,
        "cases": [asdict(case) for case in calls],
        "threads": torch.get_num_threads(),
        "until": time.time() + seconds,
    }
    current: Case | None = calls[0]  # a child may die before it begins
    ended = "ended and measured nothing"
    for line in run_child(CHILD, [json.dumps(order)], seconds + LONGEST, HUNG):
        if "begins" in line:
            case = current = calls[line["begins"]]
            bar.show(case.title)
        elif "ended" in line:
            ended = line["ended"]
        elif current is not None and "dropped" in line:
            report.notes.append(f"{current.title}: {line['dropped']}")
            bar.say(f"  {line['dropped']}")
        elif current is not None and ("cells" in line or "failed" in line):
            yield current, line.get("failed") or line["cells"]
            current = None
    if current is not None:
        yield current, f"the process {ended}"


class Progress:
    """A bar of tqdm where that is installed; else, and for what is said, lines; or nothing."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._bar, self._shown, self._total, self._done = None, shown, total, 0
        if shown and total:
            with contextlib.suppress(ImportError):
                from tqdm.auto import tqdm

                self._bar = tqdm(total=total, unit="call", file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, title: str) -> None:
        if self._bar is not None:
            self._bar.set_description(title)
        else:
            self.say(f"[{self._done + 1}/{self._total}] {title}")

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._shown:
            print(line, file=sys.stderr, flush=True)

    def step(self) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()


def export(device: torch.device, directory: Path) -> list[Path]:
    """Write the device's choices as files that the package can ship, one for each operation.

    Returns:
        ``directory/<device>/<operation>.json``; none where nothing has been measured.
    """
    name = machine.device_name(device)
    folder = directory / name.replace(" ", "_").replace("/", "_")
    measured_with = machine.versions() | {"device": name}
    written = []
    for operation, cells in tables.all_of(device).items():
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{operation}.json"
        draft = path.with_suffix(".tmp")
        content = {"cells": cells, "measured_with": measured_with}
        draft.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        os.replace(draft, path)
        written.append(path)
    return written
