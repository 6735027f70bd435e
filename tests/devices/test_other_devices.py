"""Devices that are neither a CPU nor a CUDA one, without such a device."""

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

import lora_kernels
from lora_kernels.integrations.peft.state import read_call
from lora_kernels.ops.linear import explain
from lora_kernels.runtime import dispatch, dropout

OPS = [op for op in torch._C._dispatch_get_all_op_names() if op.startswith("lora_kernels::")]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot be given a device in Python",
)
def test_composed_and_accelerate_on_a_pretended_device():
    """Torch takes such a device for the machine's accelerator: it has a process of its own."""
    tests = Path(__file__).with_name("on_pretended_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", tests]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU"])
def test_every_operation_has_a_kernel(key):
    assert len(OPS) >= 14
    missing = [
        op for op in OPS if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(op, key)
    ]
    assert not missing
    for op in OPS:
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(op, f"Autograd{key}")


def fake_call(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "x": torch.empty(2, 3, 23, device=device, dtype=dtype),
        "weight": torch.empty(37, 23, device=device, dtype=dtype),
        "lora_a": torch.empty(4, 23, device=device),
        "lora_b": torch.empty(37, 4, device=device),
    }


@pytest.mark.parametrize("device", ["mps", "xpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shapes_of_a_call(device, dtype):
    with FakeTensorMode():
        call = fake_call(device, dtype)
        y = lora_kernels.lora_linear(**call, scaling=0.5, dropout_p=0.1)
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 37), dtype, device)
        seed = dropout.draw_seed(y.device)
        assert (seed.dtype, seed.shape, seed.device.type) == (torch.int64, (), device)
        scaling = torch.tensor(0.5, dtype=torch.float64)
        operands = call["lora_a"], call["lora_b"], scaling
        base, place = ([call["weight"]], "dense", []), (0, 0, 23)
        y, h, mask, _ = torch.ops.lora_kernels.lora_linear_forward(
            call["x"], *base, *operands, None, None, 0.1, seed, *place, False, "auto"
        )
        # What is saved: h as wide as a product can be, and the mask, which composed has drawn.
        assert (h.shape, h.dtype) == ((6, 4), torch.float32)
        assert (mask.shape, mask.dtype) == ((6, 3), torch.uint8)
        dx, grad_a, grad_b, _, _ = torch.ops.lora_kernels.lora_linear_backward(
            y, call["x"], *base, *operands, h, None, None, mask, 0.1, seed, *place,
            (True, True, True, False, False), "auto",
        )  # fmt: skip
        assert (dx.shape, dx.dtype) == (call["x"].shape, dtype)
        assert (grad_a.shape, grad_b.shape) == ((4, 23), (37, 4))
        assert lora_kernels.lora_weight_norm(call["weight"], *operands).dtype == torch.float32


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_autocast(device):
    # By its flags: torch.autocast itself switches MPS's off where there is none.
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.set_autocast_enabled(device, True)
    try:
        with FakeTensorMode():
            y = lora_kernels.lora_linear(**fake_call(device, torch.float32), scaling=0.5)
    finally:
        torch.set_autocast_enabled(device, False)
    assert (y.dtype, y.device.type) == (torch.bfloat16, device)


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_what_serves_them(device):
    with FakeTensorMode():
        call = fake_call(device, torch.bfloat16)
        assert explain(**call).backend == "composed"
        assert explain(**call, backend="composed").backend == "composed"
        for backend in ("native", "triton"):
            with pytest.raises(ValueError, match=f"for '{device}' devices yet"):
                explain(**call, backend=backend)


@pytest.mark.parametrize("device", ["mtia", "ipu"])
def test_others_are_refused(device):
    """Before the dispatcher does, which names no device that would do."""
    assert not any(
        torch._C._dispatch_has_computed_kernel_for_dispatch_key(op, device.upper())
        for op in OPS
        if op != "lora_kernels::lora_weight_norm"  # one kernel for whatever there is
    )
    with FakeTensorMode():
        call = fake_call(device, torch.float32)
        message = f"no kernel for '{device}' devices, only for cpu, cuda, mps, xpu"
        with pytest.raises(ValueError, match=f"^x: .*{message}"):
            lora_kernels.lora_linear(**call, scaling=0.5)
        with pytest.raises(ValueError, match=message):
            explain(**call)
    assert dispatch.unavailable("reference", torch.device(device)) is None
    assert dispatch.unavailable("composed", torch.device(device)) is not None
    assert dispatch.unserved(torch.device("meta")) is None


def test_meta_tensors_have_no_autocast():
    """An accelerated layer on the meta device says why it leaves an input to PEFT."""
    config = peft.LoraConfig(target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(23, 37)), config).to("meta")
    assert len(lora_kernels.accelerate(model).fast) == 1
    layer = model.base_model.model[0]
    assert layer(torch.empty(5, 23, device="meta")).shape == (5, 37)
    reason = read_call(layer, torch.empty(5, 23, device="meta", dtype=torch.bfloat16), (), {})
    assert reason == "x is bfloat16 and the base weight float32, outside autocast"
