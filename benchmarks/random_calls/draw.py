"""The random choices of one call, and what it gives."""

import random
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LAYOUTS = ("plain", "plain", "plain", "transposed", "sliced", "stepped", "expanded", "shifted")
SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 24, 31, 32, 33, 47, 64, 65, 96, 129)
RANKS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 40)


class Draw:
    """The random choices of one call, noted by name.

    Attributes:
        chosen: by name, as JSON has it.
        operands: the tensors that were drawn.
        results: of the call, by name.
    """

    def __init__(self, name: str, seed: int, interpreted: bool) -> None:
        self.number = int(name.rpartition(" ")[2])
        self.random = random.Random(f"{name} {seed}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.interpreted = interpreted
        self.chosen, self.operands, self.results = {}, [], {}

    def choose(self, name: str, *options):
        value = self.random.choice(options)
        self.chosen[name] = value if isinstance(value, (int, float, list)) else str(value)
        return value

    def chance(self, name: str, probability: float) -> bool:
        if self.random.random() >= probability:
            return False
        return bool(self.choose(name, True))

    def size(self, name: str) -> int:
        return self.choose(name, *SIZES[: 9 if self.interpreted else None])

    def rank(self, name: str) -> int:
        return self.choose(name, *RANKS[: 8 if self.interpreted else None])

    def dtype(self, name: str, like: torch.dtype | None = None) -> torch.dtype:
        if like is not None and self.random.random() < 0.6:
            return self.choose(name, like)
        return self.choose(name, *(FP32, FP16) if self.interpreted else (BF16, FP16, FP32, FP64))

    def leading(self, name: str = "leading") -> list[int]:
        rows = self.random.randint(0, 9 if self.interpreted else 70)
        split = self.random.randint(1, 4)
        shapes = [rows], [split, rows // split], [split, rows // split // 2, 2], [rows]
        return self.choose(name, *shapes, *[[]] * (self.random.random() < 0.1))

    def values(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) > 1 and shape[-1] else 1.0
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (drawn * scale).to(dtype)

    def tensor(self, name: str, *shape: int, dtype: torch.dtype, trains: bool = False) -> Tensor:
        """Values in one of the layouts; gaps between them hold NaN."""
        layout = self.random.choice(LAYOUTS)
        values = self.values(*shape, dtype=dtype)
        if layout == "transposed" and values.ndim > 1:
            values = values.mT.contiguous().mT
        elif layout == "sliced":
            gaps = values.new_full([size + 3 for size in shape], float("nan"))
            values = gaps[tuple(slice(1, 1 + size) for size in shape)].copy_(values)
        elif layout == "stepped" and shape:
            gaps = values.new_full([*shape[:-1], 2 * shape[-1]], float("nan"))
            values = gaps[..., ::2].copy_(values)
        elif layout == "expanded" and shape:
            values = values[:1].expand_as(values)
        elif layout == "shifted":
            gaps = values.new_full([values.numel() + 1], float("nan"))
            values = gaps[1:].view(shape).copy_(values)
        if not trains and self.random.random() < 0.02:
            layout += " of inference"
            with torch.inference_mode():
                values = values.clone()
        self.chosen[name] = f"{dtype} {list(shape)} {layout}" + ", trains" * trains
        self.operands.append(values)
        return values.requires_grad_() if trains else values

    def scaling(self, name: str = "scaling") -> float | Tensor:
        number = self.random.choice((2, 0.37, -1.5, 1.0, 0.7, -0.3, 1.25, 0.0))
        dtype = self.choose(name, None, None, FP64, FP32, BF16)
        self.chosen[name] += f" {number}"
        return number if dtype is None else torch.tensor(number, dtype=dtype)

    def dropout(self) -> dict:
        """``dropout_p`` and ``seed``."""
        options = {"dropout_p": self.choose("dropout_p", 0, 0.0, 0.1, 0.5)}
        return options | self.seed(0.5)

    def seed(self, probability: float) -> dict:
        if not self.chance("seed", probability):
            return {}
        return {"seed": torch.tensor(self.random.getrandbits(63))}

    def backend(self) -> str:
        if self.interpreted:
            return self.choose("backend", "triton")
        return self.choose("backend", *["auto", "native", "composed"] * 4, "reference")

    def run(self, function: Callable[[], Tensor], leaves: dict[str, Tensor], tag: str = "") -> None:
        """Note a call's result, and its gradients in one of several ways."""
        modes = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
        mode = modes[self.choose(f"mode{tag}", *["grad"] * 8, "no_grad", "inference")]
        autocast = self.choose(f"autocast{tag}", *[None] * 8, BF16, FP16)
        cast = torch.autocast("cpu", dtype=autocast) if autocast else nullcontext()
        saved = {}
        hooks = nullcontext()
        if self.chance(f"counted{tag}", 0.3):
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: note_storage(saved, tensor), lambda tensor: tensor
            )
        torch.manual_seed(self.number)
        with mode(), cast, hooks:
            y = self.results[f"y{tag}"] = function()
        self.results[f"bytes saved{tag}"] = sum(saved.values())
        self.results[f"generator{tag}"] = torch.get_rng_state()
        if y.requires_grad and leaves:
            self.differentiate(y, leaves, tag)

    def differentiate(self, y: Tensor, leaves: dict[str, Tensor], tag: str) -> None:
        def note(what: str, names, gradients) -> None:
            for name, gradient in zip(names, gradients, strict=True):
                self.results[f"{what} {name}{tag}"] = gradient

        how = self.choose(f"backward{tag}", "backward", "grad", "grad", "twice", "second", "sum")
        inputs = list(leaves.values())
        if how == "sum":
            y.sum().backward()
        if how in ("backward", "sum"):
            if how == "backward":
                y.backward(self.tensor(f"dy{tag}", *y.shape, dtype=y.dtype))
            note("d", leaves, [leaf.grad for leaf in inputs])
            return
        dy = self.tensor(f"dy{tag}", *y.shape, dtype=y.dtype, trains=how == "second")
        options = {"allow_unused": True, "retain_graph": how != "grad"}
        for count in range(1 + (how == "twice")):
            gradients = torch.autograd.grad(y, inputs, dy, create_graph=how == "second", **options)
            note(f"d{count}", leaves, gradients)
        if how == "second":
            used = [gradient for gradient in gradients if gradient is not None]
            total = sum(
                (gradient.double() * self.values(*gradient.shape)).sum() for gradient in used
            )
            if used and total.requires_grad:
                note("dd", [*leaves, "dy"], torch.autograd.grad(total, [*inputs, dy], **options))


def note_storage(saved: dict[int, int], tensor: Tensor) -> Tensor:
    """Note the bytes of a saved tensor's storage by its address; those of single numbers do not
    count."""
    if tensor.numel() > 1:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
    return tensor
