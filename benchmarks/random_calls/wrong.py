"""Calls that the public functions refuse, or ought to."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lora_kernels import (
    AdapterBank,
    AdapterSlots,
    LoRAEmbedding,
    LoRALinear,
    RoutedLoRALinear,
    Routing,
    accelerate,
    explain,
    lora_linear,
    lora_weight_norm,
    route,
    routed_expand,
    routed_lora,
    routed_lora_linear,
    routed_shrink,
)

K, N, R, ROWS = 8, 6, 3, 5
META = torch.device("meta")


def freed(value: Tensor) -> Tensor:
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


# What may be wrong with a tensor, given a right one.
SPOILED: dict[str, Callable[[Tensor], object]] = {
    "None": lambda value: None,
    "a number": lambda value: 1.0,
    "text": lambda value: "x",
    "a list": lambda value: value.tolist(),
    "integers": lambda value: value.long(),
    "booleans": lambda value: value.bool(),
    "complex": lambda value: value + 0j,
    "float8": lambda value: value.to(torch.float8_e4m3fn),
    "half": lambda value: value.half(),
    "double": lambda value: value.double(),
    "meta": lambda value: value.to(META),
    "sparse": lambda value: value.to_sparse(),
    "nested": lambda value: torch.nested.nested_tensor([value, value], layout=torch.jagged),
    "0-d": lambda value: torch.tensor(1.0),
    "3-d": lambda value: value[None, ..., None],
    "a row more": lambda value: torch.cat([value, value[:1]]),
    "a column more": lambda value: torch.cat([value, value[..., :1]], -1),
    "no rows": lambda value: value[:0],
    "no columns": lambda value: value[..., :0],
    "trains": lambda value: value.clone().requires_grad_(),
    "lazily zero": lambda value: torch._efficientzerotensor(value.shape),
}
NUMBERS = {
    "scaling": (
        "2", None, [1.0], 1j, torch.ones(1), torch.tensor(1 + 1j), torch.ones((), device=META),
        torch.ones((), requires_grad=True), float("nan"), float("inf"), True, torch.tensor(2),
    ),
    "dropout_p": ("0.1", None, -0.1, 1, 1.0, 1.5, float("nan"), True, torch.tensor(0.1)),
    "seed": (3, "3", torch.tensor(3.0), torch.tensor(3, dtype=torch.int32), torch.ones(1).long(),
             torch.ones((), dtype=torch.int64, device=META)),
    "backend": ("cuda", "", None, 3, "triton"),
    "rank": (0, -1, 4.0, True, None),
    "alpha": ("8", float("nan"), float("inf"), None, True),
    "init_lora_weights": ("pissa", None, 3),
    "adapter_dtype": (torch.int8, torch.float8_e4m3fn, "float32"),
    "in_features": (0, -1, 4.0, True, "4"),
    "name": ("", "__base__", "n0", "keys", 3, None),
    "dtype": (torch.int32, torch.complex64, torch.float8_e4m3fn),
}  # fmt: skip
NUMBERS |= dict.fromkeys(
    ("out_features", "num_embeddings", "embedding_dim"), NUMBERS["in_features"]
)


def a_bank(**options) -> AdapterBank:
    bank = AdapterBank(K, N, **options)
    for index in range(2):
        bank.add(f"n{index}", torch.randn(R - index, K), torch.randn(N, R - index), 0.5)
    return bank


def routed(function: str) -> dict:
    bank = a_bank()
    given = {"bank": bank, "routing": Routing.from_tokens([0, 1, -1, 1, 0], bank)}
    if function == "routed_expand":
        return {"h": torch.randn(ROWS, R), **given}
    given["x"] = torch.randn(ROWS, K)
    if function == "routed_lora_linear":
        given |= {"weight": torch.randn(N, K), "bias": torch.randn(N)}
    return given


def linear() -> dict:
    given = {"x": torch.randn(ROWS, K), "weight": torch.randn(N, K), "scaling": 0.5}
    return given | {"lora_a": torch.randn(R, K), "lora_b": torch.randn(N, R)}


def norm() -> dict:
    given = linear()
    del given["x"]
    return given


def factors() -> dict:
    return {"name": "new", "lora_a": torch.randn(R, K), "lora_b": torch.randn(N, R), "scaling": 1.0}


# A function, right arguments for it, and which of them to spoil.
FUNCTIONS: dict[str, tuple[Callable, Callable[[], dict], tuple[str, ...]]] = {
    "lora_linear": (
        lora_linear,
        lambda: linear() | {"bias": torch.randn(N), "output_scale": torch.randn(N)},
        ("x", "weight", "lora_a", "lora_b", "bias", "output_scale", "scaling", "dropout_p", "seed",
         "backend"),
    ),
    "explain": (explain, linear, ("weight", "scaling", "dropout_p", "backend")),
    "lora_weight_norm": (lora_weight_norm, norm, ("weight", "lora_a", "lora_b", "scaling")),
    "routed_lora_linear": (
        routed_lora_linear, lambda: routed("routed_lora_linear"),
        ("x", "weight", "bias", "seed", "backend"),
    ),
    "routed_lora": (
        routed_lora, lambda: routed("routed_lora") | {"out": torch.randn(ROWS, N)}, ("x", "out"),
    ),
    "routed_shrink": (routed_shrink, lambda: routed("routed_shrink"), ("x",)),
    "routed_expand": (
        routed_expand, lambda: routed("routed_expand") | {"out": torch.randn(ROWS, N)},
        ("h", "out", "dtype"),
    ),
    "add": (
        lambda **given: a_bank().add(**given), factors,
        ("name", "lora_a", "lora_b", "scaling", "dropout_p"),
    ),
    "AdapterBank": (
        AdapterBank, lambda: {"in_features": K, "out_features": N},
        ("in_features", "out_features", "dtype"),
    ),
    "LoRALinear": (
        LoRALinear, lambda: {"in_features": K, "out_features": N, "rank": R, "alpha": 8},
        ("in_features", "out_features", "rank", "alpha", "dropout_p", "init_lora_weights",
         "adapter_dtype"),
    ),
    "LoRAEmbedding": (
        LoRAEmbedding, lambda: {"num_embeddings": K, "embedding_dim": N, "rank": R, "alpha": 8},
        ("num_embeddings", "embedding_dim", "rank", "alpha", "init_lora_weights"),
    ),
    "RoutedLoRALinear": (
        RoutedLoRALinear, lambda: {"in_features": K, "out_features": N},
        ("in_features", "adapter_dtype"),
    ),
    "layer": (
        lambda x: LoRALinear(K, N, R, 8)(x), lambda: {"x": torch.randn(ROWS, K)}, ("x",),
    ),
}  # fmt: skip


def wrong_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """A description of each call, and the call."""
    for function, (called, right, names) in FUNCTIONS.items():
        for name in names:
            values = NUMBERS.get(name) or tuple(SPOILED)
            for value in values:

                def call(called=called, right=right, name=name, value=value):
                    given = right()
                    if name not in NUMBERS:
                        value = SPOILED[value](given[name])
                    return called(**given | {name: value})

                yield f"{function}: {name} {value}", call
    for function in (routed_lora, routed_lora_linear, routed_shrink, routed_expand):
        for what, change in BANKS_AND_ROUTINGS.items():

            def call(function=function, change=change):
                given = routed(function.__name__)
                return function(**given | change(given))

            yield f"{function.__name__}: {what}", call
    for name in ("x", "lora_a", "lora_b", "output_scale"):
        given = {"output_scale": torch.randn(N)} if name == "output_scale" else {}

        def call(name=name, given=given):
            given = linear() | given
            return lora_linear(**given | {name: freed(given[name])})

        yield f"lora_linear: {name} freed", call
    yield from OTHERS.items()


def removed(given: dict) -> dict:
    given["bank"].remove("n0")
    return {}


BANKS_AND_ROUTINGS = {
    "no bank": lambda given: {"bank": None},
    "a dict for a bank": lambda given: {"bank": {}},
    "a bank on meta": lambda given: {
        "bank": AdapterBank(K, N, device=META, slots=given["bank"].slots)
    },
    "no routing": lambda given: {"routing": None},
    "a list for a routing": lambda given: {"routing": [0] * ROWS},
    "a routing of others": lambda given: {"routing": Routing.from_tokens([0] * ROWS, a_bank())},
    "a routing on meta": lambda given: {"routing": Routing.empty(ROWS, given["bank"], device=META)},
    "other rows": lambda given: {"routing": Routing.from_tokens([0] * 4, given["bank"])},
    "out of date": removed,
}
OTHERS = {
    "ids: floats": lambda: Routing.from_tokens([0.5], a_bank()),
    "ids: text": lambda: Routing.from_tokens("ab", a_bank()),
    "ids: of no adapter": lambda: Routing.from_tokens([0, 7], a_bank()),
    "ids: below -1": lambda: Routing.from_tokens([-2], a_bank()),
    "ids: outside of adapters": lambda: Routing.from_tokens([1], a_bank(), adapters=["n0"]),
    "ids: on meta": lambda: Routing.from_tokens(torch.zeros(2, device=META).long(), a_bank()),
    "ids: too many": lambda: Routing.empty(2, a_bank()).set_tokens_([0, 1, 0]),
    "ids: of one dimension": lambda: Routing.from_weighted([0, 1], [[1.0]], a_bank()),
    "weights: integers": lambda: Routing.from_weighted([[0]], torch.tensor([[1]]), a_bank()),
    "weights: a shape": lambda: Routing.from_weighted([[0]], [[1.0, 2.0]], a_bank()),
    "names: unknown": lambda: Routing.from_sequences(["n7"], 2, a_bank()),
    "names: text": lambda: Routing.from_sequences("n0", 2, a_bank()),
    "lengths: too few": lambda: Routing.from_sequences(["n0", "n1"], [2], a_bank()),
    "lengths: floats": lambda: Routing.from_sequences(["n0"], [2.0], a_bank()),
    "lengths: negative": lambda: Routing.from_sequences(["n0"], [-1], a_bank()),
    "offsets: descending": lambda: Routing.from_segments([0, 1], [0, 3, 2], a_bank()),
    "offsets: too few": lambda: Routing.from_segments([0, 1], [0, 3], a_bank()),
    "max_tokens: negative": lambda: Routing.empty(-1, a_bank()),
    "max_tokens: text": lambda: Routing.empty("4", a_bank()),
    "max_tokens: too many": lambda: Routing.empty(2**31, a_bank()),
    "pairs_per_token: 0": lambda: Routing.empty(4, a_bank(), 0),
    "pairs_per_token: two": lambda: Routing.empty(4, a_bank(), 2).set_tokens_([0]),
    "adapters: unknown": lambda: Routing.empty(4, a_bank(), adapters=["n7"]),
    "adapters: text": lambda: Routing.empty(4, a_bank(), adapters="n0"),
    "bank: a dict": lambda: Routing.empty(4, {}),
    "slots: a dict": lambda: AdapterBank(K, N, slots={}),
    "out_features: empty": lambda: AdapterBank(K, []),
    "rank_capacity: 0": lambda: AdapterBank(K, N, rank_capacity=0),
    "rank_capacity: full": lambda: a_bank(rank_capacity=4),
    "max_rank: alone": lambda: AdapterBank(K, N, max_rank=4),
    "max_rank: exceeded": lambda: a_bank(rank_capacity=8, max_rank=2),
    "capacity: 0": lambda: AdapterSlots(0),
    "remove: unknown": lambda: a_bank().remove("n7"),
    "bank[]: unknown": lambda: a_bank()["n7"],
    "one slice": lambda: AdapterBank(K, [N, N]).add("n", torch.randn(R, K), torch.randn(N, R), 1.0),
    "no slice": lambda: AdapterBank(K, [N, N]).add("n", [None] * 2, [None] * 2, 1.0),
    "adapter: scaling": lambda: setattr(a_bank()["n0"], "scaling", "2"),
    "adapter: dropout_p": lambda: setattr(a_bank()["n0"], "dropout_p", 1.0),
    "LoRALinear: lora_bias with use_dora": lambda: LoRALinear(
        K, N, R, 8, lora_bias=True, use_dora=True
    ),
    "LoRALinear: of a dict": lambda: LoRALinear.from_linear({}),
    "LoRAEmbedding: of a layer": lambda: LoRAEmbedding.from_embedding(nn.Linear(K, N)),
    "LoRAEmbedding: floats": lambda: LoRAEmbedding(K, N, R, 8)(torch.ones(2)),
    "LoRAEmbedding: out of range": lambda: LoRAEmbedding(K, N, R, 8)(torch.tensor([K])),
    "RoutedLoRALinear: of a dict": lambda: RoutedLoRALinear.from_linear({}),
    "RoutedLoRALinear: nothing chosen": lambda: with_adapter()(torch.randn(2, K)),
    "route: a number": lambda: route(3),
    "route: unknown targets": lambda: route(nn.Sequential(nn.Linear(K, N))).add(
        "n", rank=2, alpha=2, target_modules=["7"]
    ),
    "accelerate: a number": lambda: accelerate(3),
    "accelerate: no adapter": lambda: accelerate(nn.Linear(K, N)),
}


def with_adapter() -> RoutedLoRALinear:
    layer = RoutedLoRALinear(K, N)
    layer.bank.add("n", torch.randn(R, K), torch.randn(N, R), 1.0)
    return layer
