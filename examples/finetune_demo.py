"""Fine-tune two LoRA adapters on a real model and real text, and report what it gave and cost.

    python examples/finetune_demo.py            about five minutes on two CPU cores
    python examples/finetune_demo.py --joint    and then all adapters in one batch: some more
    python examples/finetune_demo.py --quick    every part of it in a few steps

SmolLM2-135M-Instruct learns the Python language reference in one adapter and numpy's docstrings in
another, through PEFT and `lora_kernels.accelerate`. With --joint one mixed batch then writes with
every adapter and with none, and the adapters are trained again together, in one batch. Nothing is
downloaded. Adapters, a report, the loss curves and all numbers as JSON land in `demo-report/`. The
exit code is 1 if something that the report claims does not hold, and 130 after Ctrl-C.
"""

import argparse
import os
import sys
from pathlib import Path

# A checkout works without being installed; an installed lora_kernels comes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=_positive, help="training steps per adapter")
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder to write to")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--joint", action="store_true", help="all adapters in one batch, too")
    parser.add_argument("--quick", action="store_true", help="a handful of steps of everything")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def main() -> int:
    options = parse()
    # Before transformers is imported: weights, tokenizer and texts are all on this machine.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # OpenMP's threads spin while they wait: on a busy machine that makes it ten times as slow.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from demo.run import run

        return run(options)
    except KeyboardInterrupt:
        adapters = sorted(path.name for path in (options.out / "adapters").glob("[!.]*"))
        kept = f"complete: {', '.join(adapters)}" if adapters else "none was finished"
        print(f"\nInterrupted. Adapters in {options.out / 'adapters'}: {kept}.", flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
