"""Our forward inside PEFT's layers. Importing this package does not import PEFT."""

from lora_kernels.integrations.peft.acceleration import AccelerationReport, accelerate

__all__ = ["AccelerationReport", "accelerate"]
