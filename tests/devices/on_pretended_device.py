"""Everything on a device that is neither a CPU nor a CUDA one; run by test_pretended_device.py."""

import copy

import peft
import pretended
import pytest
import torch
from peft import LoraConfig
from pretended import DEVICE, KEY
from routed_results import routed_eager, routed_oracle, run_routed
from torch import Tensor, nn

import lora_kernels
from lora_kernels.integrations.peft.layers import delegated_calls
from lora_kernels.integrations.routed import RoutedModel
from lora_kernels.ops import routed as routed_lora
from lora_kernels.ops.linear import op as linear_autograd
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.ops.narrow import masks
from lora_kernels.ops.norm import lora_weight_norm
from lora_kernels.ops.routed import op as routed_op
from lora_kernels.runtime import dispatch, dropout
from lora_kernels.testing import (
    LoRAProblem,
    assert_draws_within_policy,
    check_linear,
    oracle_results,
    redrawn_model,
)
from lora_kernels.testing.inputs import DIFFERENTIABLE
from lora_kernels.testing.routed_inputs import RoutedProblem

pretended.set_up()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Once per process, in whichever test comes first; it has one of its own.
pytestmark = pytest.mark.filterwarnings("ignore:lora_kernels. dropout on:UserWarning")


@pytest.fixture
def served(monkeypatch):
    """The device is one of those that the operations are registered for."""
    library = torch.library.Library("lora_kernels", "FRAGMENT")
    routed_kernels = {
        name: routed_op._kernel(name, *kernel) for name, kernel in routed_op._KERNELS.items()
    }
    for name, kernel in {**linear_autograd._KERNELS, **routed_kernels}.items():
        library.impl(name, kernel, KEY)
    monkeypatch.setitem(dispatch.DISPATCH_KEYS, DEVICE, KEY)
    yield
    library._destroy()


def moved(value):
    return value.to(DEVICE) if isinstance(value, Tensor) and value.ndim else value


# --- operations ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["like x", "fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("whole", [True, False], ids=["base", "adapter alone"])
def test_lora_linear(served, dtype, adapter_dtype, dropout_p, whole):
    problem = LoRAProblem.random(
        (5, 19), 101, 67, 9, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p,
        with_weight=whole, with_output_scale=whole,
    )  # fmt: skip

    def on_device(seed, **inputs) -> Tensor:
        y = lora_kernels.lora_linear(
            seed=None if seed is None else seed.to(DEVICE),
            **{name: moved(value) for name, value in inputs.items()},
        )
        assert y.device.type == DEVICE
        return y.cpu()

    assert check_linear(on_device, problem).keys() == oracle_results(problem).keys()


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_second_derivatives_of_lora_linear(served, dropout_p):
    problem = LoRAProblem.random((19,), 41, 27, 5, with_output_scale=True, dropout_p=dropout_p)

    def penalty(function, problem, move=lambda value: value) -> dict[str, Tensor]:
        given = {name: move(value) for name, value in vars(problem).items() if name != "dy"}
        if dropout_p:
            given["seed"] = given["seed"].to(given["x"].device)
        leaves = {name: given[name].detach().requires_grad_() for name in DIFFERENTIABLE}
        first = torch.autograd.grad(
            function(**{**given, **leaves}).tanh().sum(), list(leaves.values()), create_graph=True
        )
        loss = sum(gradient.square().sum() for gradient in first)
        second = torch.autograd.grad(loss, list(leaves.values()))
        assert all(gradient.device == given["x"].device for gradient in second)
        return {name: gradient.cpu() for name, gradient in zip(leaves, second, strict=True)}

    def draw(number: int):
        drawn = problem.redrawn(number)
        return (
            penalty(lora_kernels.lora_linear, drawn, moved),
            penalty(lora_linear_reference, drawn),
            penalty(lora_linear_reference, drawn.double()),
        )

    assert_draws_within_policy(draw)


