"""Parameters that are sharded (DTensor), for what has to see them whole: merging, initial values.

Every process of the mesh takes part in what is done here. FSDP swaps its shards for whole tensors
around a forward: only what is written to the shards outlives it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from lora_kernels.runtime.eager import PLAIN

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor."""
    if type(tensor) in PLAIN or "torch.distributed.tensor" not in sys.modules:
        return False
    return isinstance(tensor, sys.modules["torch.distributed.tensor"].DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what a DTensor stands for, gathered."""
    if type(tensor) in PLAIN:
        return tensor
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def write(parameter: Tensor, values: Tensor) -> None:
    """Copy values, the same in every process, into a parameter or into its shards."""
    parameter.copy_(sharded_like(parameter, values) if is_sharded(parameter) else values)


@torch.no_grad()
def draw(parameter: Tensor, draw_: Callable[[Tensor], object]) -> None:
    """Let ``draw_`` fill a parameter; a sharded one with what the mesh's first process draws."""
    if not is_sharded(parameter) or parameter.is_meta:
        draw_(parameter)
        return
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.to_local().device)
    draw_(values)
    parameter.copy_(sharded_like(parameter, values, source=0))


def sharded_like(parameter: DTensor, values: Tensor, source: int | None = None) -> Tensor:
    """Values as a DTensor of the parameter's mesh, placements and dtype.

    ``source`` is the process whose values count; None where all have the same.
    """
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        values.to(parameter.dtype),
        parameter.device_mesh,
        parameter.placements,
        src_data_rank=source,
    )


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP holds the module's parameters, and puts others in their place and back."""
    return module.__dict__.get("_is_fsdp_managed_module", False)


def put_shards_back(layer: nn.Module) -> None:
    """Make FSDP give up what it has gathered of a layer: it keeps a model's root whole.

    Raises:
        RuntimeError: it does not, inside of a forward.
    """
    if not any(is_managed(module) for module in layer.modules()):
        return
    from torch.distributed import _composable_state
    from torch.distributed.fsdp import FSDPModule

    for module in list(_composable_state._module_state_mapping):
        if isinstance(module, FSDPModule) and any(
            each is layer or each in layer._modules.values() for each in module.modules()
        ):
            module.reshard()
            state = module._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                if group is not None and not group.is_sharded:
                    raise RuntimeError(
                        "FSDP is in the middle of a forward, or was interrupted in one, and does "
                        "not take back what it has gathered of the layer"
                    )
