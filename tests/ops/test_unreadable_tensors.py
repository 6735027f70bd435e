"""Tensors without numbers, or that autograd cannot keep, are an error with their name: no crash."""

import pytest
import torch

from lora_kernels import (
    AdapterBank,
    Routing,
    lora_linear,
    lora_weight_norm,
    routed_lora,
    routed_lora_linear,
)
from lora_kernels.runtime import cpu_extension as native
from lora_kernels.testing import LoRAProblem

BACKENDS = ["composed", *([] if native.missing() else ["native"])]
M, K, N, R = 6, 10, 12, 3


def behind_an_offset(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins in the middle of its storage: freed, its address is not even null."""
    storage = torch.zeros(1000 + tensor.numel(), dtype=tensor.dtype)
    return storage[1000:].view(tensor.shape).copy_(tensor)


def free(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def operands(**options) -> dict:
    p = LoRAProblem.random((M,), K, N, R, with_output_scale=True, **options)
    names = ("x", "weight", "lora_a", "lora_b", "scaling", "bias", "output_scale")
    return {name: getattr(p, name) for name in names}


@pytest.mark.parametrize("known", [True, False], ids=["known", "first"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [True, False], ids=["output_scale", "plain"])
@pytest.mark.parametrize("offset", [True, False], ids=["behind an offset", "from the start"])
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias", "output_scale"])
def test_freed_before_a_forward(name, offset, scaled, backend, known, plans_forgotten):
    """Whether the call is a first one or such calls have been served."""
    arguments = operands()
    if not scaled:
        arguments["scaling"] = 0.5
        del arguments["output_scale"]
    if name not in arguments:
        return
    if known:
        lora_linear(**arguments, backend=backend)
        lora_linear(**arguments | {"weight": None}, backend=backend)
    arguments[name] = behind_an_offset(arguments[name]) if offset else arguments[name].clone()
    free(arguments[name])
    with pytest.raises((ValueError, RuntimeError), match=r"freed|out of bounds|not allocated"):
        lora_linear(**arguments, backend=backend)
    if name in ("lora_a", "lora_b"):
        with pytest.raises(ValueError, match=rf"^{name}: expected a tensor with memory.*freed"):
            lora_linear(**arguments | {"weight": None}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [True, False], ids=["output_scale", "plain"])
@pytest.mark.parametrize("offset", [True, False], ids=["behind an offset", "from the start"])
@pytest.mark.parametrize("name", ["x", "bias", "output_scale", "rank_scale"])
def test_freed_before_a_forward_without_a_base(name, offset, scaled, backend):
    """No product of torch's looks at these."""
    arguments = operands() | {"weight": None, "rank_scale": torch.randn(R)}
    if not scaled:
        arguments["output_scale"] = None
    if arguments[name] is None:
        return
    arguments[name] = behind_an_offset(arguments[name]) if offset else arguments[name].clone()
    free(arguments[name])
    with pytest.raises(ValueError, match=rf"^{name}: expected a tensor with memory.*freed"):
        lora_linear(**arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_freed_between_a_forward_and_its_backward(name, dropout_p, backend):
    arguments = operands()
    arguments[name] = behind_an_offset(arguments[name])
    x, other = arguments["x"], "lora_b" if name == "lora_a" else "lora_a"
    wanted = [x.requires_grad_(), arguments[other].requires_grad_()]
    y = lora_linear(**arguments, dropout_p=dropout_p, backend=backend)
    free(arguments[name])
    with pytest.raises((ValueError, RuntimeError), match=r"freed|cannot read"):
        torch.autograd.grad(y.sum(), wanted)


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b"])
def test_freed_before_a_norm(name):
    arguments = {key: operands()[key] for key in ("weight", "lora_a", "lora_b", "scaling")}
    arguments[name] = behind_an_offset(arguments[name])
    free(arguments[name])
    with pytest.raises(ValueError, match=rf"^{name}: expected a tensor with memory.*freed"):
        lora_weight_norm(**arguments)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_lazily_zero_factors(name, backend):
    arguments = operands()
    arguments[name] = torch._efficientzerotensor(arguments[name].shape)
    with pytest.raises(ValueError, match=rf"^{name}: .*lazy zeros"):
        lora_linear(**arguments, backend=backend)
    del arguments["output_scale"]
    with pytest.raises(ValueError, match=rf"^{name}: .*lazy zeros"):
        lora_linear(**arguments | {"scaling": 0.5}, backend=backend)
    arguments = {key: arguments[key] for key in ("weight", "lora_a", "lora_b", "scaling")}
    with pytest.raises(ValueError, match=rf"^{name}: .*lazy zeros"):
        lora_weight_norm(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [True, False], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "x"])
def test_made_in_inference_mode(name, number, backend):
    """It serves where nothing is recorded, and is named where the backward would need it."""
    arguments = operands()
    del arguments["output_scale"]
    arguments["scaling"] = 0.7 if number else arguments["scaling"]
    expected = lora_linear(**arguments, backend=backend)
    with torch.inference_mode():
        arguments[name] = arguments[name].clone()
    assert torch.equal(lora_linear(**arguments, backend=backend), expected)
    for other in {"lora_a", "lora_b"} - {name}:
        arguments[other].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"^{name}: it was made in inference mode"):
        lora_linear(**arguments, backend=backend)


