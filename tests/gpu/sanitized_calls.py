"""Small calls of each kernel, in sizes that are multiples of nothing, for compute-sanitizer.

    python tests/gpu/sanitized_calls.py NAME

Needs the tree's root and its tests on PYTHONPATH.
"""

import sys

import torch
from gemm_tail import check_gemm_tail
from linear_target import SHAPES, Target
from routed_results import call_routed

from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime import cuda_extension
from lora_kernels.testing import LoRAProblem, run_forward_backward
from lora_kernels.testing.routed_inputs import RoutedProblem, some_ids

BF16, FP32 = torch.bfloat16, torch.float32


def triton(label: str, dtype: torch.dtype, strategy: str) -> None:
    rows, *sizes = SHAPES[label]
    problem = LoRAProblem.random((rows,), *sizes, dtype=dtype, dropout_p=0.3, device="cuda")
    with tiles.use_cells({"*": {"strategy": strategy}}):
        run_forward_backward(Target("cuda", "triton", strategy).call, problem)


def native() -> None:
    target = Target("cuda", "native")
    for sizes, adapter_dtype in (((9, 520, 136, 16), None), ((3, 101, 67, 3), FP32)):
        rows, *others = sizes
        problem = target.problem((rows,), *others, dtype=BF16, adapter_dtype=adapter_dtype)
        run_forward_backward(target.call, problem, needs=())
    for with_out in (False, True):
        problem = RoutedProblem.random(
            some_ids(37, 4), (3, 16, 8, 40), 264, (136, 72), dtype=BF16, with_weight=False,
            with_out=with_out, device="cuda",
        )  # fmt: skip
        with torch.no_grad():
            call_routed(problem, problem.bank().requires_grad_(False), "native", out=problem.out)
    if cuda_extension.missing_gemm_tail(torch.device("cuda", 0)) is None:
        for transposed, p in ((True, 0.0), (False, 0.0), (False, 0.3)):
            check_gemm_tail("edges", BF16, transposed, p, "cuda")


CALLS = {
    "bf16 aligned fused": lambda: triton("aligned", BF16, "fused"),
    "bf16 odd hybrid": lambda: triton("odd", BF16, "hybrid"),
    "fp32 rank 160 fused": lambda: triton("rank 160", FP32, "fused"),
    "native": native,
}

if __name__ == "__main__":
    CALLS[sys.argv[1]]()
    torch.cuda.synchronize()
