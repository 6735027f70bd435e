"""Routed adapters for few tokens, thread by thread on the CPU, against a loop in fp64."""

import pytest
import torch
from guarded import guarded, survives
from routed_results import routed_eager, routed_oracle
from torch import Tensor

from lora_kernels.ops.routed import AdapterBank, Routing
from lora_kernels.ops.routed.tensors import in_one_piece
from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime import cuda_extension as native_cuda
from lora_kernels.testing import assert_within_policy
from lora_kernels.testing.routed_inputs import RoutedProblem

DTYPES = [torch.bfloat16, torch.float16]
RANKS = (1, 3, 8, 16, 24, 64, 100)
SLICES = (70, 41, 66)
SLICED_RANKS = ((3, 0, 8), (0, 5, 0), (1, 1, 1), (16, 24, 32), (0, 0, 2))

pytestmark = pytest.mark.usefixtures("emulated", "poisoned_memory")


def ids_of(rows: int, adapters: int) -> Tensor:
    """Every adapter, the last one too, and none, in no order."""
    ids = torch.arange(rows) % (adapters + 1) - 1
    return ids.flip(0)[torch.randperm(rows, generator=torch.Generator().manual_seed(5))]


def problem_of(ids, ranks=RANKS, in_features=40, widths=67, **options) -> RoutedProblem:
    options = {"dtype": torch.bfloat16, "with_weight": False, "with_out": True, **options}
    return RoutedProblem.random(ids, ranks, in_features, widths, **options)


def run(
    problem: RoutedProblem,
    *,
    bank: AdapterBank | None = None,
    routing: Routing | None = None,
    out: Tensor | None = None,
    overwrite: bool = False,
    save_h: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y, and h if it is saved; y is the problem's ``out`` plus what the adapters add."""
    p = problem
    bank = p.bank() if bank is None else bank
    routing = p.routing(bank) if routing is None else routing
    y = torch.full_like(p.dy, torch.nan) if overwrite else p.out.clone()
    if out is not None:
        y = out.copy_(y)
    tensors, routed = bank.tensors(), routing.tensors(with_plan=False)
    h = torch.full((routed.tokens.shape[0], tensors.max_total_rank), torch.nan) if save_h else None
    native_cuda.decode_routed_(y, p.x, tensors, routed, h, overwrite=overwrite)
    return y, h


def h_of(problem: RoutedProblem, routing: Routing, width: int, dtype: torch.dtype) -> Tensor:
    """h of every pair, in the order of the pairs, from factors rounded to x's dtype."""
    p = problem
    h = torch.zeros(routing._tokens.shape[0], width, dtype=dtype)
    by_slot = {adapter.slot: adapter for adapter in p.adapters.values()}
    for pair, token in enumerate(routing._tokens.tolist()):
        slot = p.ids[token, 0].item() if token < p.ids.shape[0] else -1
        if slot < 0:
            continue
        a = torch.cat([both[0] for both in by_slot[slot].pairs if both is not None])
        h[pair, : len(a)] = p.x[token].to(dtype) @ a.to(p.x.dtype).to(dtype).t()
    return h


def check(problem: RoutedProblem, **options) -> tuple[Tensor, Tensor | None]:
    y, h = run(problem, **options)
    eager, oracle = routed_eager(problem)["y"], routed_oracle(problem)["y"]
    if options.get("overwrite"):
        zero = problem.with_(out=torch.zeros_like(problem.out))
        eager, oracle = routed_eager(zero)["y"], routed_oracle(zero)["y"]
    assert_within_policy("y", y, eager, oracle)
    nobody = problem.ids[:, 0] < 0
    unchanged = 0 if options.get("overwrite") else problem.out[nobody]
    assert (y[nobody] == unchanged).all()
    if h is not None:
        bank = problem.bank()
        routing = options.get("routing") or problem.routing(bank)
        width = h.shape[1]
        eager_h = h_of(problem, routing, width, torch.float32)
        oracle_h = h_of(problem, routing, width, torch.float64)
        assert_within_policy("h", h, eager_h, oracle_h)
    return y, h


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "fp32_adapters"])
@pytest.mark.parametrize("rows, in_features", [(1, 256), (9, 37), (17, 40), (65, 256), (40, 1000)])
@pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])
def test_numbers(rows, in_features, sliced, adapter_dtype, dtype):
    ranks, widths = (SLICED_RANKS, SLICES) if sliced else (RANKS, 67)
    check(
        problem_of(
            ids_of(rows, len(ranks)), ranks, in_features, widths, dtype=dtype,
            adapter_dtype=adapter_dtype, weighted=sliced,
        )
    )  # fmt: skip


@pytest.mark.parametrize("rank", [*RANKS, 136, 300])
@pytest.mark.parametrize("rows", [3, 8, 16, 21])
def test_one_adapter(rank, rows):
    """All of a tile's pairs, and more than one tile."""
    check(problem_of([0] * rows, [rank], 72, 130))


