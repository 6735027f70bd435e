"""``generate`` with many adapters: beams, guidance, contrastive and assisted search."""

import copy
import inspect
import pickle

import pytest
import torch
from routed_models import NAMES, VOCABULARY, alone, llama, routed_with, tokens, written

from lora_kernels import route

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:.*gradient_checkpointing.*:FutureWarning"
)

# --- generate ---------------------------------------------------------------------------------


GENERATION = {
    "guidance": {"guidance_scale": 1.7},
    "guidance and prompts without": {"guidance_scale": 1.7, "negative_prompt_ids": tokens(5, 3)},
    "returned beams": {"num_beams": 3, "num_return_sequences": 2},
    # Of one token: what is drawn does not depend on the generator, nor on the other rows.
    "returned samples": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "as many as names": {"num_beams": 5},
}


@pytest.mark.parametrize("settings", GENERATION.values(), ids=GENERATION)
def test_generate(files, settings):
    routed = routed_with(files)
    ids = tokens(5, 5)  # as many tokens as rows
    torch.manual_seed(1)
    with routed.adapters(NAMES):
        ours = written(routed.model, ids, **settings)
    rows = len(ours) // len(NAMES)
    answers = set()
    for row, name in enumerate(NAMES):
        model = alone(name)
        torch.manual_seed(1)  # the same draws for sampled beams
        theirs = written(model, ids, **settings)
        own = slice(row * rows, (row + 1) * rows)
        assert torch.equal(ours[own], theirs[own])
        answers.add(tuple(theirs[0].tolist()))
    assert len(answers) > 2  # the adapters matter


ASSISTED = {
    # The first releases of transformers 5 want an end of text for it; this one never comes.
    "by lookup": lambda: {"prompt_lookup_num_tokens": 2, "eos_token_id": VOCABULARY},
    "by a model": lambda: {"assistant_model": llama()},
}


@pytest.mark.parametrize("settings", ASSISTED.values(), ids=ASSISTED)
def test_assisted_generation(files, settings):
    routed = routed_with(files)
    ids = tokens(1, 4).repeat(1, 3)  # found again in the prompt
    expected = written(alone("two"), ids)
    with routed.adapters(["two"]):
        assert torch.equal(written(routed.model, ids, **settings()), expected)


def contrastive(model, input_ids, top_k, **kwargs):
    """Each row's candidates are read in one batch, expanded by the loop itself."""
    for _ in range(3):
        logits = model(input_ids).logits[:, -1]
        candidates = logits.topk(top_k, dim=-1).indices  # [rows, top_k]
        longer = torch.cat(
            [input_ids.repeat_interleave(top_k, 0), candidates.flatten()[:, None]], 1
        )
        hidden = model(longer, output_hidden_states=True).hidden_states[-1]
        alike = torch.cosine_similarity(hidden[:, -1:], hidden[:, :-1], -1).max(1).values
        best = alike.view(-1, top_k).argmin(1, keepdim=True)
        input_ids = torch.cat([input_ids, candidates.gather(1, best)], 1)
    return input_ids


@torch.no_grad()
def test_contrastive_search(files):
    routed = routed_with(files)
    ids = tokens(3, 4)
    names = ["two", "__base__", "one"]
    settings = {"custom_generate": lambda model, ids, **_: contrastive(model, ids, top_k=3)}
    with routed.adapters(names), pytest.raises(ValueError, match=r"expected 3 rows .* pass beams="):
        written(routed.model, ids, **settings)
    with routed.adapters(names, beams=3):
        ours = written(routed.model, ids, **settings)
    for row, name in enumerate(names):
        assert torch.equal(ours[row], contrastive(alone(name), ids, top_k=3)[row])


@torch.no_grad()
def test_beams_end_with_generate(files):
    routed = routed_with(files)
    names, ids = ["two", "one"], tokens(2, 4)
    with routed.adapters(names):
        expected = written(routed.model, ids, num_beams=3)
        routed.model._expand_inputs_for_generation(expand_size=3, input_ids=ids)  # in none
        with pytest.raises(ValueError, match="expected 2 rows"):
            routed.model(tokens(6, 4))

        def stop(*_):
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            written(routed.model, ids, num_beams=3, logits_processor=[stop])
        with pytest.raises(ValueError, match="expected 2 rows"):
            routed.model(tokens(6, 4))
        assert torch.equal(written(routed.model, ids, num_beams=3), expected)
    with routed.adapters(names, stacked=2):
        both = written(routed.model, torch.cat([ids, ids]), num_beams=3)
    assert torch.equal(both, torch.cat([expected, expected]))


def test_a_batch_that_shrinks_in_one_generate_is_refused(files):
    """As where a loop goes on with the rows that have not ended."""
    routed = routed_with(files)

    def halves(model, ids, **_):
        for some in (ids, ids[:2]):
            ids, _ = model._expand_inputs_for_generation(expand_size=2, input_ids=some)
            model(ids)

    names = ["one", "two", "two", "one"]
    with routed.adapters(names), pytest.raises(ValueError, match="had 4 rows and now has 2"):
        written(routed.model, tokens(4, 3), custom_generate=halves)


# --- what stays on a model ---------------------------------------------------------------------


def test_watchers_are_copied_and_taken_off(files):
    routed = routed_with(files, "one", "two")
    model = routed.model
    assert inspect.signature(model.generate) == inspect.signature(llama().generate)
    ids = tokens(2, 4)
    with routed.adapters(["one", "two"]):
        expected = written(model, ids, num_beams=2)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again = route(copied)
        assert len(copied._forward_pre_hooks) == len(copied._forward_hooks) == 1
        with again.adapters(["one", "two"]):
            assert torch.equal(written(copied, ids, num_beams=2), expected)
            with pytest.raises(RuntimeError, match="nothing says which"):
                written(model, ids)
    routed.undo()
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not {"generate", "_expand_inputs_for_generation"} & model.__dict__.keys()
    routed.load("one", files / "one")
    with routed.adapters(["one", "__base__"]):
        written(model, ids, num_beams=2)


def test_a_generate_of_ones_own_stays(files):
    model = llama()
    calls = []

    def own(*args, **kwargs):
        calls.append(1)
        return type(model).generate(model, *args, **kwargs)

    model.generate = own
    routed = routed_with(files, "one", model=model)
    with routed.adapters(["one", "__base__"]):
        written(model, tokens(2, 3), num_beams=2)
    assert calls == [1]
    routed.undo()
    assert model.generate is own
