"""A training step of a Llama with random weights, by default of SmolLM2-135M's shape.

Timed: forward with the loss, and backward; `step` is their sum. The optimizer (AdamW on the
adapters) is timed by itself, outside `step`: it is the same for every provider and none of ours.
"""

import gc

import torch
from torch import Tensor, nn

from lora_kernels.bench.case import StepCase
from lora_kernels.bench.memory import PeakMemory, SavedStorage, peak_of, saved_for_backward
from lora_kernels.bench.providers import STEP_PROVIDERS, MissingExtra, StepProvider
from lora_kernels.measuring import timing


def base_model(case: StepCase) -> nn.Module:
    """The frozen Llama that all providers share."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers") from None
    config = transformers.LlamaConfig(
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        intermediate_size=case.intermediate,
        vocab_size=case.vocab,
        max_position_embeddings=max(2048, case.length),
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(case.device):
        model = transformers.LlamaForCausalLM(config)
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
        sample["step"] = sample["forward"] + sample["backward"]
        return sample

    def saved(self) -> list[SavedStorage]:
        model = self._provider.model
        with self._provider.around_step():
            return saved_for_backward(self.loss, [*model.parameters(), *model.buffers()])

    def peak(self) -> PeakMemory:
        """Of one more step; the first one is behind."""
        gc.collect()
        return peak_of(lambda: self.run() and None, self.device)


def prepare(case: StepCase, names: list[str]) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps that can run here, and for those that cannot, why."""
    base = base_model(case)
    steps, skipped = {}, {}
    for name in names:
        try:
            provider = STEP_PROVIDERS[name](base, case)
            step = Step(case, provider)
            step.run()  # warms up: primitive caches, the allocator, the optimizer's state
            if reason := provider.fallback_reason():
                skipped[name] = f"not timed: {reason}"
            else:
                steps[name] = step
        except MissingExtra:
            raise
        except Exception as error:  # one provider's trouble is not the others'
            skipped[name] = f"{type(error).__name__}: {error}"
    return steps, skipped


def peak_memory(case: StepCase, name: str) -> PeakMemory:
    """Peak of one warmed-up step; to be called in a process of its own."""
    step = Step(case, STEP_PROVIDERS[name](base_model(case), case))
    step.run()
    return step.peak()
