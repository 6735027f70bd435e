"""``routed.batch(names)`` and ``with routed.adapters(names)`` where frames stop, threads and tasks
take turns, and adapters change beside them: each call has its own adapters, or raises."""

import asyncio
import contextlib
import contextvars
import copy
import dataclasses
import gc
import threading
import weakref

import pytest
import torch
from routed_models import NAMES, alone, llama, routed_toy, routed_with, tokens
from torch.utils.checkpoint import checkpoint

from lora_kernels import Routing, route

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")


@pytest.fixture
def routed(files):
    return routed_with(files)


def logits_of(name: str, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return alone(name)(ids).logits


def assert_is(name: str, logits: torch.Tensor, ids: torch.Tensor) -> None:
    torch.testing.assert_close(logits, logits_of(name, ids))


# --- handles ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_handle_is_each_adapter_alone(routed):
    ids, handle = tokens(5, 7), routed.batch(NAMES)
    for _ in range(2):
        logits = handle(ids).logits
        for row, name in enumerate(NAMES):
            assert_is(name, logits[row : row + 1], ids[row : row + 1])
    with pytest.raises(RuntimeError, match=r"nothing says which of them to use.*routed\.batch"):
        routed.model(ids)
    assert_is("one", routed.batch("one")(ids).logits, ids)
    routing = Routing.from_sequences(NAMES, 7, routed.slots)
    torch.testing.assert_close(routed.batch(routing)(ids).logits, logits)


def test_a_handle_says_what_it_calls(routed):
    assert repr(routed.batch(["one", "two"])) == "RoutedBatch(LlamaForCausalLM, ['one', 'two'])"
    assert repr(routed.batch({"one": 0.5})) == "RoutedBatch(LlamaForCausalLM, {'one': 0.5})"


@torch.no_grad()
def test_a_handle_generates_and_wins_over_the_with_around_it(routed):
    ids, options = tokens(2, 4), {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    options["attention_mask"] = torch.ones_like(ids)
    with routed.adapters("last"):
        generated = routed.batch(["one", "two"]).call(routed.model.generate, ids, **options)
        assert_is("last", routed.model(ids).logits, ids)
    for row, name in enumerate(["one", "two"]):
        options["attention_mask"] = torch.ones_like(ids[:1])
        expected = alone(name).generate(ids[row : row + 1], **options)[0]
        assert torch.equal(generated[row], expected)


@torch.no_grad()
def test_one_handle_in_many_threads(routed):
    handle, found = routed.batch(["one", "two"]), {}

    def call(index):
        found[index] = [handle(tokens(2, 3 + index % 3)).logits for _ in range(8)]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(6):
        ids = tokens(2, 3 + index % 3)
        for logits in found[index]:
            for row, name in enumerate(["one", "two"]):
                assert_is(name, logits[row : row + 1], ids[row : row + 1])


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_handle_that_is_kept_follows_its_names(routed, files, change):
    handle, ids = routed.batch(["one", "__base__"]), tokens(2, 3)
    with torch.no_grad():
        handle(ids)
        if change == "removed":
            routed.remove("one")
            with pytest.raises(ValueError, match=r"expected '__base__' or .* got 'one' \(it was"):
                handle(ids)
            routed.load("one", files / "two")
        else:
            routed.replace("one", files / "two")
        assert_is("two", handle(ids).logits[:1], ids[:1])


def test_arguments_of_a_handle(routed):
    with pytest.raises(ValueError, match="expected '__base__' or one of"):
        routed.batch("none")
    with pytest.raises(ValueError, match="there is no module 'vision' in the model"):
        routed.batch("one", rows={"vision": "two"})
    with pytest.raises(TypeError, match="beams: expected an integer"):
        routed.batch("one", beams=1.5)
    with pytest.raises(ValueError, match="expected 2 rows on axis 0 for 2 names"):
        routed.batch(["one", "two"])(tokens(3, 4))


@torch.no_grad()
def test_threads_inside_of_one_call_have_a_forward_each(routed):
    """Whose rows the tokens of a matrix are is known from the forward alone."""

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(6, 6, dtype=torch.float64)
            self.wait = lambda: None

        def forward(self, x):
            self.wait()
            return self.inner(x.flatten(0, 1)).view_as(x)

    routed, barrier, found = routed_toy(Flat(), "inner"), threading.Barrier(2, timeout=30), {}
    inputs = {rows: torch.randn(rows, 6 // rows, 6, dtype=torch.float64) for rows in (2, 6)}
    handle = routed.batch(["one", "two"], stacked=3)
    expected = {rows: handle(x) for rows, x in inputs.items()}

    def steps():
        def call(rows, x):
            with torch.no_grad():
                found[rows] = routed.model(x)
            barrier.wait()

        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(call, *each))
            for each in inputs.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    routed.model.wait = barrier.wait
    handle.call(steps)
    for rows, y in expected.items():
        assert torch.equal(found[rows], y)


def test_a_handle_calls_nothing_that_computes_later(routed):
    async def answer():
        return routed.model(tokens(1, 4))

    with routed.adapters("two"):
        with pytest.raises(TypeError, match="has computed when it returns, got a generator"):
            routed.batch("one").call(stream, routed, "one", tokens(1, 4))
        coroutine = answer()
        with pytest.raises(TypeError, match="has computed when it returns, got a coroutine"):
            routed.batch("one").call(lambda: coroutine)
        coroutine.close()


# --- weights ---------------------------------------------------------------------------------


def weighted(routed, weights: dict[str, float]):
    """A twin of the model with the sum of the adapters in its weights."""
    model = llama()
    for path, layer in routed._layers().items():
        linear = model.get_submodule(path)
        for name, weight in weights.items():
            if name in layer.bank:
                a, b = layer.bank[name].factors()[0]
                linear.weight.data += weight * layer.bank[name].scaling * (b @ a)
    return model


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7])
def test_weights_and_scales_of_rows(routed, length):
    rows = [{"one": 0.25, "two": -1.5}, "last", {"two": 0.5}, "__base__", {}]
    ids = tokens(5, length)
    handle = routed.batch(rows)
    logits = handle(ids).logits
    with routed.adapters(rows):
        torch.testing.assert_close(routed.model(ids).logits, logits)
    for row, weights in enumerate(rows):
        weights = {weights: 1.0} if isinstance(weights, str) else weights
        expected = weighted(routed, weights)(ids[row : row + 1]).logits
        torch.testing.assert_close(logits[row : row + 1], expected)
    everywhere = routed.batch({"one": 0.25, "two": -1.5})
    expected = weighted(routed, {"one": 0.25, "two": -1.5})(ids).logits
    torch.testing.assert_close(everywhere(ids).logits, expected)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"none": 1.0}], ValueError, "got 'none'"),
        ([{"one": "1"}], TypeError, "expected a number for 'one', got a str"),
        ([{"one": True}], TypeError, "expected a number for 'one', got a bool"),
        ([{"one": float("nan")}], ValueError, "expected a finite number for 'one', got nan"),
        ([{1: 1.0}], TypeError, "expected names, got a int"),
        ([{"__base__": 1.0}], ValueError, "'__base__' has no weight"),
        ([("one", 0.5)], TypeError, "expected names, got a tuple"),
    ],
)
def test_bad_weights(routed, rows, error, message):
    with pytest.raises(error, match=message):
        routed.batch(rows)


