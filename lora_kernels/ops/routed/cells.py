"""What a table of measured choices knows a call of ``routed_lora`` by: functions of sizes alone."""

from typing import NamedTuple

import torch

from lora_kernels.runtime.device_limits import next_power_of_two
from lora_kernels.runtime.dtypes import short_name

DIRECTIONS = ("forward", "training")


class TableCell(NamedTuple):
    """One backend serves a call and its backward, so that ``training`` is the time of both."""

    direction: str  # "forward": without gradients; "training": forward and backward
    dtype: torch.dtype  # of x
    tokens: int  # M
    in_features: int  # K
    out_features: int  # N of all slices
    rank: int  # of the widest adapter, over its slices
    adapters: int  # in the bank
    dropout: bool

    @property
    def key(self) -> str:
        """M, R and the number of adapters are rounded up to powers of two."""
        tokens, rank, adapters = map(next_power_of_two, (self.tokens, self.rank, self.adapters))
        return (
            f"{self.direction}/{short_name(self.dtype)}/M{tokens}/K{self.in_features}"
            f"/N{self.out_features}/R{rank}/A{adapters}/p{int(self.dropout)}"
        )
