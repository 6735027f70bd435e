"""`kernels=` of `accelerate` and `route`: what is tested, when, and what is taken then."""

import copy
import pickle

import peft
import pytest
import torch
from peft_models import build, inputs, lora_config, lora_layers

import lora_kernels
from lora_kernels import self_test
from lora_kernels.integrations import kernels_option
from lora_kernels.integrations.peft import layers as peft_layers
from lora_kernels.ops.linear.plan import PLANS
from lora_kernels.runtime import dispatch, verdicts

STARTS = (lora_kernels.accelerate, lora_kernels.route)
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


@pytest.fixture
def asked(monkeypatch, plans_forgotten):
    """The dtypes that each self-test was asked for; a CUDA device is there."""
    tests = []
    monkeypatch.setattr(kernels_option, "may_run_kernels", lambda: True)
    monkeypatch.setattr(self_test, "ensure", lambda dtypes: tests.append(list(dtypes)))
    return tests


def taken():
    return {plan.choice.backend for plan in PLANS.values()}


def plain():
    return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))


@pytest.mark.parametrize(
    "start", [lora_kernels.accelerate, lora_kernels.route], ids=["peft", "route"]
)
@pytest.mark.parametrize(
    ("of_model", "tested"),
    [
        (torch.bfloat16, [torch.bfloat16]),
        (torch.float16, [torch.float16]),
        (torch.float32, [torch.bfloat16, torch.float16, torch.float32]),  # it may be autocast
    ],
    ids=str,
)
def test_kernels_are_tested_with_the_dtypes_in_use(asked, start, of_model, tested):
    model = plain().to(of_model)
    if start is lora_kernels.accelerate:
        config = peft.LoraConfig(target_modules=["0"], r=2)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    start(model)
    assert asked == [tested]
    start(model, kernels="auto")
    assert asked == [tested, tested], "the file knows whether it is done"
    start(model, kernels="off")
    assert len(asked) == 2


def test_nothing_is_tested_without_a_device(monkeypatch):
    monkeypatch.setattr(self_test, "ensure", lambda dtypes: pytest.fail("there is no CUDA device"))
    lora_kernels.accelerate(build(lora_config()))
    lora_kernels.route(plain())


@pytest.mark.parametrize(
    ("devices", "cuda", "missing", "may"),
    [
        (1, "13.0", None, True),
        (0, "13.0", None, False),
        (1, None, None, False),
        (1, "13.0", "not installed", False),
    ],
)
def test_where_kernels_may_run(monkeypatch, devices, cuda, missing, may):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(dispatch, "triton_missing", lambda: missing)
    assert kernels_option.may_run_kernels() is may


def test_a_backend_for_the_process_leaves_nothing_to_test(asked, monkeypatch):
    monkeypatch.setattr(dispatch, "PROCESS_DEFAULT", "composed")
    lora_kernels.route(plain())
    assert asked == []


@pytest.mark.parametrize("start", STARTS, ids=["peft", "route"])
def test_other_words_are_refused(start):
    model = build(lora_config()) if start is lora_kernels.accelerate else plain()
    with pytest.raises(ValueError, match=r"kernels: expected one of .*'off'.*, got 'measure'"):
        start(model, kernels="measure")
    if start is lora_kernels.accelerate:
        assert not any(isinstance(each, peft_layers.Linear) for each in model.modules())


def test_off_takes_composed_alone_and_auto_takes_it_back(plans_forgotten):
    model, x = build(lora_config(lora_dropout=0.5)), inputs(3)
    report = lora_kernels.accelerate(model, kernels="off")
    assert str(report).endswith("kernels are off: composed serves")
    model.eval()
    first = model(x)
    assert torch.equal(model(x), first)
    model.train()
    model(x)
    assert taken() == {"composed"}
    report = lora_kernels.accelerate(model)
    PLANS.clear()
    model(x)
    usual = dispatch.choose("auto", torch.device("cpu"), torch.float32).backend
    assert taken() == {usual}
    assert "kernels are off" not in str(report)
    lora_kernels.accelerate(model, kernels="off")
    report.undo()
    assert not any("_backend" in vars(layer) for layer in lora_layers(model).values())


def test_off_is_for_mixed_batches_too(monkeypatch):
    model = build(lora_config(), lora_config())
    lora_kernels.accelerate(model, kernels="off")
    asked = []
    unpacked = peft_layers.routed_linear_unpacked
    monkeypatch.setattr(
        peft_layers, "routed_linear_unpacked", lambda *a: asked.append(a[-1]) or unpacked(*a)
    )
    model.eval()
    with torch.no_grad():
        model(inputs(2), adapter_names=["one", "two"])
    assert asked and set(asked) == {"composed"}


def test_a_routed_model_passes_it_to_its_layers():
    model = plain()
    routed = lora_kernels.route(model, kernels="off")
    routed.add("a", rank=2, alpha=4, target_modules=["0"])
    routed.add("b", rank=2, alpha=4, target_modules=["0"])
    x = torch.randn(2, 8)

    def served():
        with routed.adapters(["a", "b"]):
            model(x)
        version = model[0].bank.version_for(None, None)
        found = {plan.choice.backend for plan in version.plans.values()}
        version.plans.clear()
        return found

    assert served() == {"composed"}
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied[0].active_adapters.backend == "composed"
    lora_kernels.route(model)
    usual = dispatch.choose("auto", torch.device("cpu"), torch.float32).backend
    assert served() == {usual}


def test_standing_says_what_was_proven(monkeypatch):
    found = {
        "linear/triton hybrid": verdicts.Verdict(verdicts.PROVEN, "24 checks passed"),
        "routed/triton": verdicts.Verdict(verdicts.BROKEN, "wrong by a tile"),
        "linear/native": verdicts.Verdict(verdicts.ABSENT, "not built"),
    }
    kind = "a GPU"
    monkeypatch.setattr(kernels_option.machine_files, "kind_of", lambda device: kind)
    monkeypatch.setattr(verdicts, "kind_of", lambda device: kind)
    monkeypatch.setattr(verdicts, "known", lambda: {kind: found})
    title, tested, *others = kernels_option.standing([torch.device("cuda", 0), torch.device("mps")])
    assert title == "kernels on a GPU:" and "self-test (" in tested
    assert others == [
        "  linear/triton hybrid: proven, 24 checks passed",
        "  routed/triton: broken, wrong by a tile",
        "  nothing is measured: lora_kernels.tune(model) measures its shapes",
    ]
    monkeypatch.setattr(verdicts, "known", lambda: {})
    assert kernels_option.standing([torch.device("cuda", 0)])[1:] == [
        "  not tested here: python -m lora_kernels self-test",
        "  nothing is measured: lora_kernels.tune(model) measures its shapes",
    ]


def test_a_test_that_fails_in_its_own_ways_costs_a_warning(asked, monkeypatch):
    def fails(dtypes):
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "planted")

    monkeypatch.setattr(self_test, "ensure", fails)
    with pytest.warns(UserWarning, match="kernels could not be tested .*planted"):
        lora_kernels.route(plain())
