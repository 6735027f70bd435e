"""What was pickled before modules had other names loads, and computes what it computed."""

import copy
import importlib
import importlib.util
import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from old_pickles import MADE, call
from torch import nn

from lora_kernels import AdapterBank, AdapterSlots, LoRALinear, old_paths

FILE = Path(__file__).with_name("old_pickles_0.1.0.tar.xz")

# Classes that a pickle may name, by the modules that 0.1.0 had them in. Those in TRITON need it.
CLASSES = {
    "adapter_directory": "AdapterContent",
    "adapter_files": "AdapterFile ModuleAdapter",
    "adapter_patterns": "Allowance EndPatterns",
    "adapter_renaming": "Renaming",
    "bench.measure": "Clock Spread",
    "dispatch": "Choice",
    "integrations.model_calls": "_Expand _ForwardHook _Generate",
    "integrations.routed": "RoutedBatch RoutedModel",
    "launching": "DeviceLimits",
    "modules": "ActiveAdapters LoRAEmbedding LoRALinear RoutedLoRALinear",
    "modules.active_adapters": "ActiveAdapters",
    "modules.adapter_layer": "AdapterLayer Merge _put_back_original",
    "modules.base_parameters": "BaseParameters",
    "modules.batch_rows": "Forward NamedRows Runs",
    "modules.choice": "Batch Choice Generation Part Place",
    "modules.lora_embedding": "LoRAEmbedding",
    "modules.lora_linear": "LoRALinear",
    "modules.merging": "Merge",
    "modules.part_reset": "PartReset",
    "modules.routed_linear": "RoutedLoRALinear",
    "ops.lora_linear": "lora_linear",
    "ops.lora_weight_norm": "lora_weight_norm",
    "ops.routed_lora": "AdapterBank AdapterSlots Routing routed_lora routed_lora_linear",
    "ops.routed_lora.adapter": "Adapter",
    "ops.routed_lora.adapters_by_name": "AdaptersByName",
    "ops.routed_lora.bank": "Adapter AdapterBank _rebind",
    "ops.routed_lora.loose": "LooseAdapter",
    "ops.routed_lora.operands": "BankTensors GradientLayout RoutingTensors Trained",
    "ops.routed_lora.regions": "Arena FactorShapes",
    "ops.routed_lora.routing": "Routing",
    "ops.routed_lora.slots": "AdapterSlots ModelVersion Pinned",
    "ops.routed_lora.tables": "SlotTables",
    "ops.routed_lora.versions": "BankVersion Bound Entry Part Reserved",
}
TRITON = {
    "ops.lora_linear.operands": "Dropout",
    "ops.lora_linear.tiles": "Cell GemmTile RankGradientTile ShrinkTile",
    "ops.routed_lora.grids": "Launches Tail",
    "ops.routed_lora.tiles": "Cell ExpandTile GemmTile GradientTile ShrinkTile",
}
PEFT = {
    "integrations.peft": "AccelerationReport accelerate",
    "integrations.peft_layers": "Linear",
    "integrations.peft_state": "ActiveAdapter LayerState MixedState",
}


def kept_by_old_package(name: str):
    with tarfile.open(FILE) as archive:
        content = archive.extractfile(name).read()
    if name.endswith(".pickle"):
        return pickle.loads(content)
    return torch.load(io.BytesIO(content), weights_only=False)


@pytest.mark.parametrize("name", [f"{name}.{kind}" for name in MADE for kind in ("pickle", "pt")])
def test_loads_and_computes_the_same(name):
    if name.startswith("peft"):
        pytest.importorskip("peft")
    made, arguments, result = kept_by_old_package(name)
    torch.testing.assert_close(call(made, arguments), result)
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(call(again, arguments), call(made, arguments))
    assert torch.equal(call(copy.deepcopy(made), arguments), call(made, arguments))


@pytest.mark.parametrize("name", ["linear", "linear_dora", "embedding", "routed_linear", "bank"])
def test_trains(name):
    made, arguments, _ = kept_by_old_package(f"{name}.pickle")
    call(made, arguments).square().sum().backward()
    module = made[0] if isinstance(made, tuple) else made
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad.abs().sum() > 0 for parameter in trained)


def test_an_old_layer_goes_on_as_a_new_one():
    """Merged before, unmerged now; filled before, added to and filled again now."""
    merged, (x,), result = kept_by_old_package("linear_merged.pickle")
    assert merged.merged
    merged.unmerge()
    torch.testing.assert_close(merged(x), result)
    (bank, routing), (x,), _ = kept_by_old_package("bank.pickle")
    assert list(bank) == ["a", "b.c"] and routing.capacity == bank.slots.capacity
    bank.add("new", torch.zeros(2, 6), torch.zeros(5, 2), 1.0)
    routing.set_weighted_([[2, -1], [2, -1]], [[1.0, 1.0], [1.0, 1.0]])
    assert torch.equal(call((bank, routing), (x,)), torch.zeros(2, 5))


def test_nothing_of_an_old_name_is_in_a_new_pickle():
    made, *_ = kept_by_old_package("routed_linear.pickle")
    content = pickle.dumps(made)
    assert not any(old.encode() in content for old in ("lora_kernels.modules", "routed_lora."))
    assert b"RoutingTensors" not in content  # a routing keeps them for its calls


