"""FSDP2 and DDP over an accelerated model: two processes compute what one does with plain PEFT."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from peft_models import accelerated, build, inputs, lora_config, lora_layers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import lora_kernels
from lora_kernels.testing import assert_within_policy

PROCESSES = 2

LORA = lora_config(lora_bias=True)
DORA = lora_config(use_dora=True)


def shard_layers_and_model(model: nn.Module, **settings) -> nn.Module:
    for layer in lora_layers(model).values():
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def shard_model(model: nn.Module, **settings) -> nn.Module:
    return fully_shard(model, **settings)


def shard_base_layers(model: nn.Module, **settings) -> nn.Module:
    """Their weights are whole only inside their own forward (PEFT's DoRA fails on that)."""
    for layer in lora_layers(model).values():
        fully_shard(layer.base_layer, **settings)
    return fully_shard(model, **settings)


def shard_adapters(model: nn.Module, **settings) -> nn.Module:
    for layer in lora_layers(model).values():
        for module in (*layer.lora_A.values(), *layer.lora_B.values()):
            fully_shard(module, **settings)
    return fully_shard(model, **settings)


def replicate(model: nn.Module, **settings) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def loss_and_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The second of two steps of SGD: weights are gathered anew for it."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        y = model(x)
        y.sin().mean().backward()
        optimizer.step()
    results = {"y": y.detach()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            results[name.removeprefix("module.")] = grad
    return results


def check(rank: int, shard: Callable, configs: list, fused: bool) -> None:
    plain = build(*configs)
    x = inputs(2 * 9).detach()
    exact = loss_and_gradients(copy.deepcopy(plain).double(), x.double())
    single = loss_and_gradients(copy.deepcopy(plain), x)

    model = accelerated(plain)
    report = lora_kernels.accelerate(model)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    rows = slice(rank * 9, (rank + 1) * 9)
    ours = loss_and_gradients(shard(model, mesh=mesh), x[rows])
    assert ours.keys() == single.keys()
    for name, value in ours.items():
        part = rows if name == "y" else slice(None)
        assert_within_policy(name, value, single[name][part], exact[name][part])

    report.refresh()
    assert (len(report.fast) == 3) == fused, str(report)
    assert (report.delegated_calls == {}) == fused, str(report)
    if fused and shard is not replicate:
        assert all("sharded by FSDP" in report.notes[name] for name in report.fast)
    elif not fused:
        assert all("hooks" in reason for reason in report.delegated.values())
    assert str(lora_kernels.accelerate(model)) == str(report)


def check_mixed_precision() -> None:
    """fp32 parameters at rest, bf16 in the forward: the layer sees bf16 everywhere."""
    plain = build(lora_config())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = []
    for model in (copy.deepcopy(plain), accelerated(plain)):
        sharded = shard_layers_and_model(model, mp_policy=policy)
        results.append(loss_and_gradients(sharded, inputs(9).detach()))
    exact = loss_and_gradients(copy.deepcopy(plain).double(), inputs(9).detach().double())
    for name, oracle in exact.items():
        theirs, ours = (result[name] for result in results)
        assert_within_policy(name, ours, theirs, oracle, torch.bfloat16)
    assert lora_kernels.accelerate(model).delegated_calls == {}


def check_undo_and_late_accelerate() -> None:
    model = build(lora_config())
    report = lora_kernels.accelerate(model)
    fully_shard(model.base_model.model.up)
    with pytest.raises(RuntimeError, match=r"base_model.model.up has become .*FSDPLinear"):
        report.undo()
    assert len(lora_kernels.accelerate(model).fast) == 3

    late = build(lora_config())
    fully_shard(late.base_model.model.up)
    report = lora_kernels.accelerate(late)
    assert list(report.delegated) == ["base_model.model.up"]
    assert "call accelerate before fully_shard" in report.delegated["base_model.model.up"]


def run_process(rank: int, rendezvous: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES
    )
    try:
        for shard, configs, fused in (
            (replicate, [LORA, DORA], True),
            (shard_layers_and_model, [LORA, DORA], True),
            (shard_model, [LORA, DORA], True),
            (shard_base_layers, [LORA, lora_config(r=2)], False),
            (shard_adapters, [LORA, lora_config(r=2)], False),
        ):
            try:
                check(rank, shard, configs, fused)
            except Exception as error:
                raise AssertionError(f"{shard.__name__}: {error}") from error
        check_mixed_precision()
        check_undo_and_late_accelerate()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(run_process, (str(tmp_path / "rendezvous"),), nprocs=PROCESSES)
