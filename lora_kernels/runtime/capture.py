"""Whether the current stream of a device is being captured in a CUDA graph."""

import torch

_CAN_BE = torch.backends.cuda.is_built()  # or torch raises when it is asked for a fake tensor's


def is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and _CAN_BE and torch.cuda.is_current_stream_capturing()
