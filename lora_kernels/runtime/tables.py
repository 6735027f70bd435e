"""What ``tune`` has measured on this machine: its choices, kept from process to process.

A file ``tuned-<digest>.json`` (``machine_files.py``) holds, by kind of device and operation, cells
by their keys, in the format of the tables that the package ships (``tuned/<gpu>/``)::

    {"state": {...}, "cells": {"NVIDIA H200, sm_90, ...": {"lora_linear": {
        "forward/bf16/M8192/K4096/N4096/R16/p0":
            {"backend": "triton", "strategy": "hybrid", "seconds": {"composed": ...}}}}}}

Only ``tune`` writes it. With ``torch.use_deterministic_algorithms(True)`` nothing is taken from it:
the bits of a result must not depend on what was measured.
"""

import contextlib
import functools
from pathlib import Path

import filelock
import torch

from lora_kernels.runtime import machine_files
from lora_kernels.runtime.machine_files import kind_of
from lora_kernels.runtime.plan import forget_plans

PATIENCE = 30.0  # seconds for another process that writes

Cells = dict[str, dict]  # by key
Tables = dict[str, dict[str, Cells]]  # by kind of device, by operation

# Whether this process has read choices for the CPU: keys of plans hold the number of tokens then.
FOR_CPU = False


def file_of(state: dict[str, str]) -> Path:
    return machine_files.file_of("tuned", state)


def load(path: Path) -> Tables:
    return machine_files.read(path, _of_content, {})


def _of_content(content: dict) -> Tables:
    tables = content["cells"]
    for operations in tables.values():
        for cells in operations.values():
            if not all(isinstance(cell["backend"], str) for cell in cells.values()):
                raise ValueError("a cell names no backend")
    return tables


def add(kind: str, operation: str, cells: Cells) -> Path | None:
    """Put cells into the file of this machine's state, in place of those of the same keys.

    Returns the file; None where it cannot be written: they hold for this process then.
    """
    path = file_of(machine_files.machine_state())
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(filelock.Timeout):  # better an entry lost than a run of minutes
            stack.enter_context(machine_files.lock_beside(path).acquire(timeout=PATIENCE))
        tables = load(path)
        tables.setdefault(kind, {}).setdefault(operation, {}).update(cells)
        kept = machine_files.write(path, {"state": machine_files.machine_state(), "cells": tables})
    forget()
    return path if kept else None


@functools.cache
def known() -> Tables:
    """What stands for the present state, read once; :func:`forget` after a change."""
    global FOR_CPU
    tables = load(file_of(machine_files.machine_state()))
    FOR_CPU = kind_of(torch.device("cpu")) in tables
    return tables


def forget() -> None:
    known.cache_clear()
    forget_plans()


def cells_of(operation: str, device: torch.device) -> Cells:
    """The measured choices of an operation on a device; none where algorithms are to be
    deterministic."""
    if torch.are_deterministic_algorithms_enabled():
        return {}
    tables = known()
    return tables[kind].get(operation, {}) if (kind := kind_of(device)) in tables else {}
