"""Modules of an adapter file by the names that another model has for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lora_kernels.files.adapters import AdapterFile
from lora_kernels.files.tensors import listed


class Renaming:
    """Names of modules in a model by those in a file.

    Args:
        prefixes: whole names of modules, which stand for what is inside of them too; "" stands for
            all modules. The longest that fits a name counts. None changes no name.

    Raises:
        TypeError: prefixes are no mapping of strings.
        ValueError: two modules of a file would have one name.
    """

    def __init__(self, prefixes: Mapping[str, str] | None) -> None:
        if not isinstance(prefixes, (Mapping, type(None))):
            raise TypeError(
                "rename: expected a mapping of modules' names in the file to those in the model, "
                f"got {type(prefixes).__name__}"
            )
        self._prefixes = dict(prefixes or {})
        for theirs, ours in self._prefixes.items():
            if not isinstance(theirs, str) or not isinstance(ours, str):
                raise TypeError(f"rename: expected names of modules, got {theirs!r}: {ours!r}")
        self._back: dict[str, str] = {}
        for theirs, ours in self._prefixes.items():
            if ours in self._back:
                raise ValueError(
                    f"rename: {self._back[ours]!r} and {theirs!r} would both be {ours!r}"
                )
            self._back[ours] = theirs

    def renamed(self, file: AdapterFile, where: str) -> AdapterFile:
        """The file with the model's names; its config keeps its own.

        Raises:
            ValueError: two modules would have one name, or no module has a name to be changed.
        """
        names = [*file.modules, *file.base_parameters]
        idle = [each for each in self._prefixes if not any(_inside(name, each) for name in names)]
        if idle:
            raise ValueError(
                f"rename: no module of {where} is inside of {', '.join(map(repr, idle))}; there "
                f"are {listed(sorted(file.modules))}"
            )
        return replace(
            file, modules=self._all(file.modules), base_parameters=self._all(file.base_parameters)
        )

    def origins(self, names: Iterable[str]) -> dict[str, str]:
        """``{name in the file: name in the model}`` of those of a model that a file can mean."""
        origins = [(_changed(name, self._back), name) for name in names]
        return {theirs: name for theirs, name in origins if self._name(theirs) == name}

    def _name(self, theirs: str) -> str:
        return _changed(theirs, self._prefixes)

    def _all(self, values: Mapping[str, Any]) -> dict[str, Any]:
        changed: dict[str, str] = {}
        for theirs in values:
            other = changed.setdefault(self._name(theirs), theirs)
            if other != theirs:
                raise ValueError(
                    f"rename: {other!r} and {theirs!r} would both be {self._name(theirs)!r}"
                )
        return {ours: values[theirs] for ours, theirs in changed.items()}


def _changed(name: str, prefixes: Mapping[str, str]) -> str:
    fitting = [prefix for prefix in prefixes if _inside(name, prefix)]
    if not fitting:
        return name
    prefix = max(fitting, key=len)
    rest = name[len(prefix) :].removeprefix(".") if prefix else name
    return ".".join(part for part in (prefixes[prefix], rest) if part)


def _inside(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")
