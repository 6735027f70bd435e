"""Whether the current stream of a device is being captured in a CUDA graph."""

import torch


def is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
