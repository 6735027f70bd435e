"""``lora_linear`` on our Triton kernels. Importing this package imports no Triton."""

from lora_kernels.base_weights import BaseWeight
from lora_kernels.ops.linear.call import Gradients, LinearBackward, LinearCall, Result
from lora_kernels.runtime.eager import below_autograd


def why_not(base: BaseWeight | None) -> str | None:
    """Why calls with this base weight cannot be served; None where they can."""
    if base is None or base.format == "dense":
        return None
    return f"its kernels read plain weights, and the base weight is {base.format}"


@below_autograd
def forward(call: LinearCall) -> Result:
    from lora_kernels.ops.linear.triton import launch

    return launch.forward(call)


@below_autograd
def backward(call: LinearBackward) -> Gradients:
    from lora_kernels.ops.linear.triton import launch

    return launch.backward(call)
