"""Whether a module may be left out: its weights used, and the module itself not called.

Asked at every call, because all of it changes between two: hooks, a forward set on the instance
(accelerate's offloading), another class (torchao's quantisation-aware training, parametrizations),
another kind of weight. So attributes come from the modules' own dictionaries:
`nn.Module.__getattr__` would cost ten times as much.
"""

from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_compiling
from torch.nn import Linear
from torch.nn.modules import module as nn_module

from lora_kernels.runtime.eager import PLAIN

COMPUTED = object()
# Of all modules: any(GLOBAL_HOOKS) says whether there are any.
GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)
OWN_FORWARD = "a forward or a hook of its own (accelerate's offload or device map)"


def bypassed(*modules: nn.Module) -> str | None:
    """What would be left out if the modules' weights were used without calling the modules."""
    for module in modules:
        if is_compiling() and not isinstance(module.forward, MethodType):
            # Reading the attribute guards the graph against a forward that is set later; looking it
            # up in the dictionary, which costs less, does not.
            return OWN_FORWARD
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return "forward hooks"
        if own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return "backward hooks"
        if "forward" in own or "_hf_hook" in own:
            return OWN_FORWARD
    return None


def tensor_of(module: nn.Module, name: str) -> Any:
    """The tensor under that name, without running code: ``COMPUTED`` for a parametrization's.

    FSDP and DataParallel put plain tensors where parameters were.
    """
    if name in module._parameters:
        return module._parameters[name]
    return module.__dict__.get(name, COMPUTED)


def parameter_of(module: nn.Module, name: str) -> Any:
    """``module.<name>``, where it is a plain parameter at a tenth of the cost."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def is_plain_linear(base: nn.Module) -> bool:
    """Whether ``base(x)`` is ``F.linear`` of its plain parameters and nothing else."""
    if type(base) is not Linear and type(base).forward is not Linear.forward:
        return False
    if bypassed(base) or any(GLOBAL_HOOKS):
        return False
    return _is_plain(tensor_of(base, "weight")) and _is_plain(tensor_of(base, "bias"))


def is_plain_embedding(base: nn.Module) -> bool:
    """Whether ``base(x)`` looks up the indices x and nothing else."""
    if type(base).forward is not nn.Embedding.forward or any(GLOBAL_HOOKS):
        return False
    return bypassed(base) is None


def called(base: nn.Module, x: Tensor, features: int) -> Tensor:
    """``base(x)``, which has to be one tensor ``[..., features]``."""
    y = base(x)
    if not isinstance(y, Tensor) or y.ndim == 0 or y.shape[-1] != features:
        came = list(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(
            f"base_layer: expected a tensor [..., {features}] from its forward, got {came}"
        )
    return y


def check_factor(name: str, module: Linear) -> None:
    """Raise where lora_A or lora_B would have to be called: the fused forward reads its weight."""
    if type(module) is not Linear and type(module).forward is not Linear.forward:
        raise ValueError(
            f"{name}: {type(module).__name__} has a forward of its own, which the fused forward "
            "would not run; leave lora_A and lora_B as they are"
        )
    check_not_bypassed(name, module)


def check_not_bypassed(name: str, module: nn.Module) -> None:
    """Raise where the module would have to be called to do what is attached to it."""
    reason = bypassed(module)
    if reason is None:
        return
    if reason is OWN_FORWARD:
        raise ValueError(
            f"{name}: it has {OWN_FORWARD}, which the fused forward would not run; remove it, or "
            "put it on the LoRA layer as a whole (accelerate: preload_module_classes)"
        )
    raise ValueError(
        f"{name}: it has hooks, which the fused forward would not run; remove them, or put them on "
        "the LoRA layer"
    )


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in PLAIN or tensor is None or isinstance(tensor, _TORCHS_OWN)


_TORCHS_OWN = (FakeTensor, FunctionalTensor)