# --- frames that stop -------------------------------------------------------------------------


@torch.no_grad()
def stream(routed, name, ids):
    with routed.adapters(name):
        for _ in range(3):
            yield routed.model(ids).logits


def test_two_streams_in_turn(routed):
    ids = tokens(1, 4)
    streams = {name: stream(routed, name, ids) for name in ("one", "two", "one")}
    for _ in range(3):
        for name, logits in streams.items():
            assert_is(name, next(logits), ids)
            with pytest.raises(RuntimeError, match=r"a generator that does not run.*routed\.batch"):
                routed.model(ids)
            with routed.adapters("last"):
                assert_is("last", routed.model(ids).logits, ids)
            assert_is("two", routed.batch("two")(ids).logits, ids)
    for logits in streams.values():
        assert list(logits) == []
    with pytest.raises(RuntimeError, match="nothing says which"):
        routed.model(ids)


def test_streams_inside_of_a_with_and_the_other_way_round(routed):
    ids = tokens(1, 4)
    with routed.adapters("last"):
        for logits in stream(routed, "one", ids):
            assert_is("one", logits, ids)
            assert_is("last", routed.model(ids).logits, ids)

    def outer():
        with routed.adapters("two"):
            for logits in stream(routed, "one", ids):
                assert_is("two", routed.model(ids).logits, ids)
                yield logits

    for logits in outer():
        assert_is("one", logits, ids)


