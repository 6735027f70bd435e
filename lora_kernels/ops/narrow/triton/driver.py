"""Whether Triton's kernels can be started at all. Importing this module imports no Triton."""

import functools

import torch

from lora_kernels.runtime.dispatch import unavailable


@functools.cache
def missing(device: torch.device) -> str | None:
    """Why our Triton kernels cannot run on ``device``; None where they can.

    Beside what :func:`unavailable` knows this starts Triton's driver once: on its first use it is
    compiled, which fails where there is no C compiler.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if reason := unavailable("triton", device):
        return reason
    if device.type == "cpu":
        return None
    import triton

    try:
        with torch.cuda.device(device):
            triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever a driver, a compiler or a file system says
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        return f"Triton's driver does not start: {first_line}"
    return None
