"""Random calls of ``lora_linear``, ``lora_weight_norm`` and the routed functions.

Dimensions: K in_features, N out_features, R rank.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from random_calls.draw import BF16, FP32, Draw
from torch import Tensor

from lora_kernels import (
    AdapterBank,
    AdapterSlots,
    Routing,
    explain,
    lora_linear,
    lora_weight_norm,
    routed_expand,
    routed_lora,
    routed_lora_linear,
    routed_shrink,
)


def linear_call(draw: Draw) -> None:
    dtype, leading = draw.dtype("dtype"), draw.leading()
    k, n, r = draw.size("K"), draw.size("N"), draw.rank("R")
    # Every subset of five gradients comes in turn.
    needs = [bool(draw.number >> bit & 1) for bit in range(5)]
    x = draw.tensor("x", *leading, k, dtype=dtype, trains=needs[0])
    a = draw.tensor("lora_a", r, k, dtype=draw.dtype("dtype of A", dtype), trains=needs[1])
    b = draw.tensor("lora_b", n, r, dtype=draw.dtype("dtype of B", dtype), trains=needs[2])
    weight = None
    if not draw.chance("no weight", 0.15):
        weight = draw.tensor("weight", n, k, dtype=dtype)
    leaves, options = {"x": x, "lora_a": a, "lora_b": b}, {}
    if needs[3] or draw.chance("bias is frozen", 0.3):
        options["bias"] = draw.tensor("bias", n, dtype=dtype, trains=needs[3])
    if (needs[4] and draw.number & 32) or draw.chance("output_scale is given", 0.05):
        kind = draw.dtype("dtype of c", dtype)
        options["output_scale"] = draw.tensor("output_scale", n, dtype=kind, trains=needs[4])
    leaves |= options
    options |= draw.dropout() | {"backend": draw.backend()}
    call = x, weight, a, b, draw.scaling()
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    draw.run(lambda: lora_linear(*call, **options), leaves)
    draw.results["explain"] = explain(*call, **options)


def norm_call(draw: Draw) -> None:
    n, k, r = draw.size("N"), draw.size("K"), draw.rank("R")
    dtype = draw.dtype("dtype")
    call = (
        draw.tensor("weight", n, k, dtype=dtype),
        draw.tensor("lora_a", r, k, dtype=draw.dtype("dtype of A", dtype), trains=True),
        draw.tensor("lora_b", n, r, dtype=draw.dtype("dtype of B", dtype)),
    )
    scaling = draw.scaling()
    draw.run(lambda: lora_weight_norm(*call, scaling), {})


def a_bank(draw: Draw) -> AdapterBank:
    """1 to 5 adapters of different ranks and slices, some of them frozen, some that drop."""
    k, widths = draw.size("K"), [draw.size("N")]
    if draw.chance("sliced", 0.35):
        widths += [draw.size("N_1")] + [draw.size("N_2")] * draw.random.randint(0, 1)
    reserved = {"rank_capacity": 600} if draw.chance("reserved", 0.1) else {}
    out_features = widths if len(widths) > 1 else widths[0]
    dtype = draw.dtype("dtype of the bank", FP32)
    bank = AdapterBank(k, out_features, dtype=dtype, slots=AdapterSlots(), **reserved)
    drops = draw.chance("drops", 0.4)
    for index in range(draw.choose("adapters", 1, 2, 3, 4, 5)):
        ranks = [draw.rank(f"R_{index}") * (draw.random.random() > 0.3) for _ in widths[1:]]
        ranks.append(draw.rank(f"R_{index}"))
        kind = draw.dtype(f"dtype of {index}", dtype)
        a = [draw.values(r, k, dtype=kind) if r else None for r in ranks]
        pairs = zip(widths, ranks, strict=True)
        b = [draw.values(width, r, dtype=kind) if r else None for width, r in pairs]
        if len(widths) == 1:
            (a,), (b,) = a, b
        dropout_p = draw.choose(f"p_{index}", 0.0, 0.1, 0.5) if drops else 0.0
        trains = not draw.chance(f"{index} is frozen", 0.2)
        adapter = bank.add(
            f"n{index}", a, b, draw.scaling(f"s_{index}"), dropout_p, trainable=trains
        )
        adapter.train(draw.random.random() > 0.1)
        if index == 1 and draw.chance("a hole", 0.3):
            bank.remove("n0")
    return bank


def a_routing(draw: Draw, bank: AdapterBank, tokens: int) -> tuple[Routing, dict[str, Tensor], int]:
    """A routing, its weights if they train, and how many rows x has."""
    slots = [adapter.slot for adapter in map(bank.__getitem__, bank)]

    def ids(count: int) -> list[int]:
        return [draw.random.choice([-1, *slots]) for _ in range(count)]

    made = draw.choose("routing", "tokens", "sequences", "segments", "weighted", "refilled")
    bound = {"adapters": list(bank)} if draw.chance("bound", 0.2) else {}
    if made == "tokens":
        return Routing.from_tokens(ids(tokens), bank, **bound), {}, tokens
    if made == "refilled":
        room = tokens + draw.random.randint(0, 5)
        routing = Routing.empty(room, bank, **bound).set_tokens_(ids(tokens))
        return routing, {}, draw.choose("rows", tokens, room)
    if made == "weighted":
        k = draw.choose("adapters per token", 1, 2, 3)
        table = torch.tensor([ids(k) for _ in range(tokens)], dtype=torch.int64).view(tokens, k)
        trains = draw.chance("weights train", 0.5)
        dtype = draw.choose("dtype of the weights", FP32, BF16)
        weights = draw.tensor("weights", tokens, k, dtype=dtype, trains=trains)
        routing = Routing.from_weighted(table, weights, bank, **bound)
        return routing, {"weights": weights} if trains else {}, tokens
    cuts = sorted(draw.random.randint(0, tokens) for _ in range(3))
    if made == "segments":
        routing = Routing.from_segments(ids(2), cuts, bank, num_tokens=tokens, **bound)
        return routing, {}, tokens
    offsets = [0, *cuts, tokens]
    lengths = [end - start for start, end in pairwise(offsets)]
    names = [draw.random.choice(["__base__", *bank]) for _ in lengths]
    return Routing.from_sequences(names, lengths, bank, **bound), {}, tokens


def routed_call(draw: Draw, function: str) -> None:
    bank, leading = a_bank(draw), draw.leading()
    tokens = torch.Size(leading).numel()
    routing, leaves, rows = a_routing(draw, bank, tokens)
    dtype = draw.dtype("dtype", bank.dtype)
    shape = leading if rows == tokens else [rows]
    k, n = bank.in_features, bank.out_features
    x = draw.tensor("x", *shape, k, dtype=dtype, trains=draw.chance("dx", 0.6))
    leaves |= {"x": x, **dict(bank.named_parameters())}
    backend = {"backend": draw.backend()}
    options = backend | draw.seed(0.4)

    def draw_out(dtype: torch.dtype) -> Tensor | None:
        if not draw.chance("out", 0.5):
            return None
        trains = draw.chance("d out", 0.3)
        leaves["out"] = draw.tensor("out", *shape, n, dtype=dtype, trains=trains)
        return leaves["out"]

    def added_to(out: Tensor | None, function: Callable[[Tensor | None], Tensor]) -> Tensor:
        """The result; a leaf of autograd is not added to, but what is made of it."""
        given = None if out is None else out * 1 if out.requires_grad else out.detach()
        y = function(given)
        draw.results["is out"] = str(y is given)
        return y

    if function == "routed_lora_linear":
        weight = draw.tensor("weight", n, k, dtype=dtype)
        bias = None
        if draw.chance("bias", 0.5):
            bias = leaves["bias"] = draw.tensor(
                "bias", n, dtype=dtype, trains=draw.chance("d bias", 0.5)
            )

        def call():
            return routed_lora_linear(x, weight, bank, routing, bias, **options)

    elif function == "routed_lora":
        out = draw_out(dtype)

        def call():
            return added_to(out, lambda out: routed_lora(x, bank, routing, out, **options))

    elif function == "routed_shrink":

        def call():
            return routed_shrink(x, bank, routing, **options)

    else:
        with torch.no_grad():
            h = routed_shrink(x, bank, routing, **options)
        draw.results["h"] = h
        h = leaves["h"] = draw.tensor("h", *h.shape, dtype=h.dtype, trains=draw.chance("dh", 0.6))
        kind = draw.dtype("dtype of the result", dtype)
        out = draw_out(kind)
        options = backend | ({"dtype": kind} if out is None else {})

        def call():
            return added_to(out, lambda out: routed_expand(h, bank, routing, out, **options))

    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    draw.run(call, leaves)
    if function != "routed_expand":
        draw.results["explain"] = explain(x, bank, routing, **backend)
    change_and_call(draw, bank, call, leaves)


def change_and_call(draw: Draw, bank: AdapterBank, call: Callable, leaves: dict) -> None:
    """Sometimes again, after a change of the adapters."""
    name = list(bank)[-1]
    match draw.choose(
        "then", *["nothing"] * 8, *["scaling", "eval", "values", "data"] * 2, "remove"
    ):
        case "nothing":
            return
        case "scaling":
            bank[name].scaling = 0.9
        case "eval":
            bank.eval()
        case "values":
            with torch.no_grad():
                for parameter in bank[name].parameters():
                    parameter.mul_(-0.5)
        case "data":
            for parameter in bank[name].parameters():
                parameter.data = parameter.data * 0.5
        case "remove":
            bank.remove(name)
    for leaf in leaves.values():
        leaf.grad = None
    draw.run(call, leaves, ", then")