def test_a_stream_whose_steps_are_run_by_other_threads(routed):
    """As web servers do: each step of a generator in a thread of a pool."""
    ids, found = tokens(1, 4), {"one": [], "two": []}
    streams = {name: stream(routed, name, ids) for name in found}
    for _ in range(3):
        for name, logits in streams.items():
            thread = threading.Thread(target=lambda n=name, s=logits: found[n].append(next(s)))
            thread.start()
            thread.join()
    for name, logits in found.items():
        assert len(logits) == 3
        for each in logits:
            assert_is(name, each, ids)


def test_a_stream_that_is_dropped_leaves_nothing_behind(routed):
    ids = tokens(1, 4)
    half = stream(routed, "one", ids)
    next(half)
    del half
    gc.collect()
    assert not routed._active._open
    with pytest.raises(RuntimeError, match="call it inside of"):
        routed.model(ids)


@pytest.mark.parametrize("how", ["class", "function"])
def test_who_enters_for_a_generator_enters_its_frame(routed, how):
    ids = tokens(1, 4)

    class Serving:
        def __init__(self, name):
            self.context = routed.adapters(name)

        def __enter__(self):
            self.context.__enter__()

        def __exit__(self, *error):
            self.context.__exit__(*error)

    def enter(stack, name):
        stack.enter_context(routed.adapters(name))

    @torch.no_grad()
    def served(name):
        with routed.adapters("last"), contextlib.ExitStack() as stack:
            stack.enter_context(Serving(name)) if how == "class" else enter(stack, name)
            for _ in range(2):
                yield routed.model(ids).logits

    streams = {name: served(name) for name in ("one", "two")}
    for _ in range(2):
        for name, logits in streams.items():
            assert_is(name, next(logits), ids)
            with pytest.raises(RuntimeError, match="a generator that does not run"):
                routed.model(ids)


@torch.no_grad()
def test_a_compiled_model_does_not_take_the_routing_of_a_stream_that_rests(routed):
    ids, layer = tokens(1, 4), routed.model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 4, 24, dtype=torch.float64)
    expected = routed.batch("one").call(layer, x)
    compiled = torch.compile(layer, backend="eager")
    routing = Routing.from_sequences(["one"], 4, routed.slots)
    assert torch.equal(routed.batch(routing).call(compiled, x), expected)

    def opened():
        with routed.adapters(routing):
            while True:
                yield compiled(x)

    calls = opened()
    for _ in range(2):
        assert torch.equal(next(calls), expected)
        with pytest.raises(RuntimeError, match="a generator that does not run"):
            compiled(x)
    calls.close()
    assert_is("two", routed.batch("two")(ids).logits, ids)


def test_contextlib_stands_for_the_frame_around_it(routed):
    ids = tokens(1, 4)

    @contextlib.contextmanager
    def serving(name):
        with routed.adapters(name):
            yield

    @contextlib.contextmanager
    def nested(name):
        with serving("last"), serving(name):
            yield name

    with torch.no_grad():
        with nested("one"):
            assert_is("one", routed.model(ids).logits, ids)
        with contextlib.ExitStack() as stack:
            stack.enter_context(routed.adapters("one"))
            stack.enter_context(nested("two"))
            assert_is("two", routed.model(ids).logits, ids)
        with pytest.raises(RuntimeError, match="nothing says which"):
            routed.model(ids)

        @serving("two")
        def decorated():
            return routed.model(ids).logits

        assert_is("two", decorated(), ids)

        def generator():
            with nested("one"):
                yield routed.model(ids).logits

        logits = generator()
        assert_is("one", next(logits), ids)
        with pytest.raises(RuntimeError, match="a generator that does not run"):
            routed.model(ids)


