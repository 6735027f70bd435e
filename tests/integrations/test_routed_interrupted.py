"""A change of adapters that is interrupted, wherever that is, leaves everything as it was."""

import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from routed_models import CONFIGS, llama, routed_with, tokens

import lora_kernels
from lora_kernels import route

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")

POINTS = 200
PACKAGE = str(Path(lora_kernels.__file__).parent)


class Interrupt(BaseException):
    """What nobody catches, as KeyboardInterrupt."""


def lines_of(function) -> int:
    """How many lines of the package a call runs."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        count += event == "line"
        return trace

    _traced(function, trace)
    return count


def interrupted(function, at: int) -> None:
    """Call it, and raise before the line of that number."""
    left = at

    def trace(frame, event, _):
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                raise Interrupt
        return trace

    with pytest.raises(Interrupt):
        _traced(function, trace)


def _traced(function, trace) -> None:
    def of_package(frame, event, argument):
        return trace if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(of_package)
    try:
        function()
    finally:
        sys.settrace(before)


def state_of(routed) -> tuple:
    """All that a user, or the next call, could see of it."""
    version = routed.slots.current
    return (
        routed.names,
        version.changes,
        sorted(version.settings),
        [(name, id(module)) for name, module in routed.model.named_modules()],
        [
            (name, id(p), p.data_ptr(), p.requires_grad)
            for name, p in routed.model.named_parameters()
        ],
        [(name, list(layer.bank), len(layer.bank)) for name, layer in routed._layers().items()],
        [len(module._forward_pre_hooks) for module in routed.model.modules()],
        sorted(vars(routed.model)),
    )


CHANGES = {
    "load": lambda routed, files: routed.load("new", files / "two"),
    "load trainable": lambda routed, files: routed.load("new", files / "last", trainable=True),
    "add": lambda routed, files: routed.add("new", peft_config()),
    "replace": lambda routed, files: routed.replace("one", files / "last"),
    "remove": lambda routed, files: routed.remove("one"),
}


def peft_config() -> dict:
    return {"peft_type": "LORA", **CONFIGS["two"]}


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "had"),
    [*((change, ["one"]) for change in CHANGES), ("load", []), ("add", [])],
    ids=lambda value: value if isinstance(value, str) else "".join(value) or "fresh",
)
def test_interrupted_at_every_point(files, change, had):
    def made():
        return routed_with(files, *had) if had else route(llama())

    CHANGES[change](made(), files)  # what is kept for the process
    done = made()
    total = lines_of(lambda: CHANGES[change](done, files))
    assert total > 300
    ids, names = tokens(2, 3), [*had, "__base__"][:1]
    routed = made()
    expected = routed.batch(names * 2)(ids).logits if had else routed.model(ids).logits
    state = state_of(routed)
    step = 1 if change == "load" and not had else 4  # all 200 points once, of others every fourth
    for point in range(0, POINTS, step):
        interrupted(lambda: CHANGES[change](routed, files), 1 + point * (total - 1) // (POINTS - 1))
        assert state_of(routed) == state, point
        if point % 20 == 0:
            logits = routed.batch(names * 2)(ids).logits if had else routed.model(ids).logits
            assert torch.equal(logits, expected)
    CHANGES[change](routed, files)
    assert routed.names == done.names
    for name in routed.names:
        torch.testing.assert_close(routed.batch(name)(ids).logits, done.batch(name)(ids).logits)


def test_the_first_load_may_be_inside_of_inference_mode(files):
    routed, ids = route(llama()), tokens(1, 3)
    with torch.inference_mode():
        routed.load("one", files / "one", trainable=True)
        routed.add("new", rank=2, alpha=2, target_modules=["o_proj"])
        routed.batch("one")(ids)
        routed.remove("new")
    routed.load("two", files / "two")
    logits = routed.batch("one")(ids).logits
    torch.testing.assert_close(logits, routed_with(files, "one").batch("one")(ids).logits)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in routed.parameters_of("one"))


def test_threads_that_add_to_a_fresh_model(files):
    """Each wraps the layers that it needs; none may drop what the other has put there."""

    ids, expected = tokens(1, 3), {}
    with torch.no_grad():
        for name in CONFIGS:
            expected[name] = routed_with(files, name).batch(name)(ids).logits
        for _ in range(20):
            routed = route(llama())
            barrier = threading.Barrier(len(CONFIGS))

            def load(name, routed=routed, barrier=barrier):
                barrier.wait()
                routed.load(name, files / name)

            threads = [threading.Thread(target=load, args=(name,)) for name in CONFIGS]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(routed.names) == sorted(CONFIGS)
            for name in CONFIGS:
                torch.testing.assert_close(routed.batch(name)(ids).logits, expected[name])


def test_one_name_given_by_two_threads(files):

    outcomes = []
    for _ in range(10):
        routed, barrier = route(llama()), threading.Barrier(2)

        def load(file, routed=routed, barrier=barrier):
            barrier.wait()
            try:
                routed.load("same", files / file)
                outcomes.append(file)
            except ValueError as error:
                assert "there is an adapter 'same' already" in str(error)

        threads = [threading.Thread(target=load, args=(file,)) for file in ("one", "last")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with torch.no_grad():
            logits = routed.batch("same")(tokens(1, 3)).logits
            expected = routed_with(files, outcomes[-1]).batch(outcomes[-1])(tokens(1, 3)).logits
        torch.testing.assert_close(logits, expected)
    assert len(outcomes) == 10


class LetsOthersGoFirst:
    """A lock whose release gives who waits for it a turn at once, as the system may."""

    def __init__(self, lock) -> None:
        self.lock, self._is_owned = lock, lock._is_owned

    def __enter__(self):
        self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()
        time.sleep(0.05)


@torch.no_grad()
def test_a_change_that_fails_is_undone_before_others_have_their_turn(files):
    routed, ids = routed_with(files, "one"), tokens(1, 3)
    routed.slots._lock = LetsOthersGoFirst(routed.slots._lock)
    began = threading.Event()

    def load():
        began.wait()
        routed.load("two", files / "two")

    thread = threading.Thread(target=load)
    thread.start()
    with pytest.raises(Interrupt), routed.slots.change():
        routed.load("last", files / "last")
        began.set()
        time.sleep(0.2)  # until it waits
        raise Interrupt
    thread.join()
    expected = routed_with(files, "one", "two")
    assert routed.names == expected.names
    assert routed.model.state_dict().keys() == expected.model.state_dict().keys()
    for name in routed.names:
        torch.testing.assert_close(routed.batch(name)(ids).logits, expected.batch(name)(ids).logits)
