"""Layers that FSDP2 has sharded, on one process and on two: merged, loaded, reset as one would."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from lora_kernels.nn import LoRAEmbedding, LoRALinear

K, N, RANK = 18, 13, 3  # of which two processes cannot have equal parts

LINEAR = {
    "lora": {},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora_bf16": {"use_dora": True, "dtype": torch.bfloat16, "adapter_dtype": torch.bfloat16},
}
EMBEDDING = {"embedding": {}, "embedding_dora": {"use_dora": True}}


def make(kind: str, **options) -> nn.Module:
    options = {"init_lora_weights": False, **options}
    if kind in EMBEDDING:
        layer = LoRAEmbedding(K, N, RANK, 7, **EMBEDDING[kind], **options)
    else:
        layer = LoRALinear(K, N, RANK, 7, **LINEAR[kind], **options)
    if layer.use_dora and not layer.base_layer.weight.is_meta:
        with torch.no_grad():
            layer.lora_magnitude_vector *= 1.25
    return layer


def draw_input(layer):
    if isinstance(layer, LoRAEmbedding):
        return torch.randint(K, (2, 5))
    return torch.randn(2, 5, K, dtype=layer.base_layer.weight.dtype)


def shard_layer(model, mesh):
    fully_shard(model[0], mesh=mesh)


def shard_model(model, mesh):
    """The layer belongs to the root, which stays whole after a forward."""
    fully_shard(model, mesh=mesh)


def shard_layer_and_model(model, mesh):
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_base(model, mesh):
    """Its weight is whole inside of its own forward alone."""
    fully_shard(model[0].base_layer, mesh=mesh)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def values(module) -> dict:
    return {name: whole(value.detach()).clone() for name, value in module.state_dict().items()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def check_merging(kind, shard, mesh, called_before, keep) -> None:
    layer = make(kind)
    alone = copy.deepcopy(layer)
    model = nn.Sequential(layer)
    shard(model, mesh)
    x = draw_input(alone)
    if called_before:
        model(x)
    frozen, base = values(alone), copy.deepcopy(alone.base_layer)
    alone.merge()
    for _ in range(2):
        layer.merge(keep)
        merged = {name: whole(p) for name, p in layer.base_layer.named_parameters()}
        assert torch.equal(merged["weight"], alone.base_layer.weight)
        assert_same(values(layer) if keep != "none" else frozen, frozen)
        for _ in range(2):  # FSDP gathers anew, and what is gathered is merged
            assert torch.equal(model(x), alone(x))
        if keep == "none":
            with pytest.raises(RuntimeError, match="unmerge: the frozen weight was not kept"):
                layer.unmerge()
            return
        layer.disable_adapters = True
        torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)
        layer.disable_adapters = False
        layer.unmerge()
        assert_same(values(layer), frozen)
        y = alone_unmerged(alone)(x)
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def alone_unmerged(alone):
    again = copy.deepcopy(alone)
    again.unmerge()
    return again


def check_loading_and_resetting(kind, shard, mesh, called_before) -> None:
    layer, other = make(kind), make(kind)
    alone = copy.deepcopy(layer)
    model = nn.Sequential(layer)
    shard(model, mesh)
    x = draw_input(alone)
    if called_before:
        model(x)
    layer.load_adapter(other.adapter_state_dict())
    alone.load_adapter(other.adapter_state_dict())
    assert_same(values(layer), values(alone))
    for _ in range(2):
        assert torch.equal(model(x), alone(x))

    base = values(layer.base_layer)
    torch.manual_seed(dist.get_rank())  # all take what the first has drawn
    layer.reset_lora_parameters()
    torch.manual_seed(0)
    alone.reset_lora_parameters()
    assert_same(values(layer), values(alone))
    assert_same(values(layer.base_layer), base)
    for _ in range(2):
        assert torch.equal(model(x), alone(x))
    layer.load_adapter(layer.adapter_state_dict())  # sharded values
    assert_same(values(layer), values(alone))


def check_training_goes_on(mesh) -> None:
    """Merged, unmerged, trained a step: as without FSDP."""
    layer = make("dora")
    alone = copy.deepcopy(layer)
    model = nn.Sequential(layer)
    shard_model(model, mesh)
    x = draw_input(alone)
    for module in (model, alone):
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            part = module[0] if module is model else module
            part.merge()
            part.unmerge()
            optimizer.zero_grad()
            module(x).sin().mean().backward()
            optimizer.step()
    ours, expected = values(layer), values(alone)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


ORDERS = {
    "parents_first": lambda modules: modules,
    "children_first": lambda modules: modules[::-1],
    "base_last": lambda modules: [modules[0], *modules[2:], modules[1]],
}


def check_materialising(kind, mesh, init_lora_weights, order) -> None:
    layer = make(kind, device="meta", init_lora_weights=init_lora_weights)
    model = nn.Sequential(layer)
    shard_model(model, mesh)
    model.to_empty(device="cpu")
    modules = [module for module in layer.modules() if hasattr(module, "reset_parameters")]
    for module in ORDERS[order](modules):
        module.reset_parameters()
    x = draw_input(layer)
    y = model(x)
    alone = make(kind)
    alone.load_state_dict(values(layer))
    if init_lora_weights:
        torch.testing.assert_close(y, alone.base_layer(x), rtol=1e-6, atol=1e-6)
    if layer.use_dora:
        torch.testing.assert_close(alone.lora_magnitude_vector.detach(), alone._weight_norm())
    assert all(torch.isfinite(value).all() for value in values(layer).values())


def check_an_embedding_of_dtensors(mesh) -> None:
    """Of tensor parallelism, which gives the indices as a DTensor too: torch's own operations."""
    layer = make("embedding")
    x = draw_input(layer)
    dist.broadcast(x, 0)
    expected = layer(x)
    for module in (layer, layer.base_layer):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                placed = distribute_tensor(parameter.detach(), mesh, [Replicate()])
                setattr(module, name, nn.Parameter(placed, parameter.requires_grad))
    y = layer(distribute_tensor(x, mesh, [Replicate()]))
    torch.testing.assert_close(y.full_tensor(), expected)


