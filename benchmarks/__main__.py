"""`python -m lora_kernels bench op|step|routed|grid`."""

import argparse
import itertools
import json
import shlex
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from lora_kernels.bench import grid, report
from lora_kernels.bench.case import DTYPES, OpCase, RoutedCase, StepCase
from lora_kernels.bench.providers import (
    OP_PROVIDERS,
    STEP_PROVIDERS,
    MissingExtra,
    default_providers,
)
from lora_kernels.bench.routed_providers import ROUTED_PROVIDERS
from lora_kernels.bench.rows import CASES, measure_case, say
from lora_kernels.measuring import machine

PROVIDERS = {"op": OP_PROVIDERS, "step": STEP_PROVIDERS, "routed": ROUTED_PROVIDERS}

# M×K×N. On a CPU: the three kinds of linear in SmolLM2-135M, 2×256 tokens. On a GPU: an 8B Llama's.
DEFAULT_SHAPES = {
    "cpu": "512x576x576,512x576x1536,512x1536x576",
    "cuda": "8192x4096x4096,8192x4096x14336,8192x14336x4096,2048x4096x4096",
}


def main(argv: list[str]) -> int:
    if argv[:1] == ["grid"]:  # has its own parser, with its own --help
        return grid.main(argv[1:])
    parser = make_parser()
    args = parser.parse_args(argv)
    # transformers and peft announce their own future to whoever runs them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        cases = list(cases_of(args))
        names = provider_names(args)
    except ValueError as error:
        parser.error(str(error))
    try:
        if args.only_memory:
            if len(cases) != 1:
                parser.error("--only-memory measures one case; give one shape, dtype and dropout")
            print(json.dumps(asdict(CASES[args.kind].peak_memory(cases[0], args.only_memory))))
            return 0
        return run(args, cases, names, argv)
    except MissingExtra as error:
        print(f"lora_kernels bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the cases finished before are in the file", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels bench",
        description="Times LoRA's providers side by side: interleaved repetitions, medians, "
        "ratios within a repetition; peak memory in a process of its own per provider.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("grid", help=grid.__doc__.splitlines()[0])
    for kind, what in (
        ("op", "one lora_linear call, forward and backward"),
        ("step", "a training step of a Llama with random weights"),
        ("routed", "one layer with many adapters in one batch"),
    ):
        add = kinds.add_parser(kind, help=what, description=what).add_argument
        add("--dtype", default="bf16", help="comma-separated: bf16, fp16, fp32 (%(default)s)")
        if kind != "routed":
            add("--dropout", default="0", help="comma-separated probabilities in [0, 1)")
            add("--rank", type=_positive, default=16, help="adapter rank (%(default)s)")
            add("--alpha", type=float, default=32, help="scaling is alpha / rank (%(default)s)")
        add("--providers", help=f"comma-separated, of: {', '.join(PROVIDERS[kind])}")
        add("--reps", type=_positive, default=7, help="interleaved repetitions (%(default)s)")
        add("--threads", type=_positive, help="CPU threads (torch's default when not given)")
        add(
            "--device",
            default="cuda" if torch.cuda.is_available() else "cpu",
            help="cpu or cuda (%(default)s)",
        )
        add(
            "--out",
            type=Path,
            default=Path("bench-report") / f"{kind}.jsonl",
            help="result file (%(default)s)",
        )
        if kind == "routed":
            _add_routed_options(add)
            continue
        add("--no-memory", action="store_true", help="skip the process per provider")
        add("--only-memory", metavar="PROVIDER", choices=PROVIDERS[kind], help=argparse.SUPPRESS)
        if kind == "op":
            shapes = "comma-separated MxKxN: tokens x in_features x out_features"
            add("--shapes", help=f"{shapes} (the default depends on the device)")
            add("--compile", action="store_true", help="add torch.compile of the naive formula")
        else:
            defaults = StepCase()
            add(
                "--tokens",
                default=f"{defaults.batch}x{defaults.length}",
                help="BATCHxLENGTH (%(default)s)",
            )
            for size in ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocab"):
                option = "--" + size.replace("_", "-")
                add(
                    option,
                    type=_positive,
                    default=getattr(defaults, size),
                    help="of the Llama (%(default)s)",
                )
    return parser


def _add_routed_options(add) -> None:
    case = RoutedCase()
    batches = "comma-separated SEQUENCESxTOKENS (%(default)s)"
    add("--batches", default=f"{case.sequences}x{case.tokens},16x64", help=batches)
    layer = "KxN, or KxN+N+N for slices that read the same x (%(default)s)"
    add("--layer", default=f"{case.k}x{case.n}", help=layer)
    add("--adapters", type=_positive, default=case.adapters, help="how many (%(default)s)")
    ranks = "comma-separated, dealt out over and over (%(default)s)"
    add("--ranks", default=",".join(map(str, case.ranks)), help=ranks)
    add("--adapter-dtype", default="", help="that of --dtype unless given")
    add("--train", action="store_true", help="forward and backward")
    add("--no-base", action="store_true", help="the adapters without the frozen layer")
    add.__self__.set_defaults(only_memory=None, no_memory=True, dropout="0", rank=0, alpha=0.0)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _sizes(text: str, option: str, names: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    expected = names.count("x") + 1
    if len(parts) != expected or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{option}: expected {names} in positive numbers, got {text!r}")
    return tuple(int(part) for part in parts)


def cases_of(args: argparse.Namespace):
    """Every combination of the comma-separated options."""
    dtypes = args.dtype.split(",")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"--dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    try:
        dropouts = [float(text) for text in args.dropout.split(",")]
    except ValueError:
        raise ValueError(f"--dropout: expected numbers, got {args.dropout!r}") from None
    if not all(0 <= dropout < 1 for dropout in dropouts):
        raise ValueError(f"--dropout: expected probabilities in [0, 1), got {args.dropout!r}")
    if args.device.split(":")[0] not in DEFAULT_SHAPES:
        raise ValueError(f"--device: expected cpu or cuda, got {args.device!r}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda was asked for, and torch sees no CUDA device")
    common = {"rank": args.rank, "alpha": args.alpha, "device": args.device}
    grid = itertools.product(dtypes, dropouts)

    if args.kind == "op":
        shapes = args.shapes or DEFAULT_SHAPES[torch.device(args.device).type]
        sizes = [_sizes(text, "--shapes", "MxKxN") for text in shapes.split(",")]
        for (dtype, dropout), (m, k, n) in itertools.product(grid, sizes):
            yield OpCase(m, k, n, dtype=dtype, dropout=dropout, **common)
        return
    if args.kind == "routed":
        k, _, slices = args.layer.partition("x")
        widths = [_sizes(text, "--layer", "N")[0] for text in slices.split("+")]
        for dtype, batch in itertools.product(dtypes, args.batches.split(",")):
            sequences, tokens = _sizes(batch, "--batches", "SEQUENCESxTOKENS")
            yield RoutedCase(
                sequences,
                tokens,
                _sizes(k, "--layer", "K")[0],
                tuple(widths),
                args.adapters,
                tuple(_sizes(rank, "--ranks", "R")[0] for rank in args.ranks.split(",")),
                dtype,
                args.adapter_dtype,
                args.train,
                not args.no_base,
                args.device,
            )
        return
    if args.hidden % args.heads or args.heads % args.kv_heads:
        raise ValueError(
            "--hidden must be a multiple of --heads, and --heads of --kv-heads; got "
            f"{args.hidden}, {args.heads}, {args.kv_heads}"
        )
    batch, length = _sizes(args.tokens, "--tokens", "BATCHxLENGTH")
    model = {
        name: getattr(args, name)
        for name in ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocab")
    }
    for dtype, dropout in grid:
        yield StepCase(dtype=dtype, dropout=dropout, batch=batch, length=length, **model, **common)


def provider_names(args: argparse.Namespace) -> list[str] | None:
    """The names asked for, or None for each case's default."""
    if args.providers is None:
        return None
    names = list(dict.fromkeys(args.providers.split(",")))
    unknown = [name for name in names if name not in PROVIDERS[args.kind]]
    if unknown:
        raise ValueError(
            f"--providers: expected names of {', '.join(PROVIDERS[args.kind])}; got "
            f"{', '.join(unknown)}"
        )
    return names


def run(args, cases: list, names: list[str] | None, argv: list[str]) -> int:
    rows: list[dict] = []
    measured = False
    for index, case in enumerate(cases):
        say(f"[{index + 1}/{len(cases)}] {case.title}")
        chosen = names or default_providers(args.kind, case.torch_dtype)
        if args.kind == "op" and args.compile and "compile" not in chosen:
            chosen.append("compile")
        meta = machine.meta(torch.device(case.device), _command(argv))
        # The first case only: after that the load is our own.
        if index == 0 and (meta["load"] or 0) > 0.5:
            say(
                f"  the machine is busy (load {meta['load']}): with as many threads as CPUs, one "
                "busy neighbour makes every thread wait; times below may be of little worth"
            )
        group = measure_case(
            args.kind, case, chosen, meta, args.reps, not args.no_memory, args.threads
        )
        measured |= any(not row["skipped"] for row in group)
        rows += group
        report.write_rows(args.out, rows)
        report.print_case(group, plain=not sys.stdout.isatty())
        print(flush=True)
    say(f"{len(rows)} rows written to {args.out}")
    return 0 if measured else 1


def _command(argv: list[str]) -> str:
    """The command without where its output went: a path says nothing about the measurement."""
    kept, skip = [], False
    for word in argv:
        if skip or word.startswith("--out="):
            skip = False
        elif word == "--out":
            skip = True
        else:
            kept.append(word)
    return shlex.join(["python", "-m", "lora_kernels", "bench", *kept])
