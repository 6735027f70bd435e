"""Rows that share names, and repeated batches: each row is its adapter alone, or it raises."""

import re

import pytest
import torch
from routed_models import assert_rows, llama, routed_with, tokens
from torch import nn

from lora_kernels import route

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:.*gradient_checkpointing.*:FutureWarning"
)

# --- rows that share a name, and repeated batches ---------------------------------------------

ROWS = {
    "beams": ({"beams": 3}, [0, 0, 0, 1, 1, 1]),
    "stacked": ({"stacked": 3}, [0, 1, 0, 1, 0, 1]),
    "both": ({"beams": 2, "stacked": 3}, [0, 0, 1, 1] * 3),
    "less of both": ({"beams": 2, "stacked": 3}, [0, 0, 1, 1]),
    "neither of both": ({"beams": 2, "stacked": 3}, [0, 1]),
}


@torch.no_grad()
@pytest.mark.parametrize(("said", "rows"), ROWS.values(), ids=ROWS)
def test_rows_that_were_said(files, said, rows):
    routed = routed_with(files)
    names, ids = ["two", "one"], tokens(len(rows), 4)
    with routed.adapters(names, **said):
        assert_rows(routed.model(ids).logits, [names[row] for row in rows], ids)


@torch.no_grad()
def test_guidance(files):
    """The batch once with its prompts and once without: twice as many rows, by ``cat([x, x])``."""
    routed = routed_with(files)
    names, ids = ["two", "one"], tokens(2, 5)
    both = torch.cat([ids, ids.flip(1)])
    with routed.adapters(names):
        for wrong in (both, both[:3]):
            with pytest.raises(ValueError, match=r"expected 2 rows .* stacked= where the whole"):
                routed.model(wrong)
    with routed.adapters(names, stacked=2):
        assert_rows(routed.model(both).logits, names * 2, both)
        with pytest.raises(ValueError, match="expected 2 or 4 rows"):
            routed.model(both[:3])


class Stacks(nn.Module):
    """A model that repeats its batch inside, as guidance in a model of diffusion does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids):
        return self.inner(torch.cat([input_ids, input_ids.flip(1)])).logits


@torch.no_grad()
def test_a_batch_stacked_inside_of_the_model(files):
    model = Stacks(llama())
    routed = route(model)
    for name in ("one", "two"):
        routed.add(name, rank=2, alpha=4, target_modules=["q_proj", "up_proj"])
        for parameter in routed.parameters_of(name):
            parameter.normal_(0, 0.3)
    ids = tokens(2, 5)
    with routed.adapters(["two", "one"], stacked=2):
        ours = model(ids)
    for row, name in enumerate(["two", "one", "two", "one"]):
        with routed.adapters(name):
            torch.testing.assert_close(ours[row], model(ids)[row])


def test_stacked_pairs_of_preference_training(files):
    """Chosen answers over rejected ones: each adapter's gradient is that of its own pairs."""
    routed = routed_with(files, "one", "two", trainable=True)
    chosen, rejected = tokens(2, 5), tokens(4, 5)[2:]

    def loss(pairs):
        scores = routed.model(pairs).logits.logsumexp(-1).sum(1)
        half = len(pairs) // 2
        return -nn.functional.logsigmoid(scores[:half] - scores[half:]).sum()

    with routed.adapters(["two", "one"], stacked=2):
        loss(torch.cat([chosen, rejected])).backward()
    together = {name: [p.grad.clone() for p in routed.parameters_of(name)] for name in routed.names}
    for row, name in enumerate(["two", "one"]):
        routed.model.zero_grad()
        with routed.adapters(name):
            loss(torch.stack([chosen[row], rejected[row]])).backward()
        for ours, parameter in zip(together[name], routed.parameters_of(name), strict=True):
            torch.testing.assert_close(ours, parameter.grad)
            assert ours.abs().sum() > 0


BAD_ARGUMENTS = {
    "beams": ({"beams": 0}, ValueError, "beams: expected at least 1, got 0"),
    "stacked": ({"stacked": 2.0}, TypeError, "stacked: expected an integer, got float"),
    "a flag": ({"beams": True}, TypeError, "beams: expected an integer, got bool"),
    "rows": ({"rows": ["one"]}, TypeError, "rows: expected names by module, got list"),
    "module": ({"rows": {"vision": "one"}}, ValueError, "rows: there is no module 'vision'"),
    "name": ({"rows": {"model": ["three"]}}, ValueError, "rows['model']: expected '__base__' or"),
    "names": ({"rows": {"model": []}}, ValueError, "rows['model']: expected at least one name"),
    "kind": ({"rows": {"model": 3}}, TypeError, "rows['model']: expected a name, a list of names"),
}


@pytest.mark.parametrize(("said", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(files, said, error, message):
    routed = routed_with(files)
    with pytest.raises(error, match=re.escape(message)), routed.adapters("one", **said):
        pass
