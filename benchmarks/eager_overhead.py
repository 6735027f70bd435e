"""Time of eager calls, of two source trees in turn: what a change costs.

    python benchmarks/eager_overhead.py OLD NEW [--what layer|host|mixed] [--rounds 60]

OLD and NEW are checkouts with the compiled extension beside the package. A process of each runs the
same calls, one thread, turn by turn; a figure is the median over the rounds of (microseconds of a
call, the lower quartile within a round), and the difference the median of the rounds' differences.

layer: 64 tokens, 96 to 48, rank 8, bf16, forward and backward: little but host time, where the CPU
multiplies bf16. host: 2 tokens in fp32, little but host time everywhere. mixed: batches
of many adapters over one layer of 1024 x 1024 and through a routed model, fp32, rank 16.
"""

import argparse
import json
import os
import subprocess
import sys
from statistics import median, quantiles

CALLS = {"layer": 200, "host": 200, "mixed": 30}


def layer_calls(tokens: int, dtype: str) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from lora_kernels import LoRALinear, accelerate, lora_linear

    made = {"dtype": getattr(torch, dtype)}
    x = torch.randn(tokens, 96, **made).requires_grad_()
    linear = nn.Linear(96, 48, bias=False, **made).requires_grad_(False)
    a, b = (torch.randn(s, **made).requires_grad_() for s in ((8, 96), (48, 8)))
    layer = LoRALinear.from_linear(linear, rank=8, alpha=16, adapter_dtype=made["dtype"])
    model = nn.ModuleDict({"q": nn.Linear(96, 48, bias=False, **made)})
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=["q"]), autocast_adapter_dtype=False
    )
    accelerate(model)
    peft_layer = model.base_model.model["q"]
    scaling, dy = torch.tensor(2.0, dtype=torch.float64), torch.randn(tokens, 48, **made)
    calls = {
        "frozen": lambda: linear(x),
        "function, number": lambda: lora_linear(x, linear.weight, a, b, 2.0),
        "function, tensor": lambda: lora_linear(x, linear.weight, a, b, scaling),
        "LoRALinear": lambda: layer(x),
        "PEFT, accelerated": lambda: peft_layer(x),
    }
    return {name: lambda call=call: call().backward(dy) for name, call in calls.items()}


def mixed_calls() -> dict:
    import torch
    from torch import nn

    from lora_kernels import AdapterBank, Routing, route, routed_lora_linear

    width, rank = 1024, 16
    weight, bank = torch.randn(width, width) * width**-0.5, AdapterBank(width, width)
    for index in range(16):
        bank.add(f"n{index}", torch.randn(rank, width), torch.randn(width, rank), 0.5)

    def layer(names: list[str], tokens: int, trains: bool):
        x = torch.randn(len(names) * tokens, width)
        routing = Routing.from_sequences(names, tokens, bank)

        def call():
            with torch.set_grad_enabled(trains):
                y = routed_lora_linear(x, weight, bank, routing)
                if trains:
                    y.sum().backward()
                    for parameter in bank.parameters():
                        parameter.grad = None

        return call

    net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))
    routed, x = route(net), torch.randn(16, 4, 256)
    for index in range(16):
        routed.add(f"n{index}", rank=8, alpha=8, target_modules=[str(i) for i in range(12)])
    names = [f"n{index}" for index in range(16)]

    def model():
        with torch.no_grad(), routed.adapters(names):
            net(x)

    def training():
        with routed.adapters(names[:4] * 4):
            net(x).sum().backward()

    return {
        "decode, 64 x 1, 16 adapters": layer(names * 4, 1, False),
        "prefill, 4 x 128, 4 adapters": layer(names[:4], 128, False),
        "joint training, 4 x 128": layer(names[:4], 128, True),
        "12 layers by names": model,
        "12 layers by names, training": training,
    }


def worker(what: str) -> None:
    import time

    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    calls = {
        "layer": lambda: layer_calls(64, "bfloat16"),
        "host": lambda: layer_calls(2, "float32"),
        "mixed": mixed_calls,
    }[what]()
    for _ in sys.stdin:
        figures = {}
        for name, call in calls.items():
            times = []
            for _ in range(CALLS[what]):
                start = time.perf_counter_ns()
                call()
                times.append((time.perf_counter_ns() - start) / 1000)
            figures[name] = quantiles(times, n=4)[0]
        print(json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--what", choices=sorted(CALLS), default="layer")
    arguments = parser.parse_args()
    workers = [
        subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker", arguments.what],
            text=True, cwd=tree,
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
    print(f"{'us':30} {'old':>8} {'new':>8}   new - old [quartiles]   new / old")
    for name in rounds[0][0]:
        old, new = ([figures[which][name] for figures in rounds] for which in (0, 1))
        low, _, high = quantiles([n - o for o, n in zip(old, new, strict=True)], n=4)
        difference = median(n - o for o, n in zip(old, new, strict=True))
        print(
            f"{name:30} {median(old):8.1f} {median(new):8.1f}   "
            f"{difference:+.1f} [{low:+.1f} {high:+.1f}]   "
            f"{median(n / o for o, n in zip(old, new, strict=True)):.3f}"
        )


if __name__ == "__main__":
    worker(sys.argv[2]) if sys.argv[1:2] == ["--worker"] else main()
