"""``lora_linear`` on our Triton kernels. Importing this package imports no Triton."""

from lora_kernels.ops.linear.call import Gradients, LinearCall, Result
from lora_kernels.runtime.eager import below_autograd


def why_not(call: LinearCall) -> str | None:
    """Why a call on this device, in this dtype, cannot be served; None where it can."""
    if call.base is None or call.base.format == "dense":
        return None
    return f"its kernels read plain weights, and the base weight is {call.base.format}"


@below_autograd
def forward(call: LinearCall) -> Result:
    from lora_kernels.ops.linear.triton import launch

    return launch.forward(call)


@below_autograd
def backward(call: LinearCall) -> Gradients:
    from lora_kernels.ops.linear.triton import launch

    return launch.backward(call)
