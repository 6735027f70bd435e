"""How composed serves a batch: by batched products or group by group, without float atomics."""

from dataclasses import replace

import pytest
import torch
from routed_calls import call_of
from routed_results import routed_eager, routed_oracle
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.ops.narrow.grouped import half_range
from lora_kernels.ops.routed import batch, composed, pair_masks, pairs
from lora_kernels.ops.routed.batch import Batch
from lora_kernels.ops.routed.call import Needs
from lora_kernels.ops.routed.pairs import Pairs, pairs_of
from lora_kernels.testing.policy import assert_within_policy
from lora_kernels.testing.routed_inputs import RoutedProblem

# Adapter 2 has no tokens, and some tokens have no adapter; neighbours, or not.
SORTED = [0, 0, 0, 1, 1, 3, 3, -1, -1]
MIXED = [3, -1, 0, 1, 0, 3, 1, -1, 0]
IDS = {
    "sorted": SORTED,
    "none first": [-1, -1, *SORTED[:-2]],
    "sequences": [3, 3, 1, 1, -1, 0, 0, 0],
    "mixed": MIXED,
    "pairs": [[3, 0], [-1, -1], [0, 0], [1, 1], [0, -1], [3, 1]],
    "short last": [0, 0, 0, 3],
    "one adapter": [1, 1, 1],
    "nobody": [-1, -1],
}
WAYS = ["padded", "group by group", "all groups at once"]


def serve(monkeypatch, way: str) -> None:
    """Let composed take that way. All at once is how a device's groups are gathered."""
    monkeypatch.setattr(composed, "_CPU_BYTES", 1 << 40 if way == "padded" else 0)
    monkeypatch.setattr(batch, "_CPU_ELEMENTS", 1 << 40 if way == "all groups at once" else 1)


def of(kind: str, ranks=(1, 3, 5, 100), **options) -> RoutedProblem:
    return RoutedProblem.random(IDS[kind], ranks, 43, 29, weighted=kind == "pairs", **options)


class NoAtomics(TorchDispatchMode):
    """Refuses what adds by atomics on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert not any(each in name for each in ("index_add", "scatter_add", "index_put")), name
        return func(*args, **(kwargs or {}))


def run(p: RoutedProblem, bank=None) -> dict[str, torch.Tensor]:
    """y of a forward that no backward follows, then all that a forward and a backward compute."""
    bank = p.bank() if bank is None else bank
    needs = Needs(True, p.weights is not None, False)
    alone, saving, back = (call_of(p, bank, "composed") for _ in range(3))
    with torch._C._AutoDispatchBelowAutograd(), NoAtomics():
        y_alone = composed.forward(alone).y
        y, h, mask = composed.forward(replace(saving, save=True))
        found = composed.backward(replace(back, h=h, mask=mask, dy=p.dy, needs=needs))
    results = {"alone": y_alone, "y": y, "h": h, "mask": mask, **found._asdict()}
    return {name: result for name, result in results.items() if result is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("way", WAYS)
def test_same_bits_twice_and_no_atomics(way, dropout, monkeypatch):
    """Tokens have several pairs, also of one adapter."""
    serve(monkeypatch, way)
    p = of("pairs", dropout=dropout)
    first, second = run(p), run(p)
    assert first.keys() == second.keys() >= {"y", "h", "x", "factors", "weights"}
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("way", WAYS)
def test_each_stream_has_its_own_copies(way, monkeypatch):
    """Another stream's are not there yet, and go when that stream is through with them."""
    serve(monkeypatch, way)
    p = of("pairs")
    bank = p.bank()
    routing = p.routing(bank).tensors(with_plan=True)
    kept, makes = [], Pairs._laid_out
    monkeypatch.setattr(Pairs, "_laid_out", lambda *a: kept.append(makes(*a)) or kept[-1])
    made = []
    for stream in (1, 2, 1):
        monkeypatch.setattr(pairs, "stream_of", lambda device, stream=stream: stream)
        with torch._C._AutoDispatchBelowAutograd():
            composed.forward(call_of(p, bank, "composed", routing))
        made.append(len(kept))
    assert made == [1, 2, 2] and kept[0].tokens.data_ptr() != kept[1].tokens.data_ptr()


