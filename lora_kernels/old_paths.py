"""The modules of 0.1.0 and before by their old names, for what was pickled with them.

A pickle, and so what ``torch.save`` writes of a whole module, names a class by its module. A module
that is imported by an old name has the attributes of the one that took its place; neither is
imported before somebody asks for it. New code imports the new one.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_PACKAGE = __name__.rpartition(".")[0]

# What became of a module; of a package, also of the modules in it that are not listed themselves.
_MOVED = {
    "adapter_config": "files.config",
    "adapter_directory": "files.directory",
    "adapter_files": "files.adapters",
    "adapter_patterns": "files.patterns",
    "adapter_renaming": "files.renaming",
    "adapter_tensors": "files.tensors",
    "bench": "measuring",
    "bench.machine": "measuring.machine",
    "bench.measure": "measuring.timing",
    "explanation": "ops",
    "initial_values": "adapters.initial_values",
    "integrations.peft_layers": "integrations.peft.layers",
    "integrations.peft_state": "integrations.peft.state",
    "kernels": "ops.narrow.triton",
    "launching": "runtime.device_limits",
    "modules": "nn",
    "modules.choice": "nn.batch_choice",
    "native": "runtime.cpu_extension",
    "native_cuda": "runtime.cuda_extension",
    "nn.choice": "nn.batch_choice",
    "ops.lora_linear": "ops.linear",
    "ops.lora_linear.autograd": "ops.linear.op",
    "ops.linear.tuned": "ops.linear.choice",
    "ops.lora_linear.compiled": "ops.linear.cpu",
    "ops.lora_linear.measured": "ops.linear.choice",
    "ops.lora_weight_norm": "ops.norm",
    "ops.routed_lora": "ops.routed",
    "ops.routed_lora.autograd": "ops.routed.op",
    "ops.routed_lora.capture": "runtime.capture",
    "ops.routed_lora.compiled": "ops.routed.cpu",
    "ops.routed_lora.grids": "ops.routed.triton.launch",
    "ops.routed_lora.launch": "ops.routed.triton",
    "ops.routed_lora.loose": "ops.routed.unpacked",
    "ops.routed_lora.operands": "ops.routed.tensors",
    "ops.routed_lora.regions": "ops.routed.bank.storage",
    "ops.second_order": "ops.narrow.second_order",
    "ops.wrappers": "runtime.checks",
    "products": "ops.narrow.products",
}
# Modules that have kept their last name: where they were, where they are, and which.
for _old, _new, _names in (
    ("", "runtime.", "dispatch dropout dtypes"),
    ("ops.", "runtime.", "eager scaling tensor_state"),
    ("ops.lora_linear.", "ops.linear.triton.", "gemm kernels launch operands tiles"),
    (
        "ops.routed_lora.",
        "ops.routed.bank.",
        "adapter adapters_by_name bank layouts slots tables versions",
    ),
    (
        "ops.routed_lora.",
        "ops.routed.triton.",
        "expand_kernels gemm_kernels gradient_kernels kernels tiles",
    ),
):
    _MOVED |= {f"{_old}{name}": f"{_new}{name}" for name in _names.split()}
_PACKAGES = {name for name in _MOVED if any(other.startswith(f"{name}.") for other in _MOVED)}
_PACKAGES |= {"kernels", "modules", "ops.lora_weight_norm"}

# Classes that have another name now, by their old modules.
_RENAMED = {
    "ops.lora_linear.tiles": {"Cell": "LinearCell"},
    "ops.routed_lora.grids": {"Launches": "RoutedLaunch"},
    "ops.routed_lora.loose": {"LooseAdapter": "LoRAFactors"},
    "ops.routed_lora.operands": {"Trained": "TrainableFactors"},
    "ops.routed_lora.tiles": {"Cell": "RoutedCell"},
}


class OldPaths(Loader):
    """Finds modules by their old names, and loads them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = _new_name(name)
        if new is None or find_spec(new) is None:
            return None
        is_package = name.removeprefix(f"{_PACKAGE}.") in _PACKAGES
        return ModuleSpec(name, self, is_package=is_package)

    def create_module(self, spec: ModuleSpec) -> None:
        """Returns None, for which Python makes an ordinary module."""

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, _new_name(module.__name__)
        assert new is not None, "find_spec knows only old names"
        renamed = _RENAMED.get(old.removeprefix(f"{_PACKAGE}."), {})

        def attribute(name: str):
            if not name.startswith("__"):  # what tells of a module is its own
                try:
                    return getattr(import_module(new), renamed.get(name, name))
                except AttributeError:
                    pass
            raise AttributeError(f"module {old!r}, which is {new} now, has no attribute {name!r}")

        module.__doc__ = f"{new}, by its old name."
        module.__getattr__ = attribute


def _new_name(name: str) -> str | None:
    """The module that took the place of ``lora_kernels.<old>``; None where that is no old name."""
    package, _, old = name.partition(".")
    if package != _PACKAGE:
        return None
    if old in _MOVED:
        return f"{_PACKAGE}.{_MOVED[old]}"
    parent, _, last = old.rpartition(".")
    return f"{_PACKAGE}.{_MOVED[parent]}.{last}" if parent in _PACKAGES else None


def find_old_paths() -> None:
    """Let Python look for old names after all others; a second call changes nothing."""
    if not any(isinstance(finder, OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(OldPaths())