@torch.no_grad()
def test_asynchronous_streams_in_one_task(routed):
    ids = tokens(1, 4)

    async def steps(name):
        with routed.adapters(name):
            for _ in range(2):
                await asyncio.sleep(0)
                yield routed.model(ids).logits

    @contextlib.asynccontextmanager
    async def serving(name):
        with routed.adapters(name):
            yield

    async def main():
        one, two = steps("one"), steps("two")
        for _ in range(2):
            assert_is("one", await anext(one), ids)
            assert_is("two", await anext(two), ids)
            with pytest.raises(RuntimeError, match="a generator that does not run"):
                routed.model(ids)
        await one.aclose()
        await two.aclose()
        async with serving("last"):
            await asyncio.sleep(0)
            assert_is("last", routed.model(ids).logits, ids)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(serving("one"))
            assert_is("one", await asyncio.to_thread(lambda: routed.model(ids).logits), ids)

    asyncio.run(main())


def test_what_another_thread_closes_is_not_kept(routed):
    old = []
    for _ in range(3):
        stack = contextlib.ExitStack()
        use = routed._active.use("one")
        stack.enter_context(use)
        old.append(weakref.ref(use))
        del use
        thread = threading.Thread(target=stack.close)
        thread.start()
        thread.join()
        del stack
    gc.collect()
    assert [each() is None for each in old[:-1]] == [True, True]


# --- versions ---------------------------------------------------------------------------------


class Changes(torch.nn.Module):
    """Stands in a model's midst and lets somebody change adapters during a forward."""

    def __init__(self, inner, change) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args, **kwargs):
        result = self.inner(*args, **kwargs)
        self.change()
        return result


@torch.no_grad()
@pytest.mark.parametrize("change", ["removed", "replaced", "moved", "many"])
@pytest.mark.parametrize("how", ["with", "handle"])
def test_a_batch_reads_one_version(routed, files, change, how):
    ids = tokens(2, 4)
    expected = routed.batch(["one", "two"])(ids).logits

    def beside():
        if change == "removed":
            routed.remove("one")
        elif change == "replaced":
            routed.replace("one", files / "last")
        elif change == "many":
            for index in range(70):  # more slots than there were
                routed.load(f"more{index}", files / "last")
        else:
            for layer in routed._layers().values():
                for name in layer.bank:
                    layer.bank[name].scaling = 100.0
                layer.bank.reserve(200, 50)
        done.append(change)

    done = []

    def in_a_thread():
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()

    block = routed.model.model.layers[0]
    block.mlp = Changes(block.mlp, in_a_thread)
    if how == "with":
        with routed.adapters(["one", "two"]):
            logits = routed.model(ids).logits
            block.mlp = block.mlp.inner
            if change == "removed":
                with pytest.raises(ValueError, match=r"got 'one' \(it was removed\)"):
                    routed.model(ids)
            elif change == "replaced":
                assert_is("last", routed.model(ids).logits[:1], ids[:1])
    else:
        logits = routed.batch(["one", "two"])(ids).logits
    assert torch.equal(logits, expected) and done == [change]


@torch.no_grad()
def test_layers_are_not_put_back_under_a_batch(routed):
    ids = tokens(2, 4)
    block = routed.model.model.layers[0]
    block.mlp = Changes(block.mlp, routed.undo)
    with pytest.raises(RuntimeError, match="undo: a batch is being computed"):
        routed.batch("one")(ids)
    with routed.adapters("two"), pytest.raises(RuntimeError, match="undo: a batch is being"):
        routed.undo()
    block.mlp = block.mlp.inner
    assert_is("one", routed.batch("one")(ids).logits, ids)
    routed.undo()
    assert_is("__base__", routed.model(ids).logits, ids)


@torch.no_grad()
def test_who_comes_while_layers_are_put_back_waits(routed, files, monkeypatch):
    ids, remove, threads, found = tokens(1, 4), type(routed)._remove, [], []
    handle, undone = routed.batch("one"), threading.Event()

    def call():
        with routed.adapters("__base__"):
            undone.wait(timeout=1)
        with pytest.raises(ValueError, match=r"got 'one' \(it was removed\)"):
            handle(ids)
        found.append("call")

    def load():
        routed.load("new", files / "last")
        found.append("load")

    def meanwhile(self, *arguments):
        remove(self, *arguments)
        if not threads and not self.names:
            threads.extend(threading.Thread(target=target) for target in (call, load))
            for thread in threads:
                thread.start()
                thread.join(timeout=0.1)

    monkeypatch.setattr(type(routed), "_remove", meanwhile)
    routed.undo()
    undone.set()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["call", "load"]
    assert routed.names == ["new"]
    assert_is("last", routed.batch("new")(ids).logits, ids)