def test_half_precision_products_are_not_rounded_below_fp32(served):
    """h and t far below fp16's smallest number, and an exact sum that bf16 could not hold."""
    x = torch.full((3, 64), 2.0**-12, dtype=torch.float16).to(DEVICE)
    tiny = torch.full((2, 64), 2.0**-14).to(DEVICE)
    large = torch.full((5, 2), 2.0**14).to(DEVICE)
    y = lora_kernels.lora_linear(x, None, tiny, large, 1.0)
    assert y.cpu().eq(2 * 64 * 2.0**-12).all()
    ones = torch.ones(515, 1, dtype=torch.bfloat16).to(DEVICE)
    a = torch.ones(1, 1).to(DEVICE).requires_grad_()
    lora_kernels.lora_linear(ones, None, a, torch.ones(1, 1).to(DEVICE), 1.0).sum().backward()
    assert a.grad.item() == 515


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["base", "added", "weighted", "sliced", "dropout"])
def test_routed_lora(served, dtype, kind):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 4, (57, 2) if kind == "weighted" else (57,), generator=generator)
    options = {
        "dtype": dtype,
        "with_weight": kind != "added",
        "with_out": kind == "added",
        "weighted": kind == "weighted",
        "dropout": (0.25, 0.0, 0.5, 0.1) if kind == "dropout" else 0.0,
    }
    ranks, width = (3, 8, 1, 24), 67
    if kind == "sliced":
        ranks, width = ((3, 0), (8, 2), (0, 5), (1, 1)), (41, 26)
    problem = RoutedProblem.random(ids, ranks, 101, width, **options)

    def draw(number: int):
        drawn = problem.redrawn(number)
        ours = run_routed(drawn.to(DEVICE), "auto")
        ours = {name: result.cpu() for name, result in ours.items()}
        return ours, routed_eager(drawn), routed_oracle(drawn)

    assert assert_draws_within_policy(draw, dtype).keys() == {"y", *problem.names()}


@pytest.mark.parametrize("segments", [False, True], ids=["tokens", "segments"])
def test_routed_halves_and_in_place_operations(served, segments):
    ids = [1, 1, 0, -1, 2, 2, 2, 0]
    options = {"dtype": torch.bfloat16, "with_weight": False, "with_out": True}
    results = {}
    for device in ("cpu", DEVICE):
        problem = RoutedProblem.random(ids, (3, 8, 1), 23, 37, device=device, **options)
        bank = problem.bank()
        routing = problem.routing(bank)
        if segments:
            routing.set_segments_(torch.tensor([1, 0, -1, 2, 0]), [0, 2, 3, 4, 7, 8])
        with torch.no_grad():
            h = routed_lora.routed_shrink(problem.x, bank, routing, backend="composed")
            added = problem.out.clone()
            routed_lora.routed_expand(h, bank, routing, added, backend="composed")
            at_once = problem.out.clone()
            routed_lora.routed_lora(problem.x, bank, routing, at_once, backend="composed")
        assert (h.dtype == torch.float32) == (device == DEVICE)
        results[device] = h, added, at_once
    for ours, theirs in zip(results[DEVICE], results["cpu"], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0.02, atol=0.02, check_dtype=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_lora_weight_norm(dtype, transposed):
    problem = LoRAProblem.random((), 101, 67, 9, dtype=dtype)
    weight = problem.weight.t().contiguous().t() if transposed else problem.weight
    operands = weight, problem.lora_a, problem.lora_b
    expected = lora_weight_norm(*operands, 0.7)
    norm = lora_weight_norm(*map(moved, operands), 0.7)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.cpu(), expected, rtol=1e-6, atol=0)


# --- dropout ---------------------------------------------------------------------------------


def test_the_mask_is_the_cpus(served):
    seed = torch.tensor(-0x1234_5678_9ABC_DEF1)
    ours = dropout.packed_keep_mask(seed.to(DEVICE), 0.3, 37, 101, stream=5)
    assert torch.equal(ours.cpu(), dropout.packed_keep_mask(seed, 0.3, 37, 101, stream=5))


def test_seeds_fill_both_words_and_follow_manual_seed():
    torch.manual_seed(1)
    seeds = [dropout.draw_seed(torch.device(DEVICE)).item() for _ in range(64)]
    torch.manual_seed(1)
    assert [dropout.draw_seed(torch.device(DEVICE)).item() for _ in range(64)] == seeds
    assert len(set(seeds)) == 64
    for word in range(2):
        halves = [(seed >> 32 * word) & 0x7FFFFFFF for seed in seeds]
        assert max(halves) > 2**30 > min(halves)


# --- choosing --------------------------------------------------------------------------------


def test_explain(served):
    problem = LoRAProblem.random((3,), 23, 37, 4)
    call = [moved(t) for t in (problem.x, problem.weight, problem.lora_a, problem.lora_b)]
    assert lora_kernels.explain(*call).backend == "composed"
    for backend in ("native", "triton"):
        with pytest.raises(ValueError, match=f"for '{DEVICE}' devices"):
            lora_kernels.lora_linear(*call, 1.0, backend=backend)


