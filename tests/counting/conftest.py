import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # for benchmarks

from benchmarks.gpu_counts.counter import counting
from benchmarks.gpu_counts.stand_ins import stand_ins


@pytest.fixture
def counter():
    """A pretended CUDA device, and what counts on it."""
    with stand_ins(), counting() as counter:
        yield counter
