"""The process in which calls are timed: a hang or a broken CUDA context costs this process.

    python -m lora_kernels.measuring.child '{"operation": "lora_linear", "cases": [{"m": 16, ...}],
                                             "threads": 2, "until": 1.8e9}'

Each line of standard output is one JSON object: that a case of that number begins, that a candidate
is prepared, timed or dropped, the case's cells, or why there are none, after which the process
ends: what the next one would inherit is not known. No case but the first is begun after ``until``,
in seconds since 1970.
"""

import json
import sys
import time
import traceback

import torch

from lora_kernels.measuring.linear_call import LinearCase
from lora_kernels.measuring.routed_call import RoutedCase
from lora_kernels.measuring.search import Case, best_cells
from lora_kernels.ops.linear.triton import tiles


def main(argv: list[str]) -> int:
    work = json.loads(argv[0])
    out = sys.stdout
    sys.stdout = sys.stderr  # nothing else may be between the lines

    def say(**line: object) -> None:
        print(json.dumps(line), file=out, flush=True)

    torch.set_num_threads(work["threads"])
    for number, fields in enumerate(work["cases"]):
        if number and time.time() > work["until"]:
            break
        say(begins=number)
        try:
            case = case_of(work["operation"], fields)
            if case.device.startswith("cuda"):
                torch.cuda.set_device(case.device)
            with tiles.use_cells({}):  # what was measured before must not change what is measured
                say(cells=best_cells(case, say))
        except Exception as error:  # whatever a kernel, its compiler or its launcher may raise
            traceback.print_exc()
            say(failed=f"{type(error).__name__}: {error}"[:600])
            break
    return 0


def case_of(operation: str, fields: dict) -> Case:
    if operation == RoutedCase.operation:
        return RoutedCase(**{**fields, "widths": tuple(fields["widths"])})
    return LinearCase(**fields)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
