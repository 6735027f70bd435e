"""The units of work of `make gpu-check`, and the process that runs some of them.

    python -m lora_kernels.bench.gpu_units SECTION --part FILE [--worker I --workers N]

Appends a line when a unit starts and one when it ends; skips units that have a line already.
"""

import argparse
import faulthandler
import functools
import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_kernels.bench import cells, kernel, layer, op
from lora_kernels.bench.case import KernelCase, LayerCase, OpCase
from lora_kernels.bench.gpu_check import AGAIN, ROOT, append, read_part
from lora_kernels.bench.providers import OP_PROVIDERS
from lora_kernels.bench.rows import measure_case
from lora_kernels.measuring import machine
from lora_kernels.runtime import dispatch
from lora_kernels.testing import (
    LoRAProblem,
    gpu_checks,
    gpu_long_checks,
    native_gpu_checks,
    routed_gpu_checks,
    run_forward_backward,
)
from lora_kernels.testing.gpu_checks import Skip

COMMAND = "make gpu-check"
OURS = ("composed", "triton-hybrid", "triton-fused")


CHECKS = {
    "quick": gpu_checks.quick,
    "routed": routed_gpu_checks.checks,
    "long": gpu_long_checks.long,
    "native": native_gpu_checks.checks,
}


@dataclass(frozen=True)
class Unit:
    name: str
    run: Callable[[], list[dict] | None]  # rows for the result file; raises where something is off


class Wrong(Exception):
    """A unit that failed and has rows all the same."""

    def __init__(self, reason: str, rows: list[dict]) -> None:
        super().__init__(reason)
        self.rows = rows


def units_of(section: str, dry_run: bool) -> list[Unit]:
    device = "cpu" if dry_run else "cuda"
    if section == "environment":
        return [
            Unit("versions", functools.partial(environment, device)),
            Unit("ceilings", functools.partial(ceilings, device)),
        ]
    if section == "build":
        return [Unit("build_ext", functools.partial(build, dry_run))]
    if section in CHECKS:
        checks = CHECKS[section]()
        if dry_run:
            return _units("composed", [check for check in checks if check.on_cpu], device)
        if section == "quick" or section == "routed":
            default = [check for check in checks if check.strategy == "fused"]  # it has no others
            ours = _units("composed", default, device, ", composed")
            return ours + _units("triton", checks, device)
        if section == "long":
            ours = native_gpu_checks.of_native(checks)
            return _units("triton", checks, device) + _units("native", ours, device, ", native")
        grids = native_gpu_checks.of_native(gpu_checks.quick() + routed_gpu_checks.checks())
        return _units("native", checks + grids, device)
    # Sizes for a CPU keep the proportions and lose a factor of 64.
    shrink, reps = (64, 2) if dry_run else (1, 9)
    core = cells.core(device, shrink)[: 2 if dry_run else None]
    if section == "shapes":
        names = ["composed"] if dry_run else [*OURS, *_if_native(["native"])]
        return [
            Unit(f"{case.title}, {name}", functools.partial(right_at, case, name))
            for case in core
            for name in names
        ]
    if section == "routed-core":
        names = _here(cells.ROUTED_PROVIDERS, dry_run)
        return [
            Unit(case.title, functools.partial(routed_benchmark, case, names, 2 if dry_run else 15))
            for case in cells.routed_core(device, shrink)
        ]
    if section in ("decode", "gemm"):
        cases = {"decode": cells.decode, "gemm": cells.gemm}[section](device, shrink)
        return [
            Unit(case.title, functools.partial(kernel_benchmark, case, dry_run, reps))
            for case in cases[: 3 if dry_run else None]
        ]
    names = _here(cells.PROVIDERS, dry_run)
    if section == "core":
        return [
            Unit(case.title, functools.partial(benchmark, "op", case, names, reps)) for case in core
        ]
    if section == "layer":
        cases = [LayerCase(dropout=p, device=device) for p in (0.0, 0.1)]
        if dry_run:
            cases = [layer.small(case) for case in cases]
        return [
            Unit(case.title, functools.partial(benchmark, "layer", case, names, reps))
            for case in cases
        ]
    triton = [
        Unit(f"memcheck {name}", functools.partial(sanitize, "memcheck", name, dry_run))
        for name in SANITIZED
    ]
    return triton + [
        Unit(f"{tool} native", functools.partial(sanitize, tool, "native", dry_run))
        for tool in ("memcheck", "racecheck", "synccheck")
    ]


