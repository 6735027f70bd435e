"""Kernels that nobody has asked for by name, and that cannot be started: composed serves."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lora_kernels import (  # fmt: skip
    AdapterBank,
    Routing,
    lora_linear,
    routed_expand,
    routed_lora,
    routed_lora_linear,
    routed_shrink,
)
from lora_kernels.ops.linear import op as linear_op
from lora_kernels.ops.linear import plan as linear_plan
from lora_kernels.ops.routed import choice as routed_choice
from lora_kernels.ops.routed import composed as routed_composed
from lora_kernels.ops.routed import op as routed_op
from lora_kernels.ops.routed import plan as routed_plan
from lora_kernels.ops.routed.tensors import groups_of
from lora_kernels.runtime import fallback, machine_files, verdicts
from lora_kernels.runtime.device_limits import DeviceLimits

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FAMILY = "linear/triton hybrid"
STEPS = ("forward", "backward", "shrink", "shrink_backward", "expand_", "expand_backward")


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch, plans_forgotten):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "_broken_here", {})
    monkeypatch.setattr(machine_files, "limits_of", lambda device: DeviceLimits("a GPU"))
    for module in (linear_plan, routed_plan):
        module._guarded.cache_clear()
    verdicts.forget()
    yield
    for module in (linear_plan, routed_plan):
        module._guarded.cache_clear()
    verdicts.forget()


class Failing:
    """A backend that serves some steps as composed does; the others cannot be started."""

    def __init__(self, composed, *serves):
        self.tried = []
        for step in STEPS:
            if hasattr(composed, step):
                setattr(self, step, self._step(step, composed, step in serves))

    def why_not(self, base):
        return None

    def _step(self, name, composed, serves):
        def step(*arguments):
            self.tried.append(name)
            if not serves:
                raise RuntimeError("out of resource: shared memory")
            call = arguments[0]
            if hasattr(call, "routing"):  # kernels know the groups without their sizes
                plan = groups_of(call.routing.offsets, call.routing.tokens)
                call.routing = call.routing._replace(plan=plan)
            return getattr(composed, name)(*arguments)

        return step


def kept():
    """What the file of this machine's state says of families."""
    found = verdicts.load(verdicts.file_of(machine_files.machine_state()))
    return {name: each.state for families in found.values() for name, each in families.items()}


# ---- what is raised, and what is remembered


def test_a_family_is_marked_and_said_once():
    with pytest.warns(
        UserWarning, match=r"kernels 'linear/triton hybrid' cannot be started on cpu"
    ):
        fallback.note_failure(FAMILY, CPU, RuntimeError("out of resource: registers\nmore"))
    assert "out of resource: registers" in verdicts.broken(FAMILY, CPU)
    assert "more" not in verdicts.broken(FAMILY, CPU)
    assert kept() == {FAMILY: verdicts.UNPROVEN}, "others do without for a while, too"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fallback.note_failure(FAMILY, CPU, RuntimeError("again"))
    assert verdicts.broken("routed/triton", CPU) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        MemoryError(),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
    ids=repr,
)
def test_what_says_nothing_of_the_kernel_is_raised(error):
    with pytest.raises(type(error)) as caught:
        fallback.note_failure(FAMILY, CPU, error)
    assert caught.value is error
    assert verdicts.broken(FAMILY, CPU) is None and kept() == {}


def test_two_threads_that_fail_at_once_are_both_served(monkeypatch):
    x, weight, a, b = (torch.randn(size) for size in ((3, 8), (6, 8), (2, 8), (6, 2)))
    expected = lora_linear(x, weight, a, b, 0.5, backend="composed")
    together = threading.Barrier(2)

    class Kernels(Failing):
        def __init__(self):
            super().__init__(linear_plan.composed)
            self.forward = self.fails

        def fails(self, call):
            together.wait(10)  # both are in them when they fail
            raise RuntimeError("registers")

    guarded = linear_plan.GuardedModule(FAMILY, CPU, Kernels())
    monkeypatch.setattr(linear_plan, "module_of", lambda *_: guarded)
    with warnings.catch_warnings(), ThreadPoolExecutor(2) as pool:
        warnings.simplefilter("ignore")
        calls = [pool.submit(lora_linear, x, weight, a, b, 0.5) for _ in range(2)]
        assert all(torch.equal(call.result(), expected) for call in calls)


