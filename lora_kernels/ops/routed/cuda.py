"""``routed_lora`` with the compiled extension's CUDA kernels: backend ``native`` on a GPU.

Dimensions: M tokens, P pairs, K in_features, N out_features of all slices, H the widest rank.

For few tokens (:func:`cuda_extension.why_not_decode_routed` has the conditions) shrink and
expand of all slices are one launch, which adds to what the frozen layer's own GEMM has written.
Everything else, training's backward among it, is Triton's kernels. Nothing is read back here
either: a captured graph replays with any routing.
"""

from lora_kernels.base_weights import product_or_bias
from lora_kernels.ops.routed import triton
from lora_kernels.ops.routed.call import ForwardCall, Result
from lora_kernels.ops.routed.triton import (  # noqa: F401  (this module is a backend)
    backward,
    expand_,
    expand_backward,
    shrink,
    shrink_backward,
)
from lora_kernels.runtime import cuda_extension


def forward(call: ForwardCall) -> Result:
    x, bank, routing, out = call.x, call.bank, call.routing, call.out
    strided = out is not None and out.stride(1) != 1 and out.shape[1] > 1
    drops = call.seed is not None
    if strided or cuda_extension.why_not_decode_routed(x, bank, routing, drops) is not None:
        return triton.forward(call)
    y, begun = out, True
    if y is None:
        y, begun = product_or_bias(call.base, x, call.bias, bank.slice_columns[-1])
    h = triton.narrow(x, call) if call.save else None
    cuda_extension.decode_routed_(y, x, bank, routing, h, overwrite=not begun)
    return Result(y, h)
