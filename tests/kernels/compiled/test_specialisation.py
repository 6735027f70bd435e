"""Triton compiles a kernel again for some values of its arguments: not for where a mask stands."""

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from lora_kernels.testing.compile_cases import CALLS, ROUTED_CALLS, launches_of

DRAWING = {
    launch.name: launch
    for call, _ in (CALLS | ROUTED_CALLS).values()
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

    for other in (0, 1, 16, 17, 2**31, 2**40):
        assert key(first_group=other) == key()
        assert key(groups_per_row=other) == key()
    assert key(M=17) != key(M=16), "as others are"