def _units(backend: str, checks: list[gpu_checks.Check], device: str, more: str = "") -> list[Unit]:
    return [
        Unit(check.name + more, functools.partial(run_check, check, device, backend))
        for check in checks
    ]


def _here(names: tuple[str, ...], dry_run: bool) -> list[str]:
    """The providers that can be measured here: what was not built is said once, not in each row."""
    if dry_run:
        return [name for name in names if not name.startswith(("triton", "native"))]
    return [name for name in names if name != "native" or _if_native([name])]


def _if_native(names: list[str]) -> list[str]:
    return [] if _native_unavailable() else names


@functools.cache
def _native_unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return dispatch.unavailable("native", torch.device("cuda", 0), torch.bfloat16)


def run_check(check: gpu_checks.Check, device: str, backend: str) -> None:
    if backend == "native" and (reason := _native_unavailable()):
        raise Skip(reason)
    check(device, backend)


# ---- the extension


BUILD_SECONDS = 52  # less than the unit's: what it started is ended with it


def build(dry_run: bool) -> list[dict]:
    """`setup.py build_ext --inplace` with this Python; nothing is downloaded."""
    if dry_run:
        raise Skip("a dry run builds nothing")
    if not (ROOT / "setup.py").is_file():
        raise Skip("this is no source tree: what was installed is used")
    began = time.monotonic()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise Wrong(
            f"not built within {BUILD_SECONDS} s: run {' '.join(command)} first", []
        ) from None
    rows = [{"schema": 1, "kind": "build", "seconds": round(time.monotonic() - began, 1)}]
    # This process has looked for the extension before it was built.
    code = (
        "import torch; from lora_kernels.runtime import cuda_extension as n; print(n.status());"
        "print('missing:', n.missing(torch.device('cuda', 0)))"
    )
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    status, _, reason = asked.stdout.strip().rpartition("\nmissing: ")
    rows[0]["status"] = status
    if process.returncode or asked.returncode or reason != "None":
        text = f"{status} {said} {asked.stderr}"
        raise Wrong(" | ".join([reason, *text.strip().splitlines()[-8:]]), rows)
    return rows


# ---- environment


def environment(device: str) -> list[dict]:
    found = machine.meta(torch.device(device), COMMAND)
    missing = [
        name
        for name in ("pytest", "hypothesis", "peft", "transformers")
        if importlib.util.find_spec(name) is None
    ]
    found |= {"missing": missing, "nvcc": _first_line("nvcc", "--version", last=True)}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "driver": _first_line(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
            ),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
            "shared_memory_bytes": properties.shared_memory_per_block_optin,
        }
    return [{"schema": 1, "kind": "environment", **found}]


def _first_line(*command: str, last: bool = False) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1 if last else 0].strip() if lines else None


