"""Same bits from run to run: nothing of ours adds floating point numbers by atomics on a GPU.

Without one: which of torch's operations are called is seen on a CPU as well. ``index_put`` with
``accumulate``, which indexing has for its derivative, sorts; a sum of integers has no order.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_kernels import LoRAEmbedding
from lora_kernels.ops.routed import AdapterBank, Routing, routed_lora

K, N, M = 12, 9, 5
BY_ATOMICS = {
    "index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_",
    "put", "put_", "bincount", "histc", "_index_put_impl_",
}  # fmt: skip


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(each.is_floating_point() for each in tree_leaves(result) if torch.is_tensor(each)):
            self.names.add(function._schema.name.partition("::")[2])
        return result


def test_they_are_seen():
    with Seen() as seen:
        torch.zeros(3).index_add_(0, torch.tensor([1, 1]), torch.ones(2))
        torch.zeros(3, dtype=torch.int64).scatter_add_(0, torch.tensor([1]), torch.tensor([1]))
    assert seen.names & BY_ATOMICS == {"index_add_"}


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_derivatives_of_derivatives_of_routed_operations(dropout):
    """A token names an adapter twice, and others between."""
    bank = AdapterBank(K, N)
    for name, rank in (("a", 3), ("b", 2), ("c", 4)):
        bank.add(name, torch.randn(rank, K), torch.randn(N, rank), 0.5, dropout)
    ids = torch.tensor([[0, 0, 1], [2, 0, 0], [1, 1, 1], [-1, 2, 2], [-1, -1, -1]])
    x, seed = torch.randn(M, K, requires_grad=True), torch.tensor(7)
    routing = Routing.from_weighted(ids, torch.randn(M, 3), bank)
    y = routed_lora(x, bank, routing, seed=seed, backend="composed")
    with Seen() as seen:
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        torch.autograd.grad(dx.square().sum(), [x, *bank.parameters()])
    assert "mm" in seen.names and not seen.names & BY_ATOMICS


def test_an_embedding():
    layer = LoRAEmbedding.from_embedding(torch.nn.Embedding(7, 6), rank=3, alpha=6)
    with Seen() as seen:
        layer(torch.tensor([[1, 1, 2], [1, 0, 6]])).square().sum().backward()
    assert "embedding_dense_backward" in seen.names and not seen.names & BY_ATOMICS