@pytest.mark.parametrize("way", WAYS)
def test_where_torch_makes_tensors_by_default_is_no_matter(way, monkeypatch):
    serve(monkeypatch, way)
    p = of("pairs", dropout=0.3)
    bank = p.bank()
    expected = run(p, bank)
    with torch.device("meta"):
        found = run(p, bank)
    assert all(torch.equal(found[name], result) for name, result in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["like x", "fp32"])
@pytest.mark.parametrize("kind", IDS)
def test_all_ways_are_within_the_policy(kind, dtype, adapter_dtype, monkeypatch):
    """And the padded one is taken by no call that a backward follows."""
    p = of(kind, dtype=dtype, adapter_dtype=adapter_dtype)
    expected, oracle = routed_eager(p)["y"], routed_oracle(p)["y"]
    used = len({slot for slot in p.ids.flatten().tolist() if slot >= 0})
    taken = []
    padded = composed._add_padded
    monkeypatch.setattr(composed, "_add_padded", lambda *a: taken.append(1) or padded(*a))
    for way in WAYS:
        with monkeypatch.context() as patch:
            serve(patch, way)
            taken.clear()
            results = run(p)
        assert len(taken) == (way == "padded" and used > 1)
        for name in ("alone", "y"):
            assert_within_policy("y", results[name], expected, oracle, dtype)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", IDS)
def test_groups_at_once_are_groups_one_by_one(kind, dropout, monkeypatch):
    p, results = of(kind, dropout=dropout), []
    for way in WAYS[1:]:
        with monkeypatch.context() as patch:
            serve(patch, way)
            results.append(run(p))
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, msg=name)


@pytest.mark.parametrize("kind", ["sorted", "none first", "sequences", "mixed", "pairs"])
def test_kernels_mask_all_pairs_at_once(kind, monkeypatch):
    """What stands in for Triton's launchers is called as they are, and nothing is masked twice."""
    p = of(kind, dropout=(0.3, 0.0, 0.5, 0.1))
    expected = run(p)
    torch_side, calls = (pair_masks.gather_masked, pair_masks.mask_rows_), []
    bank = p.bank().tensors()

    class Kernels:
        @staticmethod
        def gather_masked(x, routing, threshold_table, seed, place, mask=None):
            calls.append("drawn" if mask is None else "read")
            assert torch.equal(threshold_table, bank.threshold_table)
            every = slice(0, routing.tokens.shape[0])
            with monkeypatch.context() as patch:
                patch.setattr(pair_masks, "_kernels", lambda x: None)
                return torch_side[0](x, routing, bank, seed, place, mask, every)

        @staticmethod
        def mask_rows_(z, routing, threshold_table, mask):
            calls.append("rows")
            assert z.shape[0] == mask.shape[0] == routing.tokens.shape[0]
            with monkeypatch.context() as patch:
                patch.setattr(pair_masks, "_kernels", lambda x: None)
                torch_side[1](z, routing, bank, mask)

    serve(monkeypatch, "all groups at once")
    monkeypatch.setattr(pair_masks, "_kernels", lambda x: Kernels)
    results = run(p)
    assert calls == ["drawn", "drawn", "rows", "read"]
    for name, result in expected.items():
        torch.testing.assert_close(results[name], result, msg=name)


