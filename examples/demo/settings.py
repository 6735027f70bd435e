"""How much the demo does, and on what."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

# In nats per token. Rounding in other places (in PEFT's own forward, of the merged weights, in
# batches of another size) moves the loss of a bf16 model by up to a hundredth; an adapter lost or
# counted twice, by tenths.
ROUNDING = 0.03


@dataclass(frozen=True)
class Settings:
    """length: tokens of a sequence. batch: sequences of a step. held_out: sequences per text.
    joint: with the second half, all adapters in one batch. measurements: held-out losses during
    training. reps: repetitions of the timed steps."""

    out: Path
    device: torch.device
    dtype: torch.dtype
    seed: int
    quick: bool
    steps: int
    batch: int
    joint: bool = False
    length: int = 256
    held_out: int = 16
    measurements: int = 4
    reps: int = 7
    new_tokens: int = 64
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    learning_rate: float = 2e-3

    @property
    def adapters(self) -> Path:
        return self.out / "adapters"


def settings_from(
    *, steps: int | None, out: Path, device: str, seed: int, quick: bool, joint: bool = False
) -> Settings:
    """Settings for the command line's options; `steps` and `device` are chosen where left open."""
    chosen = pick_device(device)
    return Settings(
        out=out,
        device=chosen,
        dtype=fastest_dtype(chosen),
        seed=seed,
        quick=quick,
        joint=joint,
        steps=steps or (6 if quick else 60),
        batch=8 if chosen.type == "cuda" else 2,
        **(dict(held_out=4, measurements=1, reps=2, new_tokens=12) if quick else {}),
    )


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {name}: this PyTorch ({torch.__version__}) sees no GPU")
    return device


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it, else fp32.

    On a CPU that is measured: without bf16 instructions such a product takes several times as long
    as in fp32, with them half of it or less, and no flag of PyTorch tells this for every CPU.
    """
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if supported else torch.float32
    if device.type != "cpu":
        return torch.float32
    times = {torch.float32: [], torch.bfloat16: []}
    for _ in range(20):
        for dtype, seconds in times.items():
            seconds.append(_seconds_of_product(dtype))
    return min(times, key=lambda dtype: min(times[dtype]))


def _seconds_of_product(dtype: torch.dtype) -> float:
    x, weight = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    start = time.perf_counter()
    F.linear(x, weight)
    return time.perf_counter() - start