def check_refusals(mesh) -> None:
    for module, wrap in (
        (nn.Linear(K, N), LoRALinear.from_linear),
        (nn.Embedding(K, N), LoRAEmbedding.from_embedding),
    ):
        fully_shard(module, mesh=mesh)
        with pytest.raises(TypeError, match="plain Parameter, got a DTensor; wrap the layer befor"):
            wrap(module, RANK)
    layer = make("lora")
    fully_shard(layer.lora_B, mesh=mesh)
    with pytest.raises(ValueError, match="lora_B: it has hooks"):
        layer(draw_input(layer))


def run_process(rank: int, processes: int, rendezvous: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes
    )
    mesh = init_device_mesh("cpu", (processes,))
    shards = (shard_layer, shard_model, shard_layer_and_model)
    try:
        for kind, shard, called_before in itertools.product(
            [*LINEAR, *EMBEDDING], shards, (False, True)
        ):
            torch.manual_seed(5)
            keep = ("device", "cpu", "none")[called_before + (shard is shard_model)]
            try:
                check_merging(kind, shard, mesh, called_before, keep)
                check_loading_and_resetting(kind, shard, mesh, called_before)
            except Exception as error:
                where = f"{kind}, {shard.__name__}, called before: {called_before}, {keep}"
                raise AssertionError(f"{where}: {error}") from error
        for kind in ("lora", "lora_bias", "dora", *EMBEDDING):
            torch.manual_seed(5)
            check_merging(kind, shard_base, mesh, True, "device")
        check_training_goes_on(mesh)
        for kind, init, order in itertools.product(
            ("lora", "dora", "embedding_dora"), (True, False), ORDERS
        ):
            torch.manual_seed(5)
            check_materialising(kind, mesh, init, order)
        check_refusals(mesh)
        check_an_embedding_of_dtensors(mesh)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("processes", [1, 2])
def test_processes(tmp_path, processes):
    torch.multiprocessing.spawn(
        run_process, (processes, str(tmp_path / "rendezvous")), nprocs=processes
    )
