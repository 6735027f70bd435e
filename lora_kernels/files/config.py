"""``adapter_config.json``: what PEFT's settings mean for the numbers, and which are not served.

Ranks and alphas by module, as PEFT finds them; writing them back the other way.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import Enum
from numbers import Real
from typing import Any

from lora_kernels.files.patterns import Allowance, EndPatterns, compiled, ends, match, short

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
_HIGHEST_RANK = 2**31 - 1
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
        raise ValueError(f"{where}: expected peft_type 'LORA', got {short(kind)}")
    for key, meaning in _OTHER_KINDS.items():
        if config.get(key) not in (None, False) and config[key] not in ([], {}):
            raise ValueError(
                f"{where}: {key} = {short(config[key])}: {meaning} is not served here, only plain "
                "LoRA of linear layers"
            )
    if config.get("bias", "none") not in (None, "none"):
        raise ValueError(
            f"{where}: bias = {short(config['bias'])}: trained biases of the base model are not "
            "served here; expected 'none'"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_REWRITE_THE_BASE):
        raise ValueError(
            f"{where}: init_lora_weights = {short(init)} has changed the base weights; convert the "
            "adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key, value in config.items():
        variant = key.startswith("use_") or key.endswith("_config")
        known = key in _OTHER_KINDS or key in _INITIALISATION_ONLY or key == "use_rslora"
        if variant and not known and value and key not in ("megatron_config", "runtime_config"):
            raise ValueError(f"{where}: {key} = {short(value)} is not known here")
    allowance = Allowance(where)
    for key in _PATTERNS:
        if not isinstance(config.get(key, {}), (Mapping, type(None))):
            raise ValueError(f"{where}: {key}: expected a table, got {short(config[key])}")
        if not all(isinstance(pattern, str) for pattern in config.get(key) or {}):
            raise ValueError(f"{where}: {key}: expected patterns, got {short(config[key])}")
        EndPatterns(config.get(key) or {}, key, allowance)
    _check_targets(config, where, allowance)
    for rank in (config.get("r", 8), *(config.get("rank_pattern") or {}).values()):
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{where}: r: expected an integer of at least 1, got {short(rank)}")
        if rank > _HIGHEST_RANK:
            raise ValueError(f"{where}: r: expected at most {_HIGHEST_RANK}, got {short(rank)}")
    for alpha in (config.get("lora_alpha", 8), *(config.get("alpha_pattern") or {}).values()):
        if not _is_finite(alpha):
            raise ValueError(f"{where}: lora_alpha: expected a finite number, got {short(alpha)}")
    p = config.get("lora_dropout")
    if p is not None and (not _is_finite(p) or not 0 <= p < 1):
        raise ValueError(f"{where}: lora_dropout: expected a probability in [0, 1), got {short(p)}")
    if not isinstance(config.get("use_rslora"), (bool, type(None))):
        raise ValueError(
            f"{where}: use_rslora: expected true or false, got {short(config['use_rslora'])}"
        )


def _is_finite(number: object) -> bool:
    """Whether it is a number that a float can hold."""
    if isinstance(number, bool) or not isinstance(number, Real):
        return False
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _check_targets(config: Mapping[str, Any], where: str, allowance: Allowance) -> None:
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        listed = isinstance(value, (list, tuple, set, frozenset))
        names = value if listed else [] if value is None else [value]
        if not all(isinstance(each, str) for each in names):
            raise ValueError(
                f"{where}: {key}: expected a regular expression or a list of names, got "
                f"{short(value)}"
            )
        if key == "layers_pattern":
            for each in names:
                compiled(_layer_regex(each), key, each, allowance)
        elif not listed:
            for each in names:
                compiled(each, key, each, allowance)
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, (list, tuple)) else [layers]
    if layers is not None and not all(type(number) is int for number in numbers):
        raise ValueError(
            f"{where}: layers_to_transform: expected a number or a list of them, got "
            f"{short(layers)}"
        )


def asks_for_all_linear(config: Mapping[str, Any]) -> bool:
    """Whether ``target_modules`` is PEFT's word for all linear layers but the head."""
    wanted = config.get("target_modules")
    return isinstance(wanted, str) and wanted.lower() == "all-linear"


