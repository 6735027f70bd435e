"""The families of kernels that can be told apart, and the checks that each must pass.

Every check holds the result and all gradients to the error policy against fp64, and asks for the
same bits twice. Shapes: one whose sizes are multiples of everything, one of odd sizes, and one with
a row more than two tiles have.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_kernels.ops.linear import lora_linear
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.ops.routed import Routing, routed_lora_linear
from lora_kernels.ops.routed.bank.bank import AdapterBank
from lora_kernels.runtime import dispatch
from lora_kernels.runtime.dropout import keep_mask
from lora_kernels.testing import (
    LoRAProblem,
    assert_draws_within_policy,
    redrawn,
    run_forward_backward,
)

# M, K, N, R
SHAPES = {"aligned": (192, 256, 384, 16), "odd": (57, 101, 67, 3), "edge": (129, 520, 264, 40)}
DROPOUTS = (0.0, 0.1)
RANKS = (8, 16, 3)  # of the adapters of a batch

Check = tuple[str, Callable[[], None]]


@dataclass(frozen=True)
class Family:
    """A backend of one operation, with the strategy that its tiles take."""

    name: str  # "linear/triton hybrid"
    operation: str  # "linear" or "routed"
    backend: str
    strategy: str | None = None

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run there, or needs no test."""
        if self.backend == "composed" and device.type == "cpu":
            return "on a CPU it has no kernels of ours"
        return dispatch.unavailable(self.backend, device, dtype)

    def checks(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[Check]:
        """Named checks, in order of worth; each raises AssertionError where a result is wrong."""
        shapes = SHAPES.items()
        for (label, sizes), dtype, p in itertools.product(shapes, dtypes, DROPOUTS):
            if self.why_not(device, dtype):
                continue
            name = f"{str(dtype).removeprefix('torch.')}, {label}, dropout {p:g}"
            check = check_linear if self.operation == "linear" else check_routed
            yield name, functools.partial(self._run, check, sizes, dtype, p, device)
        for dtype in dtypes:
            if self.operation == "linear" and not self.why_not(device, dtype):
                name = f"{str(dtype).removeprefix('torch.')}, bits of the mask"
                yield name, functools.partial(self._run, check_mask, dtype, device)

    def _run(self, check: Callable[..., None], *args: object) -> None:
        cells = {"*": {"strategy": self.strategy}} if self.strategy else None
        with tiles.use_cells(cells) if cells else nullcontext():
            check(self.backend, *args)


FAMILIES = {
    family.name: family
    for family in (
        Family("linear/composed", "linear", "composed"),
        Family("routed/composed", "routed", "composed"),
        Family("linear/triton hybrid", "linear", "triton", "hybrid"),
        Family("routed/triton", "routed", "triton"),
        Family("linear/triton fused", "linear", "triton", "fused"),
        Family("linear/native", "linear", "native"),
        Family("routed/native", "routed", "native"),
    )
}


def available(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> dict[str, str | None]:
    """Each family, and why it cannot run on a device in any of these dtypes; None where it can."""
    found = {}
    for name, family in FAMILIES.items():
        reasons = [family.why_not(device, dtype) for dtype in dtypes]
        found[name] = None if None in reasons else reasons[0]
    return found


# --- one adapter -----------------------------------------------------------------------------


def check_linear(
    backend: str, sizes: tuple[int, ...], dtype: torch.dtype, p: float, device: torch.device
) -> None:
    rows, *others = sizes
    problem = LoRAProblem.random((rows,), *others, dtype=dtype, dropout_p=p, device=str(device))
    ours = functools.partial(lora_linear, backend=backend)
    definition = functools.partial(lora_linear, backend="reference")

    def draw(number: int):
        drawn = problem.redrawn(number)
        return (
            run_forward_backward(ours, drawn),
            run_forward_backward(definition, drawn.tight()),
            run_forward_backward(definition, drawn.double()),
        )

    first = assert_draws_within_policy(draw, dtype)
    assert_same_bits(first, run_forward_backward(ours, problem))
    if device.type == "cuda":
        assert_replays_linear(ours, problem)


def check_mask(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """With A and B the identity and no base weight y is the masked x."""
    rows, columns, p = 130, 72, 0.3
    seed = torch.tensor(0x1234_5678_9ABC_DEF1, device=device)
    eye = torch.eye(columns, dtype=dtype, device=device)
    x = torch.ones(rows, columns, dtype=dtype, device=device)
    y = lora_linear(x, None, eye, eye, 1.0, dropout_p=p, seed=seed, backend=backend)
    assert torch.equal(y != 0, keep_mask(seed, p, rows, columns)), "the mask is another"


def assert_same_bits(first: dict[str, Tensor], again: dict[str, Tensor]) -> None:
    for name, result in first.items():
        assert torch.equal(result, again[name]), f"{name}: other bits in a second run"


def assert_replays_linear(function: Callable[..., Tensor], problem: LoRAProblem) -> None:
    """A captured forward gives for another x what a call gives."""
    inputs = {
        name: getattr(problem, name)
        for name in ("weight", "lora_a", "lora_b", "scaling", "bias", "dropout_p", "seed")
    }
    x = problem.x.clone()
    graph = _captured(lambda: function(x, **inputs))
    x.copy_(problem.redrawn(1).x)
    replayed = graph()
    assert torch.equal(replayed, function(x, **inputs)), "a replayed graph gives other results"


def _captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        call()  # what is made on first use is made outside of the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = call()

    def replay() -> Tensor:
        graph.replay()
        return y.clone()

    return replay


# --- many adapters ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RoutedInputs:
    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    factors: tuple[tuple[Tensor, Tensor], ...]  # A [R, K] and B [N, R] of each adapter
    slots: Tensor  # [M], -1 for none
    dy: Tensor  # [M, N]
    p: float

    @staticmethod
    def random(
        sizes: tuple[int, ...], dtype: torch.dtype, p: float, device: torch.device
    ) -> "RoutedInputs":
        rows, k, n, _ = sizes
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            return values.to(device, dtype)

        slots = torch.randint(-1, len(RANKS), (rows,), generator=generator)
        return RoutedInputs(
            draw(rows, k),
            draw(n, k, scale=k**-0.5),
            tuple((draw(r, k, scale=k**-0.5), draw(n, r, scale=r**-0.5)) for r in RANKS),
            slots.to(device),
            draw(rows, n),
            p,
        )

    def with_(self, change: Callable[[str, Tensor], Tensor]) -> "RoutedInputs":
        factors = tuple(
            (change(f"a{i}", a), change(f"b{i}", b)) for i, (a, b) in enumerate(self.factors)
        )
        return replace(
            self,
            factors=factors,
            **{name: change(name, getattr(self, name)) for name in ("x", "weight", "dy")},
        )

    def bank(self) -> AdapterBank:
        n, k = self.weight.shape
        bank = AdapterBank(k, n, dtype=self.x.dtype, device=self.x.device)
        for index, (a, b) in enumerate(self.factors):
            bank.add(str(index), a, b, scaling=0.5 + index, dropout_p=self.p)
        bank.reserve(sum(RANKS))
        return bank

    def results(self, backend: str) -> dict[str, Tensor]:
        """y and the gradients of x and of every factor."""
        bank = self.bank()
        bank.requires_grad_()
        x = self.x.detach().requires_grad_()
        routing = Routing.from_tokens(self.slots, bank)
        seed = torch.tensor(11, device=x.device) if self.p else None
        y = routed_lora_linear(x, self.weight, bank, routing, seed=seed, backend=backend)
        leaves = {"x": x, **dict(bank.named_parameters())}
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy)
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def check_routed(
    backend: str, sizes: tuple[int, ...], dtype: torch.dtype, p: float, device: torch.device
) -> None:
    inputs = RoutedInputs.random(sizes, dtype, p, device)

    def draw(number: int):
        drawn = inputs.with_(lambda name, tensor: redrawn(tensor, number, name))
        double = drawn.with_(lambda _, tensor: tensor.double())
        return drawn.results(backend), drawn.results("reference"), double.results("reference")

    first = assert_draws_within_policy(draw, dtype)
    assert_same_bits(first, inputs.results(backend))
    if device.type == "cuda" and backend != "composed":
        assert_replays_routed(inputs, backend)


def assert_replays_routed(inputs: RoutedInputs, backend: str) -> None:
    """A captured forward gives for another routing what a call gives."""
    bank = inputs.bank()
    routing = Routing.from_tokens(inputs.slots, bank)

    def call() -> Tensor:
        return routed_lora_linear(inputs.x, inputs.weight, bank, routing, backend=backend)

    replay = _captured(call)
    others = inputs.slots.flip(0)
    routing.set_tokens_(others)
    replayed = replay()
    with torch.no_grad():
        fresh = routed_lora_linear(
            inputs.x, inputs.weight, bank, Routing.from_tokens(others, bank), backend=backend
        )
    assert torch.equal(replayed, fresh), "a replayed graph keeps the routing it was captured with"