def test_a_capture_is_not_served_by_another(monkeypatch):
    monkeypatch.setattr(fallback, "is_captured", lambda device: True)
    with pytest.raises(RuntimeError, match="registers"):
        fallback.note_failure(FAMILY, GPU, RuntimeError("registers"))
    assert verdicts.broken(FAMILY, GPU) is None


def test_an_error_that_sticks_is_raised_by_name_and_kept(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    cause = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match=r"'linear/triton hybrid'.*self-test --again") as caught:
        fallback.note_failure(FAMILY, GPU, cause)
    assert caught.value.__cause__ is cause and kept() == {FAMILY: verdicts.BROKEN}


def test_a_read_only_cache_is_served(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", "/proc/nothing-can-be-made-here")
    with pytest.warns(UserWarning, match="cannot be started"):
        fallback.note_failure(FAMILY, CPU, RuntimeError("registers"))
    assert verdicts.broken(FAMILY, CPU)


# ---- one adapter


@pytest.mark.parametrize("serves", [(), ("forward",)], ids=["nothing", "only the forward"])
@pytest.mark.parametrize("through_the_op", [False, True], ids=["by a plan", "through the op"])
def test_lora_linear_goes_on_with_composed(monkeypatch, serves, through_the_op):
    x, weight, a, b = (torch.randn(size) for size in ((3, 8), (6, 8), (2, 8), (6, 2)))
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    seed = torch.tensor(3)

    def results(backend):
        y = lora_linear(x, weight, a, b, 0.5, dropout_p=0.25, seed=seed, backend=backend)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    expected = results("composed")
    failing = Failing(linear_plan.composed, *serves)
    guarded = linear_plan.GuardedModule(FAMILY, CPU, failing)

    def module_of(backend, *_):
        return guarded

    for module in (linear_plan, linear_op):
        monkeypatch.setattr(module, "module_of", module_of)
    if through_the_op:
        monkeypatch.setattr("lora_kernels.ops.linear._is_for_us_alone", lambda call: False)
    with pytest.warns(UserWarning, match="composed backend serves from now on") as told:
        found = results("auto")
    assert len([each for each in told if "composed backend" in str(each.message)]) == 1
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    tried = list(failing.tried)
    again = results("auto")
    assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))
    assert failing.tried == tried, "broken kernels are not tried again"


# ---- many adapters


def routed_case():
    bank = AdapterBank(8, 6)
    for name, rank in (("a", 2), ("b", 3)):
        bank.add(name, torch.randn(rank, 8), torch.randn(6, rank), scaling=0.5, dropout_p=0.25)
    bank.requires_grad_()
    return bank, Routing.from_tokens(torch.tensor([0, 1, -1, 0, 1, 1]), bank)


@pytest.mark.parametrize("serves", [(), ("forward", "shrink", "expand_")], ids=["none", "forwards"])
def test_routed_calls_go_on_with_composed(monkeypatch, serves):
    bank, routing = routed_case()
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    seed, start = torch.tensor(5), torch.randn(6, 6)

    def results(backend):
        named = {"seed": seed, "backend": backend}
        whole = routed_lora_linear(x, weight, bank, routing, **named)
        h = routed_shrink(x, bank, routing, **named)
        halves = routed_expand(h, bank, routing, backend=backend)
        leaves = [x, *bank.parameters()]
        gradients = torch.autograd.grad(whole.square().sum() + halves.square().sum(), leaves)
        out = start.clone()
        with torch.no_grad():
            routed_lora(x, bank, routing, out, **named)
            routed_expand(h, bank, routing, out, backend=backend)
        return whole, h, halves, out, *gradients

    expected = results("composed")
    failing = Failing(routed_composed, *serves)
    guarded = routed_plan.GuardedModule("routed/triton", CPU, failing)
    choice = routed_choice.Choice("triton", "planted")
    monkeypatch.setattr(routed_op, "module_of", lambda *_: guarded)
    unasked = routed_plan.RoutedPlan(choice, "triton" + routed_choice.UNASKED, False)
    monkeypatch.setattr("lora_kernels.ops.routed.make_plan", lambda *_, **__: unasked)
    with pytest.warns(UserWarning, match="composed backend serves from now on") as told:
        found = results("auto")
    assert len([each for each in told if "composed backend" in str(each.message)]) == 1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
