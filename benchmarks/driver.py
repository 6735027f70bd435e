"""One driver for every benchmark: its options, its repetitions, its rows and its tables.

A benchmark is a module with

    Case                      a frozen dataclass of sizes and dtypes, with a title
    default_cases(device)     what is measured where no option says otherwise
    default_providers(case)   who competes
    PROVIDERS                 all who can, by name
    prepare(case, names)      -> what can be timed by name, and why the others cannot

What is timed has ``run()``, which gives seconds by name, and ``timing``, how they were taken; and
where it makes sense ``saved()``, ``peak()`` and ``first_loss``. A benchmark whose ratios and table
are not the usual ones has ``compared(samples)``, which gives what rows say beside the seconds, and
``shown(rows)``, which lays out a case as ``report.shown`` does. Each field of the case is an
option, and every combination of their comma-separated values is measured.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import provenance, report
from benchmarks.memory import STABLE_MALLOC
from benchmarks.preparing import MissingExtra
from lora_kernels.measuring import timing
from lora_kernels.measuring.linear_call import DTYPES

ROOT = Path(__file__).resolve().parents[1]


def module_of(kind: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{kind}")


def shown_by(kind: str) -> report.Shown:
    return getattr(module_of(kind), "shown", report.shown)


def main(kind: str, argv: list[str]) -> int:
    parser = make_parser(kind)
    args = parser.parse_args(argv)
    # transformers and peft announce their own future to whoever runs them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        cases = cases_of(kind, args)
        names = provider_names(kind, args.providers)
    except ValueError as error:
        parser.error(str(error))
    try:
        if args.only_memory:
            print(json.dumps(peak_here(kind, cases[0], args.only_memory)))
            return 0
        return run(kind, cases, names, args, argv)
    except MissingExtra as error:
        print(f"benchmarks {kind}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the cases finished before are in the file", file=sys.stderr)
        return 130


# ---- options


def make_parser(kind: str) -> argparse.ArgumentParser:
    module = module_of(kind)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {kind}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--providers", help=f"comma-separated, of: {', '.join(module.PROVIDERS)}")
    add("--reps", type=positive, default=7, help="interleaved repetitions (%(default)s)")
    add("--threads", type=positive, help="CPU threads (torch's default when not given)")
    add("--device", default=device, help="cpu or cuda (%(default)s)")
    out = Path("bench-report") / f"{kind}.jsonl"
    add("--out", type=Path, default=out, help="result file (%(default)s)")
    add("--no-memory", action="store_true", help="skip the peak memory")
    # For the process that measures one provider's memory.
    add("--case", help=argparse.SUPPRESS)
    add("--only-memory", metavar="PROVIDER", choices=module.PROVIDERS, help=argparse.SUPPRESS)
    usual = module.default_cases("cpu")
    for field in options_of(module.Case):
        values = dict.fromkeys(_text(getattr(case, field.name)) for case in usual)
        add(_option(field), help=f"comma-separated ({', '.join(values)})")
    return parser


def options_of(case_type: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(case_type) if field.name != "device"]


def _option(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def _text(value) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def value_of(field: dataclasses.Field, text: str):
    """An option's value as its field has it; several numbers are joined by +."""
    option = _option(field)
    if "dtype" in field.name:
        if text not in DTYPES:
            raise ValueError(f"{option}: expected {', '.join(DTYPES)}, got {text!r}")
        return text
    if field.type is bool:
        if text not in ("True", "False"):
            raise ValueError(f"{option}: expected True or False, got {text!r}")
        return text == "True"
    if field.type is float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{option}: expected a number, got {text!r}") from None
        if field.name == "dropout" and not 0 <= value < 1:
            raise ValueError(f"{option}: expected a probability in [0, 1), got {text!r}")
        return value
    if field.type is str:
        return text
    parts = text.split("+")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{option}: expected positive numbers, got {text!r}")
    if field.type is int and len(parts) > 1:
        raise ValueError(f"{option}: expected one number, got {text!r}")
    return int(text) if field.type is int else tuple(map(int, parts))


def cases_of(kind: str, args: argparse.Namespace) -> list:
    """Every combination of the options, for each of the usual cases."""
    module = module_of(kind)
    if args.case:
        return [case_from(module.Case, json.loads(args.case))]
    if args.device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {args.device!r}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda was asked for, and torch sees no CUDA device")
    given = {
        field.name: [value_of(field, each) for each in text.split(",")]
        for field in options_of(module.Case)
        if (text := getattr(args, field.name)) is not None
    }
    cases = [
        dataclasses.replace(case, **dict(zip(given, values, strict=True)))
        for values in itertools.product(*given.values())
        for case in module.default_cases(args.device)
    ]
    return list(dict.fromkeys(cases))