# --- many adapters ---------------------------------------------------------------------------


def bank_of(names: str = "ab") -> AdapterBank:
    bank = AdapterBank(K, N)
    for name in names:
        bank.add(name, torch.randn(R, K), torch.randn(N, R), 0.5)
    return bank


@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
@pytest.mark.parametrize("broken", ["freed", "lazy zeros"])
def test_factors_that_a_bank_does_not_take(name, broken):
    factors = {"lora_a": torch.randn(R, K), "lora_b": torch.randn(N, R)}
    if broken == "freed":
        factors[name] = behind_an_offset(factors[name])
        free(factors[name])
    else:
        factors[name] = torch._efficientzerotensor(factors[name].shape)
    bank = bank_of()
    with pytest.raises(ValueError, match=rf"^{name}: expected a tensor with memory.*{broken}"):
        bank.add("c", **factors, scaling=1.0)
    assert list(bank) == ["a", "b"] and "c" not in bank.slots


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("replaced", [True, False], ids=["other memory", "the bank's storage"])
@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_a_bank_whose_memory_was_freed(name, replaced, backend):
    bank, x = bank_of(), torch.randn(M, K)
    routing = Routing.from_sequences(["b", "a"], M // 2, bank)
    parameter = getattr(bank["b"], name)
    if replaced:
        parameter.data = behind_an_offset(parameter.data)
    free(parameter)
    for _ in range(2):  # and it stays an error
        with pytest.raises(RuntimeError, match=r"its storage was freed"):
            routed_lora(x, bank, routing, backend=backend)
    with pytest.raises(RuntimeError, match=r"its storage was freed"):
        bank.rebind()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["x", "weight", "x that is gathered"])
def test_routed_operands_made_in_inference_mode(name, backend):
    """Of the second x a backend takes the rows, which are a tensor of their own."""
    bank = bank_of()
    routing = Routing.from_sequences(["b", "a"], M // 2, bank)
    arguments = {"x": torch.randn(M, K), "weight": torch.randn(N, K)}
    if name.startswith("x "):
        name, arguments["x"] = "x", torch.randn(M // 2, 2, K).transpose(0, 1)
    with torch.no_grad():  # composed adds up in another order where nothing is saved
        expected = routed_lora_linear(**arguments, bank=bank, routing=routing, backend=backend)
    with torch.inference_mode():
        arguments[name] = arguments[name].clone(memory_format=torch.preserve_format)
    with torch.no_grad():
        y = routed_lora_linear(**arguments, bank=bank, routing=routing, backend=backend)
    assert torch.equal(y, expected)
    with pytest.raises(RuntimeError, match=rf"^{name}: it was made in inference mode"):
        routed_lora_linear(**arguments, bank=bank, routing=routing, backend=backend)


def test_a_low_address_alone_is_no_reason(monkeypatch):
    """In processes whose heap begins low, the storage itself is asked."""
    from lora_kernels.runtime import tensor_state

    monkeypatch.setattr(tensor_state, "LOWEST_ADDRESS", 1 << 62)
    tensor = behind_an_offset(torch.ones(3, 4))
    assert tensor_state.has_memory(tensor) and tensor_state.has_memory(tensor[:0])
    free(tensor)
    assert not tensor_state.has_memory(tensor) and tensor_state.has_memory(tensor.to("meta"))
