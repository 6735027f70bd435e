"""``tune`` and its command: what is measured, kept, left and said. Most children are made up."""

import json
import re
import sys
import time

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import LoRALinear, RoutedLoRALinear
from lora_kernels.__main__ import main
from lora_kernels.measuring import cells, child, machine, tuning
from lora_kernels.measuring.child import case_of
from lora_kernels.measuring.command import model_of
from lora_kernels.measuring.linear_call import LinearCase
from lora_kernels.measuring.routed_call import RoutedCase
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime import machine_files, tables
from lora_kernels.runtime.machine_files import kind_of

CPU = torch.device("cpu")
KIND = kind_of(CPU)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Choices of this test alone."""
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    tables.forget()
    yield tmp_path / "cache"
    tables.forget()


def model():
    return nn.Sequential(
        LoRALinear(16, 24, rank=4, alpha=8), LoRALinear(16, 24, rank=4, alpha=8),
        LoRALinear(24, 16, rank=4, alpha=8), RoutedLoRALinear(16, 8),
    )  # fmt: skip


def cell(backend="native"):
    seconds = {"composed": 2e-3, "native": 1e-3}
    return {"backend": backend, "seconds": seconds, "spread": dict.fromkeys(seconds, 1e-5)}


class Children:
    """Stands for ``run_child``: every case takes a second of the clock, and ends as told by M."""

    def __init__(self, monkeypatch, **ends):
        self.ends, self.orders, self.now = ends, [], 0.0
        monkeypatch.setattr(tuning, "run_child", self)
        monkeypatch.setattr(tuning.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(tuning.time, "time", lambda: self.now)

    def __call__(self, module, arguments, seconds, hung):
        (order,) = map(json.loads, arguments)
        self.orders.append(order)
        for number, fields in enumerate(order["cases"]):
            if number and self.now > order["until"]:
                return
            yield {"begins": number}
            self.now += 1
            case = case_of(order["operation"], fields)
            end = self.ends.get(f"M{case.m}")
            if isinstance(end, dict):
                yield end
                return
            yield {"prepares": "native"}
            if end:
                yield {"dropped": "native is no candidate: AssertionError"}
            yield {"cells": {key: cell() for key in case.keys.values()}}

    @property
    def measured(self):
        return [(o["operation"], f["k"], f["m"]) for o in self.orders for f in o["cases"]]


def test_a_process_for_each_shape_and_the_costliest_first(monkeypatch, capsys):
    children = Children(monkeypatch)
    report = lora_kernels.tune(model(), tokens=(2, 16), progress=False)
    assert children.measured == [
        ("lora_linear", 16, 16), ("lora_linear", 16, 2),
        ("lora_linear", 24, 16), ("lora_linear", 24, 2),
        ("routed_lora", 16, 16), ("routed_lora", 16, 2),
    ]  # fmt: skip
    assert len(children.orders) == 3
    assert {order["threads"] for order in children.orders} == {torch.get_num_threads()}
    assert not report.left and not report.failed and capsys.readouterr().err == ""
    assert len(report.cells["lora_linear"]) == 8 and len(report.cells["routed_lora"]) == 4
    assert tables.cells_of("lora_linear", CPU) == report.cells["lora_linear"]
    assert report.file == tables.file_for(CPU) and report.file.is_file()
    text = str(report)
    row = r" +2 +lora_linear: M 16, K 16, N 24, r 4, fp32, dropout 0 +forward native \(2.00\), back"
    assert re.search(f"^{row}", text, re.MULTILINE), text
    assert "forward native (2.00), training native (2.00)" in text and "layers" in text
    assert str(report.file) in text and repr(report) == "TuneReport(12 cells, 0 left, 0 failed)"


def test_the_time_ends_and_the_next_run_goes_on(monkeypatch):
    children = Children(monkeypatch)
    report = lora_kernels.tune(model(), tokens=(2, 16), seconds=2.5, progress=False)
    assert len(children.orders) == 2 and len(report.left) == 3
    assert "3 calls are left" in str(report) and "not measured yet" in str(report)
    first = report.cells["lora_linear"]
    assert len(first) == 6
    report = lora_kernels.tune(model(), tokens=(2, 16), seconds=20, progress=False)
    assert not report.left and len(children.orders) == 4
    assert children.orders[2]["cases"][0]["m"] == 2 and len(children.orders[2]["cases"]) == 1
    assert first.items() <= report.cells["lora_linear"].items()
    lora_kernels.tune(model(), tokens=(2, 16), progress=False)
    assert len(children.orders) == 4, "everything is in the table"
    lora_kernels.tune(model(), tokens=16, again=True, progress=False)
    assert children.measured[-3:] == [
        ("lora_linear", 16, 16), ("lora_linear", 24, 16), ("routed_lora", 16, 16),
    ]  # fmt: skip


def test_where_no_file_can_be_written_choices_hold_for_the_process(monkeypatch, tmp_path):
    Children(monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(machine_files, "_of_this_process", {})
    report = lora_kernels.tune(nn.Linear(16, 24), tokens=2, progress=False)
    assert report.file is None and "no file can be written" in str(report)
    assert len(tables.cells_of("lora_linear", CPU)) == len(report.cells["lora_linear"]) == 2


def test_a_busy_machine_is_said(monkeypatch):
    Children(monkeypatch)
    monkeypatch.setattr(machine, "load", lambda: 2.5)
    assert "busy before (250 %)" in str(lora_kernels.tune(nn.Linear(16, 24), tokens=2))
    assert "busy before" not in str(lora_kernels.tune(nn.Linear(16, 24), tokens=2)), (
        "nothing was timed"
    )


def test_without_time_nothing_is_begun(monkeypatch):
    children = Children(monkeypatch)
    report = lora_kernels.tune(model(), tokens=2, seconds=0, progress=False)
    assert not children.orders and len(report.left) == 3 and report.file is None


@pytest.mark.parametrize(
    "end",
    [{"failed": "OutOfMemoryError: 3 GB"}, {"ended": "was killed by signal 11"}],
    ids=["raises", "dies"],
)
def test_a_failure_costs_its_call_alone(monkeypatch, end):
    children = Children(monkeypatch, M16=end)
    layer = LoRALinear(16, 24, rank=4, alpha=8)
    report = lora_kernels.tune(layer, tokens=(2, 16, 64), progress=False)
    (why,) = end.values()
    (title,) = report.failed
    assert "M 16," in title and why in report.failed[title] and why in str(report)
    assert len(children.orders) == 2 and len(report.cells["lora_linear"]) == 4
    assert not any("M16" in key for key in report.cells["lora_linear"])


def test_what_was_no_candidate_is_said(monkeypatch, capsys):
    Children(monkeypatch, M2=True)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    report = lora_kernels.tune(LoRALinear(16, 24, rank=4, alpha=8), tokens=2)
    assert "native is no candidate: AssertionError" in str(report)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[1/1] lora_linear: M 2, K 16, N 24, r 4, fp32, dropout 0"
    assert "native is no candidate" in lines[1]


CHILD = """
import json, os, signal, sys, time
order = json.loads(sys.argv[1])
keys = json.load(open(os.environ["KEYS_OF_CASES"]))
cell = {"backend": "composed", "seconds": {"composed": 1.0}, "spread": {"composed": 0.0}}
for number, case in enumerate(order["cases"]):
    print(json.dumps({"begins": number}), flush=True)
    if case["m"] == 16:
        END
    print(json.dumps({"cells": {key: cell for key in keys[str(case["m"])]}}), flush=True)
