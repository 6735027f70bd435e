"""How large an error may be: a function of the eager formula's own error, never a chosen number."""

import torch
from torch import Tensor

_FEW_ELEMENTS = 64


def error_bound(eager: Tensor, oracle: Tensor, computed_in: torch.dtype | None = None) -> float:
    """The largest error allowed against the fp64 ``oracle``.

    Twice the maximum error of plain eager torch in the same dtype, plus 1e-6 of the largest result;
    for half-precision results of fewer than 64 elements plus the dtype's epsilon instead, because
    with so few an honest kernel may lose the ratio by luck. ``computed_in`` is the dtype of the
    products where it is not the result's (the fp32 gradient of an fp32 adapter over a half base).
    """
    if oracle.numel() == 0:
        return 0.0
    eager_error = (eager.double() - oracle).abs().max().item()
    dtype = computed_in or eager.dtype
    few_halves = dtype.itemsize == 2 and eager.numel() < _FEW_ELEMENTS
    slack = torch.finfo(dtype).eps if few_halves else 1e-6
    return 2 * eager_error + slack * oracle.abs().max().item()


def assert_within_policy(
    name: str,
    ours: Tensor,
    eager: Tensor,
    oracle: Tensor,
    computed_in: torch.dtype | None = None,
) -> None:
    """Fail unless ``ours`` has eager's shape and dtype, is finite and within :func:`error_bound`.

    Args:
        name: what is compared, for the message.
        ours: the result under test.
        eager: the plain eager formula's result in the dtype a trainer would run it in.
        oracle: the result in fp64 from the same inputs.
        computed_in: the dtype of the products, where it is not the result's.
    """
    assert ours.shape == eager.shape == oracle.shape, (
        f"{name}: shape {list(ours.shape)}, eager {list(eager.shape)}, oracle {list(oracle.shape)}"
    )
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, eager {eager.dtype}"
    assert oracle.dtype == torch.float64, f"{name}: the oracle must be fp64, is {oracle.dtype}"
    if ours.numel() == 0:
        return
    assert torch.isfinite(oracle).all(), f"{name}: the oracle itself is not finite"
    assert torch.isfinite(ours).all(), f"{name}: {(~torch.isfinite(ours)).sum()} non-finite values"
    error = (ours.double() - oracle).abs().max().item()
    bound = error_bound(eager, oracle, computed_in)
    assert error <= bound, (
        f"{name}: maximum error {error:.3e} exceeds {bound:.3e} "
        f"(largest result {oracle.abs().max().item():.3e})"
    )
