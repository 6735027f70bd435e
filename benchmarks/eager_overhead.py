"""Host time of one small eager call, of two source trees in turn: what a change costs per layer.

    python benchmarks/eager_overhead.py OLD NEW [--rounds 60]

OLD and NEW are checkouts with the compiled extension beside the package. A process of each runs the
same calls, one thread, turn by turn; a figure is the median over the rounds of (microseconds of a
call, the lower quartile within a round), and the difference the median of the rounds' differences.
The layer is 64 tokens, 96 to 48, rank 8, bf16, forward and backward.
"""

import argparse
import json
import os
import subprocess
import sys
from statistics import median, quantiles

WAYS = ("frozen", "function, number", "function, tensor", "LoRALinear", "PEFT, accelerated")
CALLS = 200


def worker() -> None:
    import time

    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from lora_kernels import LoRALinear, accelerate, lora_linear

    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(64, 96).bfloat16().requires_grad_()
    linear = nn.Linear(96, 48, bias=False).bfloat16().requires_grad_(False)
    a, b = (torch.randn(s).bfloat16().requires_grad_() for s in ((8, 96), (48, 8)))
    layer = LoRALinear.from_linear(linear, rank=8, alpha=16, adapter_dtype=torch.bfloat16)
    model = nn.ModuleDict({"q": nn.Linear(96, 48, bias=False).bfloat16()})
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=["q"]), autocast_adapter_dtype=False
    )
    accelerate(model)
    peft_layer = model.base_model.model["q"]
    scaling = torch.tensor(2.0, dtype=torch.float64)
    calls = {
        "frozen": lambda: linear(x),
        "function, number": lambda: lora_linear(x, linear.weight, a, b, 2.0),
        "function, tensor": lambda: lora_linear(x, linear.weight, a, b, scaling),
        "LoRALinear": lambda: layer(x),
        "PEFT, accelerated": lambda: peft_layer(x),
    }
    dy = torch.randn(64, 48).bfloat16()
    for _ in sys.stdin:
        figures = {}
        for name in WAYS:
            call, times = calls[name], []
            for _ in range(CALLS):
                start = time.perf_counter_ns()
                call().backward(dy)
                times.append((time.perf_counter_ns() - start) / 1000)
            figures[name] = quantiles(times, n=4)[0]
        print(json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    workers = [
        subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker"], text=True, cwd=tree,
            env={**os.environ, "PYTHONPATH": os.path.abspath(tree)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for tree in arguments.trees
    ]  # fmt: skip
    rounds = []
    for number in range(arguments.rounds + 2):
        figures = [{}, {}]
        for which in (0, 1) if number % 2 else (1, 0):
            print(file=workers[which].stdin, flush=True)
            figures[which] = json.loads(workers[which].stdout.readline())
        if number >= 2:  # the first ones warm up
            rounds.append(figures)
    for process in workers:
        process.stdin.close()
        process.wait()
    print(f"{'us, forward and backward':26} {'old':>8} {'new':>8}   new - old [quartiles]")
    for name in WAYS:
        old, new = ([figures[which][name] for figures in rounds] for which in (0, 1))
        low, _, high = quantiles([n - o for o, n in zip(old, new, strict=True)], n=4)
        difference = median(n - o for o, n in zip(old, new, strict=True))
        print(
            f"{name:26} {median(old):8.1f} {median(new):8.1f}   "
            f"{difference:+.1f} [{low:+.1f} {high:+.1f}]"
        )


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["--worker"] else main()
