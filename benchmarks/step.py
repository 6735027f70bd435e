"""A training step of a Llama with random weights, by default of SmolLM2-135M's shape.

Timed: forward with the loss, and backward; `step` is their sum. The optimizer (AdamW on the
adapters) is timed by itself, outside `step`: it is the same for every provider and none of ours.
"""

import gc
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.memory import PeakMemory, SavedStorage, peak_of, saved_for_backward
from benchmarks.preparing import Unavailable, import_transformers, prepare_each
from benchmarks.step_providers import PROVIDERS, StepProvider
from lora_kernels.measuring import timing
from lora_kernels.measuring.linear_call import Typed


@dataclass(frozen=True)
class StepCase(Typed):
    dtype: str = "bf16"
    dropout: float = 0.0
    rank: int = 16
    alpha: float = 32
    batch: int = 2
    length: int = 256
    layers: int = 30
    hidden: int = 576
    heads: int = 9
    kv_heads: int = 3
    intermediate: int = 1536
    vocab: int = 49152
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_heads(self)

    @property
    def title(self) -> str:
        return (
            f"training step: {self.layers} layers of {self.hidden}, {self.batch}x{self.length} "
            f"tokens, r {self.rank}, {self.dtype}, dropout {self.dropout:g}"
        )


Case = StepCase


def check_heads(case) -> None:
    if case.hidden % case.heads or case.heads % case.kv_heads:
        raise ValueError(
            "--hidden must be a multiple of --heads, and --heads of --kv-heads; got "
            f"{case.hidden}, {case.heads}, {case.kv_heads}"
        )


def default_cases(device: str) -> list[StepCase]:
    return [StepCase(device=device)]


def default_providers(case: StepCase) -> list[str]:
    # In fp32 peft-base-dtype would be the same measurement as peft.
    base_dtype = ["peft-base-dtype"] if case.dtype != "fp32" else []
    return ["frozen", "naive", "peft", *base_dtype, "ours"]


def llama_config(case, length: int, use_cache: bool):
    """A Llama of the case's sizes, for sequences of so many tokens."""
    return import_transformers().LlamaConfig(
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        intermediate_size=case.intermediate,
        vocab_size=case.vocab,
        max_position_embeddings=max(2048, length),
        tie_word_embeddings=True,
        use_cache=use_cache,
    )


def base_model(case: StepCase) -> nn.Module:
    """The frozen Llama that all providers share."""
    config = llama_config(case, case.length, use_cache=False)
    torch.manual_seed(0)
    with torch.device(case.device):
        model = import_transformers().LlamaForCausalLM(config)
    return model.to(case.torch_dtype).train().requires_grad_(False)


class Step:
    """One provider's training step on fixed token ids."""

    def __init__(self, case: StepCase, provider: StepProvider) -> None:
        self.device = torch.device(case.device)
        self.timing = "events" if self.device.type == "cuda" else "wall clock"
        self.first_loss: float | None = None
        self._provider = provider
        generator = torch.Generator().manual_seed(1)
        shape = (case.batch, case.length)
        self._ids = torch.randint(case.vocab, shape, generator=generator).to(self.device)
        trained = [p for p in provider.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None

    def loss(self) -> Tensor:
        with self._provider.around_forward():
            return self._provider.model(input_ids=self._ids, labels=self._ids).loss

    def run(self) -> timing.Sample:
        clock = timing.Clock(self.device)
        with self._provider.around_step():
            clock.start()
            loss = self.loss()
            clock.mark("forward")
            loss.backward()
            clock.mark("backward")
            if self._optimizer:
                self._optimizer.step()
                clock.mark("optimizer")
                self._optimizer.zero_grad(set_to_none=True)
        if self.first_loss is None:
            self.first_loss = loss.item()
        sample = clock.seconds()
        return sample | {"step": sample["forward"] + sample["backward"]}

    def saved(self) -> list[SavedStorage]:
        model = self._provider.model
        with self._provider.around_step():
            return saved_for_backward(self.loss, [*model.parameters(), *model.buffers()])

    def peak(self) -> PeakMemory:
        """Of one more step; the first one is behind."""
        gc.collect()
        return peak_of(self.run, self.device)


def prepare(case: StepCase, names: list[str]) -> tuple[dict[str, Step], dict[str, str]]:
    base = base_model(case)

    def make(name: str) -> Step:
        provider = PROVIDERS[name](base, case)
        step = Step(case, provider)
        step.run()  # warms up: primitive caches, the allocator, the optimizer's state
        if reason := provider.fallback_reason():
            raise Unavailable(f"not timed, {reason}")
        return step

    return prepare_each(names, make)