@torch.no_grad()
def test_a_batch_that_began_before_a_layer_had_adapters(files):
    routed, ids = routed_with(files, "one"), tokens(1, 4)
    expected = routed.batch("one")(ids).logits
    block = routed.model.model.layers[0]
    block.mlp = Changes(block.mlp, lambda: routed.load("last", files / "last"))
    assert torch.equal(routed.batch("one")(ids).logits, expected)


@torch.no_grad()
def test_a_batch_does_not_take_the_routing_of_a_later_one(files):
    """Of the same handle, in another thread, where the name has a slot that was free before."""
    routed, ids = routed_with(files, "one"), tokens(2, 4)
    handle = routed.batch(["one", "__base__"])
    block = routed.model.model.layers[0]
    norm = block.input_layernorm

    def beside():
        block.input_layernorm = norm
        routed.remove("one")
        routed.load("two", files / "two")
        routed.load("one", files / "last")
        handle(ids)

    block.input_layernorm = Changes(norm, beside)
    assert_is("one", handle(ids).logits[:1], ids[:1])
    assert_is("last", handle(ids).logits[:1], ids[:1])


@torch.no_grad()
@pytest.mark.parametrize("how", ["with", "handle"])
def test_a_routing_that_is_filled_again_in_a_batch(routed, files, how):
    routing = Routing.from_sequences(["one"], 4, routed.slots)
    layer = routed.model.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 24, dtype=torch.float64)
    expected = [routed.batch(name).call(layer, x) for name in ("one", "two")]

    def steps():
        found = [layer(x)]
        routing.set_sequences_(["two"], 4)
        return [*found, layer(x)]

    def late():
        layer(x)
        routed.load("new", files / "two")
        routing.set_sequences_(["new"], 4)
        layer(x)

    if how == "with":
        with routed.adapters(routing):
            found = steps()
    else:
        found = routed.batch(routing).call(steps)
        with pytest.raises(ValueError, match="adapters that came after the batch had begun"):
            routed.batch(routing).call(late)
    assert all(map(torch.equal, found, expected))


def test_adapters_that_are_gone_are_given_back(routed, files):
    layer = routed.model.model.layers[0].self_attn.q_proj
    old = [weakref.ref(routed.model.model.layers[0].self_attn.q_proj.bank["one"])]
    with routed.adapters("one"), torch.no_grad():
        routed.model(tokens(1, 3))
        routed.replace("one", files / "two")
        routed.model(tokens(1, 3))
        gc.collect()
        assert old[0]() is None, "a `with` that stays open keeps nothing"
    assert layer.bank["one"].ranks == (9,)


@torch.no_grad()
def test_a_forward_that_is_interrupted_leaves_nothing_behind(routed):
    """Of what is no Exception torch tells no hook."""
    ids, block = tokens(1, 4), routed.model.model.layers[0]
    old = weakref.ref(block.self_attn.q_proj.bank["one"])

    def interrupt():
        raise KeyboardInterrupt

    block.mlp = Changes(block.mlp, interrupt)
    with pytest.raises(KeyboardInterrupt), routed.adapters("one"):
        routed.model(ids)
    with pytest.raises(KeyboardInterrupt):
        routed.batch("one")(ids)
    routed.remove("one")
    gc.collect()
    assert old() is None


@torch.no_grad()
def test_a_call_goes_on_after_another_hook_has_raised(routed, files):
    ids = tokens(1, 4)

    def refuse(*_):
        raise ValueError("refused")

    def steps():
        with pytest.raises(ValueError, match="refused"):
            routed.model(ids)
        handle.remove()
        routed.replace("one", files / "two")
        return routed.model(ids).logits

    handle = routed.model.register_forward_pre_hook(refuse, prepend=True)
    assert_is("one", routed.batch("one").call(steps), ids)


