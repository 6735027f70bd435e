"""A layer whose weight is computed with and which is not called says so, once; others say nothing.

The forms in which models compute with a weight, and the ordinary reads that must stay silent.
"""

import copy
import gc
import pickle
import threading
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRAEmbedding, LoRALinear, RoutedLoRALinear, Routing, route
from lora_kernels.nn import ActiveAdapters, adapter_layer, routed_linear, weight_reads

PASSED_BY = "computes with its weight and does not call it"


def adapted(k: int, n: int) -> LoRALinear:
    return LoRALinear.from_linear(nn.Linear(k, n), 3, init_lora_weights=False)


def routed(k: int, n: int) -> RoutedLoRALinear:
    layer = RoutedLoRALinear(k, n)
    layer.bank.add("a", torch.randn(2, k), torch.randn(n, 2), 0.5)
    return layer


def embedding(n: int, k: int) -> LoRAEmbedding:
    return LoRAEmbedding.from_embedding(nn.Embedding(n, k), 3, init_lora_weights=False)


@pytest.fixture
def alarms():
    """The warnings of this kind in a test."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(each.message) for each in caught if PASSED_BY in str(each.message)]


class Reader(nn.Module):
    """``formula(module, x)`` in a module's forward, over one layer with an adapter."""

    def __init__(self, layer: nn.Module, formula) -> None:
        super().__init__()
        self.layer, self.formula = layer, formula

    def forward(self, x):
        return self.formula(self, x)


def encoder() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()


# --- the sign -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [adapted, routed])
def test_the_fast_path_of_torchs_encoder(make, alarms):
    layer = encoder()
    expected = copy.deepcopy(layer)
    for name in ("linear1", "linear2"):
        linear = getattr(layer, name)
        ours = make(linear.in_features, linear.out_features)
        ours.base_layer.load_state_dict(linear.state_dict())
        setattr(layer, name, ours)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        assert torch.equal(layer(x), expected(x))  # what the warning is about
        first = alarms()
        layer(x)
    assert [text.split(":")[0] for text in first] == [
        f"{name} ({type(ours).__name__})" for name in ("linear1", "linear2")
    ]
    assert all("TransformerEncoderLayer.forward" in text for text in first)
    assert alarms() == first


def test_an_encoder_that_was_trained_before(alarms):
    layer = encoder()
    layer.linear1 = adapted(16, 32)
    x = torch.randn(3, 5, 16)
    for _ in range(2):
        layer.train()(x).sum().backward()
        layer.eval()(x)  # with gradients its slow path, which reads and then calls
    assert layer.linear1.lora_A.weight.grad.abs().sum() > 0 and not alarms()
    with torch.no_grad():
        layer(x)
    assert len(alarms()) == 1


def test_a_stack_of_encoders_warns_for_each_layer(alarms):
    stack = nn.TransformerEncoder(encoder(), 3).eval()
    for each in stack.layers:
        each.linear1 = adapted(16, 32)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        for _ in range(3):
            stack(torch.randn(2, 5, 16), src_key_padding_mask=padding)
    assert len(alarms()) == 3


def test_the_output_projection_of_torchs_attention(alarms):
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    attention.out_proj = LoRALinear(16, 16, 3, 4.0, init_lora_weights=False)
    x = torch.randn(2, 5, 16)
    attention(x, x, x)
    assert len(alarms()) == 1


FORMULAS = {
    "h @ w.T": lambda module, x: x @ module.layer.weight.T,
    "matmul(h, w.t())": lambda module, x: torch.matmul(x, module.layer.weight.t()),
    "linear(h, w)": lambda module, x: F.linear(x, module.layer.weight, module.layer.bias),
    "w @ h": lambda module, x: (module.layer.weight @ x.mT).mT,
    "of a name": lambda module, x: F.linear(x, (lambda weight: weight)(module.layer.weight)),
    "after its dtype": lambda module, x: F.linear(
        x.to(module.layer.weight.dtype), module.layer.weight
    ),
}


@pytest.mark.parametrize("make", [adapted, routed])
@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS.keys())
def test_products_with_the_weight(formula, make, alarms):
    model = Reader(make(7, 5), formula)
    for _ in range(4):
        model(torch.randn(3, 7))
    (text,) = alarms()
    assert text.startswith(f"layer ({type(model.layer).__name__}): ")


