"""The error policy itself: which kernels it convicts, and what drawing again changes."""

import itertools

import pytest
import torch
from torch import nn

from lora_kernels.testing import (
    LoRAProblem,
    assert_as_accurate,
    assert_draws_within_policy,
    assert_within_policy,
    error_bound,
    error_ratio,
    redrawn,
    redrawn_model,
)
from lora_kernels.testing.routed_inputs import RoutedProblem


class Kernel:
    """Results whose maximum and typical errors are these multiples of eager's, draw by draw."""

    def __init__(self, *ratios: float, dtype: torch.dtype = torch.float32) -> None:
        self.ratios, self.dtype, self.drawn = ratios, dtype, []

    def __call__(self, number: int):
        self.drawn.append(number)
        generator = torch.Generator().manual_seed(number)
        exact = torch.randn(40, 20, generator=generator, dtype=torch.float64)
        noise = 1e-3 * torch.randn(40, 20, generator=generator, dtype=torch.float64)
        ratio = self.ratios[number] if number < len(self.ratios) else self.ratios[-1]
        results = {"y": exact + ratio * noise}, {"y": exact + noise}
        ours, eager = ({"y": result["y"].to(self.dtype)} for result in results)
        return ours, eager, {"y": exact}


@pytest.mark.parametrize(
    ("ratios", "draws"),
    [
        ([1.0], 1),
        ([1.9, 3.0], 1),  # one draw acquits
        ([2.8, 1.0], 17),  # honest and unlucky
        ([3.9, *[3.5] * 7, 1.0], 17),  # seven of sixteen
        ([2.1, *[0.4] * 15, 3.9], 17),
    ],
    ids=str,
)
def test_acquitted(ratios, draws):
    kernel = Kernel(*ratios)
    assert torch.equal(assert_draws_within_policy(kernel)["y"], Kernel(*ratios)(0)[0]["y"])
    assert kernel.drawn == list(range(draws))


@pytest.mark.parametrize(
    ("ratios", "draws", "message"),
    [
        ([2.5, 1.5], 17, r"y: .* 2.50 times eager's .* 1.50 in the median \(at most 1.25\)"),
        ([2.2, *[1.0] * 7, 5.0, 1.0], 17, r"1.00 in the median .*, 5.00 at most \(4\)"),
        ([2.2, *[1.0] * 7, *[1.6] * 8, 0.0], 17, "1.3. in the median"),
        ([5.0, 1.0], 17, "5.00 times eager's .* 1.00 in the median"),
    ],
    ids=["half as wrong again", "an outlier", "half of the draws", "an outlier first"],
)
def test_convicted(ratios, draws, message):
    kernel = Kernel(*ratios)
    with pytest.raises(AssertionError, match=message):
        assert_draws_within_policy(kernel)
    assert kernel.drawn == list(range(draws))


def test_few_elements_are_judged_by_all_draws_together():
    def few(*ratios):
        kernel = Kernel(*ratios)
        return lambda number: tuple({"y": each["y"][:1, :3]} for each in kernel(number))

    assert_draws_within_policy(few(9.0, 1.0))
    for ratios in ([9.0, 2.2], [9.0, *[1.0] * 8, 30.0, 1.0]):
        with pytest.raises(AssertionError, match=r"9\.00 times .* in 16 draws together"):
            assert_draws_within_policy(few(*ratios))


def test_eager_may_be_exact_by_luck():
    """In one draw of a few elements, but not in all."""

    def draw(number, lucky):
        exact = {"y": torch.full((1, 1), 3.0, dtype=torch.float64) + number}
        eager = {"y": exact["y"] if number in lucky else exact["y"] + 1e-4}
        ours, eager = ({"y": r["y"].float()} for r in ({"y": exact["y"] - 1.2e-4}, eager))
        return ours, eager, exact

    assert_draws_within_policy(lambda number: draw(number, [0, 5, 6]))
    with pytest.raises(AssertionError, match="y: the maximum error is inf"):
        assert_draws_within_policy(lambda number: draw(number, range(17)))


def test_typical_errors_need_no_bad_first_draw():
    assert_as_accurate(Kernel(1.2))
    assert_as_accurate(Kernel(3.0, 1.0))
    for ratios in ([1.5], [1.0, 5.0, 1.0], [*[1.0] * 7, 1.6]):
        with pytest.raises(AssertionError, match="root mean square"):
            assert_as_accurate(Kernel(*ratios))


