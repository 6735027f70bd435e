"""You serve many adapters: every sequence of a batch names its own, or none."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels

torch.manual_seed(0)
llama = LlamaConfig(
    vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    eos_token_id=None, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(llama).eval()
prompts = torch.randint(1, 64, (3, 5))
plain = model.generate(prompts, attention_mask=prompts > 0, max_new_tokens=8, do_sample=False)

routed = lora_kernels.route(model)
for name, rank in (("sql", 4), ("law", 16)):  # or routed.load(name, "adapters/sql"), PEFT's files
    routed.add(name, rank=rank, alpha=2 * rank, target_modules=["q_proj", "v_proj", "down_proj"])
    for index, parameter in enumerate(routed.parameters_of(name)):
        torch.nn.init.normal_(parameter, std=0.3 + index % 2)  # as if it had been trained

# Any thread may call a handle; it takes its adapters along.
arguments = {"attention_mask": prompts > 0, "max_new_tokens": 8, "do_sample": False}
handle = routed.batch(["sql", "__base__", "law"])
mixed = handle.call(model.generate, prompts, **arguments)
assert torch.equal(mixed[1], plain[1])  # the row without an adapter

alone = routed.batch("sql").call(model.generate, prompts, **arguments)
assert torch.equal(mixed[0], alone[0])  # a row does not depend on its neighbours' adapters
with routed.adapters(["law", {"sql": 0.7, "law": 0.3}, "__base__"]):  # weights add adapters up
    logits = model(prompts).logits
print(f"{routed}: one batch wrote with two adapters and none:\n{mixed[:, 5:]}")
