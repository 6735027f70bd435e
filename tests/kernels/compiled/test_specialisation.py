"""Triton compiles a kernel again for some values of its arguments.

Not for where a mask stands, and for few numbers of tokens.
"""

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
import triton
from compile_cases import (
    BF16,
    CALLS,
    FP32,
    ROUTED_CALLS,
    LinearCase,
    RoutedCase,
    launches_of,
)
from compile_only import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

EVERY = CALLS | ROUTED_CALLS
DRAWING = {
    launch.name: launch
    for call, _ in EVERY.values()
    for launch in launches_of(call, 90)
    if launch.arguments.get("LONG_COUNTER") is not None and launch.arguments["DROPOUT"]
}


@pytest.mark.parametrize("name", DRAWING)
def test_one_kernel_for_every_place(name):
    launch = DRAWING[name]
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)

    def key(**arguments):
        return bind(**(launch.arguments | arguments), **launch.options)[1]

    wide = "C" if "C" in launch.arguments else "D"

    for other in (0, 1, 16, 17, 2**31, 2**40):
        assert key(first_group=other) == key()
        assert key(groups_per_row=other) == key()
    assert key(**{wide: 17}) != key(**{wide: 16}), "as others are"


def variants(make: Callable[[int], LinearCase | RoutedCase], tokens: Iterable[int]) -> Counter:
    """name -> how many times a kernel is compiled for calls with these numbers of tokens."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders, seen = {}, set()
    for number in tokens:
        for launch in launches_of.__wrapped__(make(number), 90):
            kernel = launch.kernel
            if launch.name not in binders:
                binders[launch.name] = create_function_from_signature(
                    kernel.signature, kernel.params, backend
                )
            specialisation = binders[launch.name](**launch.arguments, **launch.options)[1]
            seen.add((launch.name, str(specialisation), str(launch.options)))
    return Counter(name for name, *_ in seen)


LINEAR = functools.partial(
    LinearCase, in_features=4096, out_features=4096, dtype=BF16, adapter_dtype=FP32, dropout_p=0.05
)
ROUTED = functools.partial(RoutedCase, in_features=4096, dtype=BF16, adapter_dtype=FP32)


@pytest.mark.parametrize(
    ("make", "at_8192", "bound"),
    [
        pytest.param(functools.partial(LINEAR, rank=16, strategy="hybrid"), 8, 9, id="hybrid"),
        pytest.param(functools.partial(LINEAR, rank=8, strategy="hybrid"), 10, 12, id="rank 8"),
        pytest.param(functools.partial(LINEAR, rank=16), 8, 11, id="fused"),
        pytest.param(
            functools.partial(ROUTED, slices=(4096,), max_total_rank=16, dropout=True),
            9, 14, id="routed",
        ),
        pytest.param(
            functools.partial(
                ROUTED, slices=(4096, 1024, 1024), max_total_rank=48, pairs_per_token=2,
                weighted=True,
            ),
            12, 15, id="routed q k v, weighted",
        ),
    ],
)  # fmt: skip
def test_numbers_of_tokens_compile_few_kernels(make, at_8192, bound):
    """Sixty of a training run, of one layer's shape: what splits and what does not, no more.

    With M specialised it was 22 for hybrid and 52 for routed, at a second or more each.
    """
    draw = random.Random(1)
    found = variants(make, [draw.randrange(300, 8192) for _ in range(60)])
    assert found.total() <= bound, found
    assert variants(make, [8192]).total() <= at_8192


def test_strides_are_still_known_to_be_aligned():
    """What loads of 16 bytes need: the strides and sizes that a layer's shape gives."""
    launch = DRAWING["shrink_kernel"]
    for name in ("M", "blocks_per_part", "first_group", "groups_per_row"):
        assert parameter(launch, name).do_not_specialize
    for name in ("D", "R", "stride_wm", "stride_nr", "stride_rounded", "wide_ptr"):
        assert not parameter(launch, name).do_not_specialize


def parameter(launch: Launch, name: str):
    return next(each for each in launch.kernel.params if each.name == name)


@pytest.mark.parametrize("name, call", [(name, call) for name, (call, _) in EVERY.items()])
def test_fusion_is_asked_for_aloud(name, call):
    """Triton 3.9 warns where it is not, and 3.10 takes the other."""
    for launch in launches_of(call, 90):
        assert launch.options["enable_fp_fusion"] is True, launch.name


def test_triton_has_nothing_to_warn_of(monkeypatch):
    said = []
    monkeypatch.setattr(triton.knobs, "warn_once", said.append, raising=False)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    options = DRAWING["shrink_kernel"].options
    backend.parse_options(dict(options))
    assert not said
    if triton.__version__.startswith("3.9."):
        unasked = {name: options[name] for name in options if name != "enable_fp_fusion"}
        backend.parse_options(unasked)
        assert said
