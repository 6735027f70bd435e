"""`make gpu-check` (lora_kernels/bench/gpu_check.py), also where the package is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_kernels.bench.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