def test_a_transposed_weight_tells_in_the_first_forward(alarms):
    Reader(adapted(7, 5), FORMULAS["h @ w.T"])(torch.randn(3, 7))
    assert len(alarms()) == 1


def test_a_table_that_is_added_and_never_looked_up(alarms):
    model = Reader(embedding(6, 5), lambda module, x: x + module.layer.weight)
    for _ in range(3):
        model(torch.randn(2, 6, 5))
    assert len(alarms()) == 1


def test_outside_of_a_module_when_a_model_runs_in_between(alarms):
    body, head = adapted(7, 6), adapted(6, 5)
    for _ in range(3):
        F.linear(body(torch.randn(3, 7)), head.weight)
    assert len(alarms()) == 1


def test_a_read_in_training_that_follows_calls(alarms):
    """Called in each training step, passed by in each evaluation."""

    def formula(module, x):
        return module.layer(x) if module.training else F.linear(x, module.layer.weight)

    model, x = Reader(adapted(7, 5), formula), torch.randn(3, 7)
    for _ in range(3):
        model.train()(x)
        model.eval()(x)
    assert not alarms()  # one evaluation between two steps could be a penalty
    model(x)
    assert len(alarms()) == 1


# --- ordinary reads -----------------------------------------------------------------------------

ORDINARY = {
    "the dtype": lambda module, x: module.layer(x.to(module.layer.weight.dtype)),
    "metadata and no call": lambda module, x: x.new_zeros(
        module.layer.weight.shape[0] + module.layer.weight.size(1) + module.layer.weight.dim(),
        dtype=module.layer.weight.dtype,
        device=module.layer.weight.device,
        requires_grad=module.layer.weight.requires_grad,
    ),
    "what a quantised weight has": lambda module, x: (
        hasattr(module.layer.weight, "SCB") or isinstance(module.layer.weight, torch.Tensor)
    ),
    "looking through modules": lambda module, x: [
        getattr(each, "weight", None) for each in module.modules() if hasattr(each, "weight")
    ],
    "and then the call": lambda module, x: module.layer(x.type_as(module.layer.weight)),
    "a penalty after the call": lambda module, x: (
        module.layer(x).sum() + module.layer.weight.square().sum()
    ),
    "tied decoder after the call": lambda module, x: module.layer(x) @ module.layer.weight,
    "not used": lambda module, x: x,
}


@pytest.mark.parametrize("make", [adapted, routed])
@pytest.mark.parametrize("formula", ORDINARY.values(), ids=ORDINARY.keys())
def test_ordinary_reads(formula, make, alarms):
    layer, use = make(7, 5), nullcontext()
    if make is routed:
        layer.active_adapters = ActiveAdapters(layer.bank.slots)
        use = layer.active_adapters.use("a")
    model = Reader(layer, formula)
    with use:
        for _ in range(4):
            model(torch.randn(3, 7))
    assert not alarms()


def test_a_tied_head_that_reads_the_embedding(alarms):
    """The embedding is called, and the head computes with the frozen rows, as with PEFT's."""
    model = Reader(
        embedding(11, 5), lambda module, x: F.linear(module.layer(x), module.layer.weight)
    )
    for _ in range(4):
        model(torch.randint(11, (2, 3)))
    assert not alarms()


def test_looking_at_weights_without_running_the_model(alarms):
    layers = nn.ModuleList([adapted(7, 5), routed(7, 5), embedding(11, 5)])
    for _ in range(4):
        sum(float(layer.weight.abs().sum()) for layer in layers)
    assert not alarms()


@pytest.mark.parametrize("state", ["merged", "disabled", "no adapters"])
def test_where_the_weight_is_what_a_call_computes_with(state, alarms):
    layer = RoutedLoRALinear(16, 32) if state == "no adapters" else adapted(16, 32)
    if state == "merged":
        layer.merge()
    elif state == "disabled":
        layer.disable_adapters = True
    model = encoder()
    expected = copy.deepcopy(model)
    expected.linear1 = nn.Linear(16, 32)
    expected.linear1.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    model.linear1, x = layer, torch.randn(2, 3, 16)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(x), expected(x))
    assert not alarms()


