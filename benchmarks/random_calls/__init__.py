"""The calls of ``same_bits.py``, through the public names only."""

import warnings
from collections.abc import Callable, Iterator

import torch
from random_calls.draw import Draw
from random_calls.functions import linear_call, norm_call, routed_call
from random_calls.layers import (
    embedding_call,
    lora_layer_call,
    peft_call,
    routed_layer_call,
    routed_model_call,
)
from random_calls.wrong import wrong_calls

ROUTED = "routed_lora_linear", "routed_lora", "routed_shrink", "routed_expand"
# What is called, and its share of the count that is asked for; those below 0.1 come on top.
KINDS = {
    "lora_linear": (linear_call, 0.5),
    **{name: (lambda draw, name=name: routed_call(draw, name), 0.1) for name in ROUTED},
    "lora_weight_norm": (norm_call, 0.03),
    "LoRALinear": (lora_layer_call, 0.08),
    "LoRAEmbedding": (embedding_call, 0.03),
    "RoutedLoRALinear": (routed_layer_call, 0.03),
    "route": (routed_model_call, 0.01),
    "accelerate": (peft_call, 0.06),
}
INTERPRETED = {"lora_linear": 0.02, **dict.fromkeys(ROUTED, 0.006)}


def calls(group: str, count: int, seed: int) -> Iterator[tuple[str, Callable]]:
    """Names and calls; each returns what was drawn, the operands and the results."""
    interpreted = group == "triton"
    for kind, (function, share) in KINDS.items():
        share = INTERPRETED.get(kind, 0.0) if interpreted else share
        for number in range(round(share * count)):
            name = f"{kind}{', triton' * interpreted} {number}"

            def call(name=name, function=function):
                draw = Draw(name, seed, interpreted)
                observe(draw.results, lambda: function(draw))
                return draw.chosen, draw.operands, draw.results

            yield name, call
    for number, (what, function) in enumerate(wrong_calls() if not interpreted else ()):

        def call(what=what, function=function):
            results = {}

            def wrong():
                torch.manual_seed(0)
                results["y"] = function()

            observe(results, wrong)
            return what, [], results

        yield f"wrong {number}", call


def observe(results: dict, function: Callable[[], object]) -> None:
    """Note the error that a function raises, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function()
        except Exception as error:
            results["error"] = f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"
    results["warnings"] = str([f"{w.category.__name__}: {w.message}" for w in caught])