def case_from(case_type: type, values: dict):
    """A case as JSON has it."""
    return case_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def provider_names(kind: str, text: str | None) -> list[str] | None:
    """The names asked for, or None for each case's default."""
    if text is None:
        return None
    known, names = module_of(kind).PROVIDERS, list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"--providers: expected names of {', '.join(known)}; got {', '.join(unknown)}"
        )
    return names


def command_of(kind: str, argv: list[str]) -> str:
    """Without where its output went: a path says nothing about the measurement."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return shlex.join(["python", "-m", "benchmarks", kind, *kept])


# ---- measuring


def run(kind: str, cases: list, names: list[str] | None, args, argv: list[str]) -> int:
    rows: list[dict] = []
    for index, case in enumerate(cases):
        say(f"[{index + 1}/{len(cases)}] {case.title}")
        meta = provenance.meta(torch.device(case.device), command_of(kind, argv))
        # The first case only: after that the load is our own.
        if index == 0 and (meta["load"] or 0) > 0.5:
            say(
                f"  the machine is busy (load {meta['load']}): with as many threads as CPUs, one "
                "busy neighbour makes every thread wait; times below may be of little worth"
            )
        chosen = names or module_of(kind).default_providers(case)
        group = measure_case(kind, case, chosen, meta, args.reps, not args.no_memory, args.threads)
        rows += group
        report.write_rows(args.out, rows)
        report.print_case(group, shown_by(kind))
        print(flush=True)
    say(f"{len(rows)} rows written to {args.out}")
    return 0 if any(not row["skipped"] for row in rows) else 1


def measure_case(
    kind: str,
    case,
    names: list[str],
    meta: dict,
    reps: int,
    memory: bool,
    threads: int | None = None,
) -> list[dict]:
    """Times, saved bytes and peak memory of every provider in one case, as rows."""
    say("  preparing and warming up: " + ", ".join(names))
    module, on_cuda = module_of(kind), torch.device(case.device).type == "cuda"
    prepared, skipped = module.prepare(case, names)
    for name, reason in skipped.items():
        say(f"  {name} skipped: {reason}")
    # On CUDA the allocator counts exactly, whatever else lives in the process.
    details = {
        name: details_of(kind, timed, memory and on_cuda) for name, timed in prepared.items()
    }
    floor = None
    if hasattr(module, "floor"):
        limits = module.limits(case)
        meta, floor = meta | {"ceilings": limits}, module.floor(case, limits)
    runs = {name: timed.run for name, timed in prepared.items()}
    samples = timing.interleave(runs, reps, progress(reps, len(runs))) if runs else {}
    del runs, prepared
    if hasattr(module, "derive"):
        module.derive(case, samples)
    if hasattr(module, "compared"):
        for name, ratios in module.compared(samples).items():
            details[name] |= ratios
    if memory and not on_cuda:
        for name in samples:
            say(f"  peak memory of {name}, in its own process")
            details[name]["memory"] = memory_in_own_process(kind, case, name, threads)
    return report.rows_of(kind, case, meta, samples, skipped, details, floor)


def details_of(kind: str, timed, peak: bool) -> dict:
    found = {"timing": timed.timing, "loss": getattr(timed, "first_loss", None)}
    if hasattr(timed, "saved"):
        saved = timed.saved()
        found["saved_bytes"] = sum(storage.bytes for storage in saved)
        if kind == "op":
            found["saved"] = [asdict(storage) for storage in saved]
    if peak and hasattr(timed, "peak"):
        found["memory"] = asdict(timed.peak())
    return found


def peak_here(kind: str, case, name: str) -> dict:
    """Peak memory of one more step after a warm one."""
    prepared, skipped = module_of(kind).prepare(case, [name])
    if skipped:
        raise SystemExit(skipped[name])
    return asdict(prepared[name].peak())


def memory_in_own_process(kind: str, case, name: str, threads: int | None) -> dict | None:
    """None, and a line saying so, where that fails."""
    command = [sys.executable, "-m", "benchmarks", kind, f"--case={json.dumps(asdict(case))}"]
    command += [f"--only-memory={name}", *([f"--threads={threads}"] if threads else [])]
    done = subprocess.run(
        command, env=environment() | STABLE_MALLOC, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        say(f"  no peak memory of {name}: {last}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment() -> dict[str, str]:
    """For a process that runs this tree's package, wherever it is started."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def progress(reps: int, runs_per_rep: int):
    """A line per repetition, with what is left."""
    began, done = time.perf_counter(), itertools.count(1)

    def ran(rep: int, name: str, sample: timing.Sample) -> None:
        if next(done) % runs_per_rep:
            return
        elapsed = time.perf_counter() - began
        left = elapsed / (rep + 1) * (reps - rep - 1)
        say(f"  repetition {rep + 1}/{reps}, {elapsed:.0f} s so far, about {left:.0f} s left")

    return ran


def say(line: str) -> None:
    """Progress goes to stderr: stdout is the result."""
    print(line, file=sys.stderr, flush=True)