def test_devices_without_kernels_are_refused():
    problem = LoRAProblem.random((3,), 23, 37, 4)
    call = [moved(t) for t in (problem.x, problem.weight, problem.lora_a, problem.lora_b)]
    message = f"no kernel for '{DEVICE}' devices, only for cpu, cuda, mps, xpu"
    for function in (lora_kernels.lora_linear, lora_kernels.explain):
        with pytest.raises(ValueError, match=message):
            function(*call, 1.0)
        with pytest.raises(ValueError, match=message):
            function(*call, 1.0, backend="composed")
    y = lora_kernels.lora_linear(*call, 0.7, problem.bias.to(DEVICE), backend="reference")
    torch.testing.assert_close(y.cpu(), oracle_results(problem)["y"].float())
    layer = lora_kernels.LoRALinear(23, 37, 4, 8.0, device=DEVICE)
    with pytest.raises(ValueError, match=f"^x: .*{message}"):
        layer(call[0])
    routed = RoutedProblem.random([0, 1, -1], (3, 2), 23, 37, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        run_routed(routed, "auto")
    bank = routed.bank()
    with pytest.raises(ValueError, match=message):
        lora_kernels.explain(routed.x, bank, routed.routing(bank))


# --- modules and models ----------------------------------------------------------------------


def trained(layer: nn.Module, x: Tensor, **arguments) -> dict[str, Tensor]:
    layer.zero_grad()
    y = layer(x, **arguments)
    y.square().sum().backward()
    gradients = {n: p.grad.cpu() for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach().cpu(), **gradients}


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_lora_linear_layer(served, settings):
    layer = lora_kernels.LoRALinear(23, 37, 4, 8.0, init_lora_weights=False, **settings)
    x = torch.randn(5, 3, 23)
    expected = trained(layer, x)
    other = copy.deepcopy(layer).to(DEVICE)
    assert_alike(trained(other, x.to(DEVICE)), expected)
    other.merge()
    torch.testing.assert_close(other(x.to(DEVICE)).cpu(), expected["y"], rtol=1e-4, atol=1e-5)
    other.unmerge()
    assert_alike(trained(other.to("cpu"), x), expected)


def test_lora_embedding_layer():
    layer = lora_kernels.LoRAEmbedding(23, 37, 4, 8.0, init_lora_weights=False)
    ids = torch.randint(0, 23, (5, 3))
    assert_alike(trained(copy.deepcopy(layer).to(DEVICE), ids.to(DEVICE)), trained(layer, ids))


def routed_model() -> RoutedModel:
    torch.manual_seed(0)
    routed = lora_kernels.route(nn.Sequential(nn.Linear(23, 37), nn.Linear(37, 29)))
    for name, rank in (("a", 3), ("b", 5)):
        routed.add(name, rank=rank, alpha=1, target_modules=["0", "1"], init_lora_weights=False)
    return routed


def test_routed_model_moves_there_and_back(served):
    routed, x, names = routed_model(), torch.randn(4, 3, 23), ["b", "a", "__base__", "b"]
    layer = routed.model[0]
    layer.bank["a"].scaling = 1 / 3
    with routed.adapters(names):
        expected = trained(routed.model, x)
    routed.model.to(DEVICE)
    assert layer.bank["a"].scaling.dtype == torch.float32
    with routed.adapters(names):
        assert_alike(trained(routed.model, x.to(DEVICE)), expected)
    routed.add("c", rank=2, alpha=1, target_modules=["0"])
    routed.model.to("cpu")
    assert layer.bank["a"].scaling.dtype == torch.float64
    with routed.adapters(names):
        ours = trained(routed.model, x)
    assert_alike({name: ours[name] for name in expected}, expected)


# --- PEFT ------------------------------------------------------------------------------------


def peft_model(**settings) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(23, 37), nn.Linear(37, 29, bias=False))
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["0", "1"], **settings)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.uniform_(0.1, 0.5)
    return model


