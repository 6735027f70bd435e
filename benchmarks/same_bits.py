"""Whether two source trees give the same bits, gradients, errors and warnings for the same calls.

    python benchmarks/same_bits.py OLD NEW [--calls 3000] [--seed 0] [--out DIR] [--plant]

OLD and NEW are checkouts with the compiled extension beside the package. A process of each, on one
thread, makes the same random calls through the public functions (``random_calls/``), and others
with Triton's interpreter. Of each call it writes a line of JSON: what was drawn, and for every
result its dtype, shape, strides, whether it requires grad or is a view, and a hash of its bytes;
beside the results how many bytes were saved for the backward, the warnings, the state of torch's
generator and the operands' memory afterwards; for an error its type and message. Any difference is
named, with the call, and the exit status is 1.

--plant lets the new process flip one bit of one result, which must be found. Calls of one kind are
repeated by ``--only "lora_linear 17"``. LORA_KERNELS_CPU_LEVEL=0, 1 or 2 in the environment does
the same for the kernels of older processors.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

GROUPS = {"cpu": {}, "triton": {"TRITON_INTERPRET": "1"}}


def fact(value) -> str:
    """A result as text that is the same for the same bits."""
    import torch

    if not isinstance(value, torch.Tensor):
        plain = value is None or isinstance(value, (str, int, float, tuple, list))
        return str(value) if plain else type(value).__name__
    strides = [s if n > 1 else 0 for n, s in zip(value.shape, value.stride(), strict=True)]
    about = f"{value.dtype} {list(value.shape)} {strides} grad={value.requires_grad}"
    about += " inference" * value.is_inference() + " view" * value._is_view()
    if value.is_meta:
        return f"{about} meta"
    # A copy with the usual strides: those of a single element may be any.
    return f"{about} {_hash(torch.empty(value.shape, dtype=value.dtype).copy_(value))}"


def memory(tensor) -> str:
    """A hash of all of the storage, what lies between the rows included."""
    import torch

    return _hash(torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()))


def _hash(tensor) -> str:
    import torch

    octets = tensor.detach().view(-1).view(torch.uint8)
    return hashlib.sha256(octets.numpy().tobytes()).hexdigest()[:16]


def flip_a_bit(results: dict) -> bool:
    """Of the last tensor among the results that has elements."""
    import torch

    for name, value in reversed(results.items()):
        if isinstance(value, torch.Tensor) and value.is_contiguous() and value.numel() > 1:
            flipped = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
            flipped.view(-1).view(torch.uint8)[-1] ^= 1
            results[name] = flipped.requires_grad_(value.requires_grad)
            return True
    return False


def worker(group: str, tree: str, path: str, calls: int, seed: int, only: str, plant: bool) -> None:
    import random_calls

    import lora_kernels

    if not Path(lora_kernels.__file__).is_relative_to(tree):
        raise SystemExit(f"imported {lora_kernels.__file__}, expected it below {tree}")
    with open(path, "w") as lines:
        for number, (name, call) in enumerate(random_calls.calls(group, calls, seed)):
            if only and name != only:
                continue
            drawn, operands, results = call()
            if plant and number >= calls // 3:
                plant = not flip_a_bit(results)
            facts = {name: fact(value) for name, value in results.items()}
            if "error" in facts:
                facts["error"] = re.sub(r"0x[0-9a-f]+", "0x", facts["error"].replace(tree, "TREE"))
            facts["operands"] = _joined([memory(tensor) for tensor in operands])
            line = {"call": name, "drawn": drawn, "facts": facts, "sha256": _joined(facts)}
            print(json.dumps(line), file=lines, flush=True)


def _joined(facts) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def run(group: str, trees: list[Path], out: Path, arguments) -> list[dict[str, dict]]:
    """The lines of both trees by call."""
    started = []
    for which, tree in zip(("old", "new"), trees, strict=True):
        path = out / f"{group}-{which}.jsonl"
        environment = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", **GROUPS[group]}
        given = [group, tree, path, arguments.calls, arguments.seed, arguments.only]
        plant = arguments.plant and which == "new" and group == "cpu"
        with open(path.with_suffix(".log"), "w") as log:
            process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), "--worker", *map(str, given),
                 *["--plant"] * plant],
                cwd=tree, stdout=log, stderr=log,
                env={**os.environ, **environment},
            )  # fmt: skip
        started.append((process, path))
    found = []
    for process, path in started:
        process.wait()
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if process.returncode:
            last = lines[-1]["call"] if lines else "the import"
            print(path.with_suffix(".log").read_text()[-2000:])
            raise SystemExit(f"{path.name}: exit status {process.returncode} after {last}")
        found.append({line["call"]: line for line in lines})
    return found


def differences(old: dict, new: dict) -> list[str]:
    """The facts of one call that differ, as text."""
    if old["drawn"] != new["drawn"]:
        return [f"drawn: {old['drawn']} / {new['drawn']}"]
    names = dict.fromkeys([*old["facts"], *new["facts"]])
    return [
        f"{name}: {old['facts'].get(name)} / {new['facts'].get(name)}"
        for name in names
        if old["facts"].get(name) != new["facts"].get(name)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--calls", type=int, default=3000, help="of lora_linear and routed ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="one call, by its name")
    parser.add_argument("--plant", action="store_true", help="flip a bit, to see it found")
    parser.add_argument("--out", type=Path, help="where the lines stay")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="same-bits-"))
    out.mkdir(parents=True, exist_ok=True)
    counts, errors, different = Counter(), Counter(), 0
    for group in GROUPS:
        trees = [tree.resolve() for tree in (arguments.old, arguments.new)]
        old, new = run(group, trees, out.resolve(), arguments)
        if old.keys() != new.keys():
            raise SystemExit(f"{group}: other calls: {sorted(old.keys() ^ new.keys())[:9]}")
        for name, line in old.items():
            kind = name.rpartition(" ")[0]
            counts[kind] += 1
            errors[kind] += "error" in line["facts"]
            if line["sha256"] != new[name]["sha256"]:
                different += 1
                if different <= 20:
                    print(f"{name}: {json.dumps(line['drawn'])}")
                    print(*(f"    {text}" for text in differences(line, new[name])), sep="\n")
    for kind, count in counts.items():
        print(f"{count:6} {kind}, {errors[kind]} of them errors")
    print(f"{counts.total():6} calls, {different} differ; {out}")
    sys.exit(different > 0 or counts.total() == 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        group, tree, path, calls, seed, only, *plant = sys.argv[2:]
        worker(group, tree, path, int(calls), int(seed), only, bool(plant))
    else:
        main()