def test_only_the_result_that_failed_is_judged_by_its_draws():
    unlucky, steady = Kernel(2.5, 1.0), Kernel(1.9)

    def both(number):
        pairs = zip(unlucky(number), steady(number), strict=True)
        return tuple({"a": a["y"], "b": b["y"]} for a, b in pairs)

    assert_draws_within_policy(both)
    assert len(unlucky.drawn) == 17


@pytest.mark.parametrize("fault", ["not finite", "dtype", "shape", "missing in eager"])
@pytest.mark.parametrize("when", [0, 9])
def test_what_has_no_luck_in_it_is_asked_of_every_draw(fault, when):
    kernel = Kernel(2.5, 1.0)

    def draw(number):
        ours, eager, oracle = kernel(number)
        if number == when:
            changed = {
                "not finite": lambda y: y.index_fill(0, torch.tensor(3), torch.nan),
                "dtype": lambda y: y.double(),
                "shape": lambda y: y.t(),
                "missing in eager": lambda y: y,
            }[fault](ours["y"])
            ours = {"z" if fault == "missing in eager" else "y": changed}
        return ours, eager, oracle

    with pytest.raises((AssertionError, KeyError)):
        assert_draws_within_policy(draw)


def test_the_ratio_is_the_bound():
    exact = torch.randn(50, dtype=torch.float64)
    for dtype, few in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        oracle = exact[:20] if few else exact.repeat(3)
        eager = oracle.to(dtype)
        bound = error_bound(eager, oracle)
        for factor in (0.1, 0.9, 1.1, 3.0):
            ours = oracle.clone()
            ours[7] += factor * bound
            ratio = error_ratio(ours, eager, oracle)
            assert (ratio <= 2) == (factor <= 1)
    assert error_ratio(exact, exact, exact) == 0.0  # nobody is wrong
    assert error_ratio(exact + 1, exact, exact) == float("inf")
    assert_within_policy("empty", exact[:0].float(), exact[:0].float(), exact[:0])


# --- drawing again ---------------------------------------------------------------------------


def test_other_signs_in_the_same_layout():
    wide = torch.full((5, 12), torch.nan, dtype=torch.bfloat16)
    wide[:, 3:10] = torch.randn(5, 7)
    for tensor in (wide[:, 3:10], wide[:, 3:10].t(), wide[:1, 3:10].expand(5, 7), wide[:, 3:10:2]):
        assert redrawn(tensor, 0) is tensor
        others = [redrawn(tensor, number, "x") for number in range(1, 17)]
        for other in others:
            assert other.stride() == tensor.stride() and other.dtype == tensor.dtype
            assert other.storage_offset() == tensor.storage_offset()
            assert torch.equal(other.abs(), tensor.abs())
            around = torch.as_strided(other, wide.shape, wide.stride(), 0)
            assert torch.equal(around.isnan(), wide.isnan())
        assert all(not torch.equal(a, b) for a, b in itertools.combinations([tensor, *others], 2))
        assert torch.equal(redrawn(tensor, 3, "x"), others[2])
        assert not torch.equal(redrawn(tensor, 3, "y"), others[2])


def test_problems_and_models_are_drawn_again():
    linear = LoRAProblem.random((9,), 8, 7, 3, with_output_scale=True, dropout_p=0.5)
    again = linear.redrawn(1)
    names = ("x", "weight", "lora_a", "lora_b", "bias", "output_scale", "dy", "seed")
    assert linear.redrawn(0) is linear and torch.equal(again.scaling, linear.scaling)
    assert all(not torch.equal(getattr(again, n), getattr(linear, n)) for n in names)

    routed = RoutedProblem.random([0, 1, -1], [4, 5], 8, 7, weighted=True, dropout=0.5)
    again = routed.redrawn(1)
    assert routed.redrawn(0) is routed and torch.equal(again.ids, routed.ids)
    for name in ("x", "weight", "bias", "weights", "dy", "seed"):
        assert not torch.equal(getattr(again, name), getattr(routed, name)), name
    factors = [f for p in (routed, again) for a in p.adapters.values() for f in a.pairs[0]]
    assert all(not torch.equal(*pair) for pair in zip(factors[:4], factors[4:], strict=True))

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    again = redrawn_model(model, 1)
    assert redrawn_model(model, 0) is model and again[1].weight is again[0].weight
    assert not torch.equal(again[0].weight, model[0].weight)
    assert torch.equal(again[0].weight, redrawn_model(model, 1)[0].weight)
