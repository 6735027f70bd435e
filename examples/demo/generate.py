"""Text written by a model, greedily."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int
) -> str:
    """At most `new_tokens` tokens that continue the prompt; the prompt is not repeated."""
    model.eval()
    device = next(model.parameters()).device
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(device)
    result = model.generate(
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
        # A model of this size repeats itself without end otherwise.
        repetition_penalty=1.15,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(result[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
