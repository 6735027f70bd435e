"""``lora_linear`` on our Triton kernels. Importing this package imports no Triton."""

from lora_kernels.ops.linear.call import Gradients, LinearCall, Result
from lora_kernels.runtime import dispatch
from lora_kernels.runtime.eager import below_autograd


def why_not(call: LinearCall) -> str | None:
    """Why these kernels cannot serve a call; None when they can."""
    return dispatch.unavailable("triton", call.x.device, call.x.dtype)


@below_autograd
def forward(call: LinearCall) -> Result:
    from lora_kernels.ops.linear.triton import launch

    return launch.forward(call)


@below_autograd
def backward(call: LinearCall) -> Gradients:
    from lora_kernels.ops.linear.triton import launch

    return launch.backward(call)
