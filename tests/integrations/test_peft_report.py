"""What `accelerate` says and refuses, and what importing and calling it costs."""

import copy
import gc
import subprocess
import sys
import time

import peft
import pytest
import torch
from peft_models import accelerated, build, inputs, lora_config, lora_layers
from torch import nn

import lora_kernels
from lora_kernels.integrations.peft import acceleration as integration
from lora_kernels.integrations.peft import layers as peft_layers
from lora_kernels.integrations.peft.state import read_call, read_ordinary
from lora_kernels.ops.linear import adapted_linear
from lora_kernels.runtime import dispatch
from lora_kernels.runtime.machine_files import kind_of

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Already unmerged")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.v_proj(self.q_proj(x))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_table():
    config = lora_config(target_modules=["q_proj", "v_proj", "embed"])
    model = peft.get_peft_model(Blocks().bfloat16(), config)
    model.base_model.model.layers[1].v_proj.base_layer.weight.requires_grad_(True)
    report = lora_kernels.accelerate(model)
    model(torch.zeros(2, 3, dtype=torch.int64))
    lines, cpu = str(report.refresh()).splitlines(), torch.device("cpu")
    choice = dispatch.choose("auto", cpu, torch.bfloat16)
    assert lines == [
        f"5 of 7 LoRA layers take the fused forward (PEFT {peft.__version__})",
        "",
        "layers  module                            forward",
        "     3  base_model.model.layers.*.q_proj  fused",
        "     2  base_model.model.layers.*.v_proj  fused",
        "     1  base_model.model.embed            "
        "PEFT: peft.tuners.lora.layer.Embedding is not PEFT's lora.Linear",
        "     1  base_model.model.layers.*.v_proj  PEFT: base weight requires grad",
        "note on 5 of them: float32 adapters over a bfloat16 base: computed in bfloat16, "
        "as PEFT does under autocast",
        "calls that PEFT's forward has served: 1: base weight requires grad",
        f"kernels on {kind_of(cpu)}:",
        f"  bfloat16: {choice.backend}: {choice.reason}",
        "  nothing is measured: lora_kernels.tune(model) measures its shapes",
    ]
    assert repr(report) == "AccelerationReport(5 fast, 2 delegated)"


def test_refresh_sees_what_changed():
    model = build(lora_config())
    report = lora_kernels.accelerate(model)
    assert report.notes == {}
    model.bfloat16()
    up = model.base_model.model.up
    up.lora_A.float()
    handle = up.lora_B["one"].register_forward_hook(lambda m, args, y: None)
    assert len(report.fast) == 3
    assert report.refresh() is report
    assert report.delegated == {"base_model.model.up": "lora_B of 'one' has forward hooks"}
    handle.remove()
    report.refresh()
    assert list(report.notes) == ["base_model.model.up"]


def test_disabled_merged_and_inactive_layers_count_as_fast():
    model = build(lora_config(), lora_config(target_modules=["up"]))
    report = lora_kernels.accelerate(model)
    for change in (
        lambda: model.set_adapter("two"),
        lambda: model.merge_adapter(),
        lambda: model.unmerge_adapter(),
        lambda: model.base_model.disable_adapter_layers(),
    ):
        change()
        model(inputs(2))
        assert len(report.refresh().fast) == 3
        assert report.delegated == report.delegated_calls == {}


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(2, 2), ValueError, "expected a model with LoRA layers.*got Linear without one$"),
        ("model", TypeError, "expected a torch.nn.Module, got str"),
    ],
    ids=["no LoRA", "no module"],
)
def test_bad_models(model, error, message):
    with pytest.raises(error, match=message):
        lora_kernels.accelerate(model)


def test_other_peft_methods_are_named():
    config = peft.IA3Config(target_modules=["up"], feedforward_modules=[])
    model = peft.get_peft_model(build(lora_config()).unload(), config)
    with pytest.raises(ValueError, match=r"other PEFT methods: peft.tuners.ia3.layer.Linear"):
        lora_kernels.accelerate(model)


def test_one_layer_alone():
    layer = next(iter(lora_layers(build(lora_config())).values()))
    report = lora_kernels.accelerate(layer)
    assert report.fast == [""]


def test_the_report_does_not_keep_the_model():
    model = build(lora_config())
    report = lora_kernels.accelerate(model)
    before = str(report)
    del model
    gc.collect()
    assert str(report) == before
    for method in (report.undo, report.refresh):
        with pytest.raises(RuntimeError, match="no longer exists"):
            method()


def test_nothing_is_left_of_layers_that_are_gone():
    from lora_kernels.integrations.peft.layers import _delegated_calls

    gc.collect()
    before = len(_delegated_calls)
    model = accelerated(build(lora_config()))
    with torch.no_grad():
        model.base_model.model.up(inputs(2).detach().to_sparse())
    assert len(_delegated_calls) == before + 1
    assert len(lora_kernels.accelerate(copy.deepcopy(model)).delegated_calls) == 0
    del model
    gc.collect()
    assert len(_delegated_calls) == before


def test_undo_forgets_the_calls():
    model = build(lora_config())
    report = lora_kernels.accelerate(model)
    with torch.no_grad():
        model.base_model.model.up(inputs(2).detach().to_sparse())
    assert report.refresh().delegated_calls
    report.undo()
    assert lora_kernels.accelerate(model).delegated_calls == {}


@pytest.mark.parametrize(
    ("configs", "operations"),
    [
        ([lora_config()], 1),
        ([lora_config(lora_dropout=0.5)], 1),
        ([lora_config(use_dora=True)], 1),
        ([lora_config(), lora_config(r=5), lora_config()], 1),
        ([lora_config(lora_dropout=0.5), lora_config(r=5), lora_config()], 2),
        ([lora_config(lora_dropout=0.5), lora_config(), lora_config(lora_dropout=0.1)], 3),
        ([lora_config(use_dora=True), lora_config(r=5), lora_config()], 2),
    ],
    ids=["one", "dropout", "dora", "three", "dropout first", "two dropouts", "dora first"],
)
def test_adapters_are_joined_where_they_can_be(monkeypatch, configs, operations):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return adapted_linear(*args, **kwargs)

    monkeypatch.setattr(peft_layers, "adapted_linear", counted)
    monkeypatch.setattr(peft_layers, "read_ordinary", lambda layer: None)
    accelerated(build(*configs)).base_model.model.up(inputs(3))
    assert len(calls) == operations
    assert calls[0][1] is not None  # the first has the base layer's weight


def test_untested_peft_versions_are_named(monkeypatch):
    model = build(lora_config())
    monkeypatch.setattr(peft, "__version__", "0.99.1")
    assert "(PEFT 0.99.1, tested with 0.21)" in str(lora_kernels.accelerate(model))


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        integration.accelerate(nn.Linear(2, 2))


def test_importing_the_package_does_not_import_peft():
    code = (
        "import sys, lora_kernels, lora_kernels.integrations.peft\n"
        "assert callable(lora_kernels.accelerate)\n"
        "assert not {'peft', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_reading_a_layer_is_cheap():
    """Far below what the four module calls of PEFT's forward cost, however loaded the machine."""
    fast = accelerated(build(lora_config(lora_dropout=0.5)))
    layer, plain = fast.base_model.model.up, build(lora_config()).base_model.model.up
    x = inputs(1)

    def best(function, repetitions: int = 200) -> float:
        times = []
        for _ in range(repetitions):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(lambda: read_call(layer, x, (), {})) < 0.5 * best(lambda: plain(x))
    assert best(lambda: read_ordinary(layer)) < 0.4 * best(lambda: plain(x))
