"""``adapter_config.json``: what PEFT's settings mean for the numbers, and which are not served.

Ranks and alphas by module, as PEFT finds them; writing them back the other way.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

# Settings of PEFT's LoRA that change what an adapter is, or put more than A and B into its file.
_OTHER_KINDS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "whole modules beside the adapter",
    "trainable_token_indices": "trained rows of an embedding",
    "target_parameters": "adapters on parameters (experts)",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
_PATTERNS = ("rank_pattern", "alpha_pattern")
# These rewrite the base weight when PEFT makes the adapter, so its file alone does not say enough.
_REWRITE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_INITIALISATION_ONLY = ("eva_config", "corda_config", "lora_ga_config", "loftq_config")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise where a PEFT config is not one of plain LoRA of linear layers.

    Keys that are not known are no error, as in PEFT, unless they are set and named as PEFT names
    its variants (``use_...``, ``..._config``).
    """
    kind = config.get("peft_type")
    kind = getattr(kind, "value", kind)
    if kind != "LORA":
        raise ValueError(f"{where}: expected peft_type 'LORA', got {kind!r}")
    for key, meaning in _OTHER_KINDS.items():
        if config.get(key) not in (None, False) and config[key] not in ([], {}):
            raise ValueError(
                f"{where}: {key} = {_short(config[key])}: {meaning} is not served here, only plain "
                "LoRA of linear layers"
            )
    if config.get("bias", "none") not in (None, "none"):
        raise ValueError(
            f"{where}: bias = {config['bias']!r}: trained biases of the base model are not served "
            "here; expected 'none'"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_REWRITE_THE_BASE):
        raise ValueError(
            f"{where}: init_lora_weights = {init!r} has changed the base weights; convert the "
            "adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key, value in config.items():
        variant = key.startswith("use_") or key.endswith("_config")
        known = key in _OTHER_KINDS or key in _INITIALISATION_ONLY or key == "use_rslora"
        if variant and not known and value and key not in ("megatron_config", "runtime_config"):
            raise ValueError(f"{where}: {key} = {_short(value)} is not known here")
    for key in _PATTERNS:
        if not isinstance(config.get(key) or {}, Mapping):
            raise ValueError(f"{where}: {key}: expected a table, got {_short(config[key])}")
    _check_targets(config, where)
    for rank in (config.get("r", 8), *(config.get("rank_pattern") or {}).values()):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"{where}: r: expected an integer of at least 1, got {rank!r}")
    for alpha in (config.get("lora_alpha", 8), *(config.get("alpha_pattern") or {}).values()):
        if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha):
            raise ValueError(f"{where}: lora_alpha: expected a finite number, got {alpha!r}")
    p = config.get("lora_dropout") or 0.0
    if isinstance(p, bool) or not isinstance(p, Real) or not 0 <= p < 1:
        raise ValueError(f"{where}: lora_dropout: expected a probability in [0, 1), got {p!r}")


def _check_targets(config: Mapping[str, Any], where: str) -> None:
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        listed = isinstance(value, (list, tuple, set, frozenset))
        names = value if listed else [] if value is None else [value]
        if not all(isinstance(each, str) for each in names):
            raise ValueError(
                f"{where}: {key}: expected a regular expression or a list of names, got "
                f"{_short(value)}"
            )
        for each in names if not listed or key == "layers_pattern" else ():
            _compiled(each, f"{where}: {key}", each)
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, (list, tuple)) else [layers]
    if layers is not None and not all(type(number) is int for number in numbers):
        raise ValueError(
            f"{where}: layers_to_transform: expected a number or a list of them, got "
            f"{_short(layers)}"
        )


def asks_for_all_linear(config: Mapping[str, Any]) -> bool:
    """Whether ``target_modules`` is PEFT's word for all linear layers but the head."""
    wanted = config.get("target_modules")
    return isinstance(wanted, str) and wanted.lower() == "all-linear"


def idle_patterns(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Patterns of ranks and alphas that match none of the modules, in words."""
    modules = list(modules)
    return [
        f"{key} {pattern!r}"
        for key in _PATTERNS
        for pattern in config.get(key) or {}
        if not any(_matches(key, pattern, module) for module in modules)
    ]


def rank_and_alpha(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """r and alpha of a module: the first pattern that matches the end of its name decides."""
    rank = _by_pattern(config, "rank_pattern", module, config.get("r", 8))
    return rank, _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))


def scaling_of(config: Mapping[str, Any], module: str) -> float:
    """What PEFT multiplies a module's ``B A`` by."""
    return _scaling(config, *rank_and_alpha(config, module))


def targets(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would give the module of that name an adapter.

    ``exclude_modules`` first; then ``target_modules``, a regular expression for the whole name or a
    list of whole names or their last parts; with a list ``layers_to_transform`` may narrow it. Of
    "all-linear" the caller has to know which modules these are.
    """
    if _names(config.get("exclude_modules") or [], module):
        return False
    if asks_for_all_linear(config):
        return True
    wanted = config.get("target_modules") or []
    if not _names(wanted, module):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(wanted, str) or module in wanted or layers is None or layers == []:
        return True
    # The first number counts: experts inside of a layer are numbered too.
    patterns = config.get("layers_pattern") or []
    regexes = [
        rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\."
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
    ]
    for regex in regexes or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
        if match := re.match(regex, module):
            return int(match["index"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _names(wanted, module: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == each or module.endswith(f".{each}") for each in wanted)


def _by_pattern(config: Mapping[str, Any], key: str, module: str, default):
    for pattern, value in (config.get(key) or {}).items():
        if _matches(key, pattern, module):
            return value
    return default


def _matches(key: str, pattern: str, module: str) -> bool:
    return _compiled(rf"(.*\.)?({pattern})$", key, pattern).match(module) is not None


def _compiled(regex: str, what: str, shown: str) -> re.Pattern:
    try:
        return re.compile(regex)
    except re.error as error:
        raise ValueError(f"{what}: {shown!r} is no regular expression: {error}") from None


def _scaling(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def describes(config: Mapping[str, Any], modules: Mapping[str, tuple[int, float]]) -> bool:
    """Whether the config's ranks and alphas give each module's ``(rank, scaling)``."""
    if "r" not in config or "lora_alpha" not in config:
        return False
    return all(
        (rank_and_alpha(config, name)[0], scaling_of(config, name)) == kind
        for name, kind in modules.items()
    )


def ranks_and_alphas(modules: Mapping[str, tuple[int, float]], use_rslora: bool) -> dict[str, Any]:
    """Settings that give each module's ``(rank, scaling)``: patterns of whole names where the
    commonest do not."""
    ranks = {name: rank for name, (rank, _) in modules.items()}
    alphas = {name: _alpha(*kind, use_rslora) for name, kind in modules.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_whole(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {_whole(name): a for name, a in alphas.items() if a != alpha},
    }


def _alpha(rank: int, scaling: float, use_rslora: bool) -> float:
    """The alpha that PEFT divides by the rank to get exactly this scaling, where there is one."""
    divisor = math.sqrt(rank) if use_rslora else rank
    near = scaling * divisor
    candidates = (
        round(near),
        near,
        math.nextafter(near, math.inf),
        math.nextafter(near, -math.inf),
    )
    return next((alpha for alpha in candidates if alpha / divisor == scaling), near)


def _whole(name: str) -> str:
    return f"^{re.escape(name)}"


def as_json(value: object) -> object:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "value"):  # an enum, such as PEFT's task types
        return value.value
    raise TypeError(f"config: {value!r} cannot be written as JSON")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