@pytest.mark.parametrize("widths", [1, 16, 24, 100, 520, (8, 8), (4, 256, 12), (3, 1, 5, 7, 2, 1)])
def test_widths(widths):
    ranks = [8, 5] if isinstance(widths, int) else [(8,) * len(widths), (5, 2) + (1,) * 6]
    ranks = ranks if isinstance(widths, int) else [given[: len(widths)] for given in ranks]
    check(problem_of([1, 0, -1, 1, 0], ranks, 64, widths))


@pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overwrite(sliced, dtype):
    ranks, widths = (SLICED_RANKS, SLICES) if sliced else (RANKS, 67)
    check(problem_of(ids_of(19, len(ranks)), ranks, 40, widths, dtype=dtype), overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
def test_h_need_not_be_saved(overwrite):
    problem = problem_of(ids_of(12, 5), SLICED_RANKS, 40, SLICES)
    y, _ = check(problem, save_h=False, overwrite=overwrite)
    assert torch.equal(y, run(problem, overwrite=overwrite)[0])


def test_a_slice_without_rank_keeps_its_bits():
    """Also the sign of a zero, which an addition would lose."""
    problem = problem_of([1, 1], SLICED_RANKS, 40, SLICES)
    problem.out[:, :70] = -0.0
    y, _ = run(problem)
    assert y[:, :70].signbit().all()


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
@pytest.mark.parametrize("rows", [1, 20])
def test_room_for_more_tokens(rows, overwrite):
    """A routing for 33 tokens of which there are fewer."""
    problem = problem_of(ids_of(rows, 5), SLICED_RANKS, 40, SLICES)
    bank = problem.bank()
    check(problem, bank=bank, routing=problem.routing(bank, 33), overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True], ids=["add", "overwrite"])
def test_a_routing_that_was_never_filled(overwrite):
    problem = problem_of([-1] * 20)
    bank = problem.bank()
    check(problem, bank=bank, routing=Routing.empty(20, bank), overwrite=overwrite)


def test_large_tiles():
    """64 pairs per tile: as routings of more than 256 pairs have them."""
    problem = problem_of(ids_of(90, 3), RANKS[:3], 40, 24, weighted=True)
    bank = problem.bank()
    routing = problem.routing(bank, 257)
    assert routing.block == 64
    check(problem, bank=bank, routing=routing)
    check(problem, bank=bank, routing=routing, overwrite=True)


@pytest.mark.parametrize("in_features", [1000, 39])
def test_without_clusters(emulated_device, in_features):
    """Compute capability 8.0: a block has all of K and of N."""
    emulated_device(capability=80)
    problem = problem_of(ids_of(20, 5), SLICED_RANKS, in_features, SLICES)
    check(problem)
    check(problem, overwrite=True)


def test_the_largest_rank_on_the_smallest_device(emulated_device):
    """In as many slices as there may be, with the 99 KB of compute capability 8.6."""
    emulated_device(capability=86)
    ranks = (57, 61, 70, 67, 63, 65, 64, 65)
    assert sum(ranks) == native_cuda.MAX_DECODE_WIDTH
    assert len(ranks) == native.extension().cuda_max_slices
    check(problem_of([0, -1, 1], [ranks, (1,) * 8], 40, (9,) * 8))


def test_too_large_a_rank_is_an_error():
    with pytest.raises(RuntimeError, match="widest rank 20000"):
        run(problem_of([0], [20_000], 8, 8))


@pytest.mark.parametrize("multiple, offset", [(8, 0), (8, 8), (4, 4), (1, 3)])
def test_strides_and_alignment(multiple, offset):
    """Rows of x and y amid NaN; the same bits whichever way they are read and written."""
    problem = problem_of(ids_of(17, 5), SLICED_RANKS, 64, SLICES)
    expected, expected_h = run(problem)

    def padded(columns: int) -> tuple[Tensor, Tensor]:
        pitch = (columns + offset + multiple) // multiple * multiple
        storage = torch.full((19, pitch), torch.nan, dtype=torch.bfloat16)
        return storage, storage[1:18, offset : offset + columns]

    (_, x), (storage, out) = padded(64), padded(sum(SLICES))
    y, h = run(problem.with_(x=x.copy_(problem.x)), out=out)
    assert torch.equal(y, expected) and torch.equal(h, expected_h)
    out.fill_(torch.nan)
    assert storage.isnan().all()


def test_nan_of_an_adapter_stays_with_its_tokens():
    problem = problem_of(ids_of(30, 5), SLICED_RANKS, 40, SLICES)
    y, h = run(problem)
    bank = problem.bank()
    with torch.no_grad():
        for parameter in bank["a3"].parameters():
            parameter.fill_(torch.nan)
    poisoned, h_poisoned = run(problem, bank=bank)
    theirs = problem.ids[:, 0] == 3
    assert poisoned[theirs].isnan().all() and torch.equal(poisoned[~theirs], y[~theirs])
    pairs = problem.routing(bank)._tokens.long()
    assert torch.equal(h_poisoned[~theirs[pairs]], h[~theirs[pairs]])


