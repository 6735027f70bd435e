"""`python -m lora_kernels self-test`: tries our kernels on this machine and says what it saw."""

import argparse
import sys

import torch

from lora_kernels import self_test
from lora_kernels.runtime.verdicts import ABSENT, BROKEN, Verdicts

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels self-test",
        description="Tries each family of kernels in a process of its own, forward and backward "
        "against fp64, and keeps the verdicts for this state of the machine. Exit status 1 if one "
        "is broken.",
    )
    add = parser.add_argument
    add("--again", action="store_true", help="also what has a verdict already")
    add("--seconds", type=float, default=self_test.SECONDS, help="at most (%(default)s)")
    add("--dtypes", default=",".join(DTYPES), help="comma-separated, of activations (%(default)s)")
    args = parser.parse_args(argv)
    names = args.dtypes.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        parser.error(f"--dtypes: expected names of {', '.join(DTYPES)}; got {', '.join(unknown)}")
    dtypes = tuple(getattr(torch, name) for name in names)
    found = self_test.ensure(dtypes, again=args.again, seconds=args.seconds)
    print("\n".join(lines_of(found)))
    every = [verdict for families in found.values() for verdict in families.values()]
    return int(any(verdict.state == BROKEN for verdict in every))


def lines_of(found: Verdicts) -> list[str]:
    """What does not run on a kind of device is left out."""
    lines = []
    for kind, families in found.items():
        lines.append(kind)
        tried = {name: verdict for name, verdict in families.items() if verdict.state != ABSENT}
        for name, verdict in tried.items():
            took = f" ({verdict.seconds:.1f} s)" if verdict.seconds else ""
            lines.append(f"  {name:<22} {verdict.state:<9} {verdict.detail}{took}")
        if not tried:
            lines.append("  no kernel of ours runs there")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
