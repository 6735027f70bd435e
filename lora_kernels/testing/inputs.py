"""Random problems for ``lora_linear``, and one way to run them and to hold them to the policy."""

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.testing.policy import Draw, Results, assert_draws_within_policy


def without_gaps(tensor: Tensor) -> Tensor:
    """A contiguous copy, with nothing behind its last row either."""
    return tensor.clone(memory_format=torch.contiguous_format)


def redrawn(tensor: Tensor, number: int, name: str = "") -> Tensor:
    """``tensor`` with other signs, for another draw of a test; draw 0 is the tensor itself.

    Sizes, strides, magnitudes and what lies between the rows stay. The signs follow from
    ``number`` and ``name``.
    """
    if number == 0:
        return tensor
    generator = torch.Generator().manual_seed(zlib.crc32(f"{number} {name}".encode()))
    memory = tensor.detach().new_empty(0).set_(tensor.detach().untyped_storage())
    signs = torch.randint(0, 2, memory.shape, generator=generator) * 2 - 1
    memory = memory * signs.to(memory)
    return memory.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def redrawn_model(model: nn.Module, number: int) -> nn.Module:
    """``model``, or for draws but 0 a copy whose parameters are :func:`redrawn` by their names."""
    if number == 0:
        return model
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.data = redrawn(parameter.data, number, name)
    return model


def changed(
    problem: object, change: Callable[[str, Tensor], Tensor], but: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors among the fields of a dataclass, but those, each changed."""
    tensors = {n: t for n, t in vars(problem).items() if n not in but and isinstance(t, Tensor)}
    return {name: change(name, tensor) for name, tensor in tensors.items()}


def in_double(_: str, tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class LoRAProblem:
    """The inputs of one call: signed random data, scaled so that y and every gradient are O(1)."""

    x: Tensor  # [..., K]
    weight: Tensor | None  # [N, K]
    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    scaling: Tensor  # []
    bias: Tensor | None  # [N]
    output_scale: Tensor | None  # [N]
    dropout_p: float
    seed: Tensor | None  # []
    dy: Tensor  # [..., N]

    @staticmethod
    def random(
        leading: tuple[int, ...],
        in_features: int,
        out_features: int,
        rank: int,
        *,
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        with_weight: bool = True,
        with_bias: bool = True,
        with_output_scale: bool = False,
        dropout_p: float = 0.0,
        device: str = "cpu",
        generator_seed: int = 0,
    ) -> "LoRAProblem":
        """Draw a problem; the values depend on ``generator_seed`` and the sizes only."""
        generator = torch.Generator().manual_seed(generator_seed)

        def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            return values.to(device=device, dtype=dtype)

        adapter_dtype = adapter_dtype or dtype
        weight = draw(out_features, in_features, scale=in_features**-0.5)
        return LoRAProblem(
            x=draw(*leading, in_features),
            weight=weight if with_weight else None,
            lora_a=draw(rank, in_features, scale=in_features**-0.5, dtype=adapter_dtype),
            lora_b=draw(out_features, rank, scale=rank**-0.5, dtype=adapter_dtype),
            scaling=torch.tensor(0.7, dtype=torch.float64),
            bias=draw(out_features) if with_bias else None,
            output_scale=(
                1 + 0.3 * draw(out_features, dtype=adapter_dtype) if with_output_scale else None
            ),
            dropout_p=dropout_p,
            seed=torch.tensor(0x1234_5678_9ABC_DEF1, device=device) if dropout_p else None,
            dy=draw(*leading, out_features),
        )

    def with_(self, **changes) -> "LoRAProblem":
        """The same problem with some inputs replaced."""
        return replace(self, **changes)

    def redrawn(self, number: int) -> "LoRAProblem":
        """Other values of the same sizes, strides and magnitudes; draw 0 is this problem."""
        if number == 0:
            return self
        changes = changed(self, lambda name, t: redrawn(t, number, name), ("scaling", "seed"))
        seed = None if self.seed is None else self.seed + number
        return replace(self, seed=seed, **changes)

    def tight(self) -> "LoRAProblem":
        """The same values without gaps: the eager formula's GEMMs may read what lies in them."""
        return replace(self, **changed(self, lambda _, tensor: without_gaps(tensor)))

    def double(self) -> "LoRAProblem":
        """The same values in fp64."""
        return replace(self, **changed(self, in_double))


DIFFERENTIABLE = ("x", "lora_a", "lora_b", "bias", "output_scale")


def run_forward_backward(
    function: Callable[..., Tensor],
    problem: LoRAProblem,
    needs: tuple[str, ...] = DIFFERENTIABLE,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """``function``'s result and the gradients named in ``needs``, as ``{"y": ..., "x": ...}``.

    ``function`` takes the arguments of the reference. Inputs are detached first, keeping their
    strides, so that runs do not touch each other.
    """
    inputs = {
        field.name: value.detach() if isinstance(value, Tensor) else value
        for field in fields(problem)
        if field.name != "dy"
        for value in (getattr(problem, field.name),)
    }
    leaves = [name for name in DIFFERENTIABLE if name in needs and inputs[name] is not None]
    for name in leaves:
        inputs[name].requires_grad_()
    with torch.autocast(problem.x.device.type, dtype=autocast, enabled=autocast is not None):
        y = function(**inputs)
    gradients = (
        torch.autograd.grad(y, [inputs[name] for name in leaves], problem.dy) if leaves else ()
    )
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def oracle_results(
    problem: LoRAProblem, needs: tuple[str, ...] = DIFFERENTIABLE
) -> dict[str, Tensor]:
    """The definition evaluated in fp64 on the same values."""
    return run_forward_backward(lora_linear_reference, problem.double(), needs)


def check_linear(
    function: Callable[..., Tensor],
    problem: LoRAProblem,
    needs: tuple[str, ...] = DIFFERENTIABLE,
) -> Results:
    """``function``'s result and gradients, after holding each to the error policy."""

    def draw(number: int) -> Draw:
        drawn = problem.redrawn(number)
        return (
            run_forward_backward(function, drawn, needs),
            run_forward_backward(lora_linear_reference, drawn.tight(), needs),
            oracle_results(drawn, needs),
        )

    return assert_draws_within_policy(draw, problem.x.dtype)
