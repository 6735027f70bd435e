"""Results of a problem of ``routed_lora``: a backend's, the plain formula's and fp64's.

Dimensions: M tokens, k adapters per token, K in_features, N out_features of all slices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.ops.routed import AdapterBank, routed_lora, routed_lora_linear
from lora_kernels.runtime import cpu_extension
from lora_kernels.runtime.dropout import drop_threshold, keep_mask, keep_scale
from lora_kernels.testing.policy import Draw, Results, assert_draws_within_policy
from lora_kernels.testing.routed_inputs import AdapterValues, RoutedProblem


class AsOnADevice(TorchDispatchMode):
    """CPU tensors stand for a device's: the mode tells a routing that it may not look at ids."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


# Those that run on a CPU, each tested alike.
BACKENDS = ["reference", "composed", *([] if cpu_extension.missing() else ["native"])]


def call_routed(problem: RoutedProblem, bank: AdapterBank, backend: str, **changes) -> Tensor:
    """``routed_lora_linear``, or ``routed_lora`` where the problem has no weight."""
    p = problem.with_(**{n: v for n, v in changes.items() if n != "routing"})
    if backend == "native" and p.x.dtype not in cpu_extension.DTYPES:
        backend = "composed"  # serves what the compiled kernels do not take
    routing = changes.get("routing") or p.routing(bank)
    if p.weight is None:
        return routed_lora(p.x, bank, routing, p.out, seed=p.seed, backend=backend)
    return routed_lora_linear(
        p.x, p.weight, bank, routing, p.bias, seed=p.seed, backend=backend
    )  # fmt: skip


