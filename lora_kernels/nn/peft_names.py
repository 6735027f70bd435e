"""Parameter names of our layers and of PEFT's.

Ours are the names of PEFT's files, which carry no adapter name. A PEFT layer in memory puts the
adapter's name in the middle, because it holds several:

    ours, PEFT on disk            PEFT in memory
    lora_A.weight                 lora_A.default.weight
    lora_B.weight, lora_B.bias    lora_B.default.weight, lora_B.default.bias
    lora_magnitude_vector         lora_magnitude_vector.default.weight
    lora_embedding_A              lora_embedding_A.default
    lora_embedding_B              lora_embedding_B.default
    base_layer.*                  base_layer.*
"""

import re
from collections.abc import Iterable

_IN_MEMORY = (
    (
        re.compile(r"lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.(?P<kind>weight|bias)"),
        "lora_{side}.{kind}",
    ),
    (re.compile(r"lora_magnitude_vector\.(?P<adapter>[^.]+)\.weight"), "lora_magnitude_vector"),
    (re.compile(r"lora_embedding_(?P<side>[AB])\.(?P<adapter>[^.]+)"), "lora_embedding_{side}"),
)


def in_memory_name(name: str, adapter_name: str) -> str:
    """PEFT's in-memory name of our parameter ``name``."""
    if name.startswith(("lora_A.", "lora_B.")):
        module, kind = name.split(".")
        return f"{module}.{adapter_name}.{kind}"
    if name == "lora_magnitude_vector":
        return f"{name}.{adapter_name}.weight"
    if name.startswith("lora_embedding_"):
        return f"{name}.{adapter_name}"
    return name


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Our name of each PEFT in-memory name among ``names``; other names are left out.

    Raises:
        ValueError: the names belong to more than one adapter.
    """
    renamed, adapters = {}, set()
    for name in names:
        for pattern, ours in _IN_MEMORY:
            match = pattern.fullmatch(name)
            if match:
                renamed[name] = ours.format(**match.groupdict())
                adapters.add(match["adapter"])
    if len(adapters) > 1:
        raise ValueError(
            f"state_dict: expected one adapter, got {sorted(adapters)}; a layer of lora_kernels "
            "holds one, so keep the keys of the one to load"
        )
    return renamed