"""


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("time.sleep(60)", "the process did nothing for 1 s"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process was killed by signal 11"),
        ("sys.exit('CUDA error')", "the process ended with status 1: CUDA error"),
        ("sys.exit(0)", "the process ended and measured nothing"),
    ],
    ids=["hangs", "dies", "raises", "stops"],
)
def test_of_a_real_process(end, said, tmp_path, monkeypatch):
    cases = [LinearCase(m, 16, 24, "fp32", 0.0, 4, 8) for m in (64, 16, 2)]
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({case.m: list(case.keys.values()) for case in cases}))
    (tmp_path / "made_up_child.py").write_text(CHILD.replace("END", end))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("KEYS_OF_CASES", str(keys))
    monkeypatch.setattr(tuning, "CHILD", "made_up_child")
    monkeypatch.setattr(tuning, "HUNG", 1.0)
    began = time.monotonic()
    layer = LoRALinear(16, 24, rank=4, alpha=8)
    report = lora_kernels.tune(layer, tokens=[2, 16, 64], progress=False)
    assert report.failed == {cases[1].title: said}
    assert not report.left and time.monotonic() - began < 15
    assert set(report.cells["lora_linear"]) == {*cases[0].keys.values(), *cases[2].keys.values()}


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"model": 3}, TypeError, "expected a torch.nn.Module, got int"),
        ({"model": nn.Conv1d(1, 1, 1)}, ValueError, "got a Conv1d without one"),
        ({"tokens": 0}, ValueError, "tokens"),
        ({"tokens": [2.5]}, TypeError, "tokens"),
        ({"rank": 0}, ValueError, "rank"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"dtype": torch.float64}, TypeError, "dtype"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors(arguments, error, said):
    with pytest.raises(error, match=said):
        lora_kernels.tune(**{"model": nn.Linear(4, 4)} | arguments)


# ---- what is shipped, and the command


def test_what_is_exported_is_what_is_shipped(monkeypatch, tmp_path):
    """`tiles.shipped_cells` reads it, by the device's name."""
    Children(monkeypatch)
    report = lora_kernels.tune(model(), tokens=2, progress=False)
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H200")
    assert tuning.export(CPU, tmp_path) == [
        tmp_path / "NVIDIA_H200" / f"{name}.json" for name in ("lora_linear", "routed_lora")
    ]
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    assert tiles.shipped_cells.__wrapped__("NVIDIA H200") == report.cells["lora_linear"]
    content = json.loads((tmp_path / "NVIDIA_H200" / "routed_lora.json").read_text())
    assert content["cells"] == report.cells["routed_lora"]
    assert content["measured_with"]["torch"] == torch.__version__
    assert content["measured_with"]["device"] == "NVIDIA H200"
    assert not list(tmp_path.rglob("*.tmp"))


