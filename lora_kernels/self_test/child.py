"""The process in which kernels are tried: a wrong kernel, a hang or a signal costs this process.

    python -m lora_kernels.self_test.child --dtypes bfloat16,float32 [--skip KIND/FAMILY ...]

Each line of standard output is one JSON object: that the process is ready, that a family of a kind
of device or one of its checks has begun, or the family's verdict. What is not there when the
process ends was not tried.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch

from lora_kernels.runtime import machine_files
from lora_kernels.runtime.verdicts import ABSENT, BROKEN, PROVEN, UNPROVEN
from lora_kernels.self_test.families import FAMILIES, Family, available


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tries kernels; for lora_kernels.self_test.")
    parser.add_argument("--dtypes", required=True)
    parser.add_argument("--skip", action="append", default=[], metavar="KIND/FAMILY")
    args = parser.parse_args(argv)
    dtypes = tuple(getattr(torch, name) for name in args.dtypes.split(","))
    out = sys.stdout
    sys.stdout = sys.stderr  # nothing else may be between the lines

    def say(**line: object) -> None:
        print(json.dumps(line), file=out, flush=True)

    found = {machine_files.kind_of(device): device for device in devices()}
    say(ready=list(found))
    for kind, device in found.items():
        for name, reason in available(device, dtypes).items():
            if f"{kind}/{name}" in args.skip:
                continue
            if reason is None:
                say(kind=kind, family=name, begins=True)
                family = FAMILIES[name]
                say(kind=kind, family=name, **judge(family, device, dtypes, say))
            else:
                say(kind=kind, family=name, state=ABSENT, detail=reason, seconds=0.0)
    return 0


def devices() -> Iterator[torch.device]:
    """One device of each kind is enough, but all are looked at: kinds may be mixed."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            torch.zeros(1, device=device)  # a GPU that is full or in use raises here
            yield device
    yield torch.device("cpu")


def judge(
    family: Family,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    say: Callable[..., None],
) -> dict:
    """The verdict of the family's checks, up to the first that fails."""
    began = time.perf_counter()
    count = 0
    for name, check in family.checks(device, dtypes):
        say(check=name)
        try:
            check()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # whatever a kernel, its compiler or its launcher may raise
            traceback.print_exc()
            state = UNPROVEN if _says_nothing_of_the_kernel(error) else BROKEN
            return _judged(state, f"{name}: {type(error).__name__}: {error}"[:600], began)
        count += 1
    return _judged(PROVEN, f"{count} checks passed", began)


def _judged(state: str, detail: str, began: float) -> dict:
    return {"state": state, "detail": detail, "seconds": time.perf_counter() - began}


def _says_nothing_of_the_kernel(error: Exception) -> bool:
    """The machine lacks something: memory, or a C compiler for Triton's launcher."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "C compiler" in str(error)


if __name__ == "__main__":
    sys.exit(main())
