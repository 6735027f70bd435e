"""How large an error may be: a function of the eager formula's own error, never a chosen number.

The quotient of two maximum errors has luck in it, and another CPU rounds in another order. So one
draw only acquits: a result that is outside of its bound is drawn again from other values, and then
it is the median that is held against eager's.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

Results = dict[str, Tensor]
Draw = tuple[Results, Results, Results]  # ours, the eager formula's, and fp64's

_FEW_ELEMENTS = 64
# What a ratio may be in one draw; where it is more, in the median of others, and in each of them.
_RATIO = 2.0
_DRAWS, _MEDIAN_RATIO, _LARGEST_RATIO = 16, 1.25, 4.0


def error_bound(eager: Tensor, oracle: Tensor, computed_in: torch.dtype | None = None) -> float:
    """The largest error allowed against the fp64 ``oracle`` in one draw.

    Twice the maximum error of plain eager torch in the same dtype, plus 1e-6 of the largest result;
    for half-precision results of fewer than 64 elements plus the dtype's epsilon instead, because
    with so few an honest kernel may lose the ratio by luck.

    Args:
        eager: the plain eager formula's result, any shape, in the dtype a trainer would run it in.
        oracle: the same in fp64.
        computed_in: the dtype of the products where it is not the result's (the fp32 gradient of an
            fp32 adapter over a half base).

    Returns:
        A bound for the maximum of ``|ours - oracle|``.
    """
    if oracle.numel() == 0:
        return 0.0
    return _RATIO * _largest(eager.double() - oracle) + _slack(eager, oracle, computed_in)


def error_ratio(
    ours: Tensor, eager: Tensor, oracle: Tensor, computed_in: torch.dtype | None = None
) -> float:
    """The maximum error of ``ours``, less the slack of :func:`error_bound`, over that of eager.

    Args:
        ours: the result under test, of eager's shape and dtype.
        eager, oracle, computed_in: as for :func:`error_bound`.

    Returns:
        At most 2 where ``ours`` is within :func:`error_bound`; 0 where the slack alone covers it.
    """
    if oracle.numel() == 0:
        return 0.0
    excess = _largest(ours.double() - oracle) - _slack(eager, oracle, computed_in)
    eager_error = _largest(eager.double() - oracle)
    if excess <= 0:
        return 0.0
    return excess / eager_error if eager_error else float("inf")


def assert_within_policy(
    name: str,
    ours: Tensor,
    eager: Tensor,
    oracle: Tensor,
    computed_in: torch.dtype | None = None,
) -> None:
    """Fail unless ``ours`` has eager's shape and dtype, is finite and within :func:`error_bound`.

    For values that cannot be drawn again; see :func:`assert_draws_within_policy`.

    Args:
        name: what is compared, for the message.
        ours: the result under test.
        eager: the plain eager formula's result in the dtype a trainer would run it in.
        oracle: the result in fp64 from the same inputs.
        computed_in: the dtype of the products, where it is not the result's.
    """
    _assert_comparable(name, ours, eager, oracle)
    error = _largest(ours.double() - oracle)
    bound = error_bound(eager, oracle, computed_in)
    assert error <= bound, (
        f"{name}: maximum error {error:.3e} exceeds {bound:.3e} "
        f"(largest result {_largest(oracle):.3e})"
    )


def assert_draws_within_policy(
    draw: Callable[[int], Draw], computed_in: torch.dtype | None = None
) -> Results:
    """Fail unless our errors are eager's, by one draw or else by many.

    Draw 0 is enough where all of its results are within :func:`error_bound`. A result that is not
    is drawn 16 times more. Then the median of its :func:`error_ratio` in these may be at most 1.25,
    and neither in them nor in draw 0 may the ratio pass 4. With fewer than 64 elements the ratio of
    a draw says little, eager may have hit all of them by luck: the 16 draws together are then one
    result, and its ratio may be at most 2. Shape, dtype and finiteness are asked of every draw.

    Args:
        draw: called with the number of a draw, returns ours, eager's and the fp64 results by name;
            different values for each number, of the same sizes and magnitudes. Ours may be fewer.
        computed_in: the dtype of the products, where it is not the results'.

    Returns:
        Our results of draw 0.
    """
    first = draw(0)
    ratios = {name: _ratio(name, first, computed_in) for name in first[0]}
    failed = {name: ratio for name, ratio in ratios.items() if not ratio <= _RATIO}
    drawn = [draw(number) for number in range(1, _DRAWS + 1)] if failed else []
    for again in drawn:
        for name in again[0]:
            _assert_comparable(name, *(kind[name] for kind in again))
    complaints = []
    for name, ratio in failed.items():
        if first[0][name].numel() < _FEW_ELEMENTS:
            complaint = _complaint_together(name, drawn, computed_in)
        else:
            complaint = _complaint([_ratio(name, again, computed_in) for again in drawn], ratio)
        if complaint:
            complaints.append(
                f"{name}: the maximum error is {ratio:.2f} times eager's (at most {_RATIO:g}); "
                + complaint
            )
    assert not complaints, "\n".join(complaints)
    return first[0]


def assert_as_accurate(draw: Callable[[int], Draw]) -> None:
    """Fail unless our root mean square error is typically eager's, without any slack.

    Stricter than :func:`assert_draws_within_policy`, for well-conditioned results of many elements:
    over 16 draws the median of our error over eager's is at most 1.25, and no quotient passes 4.

    Args:
        draw: as there.
    """
    ratios: dict[str, list[float]] = {}
    for number in range(_DRAWS):
        ours, eager, oracle = draw(number)
        for name, result in ours.items():
            _assert_comparable(name, result, eager[name], oracle[name])
            error, theirs = (
                (r.double() - oracle[name]).norm().item() for r in (result, eager[name])
            )
            ratio = error / theirs if theirs else float("inf") if error else 0.0
            ratios.setdefault(name, []).append(ratio)
    complaints = [
        f"{name}: the root mean square error against eager's: {complaint}"
        for name, found in ratios.items()
        if (complaint := _complaint(found))
    ]
    assert not complaints, "\n".join(complaints)


def _ratio(name: str, drawn: Draw, computed_in: torch.dtype | None) -> float:
    ours, eager, oracle = (kind[name] for kind in drawn)
    _assert_comparable(name, ours, eager, oracle)
    return error_ratio(ours, eager, oracle, computed_in)


def _complaint(ratios: list[float], first: float = 0.0) -> str:
    """What is wrong with the ratios of several draws; empty if nothing is."""
    median, largest = statistics.median(ratios), max(first, *ratios)
    if median <= _MEDIAN_RATIO and largest <= _LARGEST_RATIO:
        return ""
    return (
        f"in {len(ratios)} draws {median:.2f} in the median (at most {_MEDIAN_RATIO}), "
        f"{largest:.2f} at most ({_LARGEST_RATIO:g})"
    )


def _complaint_together(name: str, drawn: list[Draw], computed_in: torch.dtype | None) -> str:
    """What is wrong with all draws of a small result as one result; empty if nothing is."""
    ours, eager, oracle = (
        torch.cat([results[name].flatten() for results in kind])
        for kind in zip(*drawn, strict=True)
    )
    ratio = error_ratio(ours, eager, oracle, computed_in)
    return "" if ratio <= _RATIO else f"{ratio:.2f} times in {len(drawn)} draws together"


def _assert_comparable(name: str, ours: Tensor, eager: Tensor, oracle: Tensor) -> None:
    assert ours.shape == eager.shape == oracle.shape, (
        f"{name}: shape {list(ours.shape)}, eager {list(eager.shape)}, oracle {list(oracle.shape)}"
    )
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, eager {eager.dtype}"
    assert oracle.dtype == torch.float64, f"{name}: the oracle must be fp64, is {oracle.dtype}"
    assert torch.isfinite(oracle).all(), f"{name}: the oracle itself is not finite"
    assert torch.isfinite(ours).all(), f"{name}: {(~torch.isfinite(ours)).sum()} non-finite values"


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _slack(eager: Tensor, oracle: Tensor, computed_in: torch.dtype | None) -> float:
    dtype = computed_in or eager.dtype
    few_halves = dtype.itemsize == 2 and eager.numel() < _FEW_ELEMENTS
    return (torch.finfo(dtype).eps if few_halves else 1e-6) * _largest(oracle)
