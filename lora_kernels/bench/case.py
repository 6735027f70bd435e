"""What is measured: a dataclass of sizes and dtypes for each kind of benchmark."""

from dataclasses import asdict, dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Typed:
    """A case whose ``dtype`` is a name in ``DTYPES``."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class OpCase(Typed):
    m: int
    k: int
    n: int
    dtype: str = "bf16"
    dropout: float = 0.0
    rank: int = 16
    alpha: float = 32
    device: str = "cpu"

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def title(self) -> str:
        return (
            f"lora_linear: M {self.m}, K {self.k}, N {self.n}, r {self.rank}, {self.dtype}, "
            f"dropout {self.dropout:g}"
        )

    def argv(self) -> list[str]:
        """The command line that asks for this case again."""
        values = asdict(self)
        shape = "x".join(str(values.pop(dim)) for dim in ("m", "k", "n"))
        return ["op", f"--shapes={shape}", *(f"--{name}={value}" for name, value in values.items())]


@dataclass(frozen=True)
class StepCase(Typed):
    dtype: str = "bf16"
    dropout: float = 0.0
    rank: int = 16
    alpha: float = 32
    batch: int = 2
    length: int = 256
    layers: int = 30
    hidden: int = 576
    heads: int = 9
    kv_heads: int = 3
    intermediate: int = 1536
    vocab: int = 49152
    device: str = "cpu"

    @property
    def title(self) -> str:
        return (
            f"training step: {self.layers} layers of {self.hidden}, {self.batch}x{self.length} "
            f"tokens, r {self.rank}, {self.dtype}, dropout {self.dropout:g}"
        )

    def argv(self) -> list[str]:
        """The command line that asks for this case again."""
        values = asdict(self)
        tokens = f"{values.pop('batch')}x{values.pop('length')}"
        options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
        return ["step", f"--tokens={tokens}", *options]


@dataclass(frozen=True)
class LayerCase(Typed):
    batch: int = 4
    length: int = 2048
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 14336
    dtype: str = "bf16"
    dropout: float = 0.0
    rank: int = 16
    alpha: float = 32
    device: str = "cuda"

    @property
    def title(self) -> str:
        return (
            f"decoder layer: hidden {self.hidden}, {self.batch}x{self.length} tokens, "
            f"r {self.rank}, {self.dtype}, dropout {self.dropout:g}"
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """name -> (out_features, in_features)"""
        head = self.hidden // self.heads
        return {
            "q": (self.heads * head, self.hidden),
            "k": (self.kv_heads * head, self.hidden),
            "v": (self.kv_heads * head, self.hidden),
            "o": (self.hidden, self.heads * head),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


@dataclass(frozen=True)
class RoutedCase(Typed):
    """sequences x tokens rows; sequence i uses adapter i mod adapters, whose ranks are ``ranks``,
    over and over. slices: out_features of each, side by side."""

    sequences: int = 64
    tokens: int = 1
    k: int = 2048
    slices: tuple[int, ...] = (2048,)
    adapters: int = 16
    ranks: tuple[int, ...] = (8, 16, 24, 32, 40, 48, 56, 64)
    dtype: str = "bf16"
    adapter_dtype: str = ""  # as dtype
    train: bool = False
    base: bool = True  # False: the adapters alone, without the frozen layer
    device: str = "cpu"

    @property
    def torch_adapter_dtype(self) -> torch.dtype:
        return DTYPES[self.adapter_dtype or self.dtype]

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens

    @property
    def n(self) -> int:
        return sum(self.slices)

    def rank_of(self, adapter: int) -> int:
        return self.ranks[adapter % len(self.ranks)]

    @property
    def adapter_of_row(self) -> list[int]:
        return [i % self.adapters for i in range(self.sequences) for _ in range(self.tokens)]

    @property
    def title(self) -> str:
        what = "training" if self.train else "inference"
        ranks = sorted(set(self.ranks))
        spread = f"r {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"r {ranks[0]}"
        out = "+".join(map(str, self.slices))
        adapters = f"{self.adapters} {self.adapter_dtype or self.dtype} adapters of {spread}"
        alone = "" if self.base else ", without the base layer"
        return (
            f"routed, {what}: {self.sequences}x{self.tokens} tokens, {adapters}, "
            f"{self.k} to {out}, {self.dtype}{alone}"
        )


@dataclass(frozen=True)
class KernelCase(Typed):
    what: str  # "decode", "y" or "dx"
    m: int
    k: int
    n: int
    rank: int
    dropout: float = 0.0  # dx only
    dtype: str = "bf16"
    device: str = "cuda"

    @property
    def title(self) -> str:
        what = {"decode": "decoding", "y": "the GEMM of y", "dx": "the GEMM of dx"}[self.what]
        drops = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{what}: M {self.m}, K {self.k}, N {self.n}, r {self.rank}, {self.dtype}{drops}"