@pytest.mark.parametrize("kind", ["sorted", "none first", "sequences", "mixed", "pairs"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_with_its_adapter(way, kind, dtype, monkeypatch):
    """In y, in dx and in the gradients of the others' factors."""
    serve(monkeypatch, way)
    p = of(kind, dtype=dtype)
    bank = p.bank()
    clean = run(p, bank)
    for parameter in bank["a3"].parameters():
        parameter.data.fill_(torch.nan)
    spoilt = run(p, bank)
    its = (p.ids == 3).any(1)
    assert its.any() and not its.all()
    for name in ("alone", "y", "x"):
        assert spoilt[name][its].isnan().any()
        assert torch.equal(spoilt[name][~its], clean[name][~its]), name
    others = call_of(p, bank, "composed").layout.by_slot(bank.tensors())[3][0]
    assert torch.equal(spoilt["factors"][:others], clean["factors"][:others])


@pytest.mark.parametrize("way", WAYS)
def test_nan_stays_with_its_token(way, monkeypatch):
    """The rows that fill a group up repeat one of its own, which may be any."""
    serve(monkeypatch, way)
    p = of("mixed")
    clean = run(p)["alone"]
    for token, slot in enumerate(MIXED):
        if slot >= 0:
            x = p.x.clone()
            x[token] = torch.nan
            y = run(p.with_(x=x))["alone"]
            others = torch.arange(len(MIXED)) != token
            assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("kind", ["sorted", "sequences", "mixed", "pairs", "nobody"])
@pytest.mark.parametrize("absent", [False, True], ids=["all", "one is in no bank"])
@pytest.mark.parametrize("way", WAYS)
def test_rows_without_an_adapter_keep_their_bits(way, absent, kind, monkeypatch):
    """Negative zeros too, also of tokens whose adapter this layer does not have."""
    serve(monkeypatch, way)
    p = of(kind, with_weight=False, with_out=True)
    bank = p.bank()
    out = torch.full_like(p.out, -0.0)
    call = call_of(p, bank, "composed", out=out)
    base = (p.ids < 0).all(1)
    if absent:
        tensors = call.bank
        kept = [index for index, slot in enumerate(tensors.slots) if slot != 1]
        call.bank = tensors._replace(
            slots=[tensors.slots[index] for index in kept],
            thresholds=[tensors.thresholds[index] for index in kept],
            factors=[factor for index in kept for factor in tensors.factors_of(index)],
        )
        call.layout = None
        base = ((p.ids < 0) | (p.ids == 1)).all(1)
    with torch._C._AutoDispatchBelowAutograd():
        composed.forward(call)
    assert out[base].eq(0).all() and out[base].signbit().all()
    assert (out[~base] != 0).any(1).all()


def test_what_a_filling_says_is_made_once():
    """Nothing is copied to a device by a second call; another filling is another one."""
    p = of("mixed")
    bank = p.bank()
    routing = p.routing(bank)
    tensors = routing.tensors(with_plan=True)
    pairs = pairs_of(tensors)
    assert pairs_of(routing.tensors(with_plan=True)) is pairs
    assert pairs.dense(tensors) is pairs.dense(tensors)
    assert pairs.padded(tensors) is pairs.padded(tensors)
    routing.set_tokens_(SORTED)
    again = pairs_of(routing.tensors(with_plan=True))
    assert [group.slot for group in again.groups] == [0, 1, 3]
    assert again.offset == 0 and pairs.offset is None


def test_few_tokens_are_padded_and_many_are_not():
    """On a device, by what is moved and how many launches are saved."""

    def is_padded(counts: list[int], device: str) -> bool:
        ids = [slot for slot, count in enumerate(counts) for _ in range(count)]
        p = RoutedProblem.random(ids, [32] * len(counts), 64, 64)
        call = call_of(p, p.bank(), "composed")
        wide = torch.empty(len(ids), 4096, device=device)
        columns = [0, 4096]
        call = replace(call, bank=call.bank._replace(slice_columns=columns))
        return composed._is_better_padded(Batch(call, wide))

    assert is_padded([4] * 8, "meta")
    assert not is_padded([32], "meta")
    assert not is_padded([512] * 8, "meta")
    assert not is_padded([1] * 7 + [4000], "meta")
    assert not is_padded([4] * 8, "cpu")


@pytest.mark.parametrize("largest", [0.0, 1e-45, 3e-5, 1.0, 6.5, 3e38])
@pytest.mark.parametrize("other", [0.0, torch.nan, torch.inf], ids=str)
def test_half_range(largest, other):
    """A power of two; what is not finite has no say."""
    sizes = torch.tensor([largest, largest / 3, other])
    exponent = half_range(sizes)
    mantissa, _ = torch.frexp(exponent)
    assert mantissa == 0.5
    assert (sizes[:2] / exponent).half().isfinite().all()
    if largest > 1e-30:
        assert sizes[0] / exponent >= 2.0**14