def run_routed(
    problem: RoutedProblem,
    backend: str,
    needs: Sequence[str] | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The result and the gradients named in ``needs`` (None: all), as ``{"y": ..., "x": ...}``.

    Parameters are called ``a0.lora_a``, in sliced banks ``a0.lora_a_0``. Everything is detached
    first, keeping its strides, so that runs do not touch each other. Of adapters that no token
    uses there are none, which a call for all gradients asserts.
    """
    everything = needs is None
    needs = problem.names() if everything else needs
    inputs = {n: getattr(problem, n) for n in ("x", "weight", "bias", "weights", "out")}
    leaves = {n: None if t is None else t.detach() for n, t in inputs.items()}
    for name in ("x", "bias", "weights", "out"):
        if leaves[name] is not None:
            leaves[name].requires_grad_(name in needs)
    bank, unused = problem.bank(), []
    for name, parameter in _parameters(bank).items():
        leaves[name] = parameter.requires_grad_(name in needs or everything)
        if everything and name not in needs:
            unused.append(parameter)
    given = {n: leaves[n] for n in inputs}
    if given["out"] is not None:
        given["out"] = given["out"].clone()  # added to in place
    with torch.autocast(problem.x.device.type, dtype=autocast, enabled=autocast is not None):
        y = call_routed(problem, bank, backend, **given)
    wanted = [leaves[name] for name in needs]
    if unused:
        gradients = torch.autograd.grad(y, unused, problem.dy, retain_graph=True, allow_unused=True)
        assert set(gradients) == {None}, "an adapter without tokens has a gradient"
    gradients = torch.autograd.grad(y, wanted, problem.dy) if wanted else ()
    return {"y": y.detach(), **dict(zip(needs, gradients, strict=True))}


def _parameters(bank: AdapterBank) -> dict[str, torch.nn.Parameter]:
    return {n.removeprefix("adapters."): p for n, p in bank.named_parameters()}


def keep_factor(adapter: AdapterValues, seed: Tensor | None, rows: int, columns: int) -> Tensor:
    """What x is multiplied by elementwise, fp64 ``[M, K]``: 0 or the scale of dropout; or ones."""
    if not adapter.training or drop_threshold(adapter.dropout_p) == 0:
        return torch.ones(rows, columns, dtype=torch.float64)
    mask = keep_mask(seed, adapter.dropout_p, rows, columns, adapter.slot)
    return mask.double() * keep_scale(adapter.dropout_p)


def routed_oracle(problem: RoutedProblem) -> dict[str, Tensor]:
    """y and every gradient in fp64 by the formulas, one token and one of its adapters at a time."""
    p = problem.double()
    rows, columns = p.x.shape
    by_slot = {adapter.slot: (name, adapter) for name, adapter in p.adapters.items()}
    keeps = {a.slot: keep_factor(a, p.seed, rows, columns) for a in p.adapters.values()}
    y = torch.zeros_like(p.dy) if p.out is None else p.out.clone()
    dx = torch.zeros_like(p.x)
    if p.weight is not None:
        y += torch.einsum("mk,nk->mn", p.x, p.weight) + (0 if p.bias is None else p.bias)
        dx += torch.einsum("mn,nk->mk", p.dy, p.weight)
    results = {"y": y, "x": dx}
    if p.bias is not None:
        results["bias"] = p.dy.sum(0)
    if p.weights is not None:
        results["weights"] = torch.zeros_like(p.weights)
    if p.out is not None:
        results["out"] = p.dy
    for name, adapter in p.used().items():
        for n, factor in adapter.parameters(name).items():
            results[n] = torch.zeros_like(factor)
    for m, slots in enumerate(p.ids.tolist()):
        for j, slot in enumerate(slots):
            if slot not in by_slot:
                continue
            name, adapter = by_slot[slot]
            keep = keeps[slot][m]
            w = 1.0 if p.weights is None else p.weights[m, j].item()
            start = 0
            for s, (pair, width) in enumerate(zip(adapter.pairs, p.widths, strict=True)):
                part, start = slice(start, start + width), start + width
                if pair is None:
                    continue
                a, b = pair
                suffix = "" if len(adapter.pairs) == 1 else f"_{s}"
                h = a @ (keep * p.x[m])
                delta = adapter.scaling * (b @ h)
                t = w * adapter.scaling * (p.dy[m, part] @ b)
                y[m, part] += w * delta
                dx[m] += keep * (t @ a)
                results[f"{name}.lora_a{suffix}"] += torch.outer(t, keep * p.x[m])
                results[f"{name}.lora_b{suffix}"] += (w * adapter.scaling) * torch.outer(
                    p.dy[m, part], h
                )
                if p.weights is not None:
                    results["weights"][m, j] += p.dy[m, part] @ delta
    return results


def routed_eager(problem: RoutedProblem) -> dict[str, Tensor]:
    """The plain formula in x's dtype as trainers run it: a loop over the adapters, with autograd.

    Factors of another dtype are cast to x's, as autocast does.
    """
    p, leaves = problem.tight(), {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        leaves[name] = tensor.detach().clone().requires_grad_()
        return leaves[name]

    x = leaf("x", p.x)
    bias = None if p.bias is None else leaf("bias", p.bias)
    weights = None if p.weights is None else leaf("weights", p.weights)
    if p.weight is not None:
        y = F.linear(x, p.weight, bias)
    else:
        y = torch.zeros_like(p.dy) if p.out is None else leaf("out", p.out)
    for tensor in (x, weights):
        y = y if tensor is None else y - tensor[:0].sum().to(y.dtype)  # a function of it, always
    for name, adapter in p.used().items():
        factors = {n: leaf(n, factor) for n, factor in adapter.parameters(name).items()}
        tokens, which = torch.nonzero(p.ids == adapter.slot, as_tuple=True)
        rows = x[tokens] * keep_factor(adapter, p.seed, *x.shape)[tokens].to(x.dtype)
        parts = []
        for s, (pair, width) in enumerate(zip(adapter.pairs, p.widths, strict=True)):
            suffix = "" if len(adapter.pairs) == 1 else f"_{s}"
            if pair is None:
                parts.append(x.new_zeros(len(tokens), width))
                continue
            a, b = (factors[f"{name}.{role}{suffix}"].to(x.dtype) for role in ("lora_a", "lora_b"))
            parts.append(F.linear(F.linear(rows, a), b) * adapter.scaling)
        delta = torch.cat(parts, dim=1)
        if weights is not None:
            delta = delta * weights[tokens, which].to(x.dtype).unsqueeze(1)
        y = y.index_add(0, tokens, delta)
    gradients = torch.autograd.grad(y, list(leaves.values()), p.dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def check_routed(
    problem: RoutedProblem,
    backend: str,
    needs: Sequence[str] | None = None,
    known: tuple[Results, Results] | None = None,
    **options,
) -> Results:
    """``backend``'s result and gradients, after holding each to the error policy.

    known: eager's and the oracle's results, where they are at hand.
    """

    def draw(number: int) -> Draw:
        drawn = problem.redrawn(number)
        ours = run_routed(drawn, backend, needs, **options)
        if known is not None and number == 0:
            return ours, *known
        return ours, routed_eager(drawn), routed_oracle(drawn)

    ours = assert_draws_within_policy(draw, problem.x.dtype)
    assert needs is not None or ours.keys() == {"y", *problem.names()}
    return ours