def adapter_directory(tmp_path, **changes):
    pytest.importorskip("peft")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 80, "vocab_size": 50,
        "num_hidden_layers": 2, "num_attention_heads": 4, "dtype": "bfloat16",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1,
        "target_modules": ["down_proj"], "base_model_name_or_path": str(base),
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
    return adapter


def test_the_command_from_end_to_end(tmp_path, capsys):
    """For real, in a process: an adapter's one shape, and once more with nothing left to do."""
    adapter, out = adapter_directory(tmp_path), tmp_path / "tuned"
    command = ["tune", "--model", str(adapter), "--tokens", "4", "--seconds", "30"]
    assert main([*command, f"--export={out}"]) == 0
    said = capsys.readouterr().out
    case = LinearCase(4, 80, 32, "bf16", 0.1, 4, 8)
    assert f"     2  {case.title}  forward " in said, said
    found = tables.cells_of("lora_linear", CPU)
    assert set(found) == {*case.keys.values()}
    for each in found.values():
        assert each["seconds"]["composed"] > 0
    (path,) = out.rglob("*.json")
    assert json.loads(path.read_text())["cells"] == found and str(path) in said
    began = time.monotonic()
    assert main(command) == 0 and time.monotonic() - began < 3


def test_a_model_is_named_by_its_directory_or_its_config(tmp_path):
    adapter_directory(tmp_path)
    for name in ("base", "base/config.json"):
        model = model_of(str(tmp_path / name))
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert model.dtype == torch.bfloat16


def test_a_base_that_is_not_here(tmp_path, capsys, monkeypatch):
    adapter = adapter_directory(tmp_path, base_model_name_or_path="someone/absent")
    with pytest.raises(SystemExit):
        main(["tune", "--model", str(adapter)])
    said = capsys.readouterr().err
    assert "got 'someone/absent'; nothing is downloaded" in said


def test_a_list_of_calls(monkeypatch, capsys):
    children = Children(monkeypatch)
    core = cells.core
    monkeypatch.setitem(
        sys.modules["lora_kernels.measuring.command"].LISTS, "core", lambda *a: core(*a)[:3]
    )
    assert main(["tune", "--cells=core", "--shrink=256", "--seconds=1.5"]) == 0
    assert len(children.orders) == 2 and "1 calls are left" in capsys.readouterr().out
    assert main(["tune", "--cells=core", "--shrink=256"]) == 0
    assert len(children.orders) == 3


def test_the_command_wants_to_know_what(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["tune"])
    assert "expected --model, --cells or --export" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tune", "--cells=core", "--rank=8"])
    assert "--dtype are for --model" in capsys.readouterr().err
    assert main(["tune", "--export", str(tmp_path)]) == 1
    assert "nothing has been measured here" in capsys.readouterr().out


def test_an_export_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    Children(monkeypatch)
    lora_kernels.tune(nn.Linear(16, 24), tokens=2, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(["tune", "--export", str(tmp_path / "file")])
    assert "--export: " in capsys.readouterr().err


def test_the_child_measures_without_what_was_measured(monkeypatch, capsys):
    """And ends after a failure, as what follows would inherit the context."""
    seen = []

    def best_cells(case, say):
        seen.append((case.m, tiles._replacement))
        say(prepares="native")
        if case.m == 3:
            raise RuntimeError("planted")
        return {"key": cell()}

    monkeypatch.setattr(child, "best_cells", best_cells)
    cases = [tuning.asdict(LinearCase(m, 4, 5)) for m in (1, 2, 3, 4)]
    order = {"operation": "lora_linear", "cases": cases, "until": time.time() + 60}
    order["threads"] = torch.get_num_threads()
    assert child.main([json.dumps(order)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert seen == [(1, {}), (2, {}), (3, {})]
    assert lines[:3] == [{"begins": 0}, {"prepares": "native"}, {"cells": {"key": cell()}}]
    assert lines[-1] == {"failed": "RuntimeError: planted"}
    seen.clear()
    child.main([json.dumps(order | {"until": 0.0})])
    assert seen == [(1, {})], "the first is measured in any case"


def test_a_case_is_what_it_was_on_the_other_side():
    for case in (LinearCase(3, 4, 5, dropout=0.1), RoutedCase(3, 4, (5, 6), rank=3, adapters=2)):
        fields = json.loads(json.dumps(tuning.asdict(case)))
        assert case_of(case.operation, fields) == case
