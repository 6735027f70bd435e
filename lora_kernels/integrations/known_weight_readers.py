"""Modules whose own code computes with the weight of a linear layer inside them.

An adapter on such a layer changes nothing there. `lora_kernels.nn.weight_reads` notices it
while a model runs; what is known of torch and transformers is said before.
"""

from torch import nn

# They never call these layers.
_NEVER_CALL = {
    "ConditionalDetrMHAttentionMap": {"k_proj"},
    "DabDetrMHAttentionMap": {"k_linear"},
    "DetrMHAttentionMap": {"k_proj"},
    "JambaMambaMixer": {"dt_proj"},
    "LayoutLMv2Encoder": {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"},
    "LongcatFlashTopkRouter": {"classifier"},
    "MambaMixer": {"dt_proj"},
    "FalconMambaMixer": {"dt_proj"},
    "MaskFormerDetrMHAttentionMap": {"k_proj"},
    "MobileBertLMPredictionHead": {"decoder", "dense"},
    "NeoMMEForMaskedLM": {"unembedding_projection"},
    "TDNNLayer": {"kernel"},
    "WavLMAttention": {"k_proj", "out_proj", "q_proj", "v_proj"},
}
# They call these layers, but not where a fused kernel or a shortcut takes their place.
_PASS_BY = {
    "BambaMixer": {"out_proj"},
    "FalconH1Mixer": {"out_proj"},
    "FalconMambaMixer": {"out_proj", "x_proj"},
    "Gemma4AssistantForCausalLM": {"lm_head"},
    "Gemma4UnifiedAssistantForCausalLM": {"lm_head"},
    "GraniteMoeHybridMambaLayer": {"out_proj"},
    "LSHSelfAttention": {"query_key", "value"},
    "Mamba2Mixer": {"out_proj"},
    "MambaMixer": {"out_proj", "x_proj"},
    "NemotronHMamba2Mixer": {"out_proj"},
    "Zamba2MambaMixer": {"out_proj"},
}


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module around the one of that name, and what it calls that."""
    path, _, child = name.rpartition(".")
    return model.get_submodule(path), child


def never_calls(parent: nn.Module, child: str) -> bool:
    """Whether ``parent`` computes with the weight of its ``child`` and never calls it."""
    if isinstance(parent, nn.MultiheadAttention):
        return child == "out_proj"
    return child in _listed(parent, _NEVER_CALL)


def passes_by(parent: nn.Module, child: str) -> bool:
    """Whether ``parent`` sometimes computes with the weight of its ``child`` instead of calling it.

    torch's encoder layer does in evaluation, the mixers of Mamba where their kernels are installed.
    """
    if isinstance(parent, nn.TransformerEncoderLayer):
        return child in ("linear1", "linear2")
    return child in _listed(parent, _PASS_BY)


def _listed(parent: nn.Module, table: dict[str, set[str]]) -> set[str]:
    """What a table lists for a class of transformers: names say nothing of other classes."""
    for cls in type(parent).__mro__:
        if cls.__module__.startswith("transformers.") and cls.__name__ in table:
            return table[cls.__name__]
    return set()
