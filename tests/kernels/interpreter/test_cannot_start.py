"""A kernel that cannot be started, whichever of a call's it is: composed serves the whole call."""

import pytest
import torch

from lora_kernels import AdapterBank, Routing, routed_expand, routed_lora, routed_shrink
from lora_kernels.ops.routed import choice as routed_choice
from lora_kernels.ops.routed import plan as routed_plan
from lora_kernels.ops.routed.triton import launch
from lora_kernels.runtime import verdicts

UNASKED = "triton" + routed_choice.UNASKED


class Refused:
    """In place of a kernel: the launches before it take place, its own does not."""

    def __init__(self):
        self.asked = 0

    def __getitem__(self, grid):
        self.asked += 1
        raise RuntimeError("out of resource: shared memory")


@pytest.fixture
def unasked(monkeypatch, tmp_path, plans_forgotten):
    """auto takes the interpreter's kernels, which nobody has named."""
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(verdicts, "_broken_here", {})
    routed_plan._guarded.cache_clear()
    verdicts.forget()
    choice = routed_choice.Choice("triton", "planted")

    make_plan = routed_plan.make_plan

    def of_triton(found, like, *, unasked):
        if unasked:
            return routed_plan.RoutedPlan(choice, UNASKED, reads_groups=False)
        return make_plan(found, like, unasked=False)

    monkeypatch.setattr("lora_kernels.ops.routed.make_plan", of_triton)
    yield
    routed_plan._guarded.cache_clear()
    verdicts.forget()


def case(tokens, pairs):
    bank = AdapterBank(40, 24)
    for name, rank in (("a", 4), ("b", 3)):
        bank.add(name, torch.randn(rank, 40), torch.randn(24, rank), scaling=0.5)
    ids = torch.tensor([[0, 1], [1, -1], [0, -1], [1, 0], [-1, -1]]).repeat(tokens // 5, 1)
    if pairs == 1:
        return bank, Routing.from_tokens(ids[:, 0], bank)
    return bank, Routing.from_weighted(ids, torch.rand(tokens, 2), bank)


@pytest.mark.parametrize(
    ("step", "kernel", "tokens", "pairs"),
    [
        ("both", "routed_shrink_kernel", 5, 1),
        ("both", "routed_expand_kernel", 5, 1),
        ("both", "routed_combine_kernel", 5, 2),
        ("both", "routed_expand_kernel", 300, 1),
        ("both", "routed_combine_kernel", 300, 2),
        ("expand", "routed_expand_kernel", 5, 1),
        ("expand", "routed_combine_kernel", 5, 2),
        ("expand", "routed_finish_kernel", 300, 1),
    ],
)
@torch.no_grad()
def test_nothing_is_written_in_place_before_the_last_launch(
    monkeypatch, unasked, step, kernel, tokens, pairs
):
    bank, routing = case(tokens, pairs)
    x, start, refused = torch.randn(tokens, 40), torch.randn(tokens, 24), Refused()
    h = routed_shrink(x, bank, routing, backend="composed")

    def call(out, backend):
        if step == "both":
            return routed_lora(x, bank, routing, out, backend=backend)
        return routed_expand(h, bank, routing, out, backend=backend)

    expected = call(start.clone(), "composed")
    monkeypatch.setattr(launch, kernel, refused)
    out = start.clone()
    with pytest.raises(RuntimeError, match="out of resource"):
        call(out, "triton")  # asked for by name
    assert torch.equal(out, start) and refused.asked == 1
    with pytest.warns(UserWarning, match="composed backend serves from now on"):
        call(out, "auto")
    assert torch.equal(out, expected) and refused.asked == 2
