"""Where a layer is in a model of transformers, and what that tells about its inputs: whether their
rows are those of the text, and which axis is the batch's. Nothing of transformers is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_kernels.nn.batch_choice import Place

# Modules of transformers, by class, that compute [tokens, batch, features], or a layer of theirs
# that does; the rest of their models comes batch first. Of those, layers that are the batch's.
_SEQUENCE_FIRST = {
    "bridgetower": ("BridgeTowerResidualAttention",),
    "bros": (
        "BrosRelationExtractor",
        "BrosSpadeEEForTokenClassification.initial_token_classifier",
    ),
    "fsmt": ("EncoderLayer", "DecoderLayer"),
    "led": ("LEDEncoderSelfAttention",),
    "longformer": ("LongformerSelfAttention",),
    "mask2former": ("Mask2FormerAttention", "Mask2FormerMaskedAttentionDecoderLayer"),
    "oneformer": (
        "OneFormerAttention",
        "OneFormerTransformerDecoderFFNLayer",
        "OneFormerTransformerDecoderQueryTransformerDecoderLayer",
    ),
    "xlnet": ("XLNetFeedForward",),
}
_TEXT_CONFIGS = ("text_config", "decoder", "generator", "text_encoder")


def place_of(model: nn.Module, name: str) -> Place:
    """Where the layer of that name is."""
    around = list(_around(model, name))
    return Place(name, _batch_axis(model, name, around), _apart(name, around))


def _around(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a layer is in, from the model on, each with its name."""
    yield "", model
    parts = name.split(".")
    for count in range(1, len(parts)):
        path = ".".join(parts[:count])
        yield path, model.get_submodule(path)


# --- the batch's axis -------------------------------------------------------------------------


def _batch_axis(model: nn.Module, name: str, around: list[tuple[str, nn.Module]]) -> int | None:
    for path, module in reversed(around):
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            return 0 if module.self_attn.batch_first else 1
        inside = name[len(path) :].lstrip(".")
        if _is_sequence_first(module, inside):
            return 1
    families = {_family(module) for _, module in around} & _SEQUENCE_FIRST.keys()
    return 0 if families else None


def _is_sequence_first(module: nn.Module, inside: str) -> bool:
    for entry in _SEQUENCE_FIRST.get(_family(module) or "", ()):
        cls, _, layer = entry.partition(".")
        if type(module).__name__ == cls and f"{inside}.".startswith(f"{layer}." if layer else ""):
            return True
    return False


def _family(module: nn.Module) -> str | None:
    """``bert`` of what is defined in ``transformers.models.bert``."""
    parts = type(module).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else None


# --- text, and what is not --------------------------------------------------------------------


def _apart(name: str, around: list[tuple[str, nn.Module]]) -> str | None:
    """The part of the model around a layer in which rows are not the text's.

    Inside of a model that has a configuration for its text and others beside it, rows are the
    text's in modules with the text's configuration, and at the output embeddings.
    """
    models = [
        (path, module)
        for path, module in around
        if hasattr(module, "main_input_name") and _is_config(getattr(module, "config", None))
    ]
    for _, whole in models:
        text = _text_types(whole)
        other = [config for config in _sub_configs(whole.config) if type(config) not in text]
        if other and (type(whole.config) not in text or whole.main_input_name == "input_ids"):
            break
    else:
        return None
    path, nearest = models[-1]
    if type(nearest.config) in text:
        return None
    if type(nearest.config) is not type(whole.config):
        return path
    # Beside the parts: a projection between them, or the head over the text.
    inside = name[len(path) :].lstrip(".")
    head = getattr(nearest, "get_output_embeddings", None)
    if callable(head) and head() is nearest.get_submodule(inside):
        return None
    return f"{path}.".lstrip(".") + inside.partition(".")[0]


def _text_types(model: nn.Module) -> set[type]:
    config: Any = model.config  # of transformers, which is not imported
    names = _TEXT_CONFIGS + (("encoder",) if model.main_input_name == "input_ids" else ())
    found = [getattr(config, name, None) for name in names]
    try:
        found.append(config.get_text_config())
    except ValueError:  # there are several
        pass
    else:
        if found[-1] is config and any(map(_is_config, found[:-1])):
            found.pop()
    return {type(each) for each in found if _is_config(each)}


def _sub_configs(config: Any) -> list[Any]:
    found = [getattr(config, name, None) for name in getattr(type(config), "sub_configs", ())]
    return [each for each in found if _is_config(each)]


def _is_config(value: Any) -> bool:
    return hasattr(value, "get_text_config")