def calls_of(model: nn.Module) -> dict[str, int]:
    calls = {}
    for module in model.modules():
        for reason, count in delegated_calls(module).items():
            calls[reason] = calls.get(reason, 0) + count
    return calls


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_accelerated_model(served, settings):
    plain, x = peft_model(**settings), torch.randn(5, 3, 23)
    expected = trained(plain, x)
    fast = copy.deepcopy(plain).to(DEVICE)
    report = lora_kernels.accelerate(fast)
    assert len(report.fast) == 2 and not report.delegated
    assert_alike(trained(fast, x.to(DEVICE)), expected)
    assert not calls_of(fast)
    assert_alike(trained(fast.to("cpu"), x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accelerated_model_under_autocast(served, dtype):
    x = torch.randn(5, 3, 23)

    def draw(number: int):
        plain = redrawn_model(peft_model(), number)
        fast = copy.deepcopy(plain).to(DEVICE)
        lora_kernels.accelerate(fast)
        with torch.no_grad(), torch.autocast(DEVICE, dtype=dtype):
            ours = fast(x.to(DEVICE)).cpu()
        assert not calls_of(fast)
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            eager = plain(x)
        return {"y": ours}, {"y": eager}, {"y": plain.double()(x.double()).detach()}

    assert_draws_within_policy(draw)


def test_dropout_is_torchs_operations_there(served):
    """The CPU's masks for the seeds that the device drew, and one warning in the process."""
    masks._has_kernels.cache_clear()
    layer, x = lora_kernels.LoRALinear(23, 37, 4, 8.0, dropout_p=0.25), torch.randn(5, 3, 23)
    nn.init.uniform_(layer.lora_B.weight)
    other = copy.deepcopy(layer).to(DEVICE)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="some hundred torch operations") as caught:
        ours = [trained(other, x.to(DEVICE)) for _ in range(2)]
    assert len(caught) == 1
    torch.manual_seed(1)
    for each in ours:
        masked = Masked(dropout.draw_seed(torch.device(DEVICE)).cpu(), 0.25)
        adapter = layer.lora_B.weight @ layer.lora_A.weight * 2.0
        y = layer.base_layer(x) + masked(x) @ adapter.t()
        layer.zero_grad()
        y.square().sum().backward()
        expected = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        assert_alike(each, {"y": y.detach(), **expected})


def test_active_dropout_stays_pefts(served):
    """Where masks have no kernels; in an eval step it is fast again."""
    fast, x = peft_model(lora_dropout=0.25).to(DEVICE), torch.randn(5, 3, 23, device=DEVICE)
    report = lora_kernels.accelerate(fast)
    reason = masks.slow_on(torch.device(DEVICE))
    assert {each.endswith(f"faster there: {reason}") for each in report.delegated.values()} == {
        True
    }
    fast(x)
    (counted,) = calls_of(fast).items()
    assert counted == (report.delegated["base_model.model.0"], 2)
    assert len(lora_kernels.accelerate(fast.eval()).fast) == 2
    fast(x)
    assert list(calls_of(fast).values()) == [2]


class Masked(nn.Module):
    """The package's dropout for one seed."""

    def __init__(self, seed: Tensor, p: float) -> None:
        super().__init__()
        self.seed, self.p = seed, p

    def forward(self, x: Tensor) -> Tensor:
        mask = dropout.keep_mask(self.seed, self.p, x.shape[:-1].numel(), x.shape[-1])
        return torch.where(mask.view(x.shape), x * dropout.keep_scale(self.p), 0)


def test_mixed_batches(served):
    plain = peft_model().eval()
    plain.add_adapter("other", LoraConfig(r=5, lora_alpha=3, target_modules=["0"]))
    nn.init.uniform_(plain.base_model.model[0].lora_B["other"].weight)
    x, names = torch.randn(4, 3, 23), ["other", "default", "__base__", "other"]
    fast = copy.deepcopy(plain).to(DEVICE)
    lora_kernels.accelerate(fast)
    with torch.no_grad():
        expected = plain(x, adapter_names=names)
        y = fast(x.to(DEVICE), adapter_names=names)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert not calls_of(fast)


def test_accelerate_leaves_other_devices_to_peft():
    """Reported, counted by call, and right again as soon as the model is somewhere else."""
    plain, x = peft_model(), torch.randn(5, 3, 23)
    expected = trained(plain, x)
    fast = copy.deepcopy(plain).to(DEVICE)
    report = lora_kernels.accelerate(fast)
    reason = dispatch.unserved(torch.device(DEVICE))
    assert not report.fast and set(report.delegated.values()) == {f"base weight: {reason}"}
    assert_alike(trained(fast, x.to(DEVICE)), expected)
    names = ["default", "__base__", "default", "default", "__base__"]
    with torch.no_grad():
        mixed = fast.eval()(x.to(DEVICE), adapter_names=names)
    torch.testing.assert_close(mixed.cpu(), plain.eval()(x, adapter_names=names))
    assert calls_of(fast) == {f"base weight: {reason}": 4}
    assert_alike(trained(fast.to("cpu"), x), expected)
    assert len(report.refresh().fast) == 2
    assert calls_of(fast) == {f"base weight: {reason}": 4}
