"""Triton kernels through Triton's interpreter, on a CPU.

    TRITON_INTERPRET=1 pytest tests/kernels/interpreter

In a process of their own: the variable decides what ``@triton.jit`` makes of a kernel, so it must
be set before any is imported. Without it nothing here is collected. fp32 and fp16 only: the
interpreter's bf16 products are wrong.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
