"""Measurements beside PEFT, naive LoRA and the frozen layer; `--help` behind each for more."""

import importlib
import sys

COMMANDS = {
    "op": "one lora_linear call, forward and backward",
    "step": "a training step of a Llama with random weights",
    "routed": "one layer with many adapters in one batch",
    "infer": "what LoRA costs at inference, on a whole model",
    "layer": "a training step of one decoder layer in plain torch",
    "tuned": "what tune takes on this machine, held to composed",
    "gpu": "everything that a GPU should show, in order of worth, until the time is over",
    "readme": "the plot and the tables of README.md and docs/, from benchmarks/results/",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else None
    if name not in COMMANDS:
        lines = [f"  {command:8}{what}" for command, what in COMMANDS.items()]
        print("\n".join(["python -m benchmarks COMMAND", "", __doc__, "", *lines]))
        return 0 if name in (None, "-h", "--help") else 2
    try:
        module = importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"benchmarks.{name}":
            raise
        print(f"benchmarks {name}: there is no benchmarks/{name}.py in this tree", file=sys.stderr)
        return 2
    if hasattr(module, "main"):
        return module.main(argv[1:])
    from benchmarks import driver

    return driver.main(name, argv[1:])


if __name__ == "__main__":
    sys.exit(main())
