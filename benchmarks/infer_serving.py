"""A served model, run again and again, and what its logits are held to."""

import copy
import gc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.infer_providers import Factors, Provider, Served, naive
from benchmarks.memory import PeakMemory, peak_of
from benchmarks.step_providers import own_copy
from lora_kernels.measuring import timing
from lora_kernels.testing import assert_within_policy


@torch.no_grad()
def logits_of(served: Served, ids: Tensor) -> Tensor:  # [2, batch, vocab]
    """Behind the prompt, and behind one token more that comes to the cache."""
    with served.around():
        first = served.model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1)
        second = served.model(input_ids=ids[:, -1:], past_key_values=first.past_key_values)
    return torch.stack([first.logits[:, -1], second.logits[:, -1]])


class Inference:
    """One provider serving the same prompts again and again."""

    def __init__(
        self,
        provider: Provider,
        served: Served,
        ids: Tensor,  # [batch, prompt + 1]
        new_tokens: int,
    ) -> None:
        self.device = ids.device
        self.timing = "events" if self.device.type == "cuda" else "wall clock"
        self.first_loss: float | None = None
        self.provider, self.served = provider, served
        self._ids, self._new_tokens = ids, new_tokens

    @torch.no_grad()
    def run(self) -> timing.Sample:
        clock, served = timing.Clock(self.device), self.served
        clock.start()
        with served.around():
            out = served.model(input_ids=self._ids[:, :-1], use_cache=True, logits_to_keep=1)
            clock.mark("prefill")
            for _ in range(self._new_tokens):
                out = self._step(out)
        clock.mark("tokens")
        if served.switch:
            for index in (1, 0):
                clock.start()
                served.switch(index)
                clock.mark("switch")
                with served.around():
                    out = self._step(out)
                clock.mark("token after")
        sample = clock.seconds()
        sample["token"] = sample.pop("tokens") / self._new_tokens
        if served.switch:
            sample["switch"] /= 2
            sample["switch and token"] = sample["switch"] + sample.pop("token after") / 2
        return sample

    def _step(self, out):
        """Greedy: the likeliest token goes in, with all that is in the cache."""
        ids = out.logits[:, -1:].argmax(-1)
        return self.served.model(input_ids=ids, past_key_values=out.past_key_values)

    def check(self, expected: "Expected") -> None:
        """Raises an AssertionError unless it computes what its name says, switched there and back;
        notes the first loss."""
        switch = self.served.switch
        for index in (0, 1, 0) if switch else (0,):
            if switch and self.first_loss is not None:
                switch(index)
            logits = logits_of(self.served, self._ids)
            if self.first_loss is None:
                losses = F.cross_entropy(logits[0].float(), self._ids[:, -1])
                self.first_loss = losses.item()
            if self.provider.same_function:
                expected.hold(logits, None if self.provider.row_by_row else index)

    def peak(self) -> "InferMemory":
        """Of one more run, and of switching there and back; a first run is behind."""
        # On CUDA the process holds all providers.
        held = tensor_bytes() if self.device.type == "cpu" else None
        peak, switched = peak_of(self.run, self.device), None
        if switch := self.served.switch:
            with torch.no_grad():
                there_and_back = peak_of(lambda: (switch(1), switch(0)), self.device)
            switched = there_and_back.step_bytes
        return InferMemory(**asdict(peak), tensor_bytes=held, switch_bytes=switched)


@dataclass(frozen=True)
class InferMemory(PeakMemory):
    """tensor_bytes: of all tensors that live between two runs, weights above all. switch_bytes:
    the peak of switching there and back above what was resident before; None without a switch."""

    tensor_bytes: int | None
    switch_bytes: int | None


def tensor_bytes() -> int:
    """Of the storages of all tensors in this process."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        # isinstance asks, and wakes lazy objects; a sparse one's values are tensors of their own.
        plain = type(each) in (Tensor, nn.Parameter) and each.layout is torch.strided
        if plain and not each.is_meta:
            with suppress(RuntimeError):  # a wrapper that a transform left: no memory of its own
                storage = each.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Expected:
    """The formula's logits: plain in the model's dtype, and in fp64 from the same values."""

    def __init__(
        self, model: nn.Module, adapters: Sequence[Factors], scaling: float, ids: Tensor
    ) -> None:
        self._model, self._adapters, self._scaling, self._ids = model, adapters, scaling, ids
        self._known: dict[int | None, tuple[Tensor, Tensor]] = {}

    def hold(self, logits: Tensor, index: int | None) -> None:
        """Raises an AssertionError where logits break the error policy. index: of the adapter that
        is active; None for an adapter for each row."""
        if index not in self._known:
            self._known[index] = self._formula(index)
        which = "an adapter for each row" if index is None else f"adapter {index}"
        assert_within_policy(f"logits with {which}", logits, *self._known[index])

    def _formula(self, index: int | None) -> tuple[Tensor, Tensor]:
        def computed(served: Served) -> Tensor:
            assert served.switch
            if index is not None:
                served.switch(index)
                return logits_of(served, self._ids)
            rows = []
            for row in range(self._ids.shape[0]):
                served.switch(row)
                rows.append(logits_of(served, self._ids[row : row + 1]))
            return torch.cat(rows, dim=1)

        return computed(self._eager), computed(self._oracle)

    @cached_property
    def _eager(self) -> Served:
        return naive(own_copy(self._model), self._adapters, self._scaling)

    @cached_property
    def _oracle(self) -> Served:
        model = copy.deepcopy(self._model).double()
        named: list[tuple[str, Any]] = list(model.named_modules())
        for name, module in named:
            if type(module).__name__ == "LlamaRMSNorm":  # would compute in fp32
                norm = nn.RMSNorm(module.weight.shape[0], module.variance_epsilon)
                norm.weight = module.weight
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, norm)
        double = [
            {name: (a.double(), b.double()) for name, (a, b) in factors.items()}
            for factors in self._adapters
        ]
        return naive(model, double, self._scaling)
