"""``lora_linear`` on our Triton kernels."""
