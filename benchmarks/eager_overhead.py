"""Time of eager calls, of two source trees in turn: what a change costs.

    python benchmarks/eager_overhead.py OLD NEW [--what WHAT] [--rounds 60] [--out results.json]

OLD and NEW are checkouts with the compiled extension beside the package. A process of each runs the
same calls, turn by turn (old, new, new, old, ...), and a turn gives each call's microseconds, their
lower quartile. After some pairs of turns two other processes go on. A line shows the medians of the
turns, of the differences of a pair of turns with their quartiles, and of the ratios of a pair with
their 95 % bootstrap bounds.

layer: 64 tokens, 96 to 48, rank 8, bf16, forward and backward: little but host time, where the CPU
multiplies bf16. host: 2 tokens in fp32, little but host time everywhere. routed: a decode of 64
tokens over 16 adapters of such a layer, bf16, without gradients. mixed: batches of many adapters
over one layer of 1024 x 1024 and through a routed model, fp32, rank 16. step: forward with the
loss and backward of 8 layers, 576 to 576 and 1536, rank 16, bf16, 2 x 128 tokens, on two threads;
the others take one.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from statistics import median, quantiles

CALLS = {"layer": 200, "host": 200, "routed": 100, "mixed": 30, "step": 6}
THREADS = {"step": 2}
WARM_UP, RESAMPLES = 2, 2000


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


def routed_calls() -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from lora_kernels import (
        AdapterBank,
        RoutedLoRALinear,
        Routing,
        accelerate,
        route,
        routed_lora,
        routed_lora_linear,
    )

    made = {"dtype": torch.bfloat16}
    linear = nn.Linear(96, 48, bias=False, **made).requires_grad_(False)
    layer = RoutedLoRALinear.from_linear(
        nn.Linear(96, 48, bias=False, **made), adapter_dtype=torch.bfloat16
    )
    bank = AdapterBank(96, 48, **made)
    net = nn.Sequential(nn.Linear(96, 48, bias=False, **made))
    routed = route(net)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q"])
    model = nn.ModuleDict({"q": nn.Linear(96, 48, bias=False, **made)})
    model = get_peft_model(model, config, "n0", autocast_adapter_dtype=False)
    for index in range(16):
        factors = torch.randn(8, 96, **made), torch.randn(48, 8, **made)
        bank.add(f"n{index}", *factors, 2.0)
        layer.bank.add(f"n{index}", *factors, 2.0)
        routed.add(f"n{index}", rank=8, alpha=16, target_modules=["0"])
        if index:
            model.add_adapter(f"n{index}", config)
    accelerate(model.eval())
    peft_layer = model.base_model.model["q"]
    names, x = list(bank) * 4, torch.randn(64, 96, **made)
    filled, again = (Routing.from_sequences(names, 1, bank) for _ in range(2))
    of_layer, out = Routing.from_sequences(names, 1, layer.bank), torch.zeros(64, 48, **made)

    def by_names():
        with routed.adapters(names):
            net(x[:, None])

    calls = {
        "frozen": lambda: linear(x),
        "routed_lora_linear": lambda: routed_lora_linear(x, linear.weight, bank, filled),
        "routed_lora": lambda: routed_lora(x, bank, filled),
        "routed_lora into out": lambda: routed_lora(x, bank, filled, out),
        "routing filled, then called": lambda: routed_lora_linear(
            x, linear.weight, bank, again.set_sequences_(names, 1)
        ),
        "RoutedLoRALinear": lambda: layer(x, of_layer),
        "route, by names": by_names,
        "PEFT, accelerated, by names": lambda: peft_layer(x, adapter_names=names),
    }
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def step_calls() -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from lora_kernels import LoRALinear, accelerate

    made = {"dtype": torch.bfloat16}

    def linears() -> list[nn.Linear]:
        sizes = [(576, 576), (576, 576), (576, 1536), (1536, 576)] * 2
        return [nn.Linear(*size, bias=False, **made).requires_grad_(False) for size in sizes]

    def layers(dropout_p: float) -> nn.Module:
        options = {"dropout_p": dropout_p, "adapter_dtype": torch.bfloat16}
        return nn.Sequential(*(LoRALinear.from_linear(each, **options) for each in linears()))

    def accelerated(dropout_p: float) -> nn.Module:
        model = get_peft_model(
            nn.Sequential(*linears()),
            LoraConfig(r=16, target_modules=r"\d", lora_dropout=dropout_p),
            autocast_adapter_dtype=False,
        )
        accelerate(model)
        return model.base_model.model

    def step(model: nn.Module, trains_x: bool = False):
        x = torch.randn(2, 128, 576, **made, requires_grad=trains_x)
        leaves = [x, *model.parameters()]

        def call():
            model(x).float().square().mean().backward()
            for leaf in leaves:
                leaf.grad = None

        return call

    return {
        "frozen, with dx": step(nn.Sequential(*linears()), trains_x=True),
        "LoRALinear": step(layers(0.0)),
        "LoRALinear, dropout": step(layers(0.05)),
        "PEFT, accelerated": step(accelerated(0.0)),
        "PEFT, accelerated, dropout": step(accelerated(0.05)),
    }


def worker(what: str) -> None:
    import time

    import torch

    torch.set_num_threads(THREADS.get(what, 1))
    torch.manual_seed(0)
    calls = {
        "layer": lambda: layer_calls(64, "bfloat16"),
        "host": lambda: layer_calls(2, "float32"),
        "routed": routed_calls,
        "mixed": mixed_calls,
        "step": step_calls,
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


def bounds(ratios: list[list[float]]) -> tuple[float, float]:
    """Of the median, by the bootstrap: 95 % of resampled medians lie between them.

    Processes are drawn first and then their pairs: where a process's memory lies changes all of
    its turns alike.
    """
    draw = random.Random(0).choices
    medians = sorted(
        median(r for own in draw(ratios, k=len(ratios)) for r in draw(own, k=len(own)))
        for _ in range(RESAMPLES)
    )
    return medians[RESAMPLES // 40], medians[-RESAMPLES // 40]


def summary(name: str, processes: list[list[list[dict]]]) -> dict:
    """Of one call, from its turns in pairs."""
    pairs = [[(old[name], new[name]) for old, new in rounds] for rounds in processes]
    every = [pair for own in pairs for pair in own]
    low, _, high = quantiles([new - old for old, new in every], n=4)
    return {
        "old": median(old for old, _ in every),
        "new": median(new for _, new in every),
        "difference": median(new - old for old, new in every),
        "quartiles": (low, high),
        "ratio": median(new / old for old, new in every),
        "bounds": bounds([[new / old for old, new in own] for own in pairs]),
    }


def measure(trees: list[str], what: str, rounds: int) -> list[list[dict]]:
    """The figures of a process of each tree, in pairs."""
    # Threads that spin for each other lose whole time slices where the machine has other work.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    environment["OMP_NUM_THREADS"] = str(THREADS.get(what, 1))
    workers = [
        subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker", what],
            text=True, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**environment, "PYTHONPATH": os.path.abspath(tree)},
        )
        for tree in trees
    ]  # fmt: skip
    found = []
    for number in range(-WARM_UP, rounds):
        figures = [{}, {}]
        for which in (0, 1) if number % 2 else (1, 0):
            print(file=workers[which].stdin, flush=True)
            figures[which] = json.loads(workers[which].stdout.readline())
        if number >= 0:
            found.append(figures)
    for process in workers:
        process.stdin.close()
        process.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    parser.add_argument("--rounds", type=int, default=60, help="pairs of turns")
    parser.add_argument(
        "--processes", type=int, default=6, help="of each tree, one after the other"
    )
    parser.add_argument("--what", choices=sorted(CALLS), default="layer")
    parser.add_argument("--out", help="write the figures there as JSON")
    arguments = parser.parse_args()
    rounds = -(-arguments.rounds // arguments.processes)
    processes = [
        measure((arguments.old, arguments.new), arguments.what, rounds)
        for _ in range(arguments.processes)
    ]
    found = {name: summary(name, processes) for name in processes[0][0][0]}
    print(f"{'us':30} {'old':>8} {'new':>8}   new - old [quartiles]   new / old [95 % bounds]")
    for name, each in found.items():
        (low, high), (least, most) = each["quartiles"], each["bounds"]
        print(
            f"{name:30} {each['old']:8.1f} {each['new']:8.1f}   "
            f"{each['difference']:+.1f} [{low:+.1f} {high:+.1f}]   "
            f"{each['ratio']:.3f} [{least:.3f} {most:.3f}]"
        )
    if arguments.out:
        facts = {"what": arguments.what, "pairs": rounds * arguments.processes}
        facts |= {"processes": arguments.processes, "load": os.getloadavg()}
        with open(arguments.out, "w") as file:
            json.dump({**facts, "microseconds": found}, file, indent=1)


if __name__ == "__main__":
    worker(sys.argv[2]) if sys.argv[1:2] == ["--worker"] else main()
