"""Training an adapter, and the loss on held-out text."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from demo.progress import Advance
from demo.settings import Settings
from demo.texts import Text


@dataclass
class Curve:
    """train: the loss of each step's batch. held_out: steps done, and the loss after them.
    seconds: of each step."""

    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def add_adapter(base: nn.Module, settings: Settings) -> PeftModel:
    """A new LoRA adapter on every linear layer but the output's, in PEFT's default precision."""
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def train(
    model: PeftModel, text: Text, base_loss: float, settings: Settings, advance: Advance
) -> Curve:
    """AdamW, warmed up over a tenth of the steps, then decayed linearly; `advance` after each."""
    curve = Curve(held_out=[(0, base_loss)])
    optimizer = adapter_optimizer(model, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, settings.steps)
    )
    measured = measured_steps(settings.steps, settings.measurements)
    model.train()
    batches = shuffled_batches(text.train, settings.batch, settings.seed)
    for step, batch in enumerate(islice(batches, settings.steps), start=1):
        began = time.perf_counter()
        loss = loss_of(model, batch.to(settings.device))
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        curve.train.append(loss.item())
        curve.seconds.append(time.perf_counter() - began)
        if step in measured:
            held_out = held_out_loss(model, text.held_out, settings)
            curve.held_out.append((step, held_out))
        advance(f"loss {curve.train[-1]:.3f}, held out {curve.held_out[-1][1]:.3f}")
    return curve


def adapter_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean loss per token, in nats, of predicting each next token of `batch` [n, length]."""
    return model(input_ids=batch, labels=batch, use_cache=False).loss


@torch.no_grad()
def held_out_loss(model: nn.Module, sequences: Tensor, settings: Settings) -> float:
    """Mean loss per token over all `sequences` [m, length], without dropout."""
    training = model.training
    model.eval()
    total = 0.0
    for batch in sequences.split(settings.batch):
        total += loss_of(model, batch.to(settings.device)).item() * len(batch)
    model.train(training)
    return total / len(sequences)


def shuffled_batches(sequences: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches without end: every sequence once, in an order of its own each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sequences), generator=generator)
        for indices in order.split(batch):
            if len(indices) == batch or len(sequences) < batch:
                yield sequences[indices]


def learning_rate_factor(step: int, steps: int) -> float:
    """Up to 1 over the first tenth of the steps, then down; 0 would come after the last."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup + 1))


def measured_steps(steps: int, count: int) -> set[int]:
    """`count` steps (fewer if there are not so many), evenly spaced; the last is one of them."""
    return {round(steps * (i + 1) / count) for i in range(count)} - {0}