def test_a_backward_that_fails_keeps_nothing(routed):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise MemoryError

    block = routed.model.model.layers[0]
    old = weakref.ref(block.self_attn.q_proj.bank["one"])
    x = Fails.apply(torch.randn(1, 4, 24, dtype=torch.float64, requires_grad=True))
    loss = routed.batch("one")(inputs_embeds=x).logits.sum()
    with pytest.raises(MemoryError):
        loss.backward()
    del loss, x
    routed.remove("one")
    gc.collect()
    assert old() is None


def test_the_garbage_collector_closes_streams_while_others_are_opened(routed):
    class Request:
        pass

    def opened():
        with routed.adapters("one"):
            yield

    def serve():
        before = gc.get_threshold()
        gc.set_threshold(1, 1, 1)
        try:
            for _ in range(1000):
                request = Request()
                request.own, request.stream = request, opened()
                next(request.stream)
                del request
                with routed.adapters("two"):
                    pass
        finally:
            gc.set_threshold(*before)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive(), "it waits for itself"
    gc.collect()
    assert not routed._active._open


def test_a_backward_finds_its_batch_by_outputs_in_an_object(files):
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(6, 6, dtype=torch.float64)

        def forward(self, x):
            return Output(checkpoint(lambda x: self.inner(x).tanh(), x, use_reentrant=False))

    routed = routed_toy(Wrapped(), "inner")
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    with routed.adapters("one"):
        expected = torch.autograd.grad(routed.model(x).logits.square().sum(), x)
    loss = routed.batch("one")(x).logits.square().sum()
    with routed.adapters("two"):
        routed.model(x)
        torch.testing.assert_close(torch.autograd.grad(loss, x), expected)


def test_a_name_that_comes_back_while_it_is_saved(routed, files, tmp_path, monkeypatch):
    """Nothing is written of what the version that is saved does not have."""
    known = type(routed)._check_known

    def comes_back(self, *arguments):
        if "one" not in self.names:
            self.load("one", files / "one")
        known(self, *arguments)

    for read in (lambda: routed.save("one", tmp_path / "one"), lambda: routed.parameters_of("one")):
        routed.remove("one")
        with monkeypatch.context() as patched, pytest.raises(KeyError, match="no adapter 'one'"):
            patched.setattr(type(routed), "_check_known", comes_back)
            read()
    assert not (tmp_path / "one").exists()


# --- replacing --------------------------------------------------------------------------------


@torch.no_grad()
def test_replaced_in_all_layers_at_once(routed, files):
    ids = tokens(1, 5)
    before = routed.names
    routed.replace("one", files / "two")
    assert routed.names == before
    assert_is("two", routed.batch("one")(ids).logits, ids)
    assert_is("two", routed.batch("two")(ids).logits, ids)
    routed.replace("one", files / "last", trainable=True)  # of other layers
    assert_is("last", routed.batch("one")(ids).logits, ids)
    assert all(parameter.requires_grad for parameter in routed.parameters_of("one"))
    q_proj = routed.model.model.layers[0].self_attn.q_proj
    assert "one" not in q_proj.bank and "two" in q_proj.bank


def test_a_replacement_that_fails_changes_nothing(routed, files, tmp_path):
    ids = tokens(1, 5)
    for directory in (tmp_path, files / "absent"):
        with pytest.raises((ValueError, OSError)):
            routed.replace("one", directory)
    with pytest.raises(KeyError, match="no adapter 'none' in the model"):
        routed.replace("none", files / "one")
    with torch.no_grad():
        assert_is("one", routed.batch("one")(ids).logits, ids)


def test_a_routing_of_ones_own_is_out_of_date_where_its_adapter_was_replaced(routed, files):
    one = Routing.from_sequences(["one"], 3, routed.slots)
    two = Routing.from_sequences(["two"], 3, routed.slots)
    routed.replace("one", files / "two")
    with torch.no_grad():
        assert_is("two", routed.batch(two)(tokens(1, 3)).logits, tokens(1, 3))
        with pytest.raises(ValueError, match="removed or replaced since it was filled"):
            routed.batch(one)(tokens(1, 3))


def test_two_handles_on_a_fresh_model_share_its_adapters(files):
    model = llama()
    first, second = route(model), route(model)
    first.load("one", files / "one")
    second.load("two", files / "two")
    assert first.names == second.names == ["one", "two"]
    first.save("two", files.parent / "saved")
    copied = route(copy.deepcopy(model))
    with torch.no_grad():
        for routed in (first, second, copied):
            for name in ("one", "two"):
                ids = tokens(1, 4)
                assert_is(name, routed.batch(name)(ids).logits, ids)


