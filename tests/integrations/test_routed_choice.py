"""``with routed.adapters(...)``: never the wrong adapter, never the base model in silence."""

import asyncio
import re
import threading

import pytest
import torch
from routed_models import alone, llama, routed_with, tokens
from torch import nn

from lora_kernels import Routing, route

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:.*gradient_checkpointing.*:FutureWarning"
)


def test_outside_of_a_choice(files):
    routed = route(llama())
    ids = tokens(2, 3)
    routed.model(ids)  # no adapters yet
    routed.load("one", files / "one")
    with pytest.raises(RuntimeError, match=r"adapters \['one'\] and nothing says which"):
        routed.model(ids)
    with pytest.raises(ValueError, match="stop"), routed.adapters("one"):
        raise ValueError("stop")
    with pytest.raises(RuntimeError, match="nothing says which"):
        routed.model(ids)
    routed.remove("one")
    assert torch.equal(routed.model(ids).logits, llama()(ids).logits)


@torch.no_grad()
def test_a_choice_in_a_choice(files):
    routed = routed_with(files)
    ids = tokens(1, 3)
    with routed.adapters("one"):
        outer = routed.model(ids).logits
        with routed.adapters("two"):
            assert not torch.allclose(routed.model(ids).logits, outer)
        assert torch.equal(routed.model(ids).logits, outer)


BAD_CHOICES = {
    "unknown": ("none", ValueError, "expected '__base__' or one of ['one', 'two', 'last'], got"),
    "none": ([], ValueError, "expected at least one name, got none"),
    "number": ([0], TypeError, "expected names, got a int"),
    "tensor": (torch.tensor([0]), TypeError, "a name, a list of names or a Routing, got Tensor"),
}


@pytest.mark.parametrize(("names", "error", "message"), BAD_CHOICES.values(), ids=BAD_CHOICES)
def test_bad_choices(files, names, error, message):
    routed = routed_with(files)
    with pytest.raises(error, match=re.escape(message)), routed.adapters(names):
        pass


def test_batches_that_do_not_fit(files):
    routed = routed_with(files)
    with routed.adapters(["one", "two"]):
        # 3 rows of 4 tokens: 12 tokens could be halved, as those of 2 rows before; 4 rows too.
        for shape in [(3, 4), (4, 3)]:
            with pytest.raises(ValueError, match="expected 2 rows on axis 0 for 2 names"):
                routed.model(tokens(*shape))
            routed.model(tokens(2, 6))
    other = Routing.from_sequences(["one"], [4], routed_with(files, "one").slots)
    with pytest.raises(ValueError, match="a routing of this model's slots"), routed.adapters(other):
        pass


@torch.no_grad()
def test_threads_have_a_choice_each(files):
    routed, found = routed_with(files), {}

    def elsewhere():
        try:
            routed.model(tokens(1, 3))
        except RuntimeError as error:
            found["without"] = str(error)
        with routed.adapters("two"):
            found["two"] = routed.model(tokens(1, 3)).logits

    with routed.adapters("one"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        found["one"] = routed.model(tokens(1, 3)).logits
    assert "nothing says which of them to use" in found["without"]
    for name in ("one", "two"):
        torch.testing.assert_close(found[name], alone(name)(tokens(1, 3)).logits)


@torch.no_grad()
def test_tasks_have_a_choice_each(files):
    routed = routed_with(files)

    async def one(entered, leave):
        with routed.adapters("one"):
            entered.set()
            await leave.wait()
            return routed.model(tokens(1, 3)).logits

    async def both():
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(one(entered, leave))
        await entered.wait()
        with pytest.raises(RuntimeError, match="nothing says which"):
            routed.model(tokens(1, 3))
        with routed.adapters("two"):
            two = routed.model(tokens(1, 3)).logits
        leave.set()
        return await task, two

    for name, logits in zip(("one", "two"), asyncio.run(both()), strict=True):
        torch.testing.assert_close(logits, alone(name)(tokens(1, 3)).logits)


class Flat(nn.Module):
    """Tokens one after the other, as pooled, flattened and unpadded models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, flatten):
        return self.second(flatten(self.first(x)))


@torch.no_grad()
def test_tokens_without_rows():
    routed = route(Flat())
    for name in ("one", "two"):
        routed.add(
            name, rank=2, alpha=2, target_modules=["first", "second"], init_lora_weights=False
        )
    x = torch.randn(4, 3, 6)
    with routed.adapters(["one", "two"], beams=2):
        kept = routed.model(x, lambda h: h)
        torch.testing.assert_close(routed.model(x, lambda h: h.flatten(0, 1)).view(4, 3, 6), kept)
        torch.testing.assert_close(routed.model(x, lambda h: h[:, 0]), kept[:, 0])
        with pytest.raises(ValueError, match=r"expected the tokens of 2 or 4 rows .* \[10, 6\]"):
            routed.model(x, lambda h: h.flatten(0, 1)[2:])  # padding cut out
    with routed.adapters(["one", "two"]):
        torch.testing.assert_close(routed.model(x[::2, 0], lambda h: h), kept[::2, 0])
        with pytest.raises(ValueError, match="expected the tokens of 2 rows"):
            routed.model(x[:, 0], lambda h: h)
    routing = Routing.from_sequences(["one", "two"], [6, 4], routed.slots)
    with routed.adapters(routing):
        cut = routed.model(x.flatten(0, 1)[:10], lambda h: h)
    torch.testing.assert_close(cut, kept.flatten(0, 1)[:10])


@pytest.mark.parametrize("fullgraph", [True, False], ids=["routing", "names"])
def test_a_compiled_model_follows_the_choice(fullgraph):
    routed = route(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)))
    for name, targets in (("one", ["0", "2"]), ("two", ["2"])):
        routed.add(name, rank=2, alpha=2, target_modules=targets, init_lora_weights=False)
    backend = "aot_eager" if fullgraph else "eager"
    compiled = torch.compile(routed.model, backend=backend, fullgraph=fullgraph)
    x = torch.randn(4, 3, 6)

    def choice(names):
        return Routing.from_sequences(names, 6, routed.slots) if fullgraph else names

    def run(model, names):
        routed.model.zero_grad()
        with routed.adapters(choice(names), beams=2):
            y = model(x)
        y.square().sum().backward()
        return y.detach(), {
            name: [p.grad for p in routed.parameters_of(name)] for name in ("one", "two")
        }

    for names in (["one", "two"], ["two", "one"], ["two", "__base__"]):
        (expected, eager), (y, gradients) = run(routed.model, names), run(compiled, names)
        torch.testing.assert_close(y, expected)
        for name in ("one", "two"):
            # A graph knows no names: who has none of the tokens gets exact zeros from it.
            if name not in names:
                assert eager[name] == [None] * len(eager[name])
                assert not any(gradient.any() for gradient in gradients[name])
                continue
            for value, other in zip(gradients[name], eager[name], strict=True):
                assert other.any()
                torch.testing.assert_close(value, other)
