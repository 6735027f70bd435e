"""`python -m lora_kernels tune`: measures what `auto` may take on this machine, and keeps it.

The calls are those of a model, by its config or adapter directory, or of a list (Llama-3's linears,
or a decoder's step). Calls that were measured are skipped: the command goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from lora_kernels.measuring import cells
from lora_kernels.measuring.linear_call import DTYPES
from lora_kernels.measuring.shapes import Work
from lora_kernels.measuring.tuning import device_of, export, tune, tune_calls

LISTS = {"core": cells.core, "decode": cells.decode, "full": cells.grid}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", help="a directory with config.json or adapter_config.json, or a config"
    )
    which.add_argument("--cells", choices=LISTS, help="calls of Llama-3 8B and 70B, in bf16")
    add("--tokens", type=_numbers, help="comma-separated, rows of a call (1,32,512,8192 on a GPU)")
    add("--seconds", type=float, default=20.0, help="begin no shape after these (%(default)s)")
    add("--rank", type=int, help="of adapters (the adapter's own, else 16)")
    add("--dropout", type=float, help="of adapters (the adapter's own, else 0)")
    add("--dtype", choices=DTYPES, help="of activations (the model's own)")
    add("--again", action="store_true", help="also what has been measured already")
    add(
        "--export", type=Path, nargs="?", const=Path("tuned"), metavar="DIR",
        help="write what has been measured to DIR/<gpu>/, to ship it (DIR: %(const)s)",
    )  # fmt: skip
    add("--shrink", type=int, default=1, help=argparse.SUPPRESS)  # of --cells: M, K and N divided
    args = parser.parse_args(argv)
    if args.model is None and args.cells is None and args.export is None:
        parser.error("expected --model, --cells or --export")
    of_model = (args.tokens, args.rank, args.dropout, args.dtype)
    if args.model is None and of_model != (None, None, None, None):
        parser.error("--tokens, --rank, --dropout and --dtype are for --model")
    device = device_of(nn.Module())
    options = {"seconds": args.seconds, "again": args.again}
    try:
        if args.model is not None:
            dtype = DTYPES[args.dtype] if args.dtype else None
            model = model_of(args.model)
            print(
                tune(model, tokens=args.tokens, dtype=dtype, rank=args.rank,
                     dropout_p=args.dropout, **options)
            )  # fmt: skip
        elif args.cells is not None:
            work: Work = dict.fromkeys(LISTS[args.cells](str(device), args.shrink), 1)
            print(tune_calls(work, device, **options))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    if args.export is not None:
        try:
            written = export(device, args.export)
        except OSError as error:
            parser.error(f"--export: {error}")
        print("\n".join(map(str, written)) or "nothing to export: nothing has been measured here")
        return int(not written)
    return 0


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def model_of(name: str) -> nn.Module:
    """The model of a directory, on the meta device: no weights are read, nothing is downloaded.

    Raises:
        ValueError: it is not there, or its config is of no known model.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ValueError("--model needs transformers: pip install transformers") from error
    if (Path(name) / "adapter_config.json").is_file():
        from peft import PeftConfig, get_peft_model

        adapter = PeftConfig.from_pretrained(name)
        base = model_of(str(adapter.base_model_name_or_path))
        return get_peft_model(base, adapter, low_cpu_mem_usage=True)
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except OSError as error:
        raise ValueError(
            f"--model: expected a directory with config.json or adapter_config.json, or a model in "
            f"the cache of Hugging Face, got {name!r}; nothing is downloaded"
        ) from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