def test_nan_of_a_slice_stays_in_it():
    problem = problem_of([3] * 5, SLICED_RANKS, 40, SLICES)
    y, _ = run(problem)
    bank = problem.bank()
    with torch.no_grad():
        bank["a3"].lora_a_1.fill_(torch.nan)
    poisoned, _ = run(problem, bank=bank)
    assert poisoned[:, 70:111].isnan().all()
    assert torch.equal(poisoned[:, :70], y[:, :70]) and torch.equal(poisoned[:, 111:], y[:, 111:])


def test_a_token_has_the_same_bits_in_any_batch():
    problem = problem_of(ids_of(50, 7), RANKS, 1000, 67, weighted=True)
    bank = problem.bank()
    y, _ = run(problem, bank=bank)
    for rows in (slice(0, 1), slice(49, 50), slice(5, 14), slice(20, 50)):
        part = problem.with_(
            x=problem.x[rows], out=problem.out[rows], dy=problem.dy[rows],
            ids=problem.ids[rows], weights=problem.weights[rows],
        )  # fmt: skip
        assert torch.equal(run(part, bank=bank)[0], y[rows])


def test_scalings_and_weights_that_are_not_finite():
    """Only the tokens that they scale, and only where there is a rank."""
    problem = problem_of(ids_of(20, 5), SLICED_RANKS, 40, SLICES)
    y, h = run(problem)
    bad, bad_h = run(problem.with_adapter("a0", scaling=torch.inf))
    theirs = problem.ids[:, 0] == 0
    assert not bad[theirs][:, :70].isfinite().any()
    assert torch.equal(bad[theirs][:, 70:111], y[theirs][:, 70:111])
    assert torch.equal(bad[~theirs], y[~theirs]) and torch.equal(bad_h, h)


@pytest.mark.parametrize("rank, width", [(8, 3), (6, 4)])
def test_a_wider_adapter_after_h_was_made(rank, width):
    """h has the width of an earlier bank, as in a captured graph: the rest is left out."""
    problem = problem_of([0, 0, 1], [rank, 3], 40, 24)
    bank = problem.bank()
    whole_h = run(problem, bank=bank)[1]
    with torch.no_grad():
        bank["a0"].lora_b[:, width:] = torch.nan  # must not be read: 0 times it would be NaN
    tensors = bank.tensors()._replace(max_total_rank=width)
    routed = problem.routing(bank).tensors(with_plan=False)
    h, y = torch.full((3, width), torch.nan), problem.out.clone()
    native_cuda.decode_routed_(y, problem.x, tensors, routed, h)
    a, b = problem.adapters["a0"].pairs[0]
    narrow = problem.with_adapter("a0", pairs=((a[:width], b[:, :width]),))
    assert_within_policy("y", y, routed_eager(narrow)["y"], routed_oracle(narrow)["y"])
    assert torch.equal(h, whole_h[:, :width])


@pytest.mark.parametrize("in_features", [40, 37])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "fp32_adapters"])
def test_nothing_is_read_outside(in_features, adapter_dtype):
    """x has fewer rows than the routing has room for; the last adapter ends the storage."""
    problem = problem_of(
        ids_of(11, 5), SLICED_RANKS, in_features, SLICES, adapter_dtype=adapter_dtype, weighted=True
    )
    bank = problem.bank()
    tensors = in_one_piece(bank.tensors())
    routed = problem.routing(bank, 20).tensors(with_plan=False)
    end = max(
        offset + rank * (in_features if factor == 0 else SLICES[factor - 1])
        for slot in tensors.slot_table.tolist()
        for factor, (rank, _, offset) in enumerate(slot)
    )
    tensors = tensors._replace(
        storage=guarded(tensors.storage[:end]), slot_table=guarded(tensors.slot_table),
        scaling=guarded(tensors.scaling),
    )  # fmt: skip
    names = ("tokens", "offsets", "tiles", "pair_weights")
    routed = routed._replace(**{name: guarded(getattr(routed, name)) for name in names})
    x, y = guarded(problem.x), guarded(problem.out)
    h = guarded(torch.empty(20, tensors.max_total_rank))
    assert survives(lambda: native_cuda.decode_routed_(y, x, tensors, routed, h))


def test_scaled_h_may_be_too_large_for_fp16():
    """h and y are not: h is 2560, of which 32 are infinite."""
    bank = AdapterBank(64, 24, dtype=torch.float16)
    lora_b = torch.full((24, 4), 1e-3, dtype=torch.float16)
    bank.add("one", torch.full((4, 64), 40.0, dtype=torch.float16), lora_b, 32.0)
    routing = Routing.from_tokens(torch.tensor([0, -1, 0]), bank)
    y = torch.zeros(3, 24, dtype=torch.float16)
    x = torch.ones(3, 64, dtype=torch.float16)
    native_cuda.decode_routed_(y, x, bank.tensors(), routing.tensors(with_plan=False))
    exact = torch.full((24,), 4 * 2560 * 32 * lora_b[0, 0].item()).half()
    assert torch.equal(y[0], exact) and torch.equal(y[2], exact) and (y[1] == 0).all()