@pytest.mark.parametrize("make", [adapted, embedding, routed])
def test_our_own_code_reads_the_base_layers_weight(make, monkeypatch):
    reads = []
    for module in (adapter_layer, routed_linear):
        monkeypatch.setattr(module, "note_read", reads.append)
    layer = make(7, 5)
    x = torch.randint(7, (3,)) if make is embedding else torch.randn(3, 7)
    options = {"routing": Routing.from_sequences(["a"], [3], layer.bank)} if make is routed else {}
    layer(x, **options).sum().backward()
    layer.to(torch.bfloat16)
    layer.load_state_dict(copy.deepcopy(layer).state_dict())
    if make is not routed:
        layer.reset_lora_parameters(False)
        layer.merge()
        layer.to(torch.float32)
        layer.unmerge()
        layer.load_adapter(layer.adapter_state_dict())
        layer.peft_state_dict()
        layer.scaling = 0.5
    repr(layer)
    assert not reads
    assert layer.weight is layer.base_layer.weight and reads == [layer]


def test_checkpointed_activations(alarms):
    model = Reader(adapted(7, 5), ORDINARY["and then the call"])
    for _ in range(3):
        x = torch.randn(3, 7, requires_grad=True)
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert not alarms()


# --- copies, threads, torch.compile -------------------------------------------------------------


def test_copies_and_pickles_hold_nothing_of_it(alarms):
    model = Reader(adapted(7, 5), FORMULAS["h @ w.T"])
    layer = model.layer
    kept = set(vars(layer)), layer.state_dict().keys()
    model(torch.randn(3, 7))
    assert len(alarms()) == 1
    assert (set(vars(layer)), layer.state_dict().keys()) == kept
    for number, twin in enumerate((copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)))):
        model.layer = twin
        model(torch.randn(3, 7))
        assert len(alarms()) == 2 + number


def test_nothing_is_kept_of_layers_that_are_gone():
    gc.collect()
    before = len(weight_reads._seen)
    for _ in range(3):
        layer = adapted(7, 5)
        layer(torch.randn(3, 7))
        assert len(weight_reads._seen) == before + 1
        del layer
    assert len(weight_reads._seen) == before


def test_threads(alarms):
    layer, failed = adapted(7, 5), []
    model = Reader(layer, ORDINARY["a penalty after the call"])

    def work():
        try:
            for _ in range(200):
                model(torch.randn(3, 7))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.parametrize("formula", ["h @ w.T", "after its dtype"])
def test_reads_and_calls_leave_compiled_code_alone(formula, alarms):
    """Eager reads, eager calls and compiled calls in any order: one graph, compiled once."""
    counter = torch._dynamo.testing.CompileCounter()
    for run in (FORMULAS[formula], ORDINARY["the dtype"], ORDINARY["a penalty after the call"]):
        counter.clear()
        model, x = Reader(adapted(7, 5), run), torch.randn(3, 7)
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for step in range(12):
            torch.testing.assert_close(compiled(x), expected)
            if step % 3 == 0:
                model.layer(x)
            if step % 2 == 0:
                model(x)
        assert counter.frame_count == 1


def test_a_layer_whose_calls_are_compiled(alarms):
    """Its calls are not seen, so that reads beside them tell nothing."""
    model = Reader(adapted(7, 5), ORDINARY["and then the call"])
    model.layer.compile(backend="eager")
    for _ in range(4):
        model(torch.randn(3, 7))
    assert not alarms()


def test_a_read_keeps_nothing_of_its_frame_alive():
    """To look at a frame's locals would keep them until it returns."""

    def main():
        layer, large = LoRALinear(8, 6, 2, 4.0), torch.zeros(1000)
        assert layer.weight.dtype == torch.float32
        alive = weakref.ref(layer), weakref.ref(large)
        del layer, large
        gc.collect()
        assert [each() for each in alive] == [None, None]

    main()


class Asks(nn.Module):
    """Compares the weight of a part that it does not use with None."""

    def __init__(self, unused: nn.Module) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), unused

    def forward(self, x):
        if self.unused.weight is None:
            raise ValueError
        if self.unused.weight is not None and x.ndim:
            x = x + 1
        missing = self.unused.weight is None
        return self.used(x) if not missing else x


def test_a_comparison_with_none_computes_nothing(recwarn):
    model = Asks(LoRALinear(4, 4, 2, 4.0, init_lora_weights=False))
    for _ in range(3):
        model(torch.randn(2, 4))
    assert not recwarn.list
    model = route(Asks(nn.Linear(4, 4)))
    model.add("a", rank=2, alpha=4, target_modules=["used", "unused"])
    for _ in range(2):
        with model.adapters("a"):
            model.model(torch.randn(2, 4))
