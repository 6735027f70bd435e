"""The second half: every adapter in one batch, writing together and trained together."""

import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import lora_kernels
from demo.adapters import save_adapter
from demo.progress import progress
from demo.results import Joint, Results
from demo.settings import ROUNDING, Settings
from demo.train import (
    Curve,
    adapter_optimizer,
    add_adapter,
    held_out_loss,
    learning_rate_factor,
    shuffled_batches,
)
from lora_kernels.integrations.routed import RoutedModel

NO_ADAPTER = "__base__"


def run_joint(
    base: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Settings, results: Results
) -> None:
    """Writes and trains with all adapters at once, and compares with one after the other."""
    results.joint = Joint()
    write_together(base, tokenizer, settings, results)
    train_together(base, settings, results)


def write_together(
    base: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Settings, results: Results
) -> None:
    """Every prompt with every adapter and with none, in one batch; then the same one by one.

    In fp32, where rounding in products of other sizes does not change which token is likeliest.
    """
    model = deepcopy(base).float()
    routed = lora_kernels.route(model)
    names = [text.name for text in results.texts]
    for name in names:
        routed.load(name, settings.adapters / name)
    batch = prompts_of(tokenizer, results, settings)
    chosen = [name for _ in results.texts for name in (*names, NO_ADAPTER)]
    rows = len(chosen)
    joint = results.joint
    joint.rows, joint.new_tokens = rows, settings.new_tokens

    def write(some: slice) -> Tensor:
        with routed.adapters(chosen[some]):
            return continued(model, tokenizer, {k: v[some] for k, v in batch.items()}, settings)

    with progress("Writing in one batch", 3 + rows) as advance:
        write(slice(0, 1))  # warms up
        advance("warm")
        together, joint.writing["one mixed batch"] = timed(lambda: write(slice(None)), 2)
        advance(f"{rows} sequences at once")
        alone, seconds = [], 0.0
        for row in range(rows):
            tokens, took = timed(lambda row=row: write(slice(row, row + 1)))
            alone.append(tokens)
            seconds += took
            advance(f"alone: {chosen[row]}")
        joint.writing["one sequence after another"] = seconds
        routed.undo()
        peft_model = with_peft(model, names, settings)
        peft, took = timed(
            lambda: continued(peft_model, tokenizer, batch, settings, adapter_names=chosen), 2
        )
        joint.writing["PEFT's mixed batch"] = took
        advance("PEFT")
    end = tokenizer.eos_token_id
    same = sum(same_tokens(a, b[None], end) for a, b in zip(alone, together, strict=True))
    results.check(
        "a mixed batch writes the same tokens as each of its sequences alone, in fp32",
        same == rows,
        f"{same} of {rows} sequences",
    )
    results.check(
        "PEFT's mixed batch writes the same tokens",
        same_tokens(peft, together, end),
        f"{rows} sequences",
    )


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, results: Results, settings: Settings
) -> dict[str, Tensor]:
    """Each text's prompt as often as there are adapters, and once more; padded on the left."""
    times = len(results.texts) + 1
    prompts = [text.prompt for text in results.texts for _ in range(times)]
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    width = max(map(len, encoded))
    ids = torch.full((len(prompts), width), tokenizer.eos_token_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    return {"input_ids": ids.to(settings.device), "attention_mask": mask.to(settings.device)}


def continued(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: dict[str, Tensor],
    settings: Settings,
    **options,
) -> Tensor:
    """What is written greedily after the prompts: tokens ``[rows, at most new_tokens]``."""
    model.eval()
    with torch.no_grad():
        ids = model.generate(
            **batch,
            max_new_tokens=settings.new_tokens,
            do_sample=False,
            repetition_penalty=1.15,
            pad_token_id=tokenizer.eos_token_id,
            **options,
        )
    return ids[:, batch["input_ids"].shape[1] :]


def with_peft(model: nn.Module, names: list[str], settings: Settings) -> PeftModel:
    """The adapters in PEFT's own layers, which loop over them in a mixed batch."""
    first, *others = names
    peft_model = PeftModel.from_pretrained(model, settings.adapters / first, adapter_name=first)
    for name in others:
        peft_model.load_adapter(settings.adapters / name, adapter_name=name)
    return peft_model


def train_together(base: nn.Module, settings: Settings, results: Results) -> None:
    """Trains all adapters at once from where they began, on the batches that each had alone."""
    routed = lora_kernels.route(deepcopy(base))
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        save_adapter(add_adapter(deepcopy(base), settings), start)
        for text in results.texts:
            routed.load(text.name, start, trainable=True)
    optimizer = adapter_optimizer(routed.model, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, settings.steps)
    )
    streams = [shuffled_batches(t.train, settings.batch, settings.seed) for t in results.texts]
    curves = {text.name: Curve() for text in results.texts}
    seconds = []
    routed.model.train()
    with progress("Training together", settings.steps) as advance:
        for batches in islice(zip(*streams, strict=True), settings.steps):
            began = time.perf_counter()
            losses = joint_losses(routed, list(curves), list(batches), settings)
            torch.stack(losses).sum().backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            for curve, loss in zip(curves.values(), losses, strict=True):
                curve.train.append(loss.item())
            seconds.append(time.perf_counter() - began)
            advance(", ".join(f"{name} {c.train[-1]:.3f}" for name, c in curves.items()))
    joint = results.joint
    joint.together = statistics.median(seconds)
    joint.apart = sum(
        statistics.median(results.curves[text.name].seconds) for text in results.texts
    )
    for text in results.texts:
        with routed.adapters(text.name):
            together = held_out_loss(routed.model, text.held_out, settings)
        apart = results.curves[text.name].held_out[-1][1]
        joint.losses[text.name] = (apart, together)
        results.check(
            f"{text.name}: trained together with the others, the held-out loss is that of training "
            f"alone within {ROUNDING}",
            abs(together - apart) < ROUNDING,
            f"alone {apart:.4f}, together {together:.4f}",
        )
        routed.save(text.name, settings.out / "adapters-joint" / text.name)


def joint_losses(
    routed: RoutedModel, names: list[str], batches: list[Tensor], settings: Settings
) -> list[Tensor]:
    """The mean loss per token of each adapter's own sequences, from one pass over all of them."""
    batch = torch.cat(batches).to(settings.device)
    chosen = [name for name, part in zip(names, batches, strict=True) for _ in part]
    with routed.adapters(chosen):
        logits = routed.model(input_ids=batch, use_cache=False).logits
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
    ).view(len(batch), -1)
    return [part.mean() for part in losses.split([len(part) for part in batches])]


def timed(write: Callable[[], Tensor], times: int = 1) -> tuple[Tensor, float]:
    """What it gives, and the seconds of the fastest of so many times."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        tokens = write()
        if tokens.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return tokens, min(seconds)


def same_tokens(left: Tensor, right: Tensor, end: int) -> bool:
    """Whether both ``[rows, any]`` say the same: a batch goes on until its last row has ended."""
    width = max(left.shape[1], right.shape[1])
    left, right = (
        F.pad(tokens, (0, width - tokens.shape[1]), value=end) for tokens in (left, right)
    )
    return torch.equal(left, right)
