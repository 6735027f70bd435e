"""The committed table of registers, spills and shared memory is what the kernels compile to."""

from pathlib import Path

import pytest
import triton
from compile_cases import RENEW, resource_table

TABLE = Path(__file__).parents[3] / "benchmarks" / "resources.md"


def test_table_is_up_to_date(request):
    # Absent where this folder's conftest is read after the command line, as in `pytest tests`.
    if request.config.getoption("--renew", False):
        TABLE.write_text(resource_table())
        return
    committed = TABLE.read_text()
    if f"Triton {triton.__version__}" not in committed.splitlines()[0]:
        pytest.skip(f"the table is of another Triton than {triton.__version__}")
    assert resource_table() == committed, RENEW
