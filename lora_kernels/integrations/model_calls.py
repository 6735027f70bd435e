"""What a model's own calls tell :class:`ActiveAdapters`: its forward, by hooks, how many rows and
tokens there are; its ``generate`` how many beams.

The hooks and the methods in front of ``generate`` ask for the choice at hand when they are called
and keep nothing of a call, so they may stay on a model and are copied with it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lora_kernels.nn.active_adapters import ActiveAdapters


def watch_calls(model: nn.Module, active: ActiveAdapters) -> None:
    """Let a model tell of its calls; once more changes nothing."""
    if _hook_on(model) is None:
        hook = _ForwardHook(active)
        hook.handles = [
            model.register_forward_pre_hook(hook.begin, prepend=True, with_kwargs=True),
            model.register_forward_hook(hook.end, always_call=True),
        ]
    for module in model.modules():
        if all(callable(getattr(type(module), name, None)) for name in _METHODS):
            for name, method in _METHODS.items():
                replaced = module.__dict__.get(name)
                if not isinstance(replaced, _Method):
                    module.__dict__[name] = method(module, name, active, replaced)


def unwatch_calls(model: nn.Module) -> None:
    """Undo :func:`watch_calls`."""
    if (hook := _hook_on(model)) is not None:
        for handle in hook.handles:
            handle.remove()
    for module in model.modules():
        for name in _METHODS:
            method = module.__dict__.get(name)
            if isinstance(method, _Method):
                del module.__dict__[name]
                if method.replaced is not None:
                    module.__dict__[name] = method.replaced


class _ForwardHook:
    def __init__(self, active: ActiveAdapters) -> None:
        self.active, self.handles = active, []

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        # Models of transformers take [batch, tokens], whatever their layers do with it.
        batch_first = hasattr(model, "main_input_name")
        self.active.begin_forward(args, kwargs, 0 if batch_first else self.active.batch_dim)

    def end(self, model: nn.Module, args: tuple, output: Any) -> None:
        self.active.end_forward(output)


def _hook_on(model: nn.Module) -> _ForwardHook | None:
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    return next((owner for owner in owners if isinstance(owner, _ForwardHook)), None)


class _Method:
    """Stands on an instance in front of a method of its class (or of what was on the instance).

    The module is referred to weakly: a model in a circle would keep its memory until the garbage
    collector comes by.
    """

    def __init__(
        self, module: nn.Module, name: str, active: ActiveAdapters, replaced: Callable | None
    ) -> None:
        self.module, self.name = weakref.ref(module), name
        self.active, self.replaced = active, replaced

    @property
    def __wrapped__(self) -> Callable:
        if self.replaced is not None:
            return self.replaced
        module = self.module()
        cls = type(module)
        return inspect.getattr_static(cls, self.name).__get__(module, cls)  # static in older ones

    def __reduce__(self) -> tuple:
        return type(self), (self.module(), self.name, self.active, self.replaced)


class _Generate(_Method):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.active.generation():
            return self.__wrapped__(*args, **kwargs)


class _Expand(_Method):
    def __call__(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        ids = model_kwargs.get("inputs_embeds") if input_ids is None else input_ids
        self.active.expand(None if ids is None else ids.shape[0], expand_size)
        return self.__wrapped__(expand_size, is_encoder_decoder, input_ids, **model_kwargs)


_METHODS = {"generate": _Generate, "_expand_inputs_for_generation": _Expand}
