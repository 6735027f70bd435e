"""A served model, run again and again, and what its logits are held to."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.infer_providers import Factors, Provider, Served, naive, own_copy
from lora_kernels.bench.memory import PeakMemory, SavedStorage, peak_of
from lora_kernels.measuring import timing
from lora_kernels.testing import error_bound


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
        switches = (1, 0) if served.switch else ()
        for index in switches:
            clock.start()
            served.switch(index)
            clock.mark("switch")
            with served.around():
                out = self._step(out)
            clock.mark("token after")
        sample = clock.seconds()
        sample["token"] = sample.pop("tokens") / self._new_tokens
        if switches:
            sample["switch"] /= len(switches)
            sample["switch and token"] = sample["switch"] + sample.pop("token after") / len(
                switches
            )
        return sample

    def _step(self, out):
        """Greedy: the likeliest token goes in, with all that is in the cache."""
        ids = out.logits[:, -1:].argmax(-1)
        return self.served.model(input_ids=ids, past_key_values=out.past_key_values)

    @torch.no_grad()
    def switch_there_and_back(self) -> None:
        for index in (1, 0):
            self.served.switch(index)

    def wrong(self, expected: "Expected") -> str | None:
        """Why it must not be timed; None if it computes what its name says."""
        switch = self.served.switch
        for index in (0, 1, 0) if switch else (0,):
            if switch and (index or self.first_loss is not None):
                switch(index)
            logits = logits_of(self.served, self._ids)
            if self.first_loss is None:
                losses = F.cross_entropy(logits[0].float(), self._ids[:, -1])
                self.first_loss = losses.item()
            if self.provider.same_function and (reason := expected.reject(self, logits, index)):
                return f"not timed: {reason}"
        if reason := self.served.why_not():
            return f"not timed: {reason}"
        return None

    def saved(self) -> list[SavedStorage]:
        """For a backward: nothing, there is none."""
        return []

    def peak(self) -> PeakMemory:
        """Of one more run; the first one is behind."""
        return peak_of(lambda: self.run() and None, self.device)


class Expected:
    """The formula's logits: plain in the model's dtype, and in fp64 from the same values."""

    def __init__(
        self, model: nn.Module, adapters: Sequence[Factors], scaling: float, ids: Tensor
    ) -> None:
        self._model, self._adapters, self._scaling, self._ids = model, adapters, scaling, ids
        self._known: dict[int | str, tuple[Tensor, Tensor]] = {}

    def reject(self, timed: Inference, logits: Tensor, index: int) -> str | None:
        """What is wrong with a provider's logits when adapter `index` is active."""
        key = "rows" if timed.provider.row_by_row else index
        if key not in self._known:
            self._known[key] = self._formula(key)
        eager, oracle = self._known[key]
        error, bound = (logits.double() - oracle).abs().max().item(), error_bound(eager, oracle)
        if error <= bound:  # not so with a NaN
            return None
        which = "an adapter for each row" if key == "rows" else f"adapter {index}"
        return f"logits with {which} are off by {error:.2e} (at most {bound:.2e})"

    def _formula(self, key: int | str) -> tuple[Tensor, Tensor]:
        def computed(served: Served) -> Tensor:
            if key != "rows":
                served.switch(key)
                return logits_of(served, self._ids)
            rows = []
            for index in range(self._ids.shape[0]):
                served.switch(index)
                rows.append(logits_of(served, self._ids[index : index + 1]))
            return torch.cat(rows, dim=1)

        return computed(self._eager), computed(self._oracle)

    @cached_property
    def _eager(self) -> Served:
        return naive(own_copy(self._model, False), self._adapters, self._scaling)

    @cached_property
    def _oracle(self) -> Served:
        model = own_copy(self._model, True).double()
        for name, module in list(model.named_modules()):
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