def ceilings(device: str) -> list[dict]:
    found = {
        name: machine.ceilings(torch.device(device), dtype)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    return [{"schema": 1, "kind": "ceilings", **found}]


# ---- benchmarks


def right_at(case: OpCase, name: str) -> None:
    """The policy at a benchmark's size, and a call with dropout: compiles what will be timed."""
    inputs = op.make_inputs(case, seed=0)
    if reason := op.wrong(case, name, inputs):
        raise AssertionError(reason)
    for dropout in {case.dropout, 0.1}:
        dropping = replace(case, dropout=dropout)
        op.forward_and_backward(OP_PROVIDERS[name](inputs, dropping), inputs)
    if case.device == "cuda":
        torch.cuda.synchronize()


def benchmark(kind: str, case, names: list[str], reps: int) -> list[dict]:
    meta = machine.meta(torch.device(case.device), COMMAND)
    rows = measure_case(kind, case, names, meta, reps, memory=case.device == "cuda")
    skipped = [f"{row['provider']}: {row['skipped']}" for row in rows if row["skipped"]]
    if skipped:
        raise Wrong("; ".join(skipped), rows)
    return rows


def kernel_benchmark(case: KernelCase, dry_run: bool, reps: int) -> list[dict]:
    """Not every provider exists for every case, nor on every device; none may be wrong."""
    meta = machine.meta(torch.device(case.device), COMMAND)
    names = [name for name in kernel.providers(case) if not (dry_run and name.startswith("tri"))]
    rows = measure_case("kernel", case, names, meta, reps, memory=False)
    skipped = [
        f"{row['provider']}: {row['skipped']}"
        for row in rows
        if row["skipped"] and not row["skipped"].startswith("Unavailable")
    ]
    if skipped and not dry_run:
        raise Wrong("; ".join(skipped), rows)
    return rows


def routed_benchmark(case, names: list[str], reps: int) -> list[dict]:
    """Not every provider exists for every case; ours must."""
    meta = machine.meta(torch.device(case.device), COMMAND)
    rows = measure_case("routed", case, names, meta, reps, memory=case.device == "cuda")
    skipped = [
        f"{row['provider']}: {row['skipped']}"
        for row in rows
        if row["skipped"] and row["provider"] in ("composed", "triton", "native")
    ]
    if skipped:
        raise Wrong("; ".join(skipped), rows)
    return rows


# ---- compute-sanitizer

_BF16, _FP32 = torch.bfloat16, torch.float32
SANITIZED = {
    "bf16 aligned fused": ("aligned", _BF16, "fused"),
    "bf16 odd hybrid": ("odd", _BF16, "hybrid"),
    "fp32 rank 160 fused": ("rank 160", _FP32, "fused"),
}


def sanitize(which: str, name: str, dry_run: bool) -> None:
    """Runs :func:`call` under one of compute-sanitizer's tools."""
    if dry_run:
        raise Skip("there are no kernels to watch on a CPU")
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        raise Skip("compute-sanitizer is not installed")
    if name == "native" and (reason := _native_unavailable()):
        raise Skip(reason)
    command = [tool, f"--tool={which}", "--error-exitcode=97", sys.executable]
    command += ["-m", "lora_kernels.bench.gpu_units", "call", f"--call={name}"]
    # Every tensor its own allocation: past its end is past the allocation's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if "Device not supported" in output:
        raise Skip("compute-sanitizer does not support this device")
    # racecheck has a summary of its own, "0 hazards displayed (0 errors, 0 warnings)".
    clean = "ERROR SUMMARY: 0 errors" in output or "(0 errors, 0 warnings)" in output
    if done.returncode or not clean:
        raise AssertionError(" | ".join(output.strip().splitlines()[:12]))


def call(name: str) -> None:
    if name == "native":
        native_gpu_checks.small_calls()
        return
    label, dtype, strategy = SANITIZED[name]
    rows, *sizes = gpu_checks.SHAPES[label]
    problem = LoRAProblem.random((rows,), *sizes, dtype=dtype, dropout_p=0.3, device="cuda")
    with gpu_checks.tiles.use_cells({"*": {"strategy": strategy}}):
        run_forward_backward(gpu_checks.Target().call, problem)
    torch.cuda.synchronize()


# ---- the process


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("section")
    add("--part", type=Path)
    add("--worker", type=int, default=0)
    add("--workers", type=int, default=1)
    add("--unit-seconds", type=float, default=60)
    add("--dry-run", action="store_true")
    add("--call", choices=[*SANITIZED, "native"])
    args = parser.parse_args(argv)
    if args.section == "call":
        call(args.call)
        return 0
    if args.section in CHECKS:
        # Read when cuBLAS is first used: poisoned memory switches deterministic algorithms on.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if args.dry_run:
        torch.set_num_threads(1)  # tiny sizes, and maybe neighbours
    units = units_of(args.section, args.dry_run)[args.worker :: args.workers]
    seen = {line["unit"] for line in read_part(args.part)}
    for unit in units:
        if unit.name not in seen and not run_unit(unit, args.part, args.unit_seconds):
            return AGAIN
    return 0


def run_unit(unit: Unit, part: Path, seconds: float) -> bool:
    """Whether the process is fit for another unit."""
    append(part, {"unit": unit.name, "state": "started"})
    # A C thread: it also ends a process that hangs inside a CUDA call.
    faulthandler.dump_traceback_later(seconds, exit=True)
    began = time.monotonic()
    line = {"unit": unit.name, "state": "passed"}
    try:
        line["rows"] = unit.run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Skip as reason:
        line |= {"state": "skipped", "detail": str(reason)}
    except Exception as error:  # recorded, and the next unit runs
        line |= {"state": "failed", "detail": f"{type(error).__name__}: {error}"[:2000]}
        line["rows"] = getattr(error, "rows", None)
        # Frames keep tensors alive.
        error.__traceback__ = None
    faulthandler.cancel_dump_traceback_later()
    append(part, line | {"seconds": time.monotonic() - began})
    return _context_works()


def _context_works() -> bool:
    gc.collect()
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
