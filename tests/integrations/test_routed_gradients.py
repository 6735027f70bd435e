"""``route(model)``: adapters that a batch does not name have no gradients, also under DDP.

DDP has to look for parameters without gradients then: find_unused_parameters=True.
"""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from routed_results import AsOnADevice
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lora_kernels import Routing, route
from lora_kernels.integrations.routed import RoutedModel

PROCESSES, ROWS, TOKENS = 2, 2, 3


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 11), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def routed_layers(dtype: torch.dtype = torch.float64) -> RoutedModel:
    torch.manual_seed(0)
    routed = route(Layers().to(dtype))
    for rank, name in enumerate(("a", "b", "c", "never"), 1):
        targets = ["up"] if name == "c" else ["up", "down"]
        routed.add(name, rank=rank, alpha=4, target_modules=targets, init_lora_weights=False)
    return routed


def with_gradients(routed: RoutedModel) -> set[str]:
    found = set()
    for name in routed.names:
        absent = {parameter.grad is None for parameter in routed.parameters_of(name)}
        assert len(absent) == 1, name
        found |= set() if absent == {True} else {name}
    return found


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpoint"])
def test_an_optimizer_over_all_adapters_moves_those_that_are_named(checkpointed):
    routed = routed_layers()
    optimizer = torch.optim.AdamW(
        [p for name in routed.names for p in routed.parameters_of(name)], lr=0.1, weight_decay=0.1
    )
    for names in (["a", "b"], ["c", "never"], ["a", "__base__"], ["b", "b"]):
        before = {name: [p.clone() for p in routed.parameters_of(name)] for name in routed.names}
        optimizer.zero_grad()
        x = torch.randn(2, TOKENS, 7, dtype=torch.float64)
        with routed.adapters(names):
            if checkpointed:
                y = checkpoint(routed.model, x, use_reentrant=False)
            else:
                y = routed.model(x)
            y.square().sum().backward()
        optimizer.step()
        named = set(names) - {"__base__"}
        assert with_gradients(routed) == named
        for name in routed.names:
            same = map(torch.equal, before[name], routed.parameters_of(name))
            assert set(same) == {name not in named}, name


# --- DDP --------------------------------------------------------------------------------------


# Of each step, the names of each process; nobody uses "never", and "c" one process at times.
STEPS = [[["a", "b"], ["b", "a"]], [["a", "a"], ["c", "__base__"]], [["b", "c"], ["b", "b"]]]


def inputs(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(PROCESSES, ROWS, TOKENS, 7, generator=generator, dtype=torch.float64)


def trained(routed: RoutedModel, model: nn.Module, rank: int | None) -> list[set[str]]:
    """Steps of AdamW over all adapters; whose parameters had gradients in each."""
    adapters = [p for name in routed.names for p in routed.parameters_of(name)]
    optimizer, found = torch.optim.AdamW(adapters, lr=0.1, weight_decay=0.1), []
    for step, names in enumerate(STEPS):
        optimizer.zero_grad()
        x = inputs(step)
        mine = x.flatten(0, 1) if rank is None else x[rank]
        with routed.adapters([*names[0], *names[1]] if rank is None else names[rank]):
            loss = model(mine).square().sum()
            (loss / PROCESSES if rank is None else loss).backward()
        found.append(with_gradients(routed))
        optimizer.step()
    return found


def check_that_it_is_one_process(rank: int) -> None:
    whole, parted = routed_layers(), routed_layers()
    expected = trained(whole, whole.model, None)
    model = DistributedDataParallel(parted.model, find_unused_parameters=True)
    assert trained(parted, model, rank) == expected == [{"a", "b"}, {"a", "c"}, {"b", "c"}]
    ours = dict(parted.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-9, atol=1e-9, msg=name)
    start = dict(routed_layers().model.named_parameters())
    assert all(torch.equal(ours[n], p) for n, p in start.items() if ".never." in n)


def check_the_error_without_looking(rank: int) -> None:
    routed = routed_layers()
    model = DistributedDataParallel(routed.model)
    with routed.adapters("a"):
        model(inputs(0)[rank]).sum().backward()
        with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
            model(inputs(1)[rank])


def check_zeros_without_looking(rank: int) -> None:
    """Ids that the host does not know give every parameter a gradient, on every process."""
    routed = routed_layers()
    model, single = DistributedDataParallel(routed.model), copy.deepcopy(routed.model)
    with AsOnADevice():
        ids = torch.tensor([0, 1]).repeat_interleave(TOKENS)
        routing = Routing.from_tokens(ids, routed.slots)
    for step in range(2):
        routed.model.zero_grad()
        with routed.adapters(routing):
            model(inputs(step)[rank]).square().sum().backward()
    assert with_gradients(routed) == set(routed.names)
    with route(single).adapters(["a", "b"] * PROCESSES):
        (single(inputs(1).flatten(0, 1)).square().sum() / PROCESSES).backward()
    ours = dict(routed.model.named_parameters())
    for name, parameter in single.named_parameters():
        if parameter.requires_grad:
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(ours[name].grad, expected, msg=name)


def run_process(rank: int, rendezvous: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES
    )
    try:
        check_that_it_is_one_process(rank)
        check_the_error_without_looking(rank)
        check_zeros_without_looking(rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(run_process, (str(tmp_path / "rendezvous"),), nprocs=PROCESSES)