def test_a_name_without_layers_is_no_name(routed):
    routed.model.model.layers = routed.model.model.layers[:0]
    routed.model.lm_head = torch.nn.Linear(24, 61, bias=False, dtype=torch.float64)
    gc.collect()
    with pytest.raises(ValueError, match="no layer of the model has an adapter 'one'"):
        routed.batch("one")
    routed.remove("one")
    assert "one" not in routed.names


# --- who looks on -----------------------------------------------------------------------------


def test_pollers_beside_changes(routed, files, tmp_path):
    """Whoever looks through the model, its banks and names sees what there is before or after."""
    bank = routed.model.model.layers[0].self_attn.q_proj.bank
    polls = {
        "named_parameters": lambda: dict(routed.model.named_parameters()),
        "state_dict": routed.model.state_dict,
        "names": lambda: (routed.names, repr(routed), repr(routed.slots)),
        "bank": lambda: [bank[name].rank for name in bank if name in bank],
        "items": lambda: [adapter.rank for _, adapter in bank.adapters.items()],
        "tensors": lambda: bank.tensors(),
        "parameters_of": lambda: routed.parameters_of("one"),
        "save": lambda: routed.save("one", tmp_path / "saved"),
        "eval": routed.model.eval,
    }
    errors, stop = [], threading.Event()

    def poll(what):
        while not stop.wait(0.001):
            try:
                polls[what]()
            except Exception as error:
                errors.append(f"{what}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=poll, args=(what,)) for what in polls]
    for thread in threads:
        thread.start()
    try:
        for index in range(12):
            routed.load(f"more{index % 3}", files / "two")
            routed.replace("one", files / "one")
            routed.remove(f"more{index % 3}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors[:3]


def test_memory_of_a_burst_is_given_back(routed, files):
    def held() -> int:
        gc.collect()
        banks = [layer.bank for layer in routed._layers().values()]
        regions = {
            factor.untyped_storage().data_ptr(): factor.untyped_storage().nbytes()
            for bank in banks
            for factor in bank.tensors().factors
        }
        return sum(regions.values())

    before, gone = held(), []
    for index in range(30):
        routed.load(f"more{index}", files / "two")
    assert held() > 5 * before
    for layer in routed._layers().values():
        gone += [weakref.ref(factor) for factor in layer.bank.tensors().factors]
    for index in range(30):
        routed.remove(f"more{index}")
    assert held() == before
    still = {id(f) for layer in routed._layers().values() for f in layer.bank.tensors().factors}
    assert all(ref() is None or id(ref()) in still for ref in gone)


def test_a_forward_that_cannot_begin_leaves_the_one_around_it_alone(routed):
    ids = tokens(2, 4)
    block = routed.model.model.layers[0]

    def inner():
        with routed.adapters(["one", "two"]):
            routed.remove("last")
        with (
            routed.adapters(["two", "one"]) as _,
            pytest.raises(ValueError, match="it was removed"),
        ):
            routed.remove("one")
            routed.model(ids)

    with torch.no_grad():
        expected = routed.batch(["one", "two"])(ids).logits
        block.mlp = Changes(block.mlp, inner)
        assert torch.equal(routed.batch(["one", "two"])(ids).logits, expected)


def test_a_copy_beside_a_change_is_whole_or_an_error(routed, files, monkeypatch):
    layers = list(routed._layers().values())
    copied = copy.deepcopy(routed.model)
    for change in (lambda: routed.load("new", files / "two"), lambda: routed.remove("new")):
        state = type(layers[2].bank).__getstate__

        def beside(bank, change=change, state=state):
            if bank is layers[2].bank:
                monkeypatch.undo()
                change()
            return state(bank)

        monkeypatch.setattr(type(layers[2].bank), "__getstate__", beside)
        with pytest.raises(RuntimeError, match="copied while adapters were loaded, changed or rem"):
            copy.deepcopy(routed.model)
    ids = tokens(1, 3)
    with torch.no_grad():
        for model in (copied, copy.deepcopy(routed.model), copy.deepcopy(copied)):
            assert_is("one", route(model).batch("one")(ids).logits, ids)
