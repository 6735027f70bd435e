"""The committed table of registers, spills and shared memory is what the kernels compile to."""

from pathlib import Path

import pytest
import triton

from lora_kernels.testing.compile_cases import resource_table

TABLE = Path(__file__).parents[3] / "benchmarks" / "resources.md"


def test_table_is_up_to_date():
    committed = TABLE.read_text()
    if f"Triton {triton.__version__}" not in committed.splitlines()[0]:
        pytest.skip(f"the table is of another Triton than {triton.__version__}")
    assert resource_table() == committed, (
        "python -m lora_kernels.testing.compile_cases > benchmarks/resources.md"
    )