def renamed(content: bytes, names: dict[str, str]) -> bytes:
    """A pickle of protocol 2 with other names: ``c module \\n name \\n`` is a global there."""
    for new, old in names.items():
        old_global, new_global = (
            "c{}\n{}\n".format(*path.rsplit(".", 1)).encode() for path in (old, new)
        )
        assert new_global in content, new
        content = content.replace(new_global, old_global)
    return content


P = "lora_kernels."
OF_A_LAYER = {
    f"{P}nn.lora_linear.LoRALinear": f"{P}modules.lora_linear.LoRALinear",
    f"{P}nn.adapter_layer._put_back_original": f"{P}modules.adapter_layer._put_back_original",
    f"{P}nn.part_reset.PartReset": f"{P}modules.part_reset.PartReset",
}


def test_a_layer_under_its_old_name():
    layer = LoRALinear(4, 3, rank=2, alpha=2)
    old = pickle.loads(renamed(pickle.dumps(layer, protocol=2), OF_A_LAYER))
    assert type(old) is LoRALinear
    x = torch.randn(2, 4)
    assert torch.equal(old(x), layer(x))
    old.reset_parameters()


def test_a_bank_under_its_old_name():
    bank = AdapterBank(4, 3, slots=AdapterSlots())
    bank.add("a", torch.randn(2, 4), torch.randn(3, 2), 0.5)
    names = {
        f"{P}ops.routed.bank.bank.AdapterBank": f"{P}ops.routed_lora.bank.AdapterBank",
        f"{P}ops.routed.bank.bank._rebind": f"{P}ops.routed_lora.bank._rebind",
        f"{P}ops.routed.bank.adapter.Adapter": f"{P}ops.routed_lora.bank.Adapter",
        f"{P}ops.routed.bank.slots.AdapterSlots": f"{P}ops.routed_lora.slots.AdapterSlots",
    }
    old = pickle.loads(renamed(pickle.dumps(bank, protocol=2), names))
    assert type(old) is AdapterBank and torch.equal(old["a"].lora_a, bank["a"].lora_a)


def test_a_class_that_has_another_name_now():
    from lora_kernels.adapters.factors import LoRAFactors

    factors = LoRAFactors(torch.ones(1, 2), torch.ones(2, 1), 0.5)
    names = {f"{P}adapters.factors.LoRAFactors": f"{P}ops.routed_lora.loose.LooseAdapter"}
    old = pickle.loads(renamed(pickle.dumps(factors, protocol=2), names))
    assert type(old) is LoRAFactors and old.scaling == 0.5


@pytest.mark.parametrize("old", [*CLASSES, *TRITON, *PEFT])
def test_every_class_has_its_old_name(old):
    if old in TRITON:
        pytest.importorskip("triton")
    if old in PEFT:
        pytest.importorskip("peft")
    module = importlib.import_module(f"lora_kernels.{old}")
    for name in ({**CLASSES, **TRITON, **PEFT})[old].split():
        assert callable(getattr(module, name)), name


@pytest.mark.parametrize("new", sorted(set(old_paths._MOVED.values())))
def test_a_new_module_is_there(new):
    if "triton" in new:
        pytest.importorskip("triton")
    assert importlib.util.find_spec(f"lora_kernels.{new}") is not None


def test_an_old_name_is_no_second_spelling():
    """It hands on what it is asked for: a function that is replaced is replaced for both."""
    old = importlib.import_module("lora_kernels.modules.lora_linear")
    new = importlib.import_module("lora_kernels.nn.lora_linear")
    assert old is not new and old.LoRALinear is new.LoRALinear
    with pytest.raises(AttributeError, match=r"which is lora_kernels\.nn\.lora_linear now, has no"):
        old.LoRALiner  # noqa: B018
    assert not hasattr(old, "__file__")  # or inspect would take it for the other


@pytest.mark.parametrize(
    "name", ["modules.lora_liner", "modules.lora_linear.lora_linear", "ops.routed_lora.space", "op"]
)
def test_what_never_was_is_not_found(name):
    with pytest.raises(ModuleNotFoundError, match=name):
        importlib.import_module(f"lora_kernels.{name}")


def test_nothing_is_imported_before_an_old_name_is_asked_for():
    program = """
import sys, torch, lora_kernels
names = [name for name in sys.modules if name.startswith("lora_kernels.")]
print([n for n in names if n.split(".")[1] in ("modules", "kernels", "dispatch", "native")])
import lora_kernels.integrations.peft_layers as layers
print("peft" in sys.modules)
layers.Linear
print("peft" in sys.modules)
"""
    pytest.importorskip("peft")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split() == ["[]", "False", "True"], result.stderr


def test_a_pickle_alone_finds_them():
    """Whoever loads it has not imported the package."""
    content = renamed(pickle.dumps(nn.Sequential(LoRALinear(2, 2, 1, 1)), protocol=2), OF_A_LAYER)
    program = f"import pickle; print(type(pickle.loads({content!r})[0]).__name__)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "LoRALinear", result.stderr