def idle_patterns(
    config: Mapping[str, Any], modules: Iterable[str], where: str = "config"
) -> list[str]:
    """Patterns of ranks and alphas that match none of the modules, in words."""
    allowance, modules = Allowance(where), list(modules)
    return [
        f"{key} {short(pattern)}"
        for key in _PATTERNS
        for pattern in EndPatterns(config.get(key) or {}, key, allowance).idle(modules)
    ]


def ranks_and_scalings(
    config: Mapping[str, Any], modules: Iterable[str], where: str = "config"
) -> dict[str, tuple[int, float]]:
    """r of each module, and what PEFT multiplies its ``B A`` by.

    The first pattern that matches the end of a module's name decides.

    Raises:
        ValueError: a pattern takes too long to match; ``where`` is the file that is named.
    """
    allowance = Allowance(where)
    tables = [config.get(key) or {} for key in _PATTERNS]
    ranks, alphas = (
        EndPatterns(table, key, allowance) for table, key in zip(tables, _PATTERNS, strict=True)
    )
    found = {}
    for module in modules:
        rank = tables[0].get(ranks.first(module), config.get("r", 8))
        alpha = tables[1].get(alphas.first(module), config.get("lora_alpha", 8))
        found[module] = rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found


def targets(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would give the module of that name an adapter; see :func:`targeted`."""
    return bool(targeted(config, [module]))


def targeted(config: Mapping[str, Any], modules: Iterable[str], where: str = "config") -> list[str]:
    """The modules of those names that PEFT would give an adapter.

    ``exclude_modules`` first; then ``target_modules``, a regular expression for the whole name or a
    list of whole names or their last parts; with a list ``layers_to_transform`` may narrow it. Of
    "all-linear" the caller has to know which modules these are.

    Raises:
        ValueError: a pattern takes too long to match; ``where`` is the file that is named.
    """
    allowance = Allowance(where)
    chosen = _named(config, "exclude_modules", allowance)
    names = [name for name in modules if not chosen(name)]
    if asks_for_all_linear(config):
        return names
    chosen = _named(config, "target_modules", allowance)
    names = [name for name in names if chosen(name)]
    wanted, layers = config.get("target_modules"), config.get("layers_to_transform")
    if isinstance(wanted, str) or layers is None or layers == []:
        return names
    layers = {layers} if isinstance(layers, int) else set(layers)
    whole = set(wanted or ())
    return [name for name in names if name in whole or _layer_of(name, config, allowance) in layers]


def _named(config: Mapping[str, Any], key: str, allowance: Allowance):
    """A function that says whether the setting means a name."""
    wanted = config.get(key) or []
    if isinstance(wanted, str):
        return lambda name: match(wanted, name, key, wanted, allowance, "fullmatch") is not None
    wanted = set(wanted)
    return lambda name: not wanted.isdisjoint(ends(name))


def _layer_of(module: str, config: Mapping[str, Any], allowance: Allowance) -> int | None:
    # The first number counts: experts inside of a layer are numbered too.
    key, patterns = "layers_pattern", config.get("layers_pattern") or []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := match(_layer_regex(pattern), module, key, pattern, allowance):
            return int(found["idx"])
    if not patterns and (found := re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)):
        return int(found["idx"])
    return None


def _layer_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def describes(config: Mapping[str, Any], modules: Mapping[str, tuple[int, float]]) -> bool:
    """Whether the config's ranks and alphas give each module's ``(rank, scaling)``."""
    if "r" not in config or "lora_alpha" not in config:
        return False
    return ranks_and_scalings(config, modules) == dict(modules)


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
    neighbours = (math.nextafter(near, towards) for towards in (math.inf, -math.inf))
    candidates = (round(near), near, *neighbours)
    return next((alpha for alpha in candidates if alpha / divisor == scaling), near)


def _whole(name: str) -> str:
    return f"^{re.escape(name)}"


def as_json(value: object) -> object:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Enum):  # such as PEFT's task types
        return value.value
    raise TypeError(f"config: {value!r} cannot be written as JSON")
