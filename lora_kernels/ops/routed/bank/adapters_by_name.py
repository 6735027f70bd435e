"""A bank's adapters as submodules, by names that may have dots in them."""

import re
from collections.abc import ItemsView, Iterator, KeysView

from torch import nn

from lora_kernels.ops.routed.bank.adapter import Adapter

# A name is its own key, but for dots, which separate the parts of a state dict's keys, and for what
# would be read as one. So nearly every name without dots is a key as it stands.
_IN_NAMES = re.compile(r"\.|%(?=25|2E)")
_IN_KEYS = re.compile(r"%25|%2E")


def key_of(name: str) -> str:
    """The key of an adapter in a state dict: ``a%2Eb`` for ``a.b``."""
    return _IN_NAMES.sub(lambda match: "%2E" if match[0] == "." else "%25", name)


def name_of(key: str) -> str:
    """The name that :func:`key_of` gives this key."""
    return _IN_KEYS.sub(lambda match: "." if match[0] == "%2E" else "%", key)


class AdaptersByName(nn.ModuleDict):
    """A ModuleDict whose names may have dots; its submodules are called ``key_of(name)``."""

    def accepts(self, name: str) -> bool:
        """Whether the name is free, and not one of the attributes that a ModuleDict has."""
        return bool(name) and not hasattr(self, key_of(name))

    def __getitem__(self, name: str) -> nn.Module:
        return self._modules[key_of(name)]

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self.add_module(key_of(name), module)

    def replace(self, name: str, module: nn.Module | None) -> None:
        """Set a name, or with None take it out, without changing what others may be looking at."""
        modules, key = dict(self._modules), key_of(name)
        modules.pop(key, None)
        if module is not None:
            modules[key] = module
        self.__dict__["_modules"] = modules

    def __delitem__(self, name: str) -> None:
        del self._modules[key_of(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and key_of(name) in self._modules

    def __iter__(self) -> Iterator[str]:
        return map(name_of, self._modules)

    def keys(self) -> KeysView[str]:
        return self._named().keys()

    def items(self) -> ItemsView[str, Adapter]:
        return self._named().items()

    def pop(self, name: str) -> nn.Module:
        return self._modules.pop(key_of(name))

    def _named(self) -> dict[str, Adapter]:
        own = self._modules.items()
        return {name_of(key): each for key, each in own if isinstance(each, Adapter)}
