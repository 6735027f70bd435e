"""Tensors of other classes: those that stand for others are refused, the rest is computed."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from lora_kernels import (
    AdapterBank,
    Routing,
    lora_linear,
    lora_weight_norm,
    routed_lora,
    routed_lora_linear,
)
from lora_kernels.ops.routed import routed_expand, routed_shrink

M, K, N, R = 4, 24, 13, 3


def int8(tensor):
    linear = nn.Linear(tensor.shape[-1], tensor.shape[0], bias=False)
    linear.weight = nn.Parameter(tensor.clone())
    quantize_(linear, Int8WeightOnlyConfig())
    return linear.weight


class Wrapper(torch.Tensor):
    """Holds a tensor, and takes the operations of aten alone."""

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)

    def __init__(self, tensor):
        self.tensor = tensor

    def __tensor_flatten__(self):
        return ["tensor"], None

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise AssertionError("nothing is launched")


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    rendezvous = tmp_path_factory.mktemp("gloo") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor: DTensor.from_local(tensor, mesh, [Replicate()])
    dist.destroy_process_group()


@pytest.fixture(params=["Int8Tensor", "DTensor", "Wrapper"])
def wrap(request):
    if request.param == "DTensor":
        return request.getfixturevalue("distributed")
    return {"Int8Tensor": int8, "Wrapper": Wrapper}[request.param]


def operands() -> dict:
    return {
        "x": torch.randn(M, K),
        "weight": torch.randn(N, K),
        "lora_a": torch.randn(R, K),
        "lora_b": torch.randn(N, R),
        "bias": torch.randn(N),
        "output_scale": torch.randn(N),
    }


def bank_and_routing() -> tuple[AdapterBank, Routing]:
    bank = AdapterBank(K, N)
    bank.add("one", torch.randn(R, K), torch.randn(N, R), 0.5)
    return bank, Routing.from_tokens([0, -1, 0, 0], bank)


def plain_linear(x, weight, lora_a, lora_b, bias, output_scale):
    return lora_linear(x, weight, lora_a, lora_b, 0.5, bias, output_scale=output_scale)


def norm(x, weight, lora_a, lora_b, bias, output_scale):
    return lora_weight_norm(weight, lora_a, lora_b, 0.5)


def routed(x, weight, lora_a, lora_b, bias, output_scale):
    bank, routing = bank_and_routing()
    return routed_lora(x, bank, routing)


def routed_linear(x, weight, lora_a, lora_b, bias, output_scale):
    bank, routing = bank_and_routing()
    return routed_lora_linear(x, weight, bank, routing, bias)


def shrink(x, weight, lora_a, lora_b, bias, output_scale):
    return routed_shrink(x, *bank_and_routing())


def added(x, weight, lora_a, lora_b, bias, output_scale):
    return AdapterBank(K, N).add("one", lora_a, lora_b, 1.0)


TAKEN = {
    plain_linear: ("x", "weight", "lora_a", "lora_b", "bias", "output_scale"),
    norm: ("weight", "lora_a", "lora_b"),
    routed: ("x",),
    routed_linear: ("x", "weight", "bias"),
    shrink: ("x",),
    added: ("lora_a", "lora_b"),
}
PLACES = [(function, name) for function, names in TAKEN.items() for name in names]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("function", "name"), PLACES, ids=[f"{function.__name__}-{name}" for function, name in PLACES]
)
def test_what_stands_for_another_tensor_is_refused_by_name(function, name, wrap, requires_grad):
    given = operands()
    if wrap is int8 and given[name].ndim < 2:
        return
    given["lora_a"].requires_grad_(requires_grad and name != "lora_a")
    given[name] = wrap(given[name])
    kind = type(given[name]).__name__
    with pytest.raises(TypeError, match=f"^{name}: expected a plain tensor, got a {kind}$"):
        function(**given)


def test_other_places_are_refused_too(distributed):
    bank, routing = bank_and_routing()
    x = torch.randn(M, K)
    scaling = distributed(torch.tensor(0.5))
    given = [operands()[name] for name in ("weight", "lora_a", "lora_b")]
    with pytest.raises(TypeError, match=r"^scaling: expected a plain tensor, got a DTensor"):
        lora_linear(x, *given, scaling)
    with pytest.raises(TypeError, match=r"^scaling: expected a plain tensor, got a DTensor"):
        lora_weight_norm(*given, scaling)
    with pytest.raises(TypeError, match=r"^out: expected a plain tensor, got a DTensor"):
        routed_lora(x, bank, routing, out=distributed(torch.zeros(M, N)))
    h = routed_shrink(x, bank, routing)
    with pytest.raises(TypeError, match=r"^h: expected a plain tensor, got a DTensor"):
        routed_expand(distributed(h), bank, routing)
    assert list(bank) == ["one"]


class Derived(torch.Tensor):
    """Dispatches as its values would."""


class DerivedParameter(nn.Parameter):
    pass


OTHERS = {
    "derived": lambda tensor: tensor.as_subclass(Derived),
    "parameter": lambda tensor: DerivedParameter(tensor, requires_grad=False),
    "awaited": AsyncCollectiveTensor,
}


@pytest.mark.parametrize("kind", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize(
    ("function", "name"), PLACES, ids=[f"{function.__name__}-{name}" for function, name in PLACES]
)
def test_classes_that_take_any_operation_are_computed(function, name, kind):
    given = operands()
    torch.manual_seed(1)
    expected = function(**given)
    torch.manual_seed(1)
    result = function(**{**given, name: kind(given[name])})
    if function is added:
        expected, result = expected.lora_a, result.lora_a
    assert torch.equal(torch.as_tensor(result).as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("function", [plain_linear, norm])
def test_fake_and_functional_tensors(function):
    with FakeTensorMode():
        given = operands()
        assert function(**given).shape == ((M, N) if function is plain_linear else (N,))
    given = operands()
    with FunctionalTensorMode():
        given = {name: FunctionalTensor.to_functional(value) for name, value in given.items()}
        assert isinstance(function(**given), FunctionalTensor)
