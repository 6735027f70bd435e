"""What ``tune`` has measured on this machine: its choices, kept from process to process.

Files ``tuned-<digest>.json`` (``machine_files.py``), one for the CPU and one for GPUs, hold by kind
of device and operation cells by their keys, in the format of the tables that the package ships::

    {"state": {...}, "cells": {"NVIDIA H200, sm_90, ...": {"lora_linear": {
        "forward/bfloat16/M8192/K4096/N4096/R16/p0":
            {"backend": "triton", "strategy": "hybrid", "seconds": {"composed": ...}}}}}}

Only ``tune`` writes them. With ``torch.use_deterministic_algorithms(True)`` nothing is taken from
them: the bits of a result must not depend on what was measured.
"""

import functools
from pathlib import Path

import torch

from lora_kernels.runtime import machine_files
from lora_kernels.runtime.plan import forget_plans

PATIENCE = 30.0  # seconds for another process that writes

Cells = dict[str, dict]  # by key
Tables = dict[str, dict[str, Cells]]  # by kind of device, by operation

_BACKENDS, _STRATEGIES = ("composed", "triton", "native"), ("hybrid", "fused")
_TILES = {"gemm", "shrink", "rank_gradient", "native"}

# Whether this process has found choices for the CPU: keys of plans hold the number of tokens then.
FOR_CPU = False


def add(device: torch.device, operation: str, cells: Cells) -> Path | None:
    """Put cells into the file of this machine's state, in place of those of the same keys.

    Returns the file; None where it cannot be written: they hold for this process then.
    """
    state, path = _state_of(device.type), file_for(device)
    with machine_files.held(path, PATIENCE):  # if not, better an entry lost than a run of minutes
        tables = machine_files.read(path, _of_content, {})
        of_kind = tables.setdefault(_kind_of(device), {})
        of_kind.setdefault(operation, {}).update(cells)
        kept = machine_files.write(path, {"state": state, "cells": tables})
    forget()
    return path if kept else None


def file_for(device: torch.device) -> Path:
    return machine_files.file_of("tuned", _state_of(device.type))


def forget() -> None:
    """Has to be called where the files may have changed."""
    global FOR_CPU
    FOR_CPU = False  # until they are read
    _known.cache_clear()
    forget_plans()


def cells_of(operation: str, device: torch.device) -> Cells:
    """The measured choices of an operation on a device; none where algorithms are to be
    deterministic."""
    if torch.are_deterministic_algorithms_enabled():
        return {}
    return all_of(device).get(operation, {})


def cells_of_gpu(operation: str, limits: machine_files.DeviceLimits) -> Cells:
    """Those of a GPU with these limits."""
    if torch.are_deterministic_algorithms_enabled():
        return {}
    return _known("cuda").get(machine_files.kind_of_gpu(limits), {}).get(operation, {})


def all_of(device: torch.device) -> dict[str, Cells]:
    """What is recorded for a device, by operation."""
    return _known(device.type).get(_kind_of(device), {})


def _kind_of(device: torch.device) -> str:
    """Of a CPU with the number of threads: vendors' GEMMs and our kernels gain differently."""
    kind = machine_files.kind_of(device)
    return kind if device.type != "cpu" else f"{kind}, {torch.get_num_threads()} threads"


@functools.cache
def _known(device_type: str) -> Tables:
    global FOR_CPU
    tables: Tables = {}
    if machine_files.has_any("tuned"):
        path = machine_files.file_of("tuned", _state_of(device_type))
        tables = machine_files.read(path, _of_content, tables)
    if device_type == "cpu":
        FOR_CPU = bool(tables)
    return tables


def _state_of(device_type: str) -> dict[str, str]:
    return machine_files.cpu_state() if device_type == "cpu" else machine_files.machine_state()


def _of_content(content: dict) -> Tables:
    """Without cells that say what no version of ours has said."""
    return {
        kind: {
            operation: {key: cell for key, cell in cells.items() if _is_a_cell(cell)}
            for operation, cells in operations.items()
        }
        for kind, operations in content["cells"].items()
    }


def _is_a_cell(cell: dict) -> bool:
    seconds, tiles = cell.get("seconds", {}), cell.keys() & _TILES
    return (
        cell.get("backend") in _BACKENDS
        and cell.get("strategy", "hybrid") in _STRATEGIES
        and isinstance(seconds, dict)
        and all(isinstance(took, (int, float)) for took in seconds.values())
        and all(isinstance(cell[name], dict) for name in tiles)
    )
