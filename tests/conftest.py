"""Every test starts from the same seed, on one thread; memory can be poisoned with NaN."""

import os
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch
from gemm_that_reads_gaps import gemm_that_reads_gaps

from lora_kernels.runtime.plan import forget_plans

# The same examples on every machine and run. HYPOTHESIS_PROFILE=search draws new ones. The checks
# on a GPU do without.
with suppress(ModuleNotFoundError):
    from hypothesis import settings

    settings.register_profile("fixed", derandomize=True, deadline=None)
    settings.register_profile("search", deadline=None, max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# GEMM_READS_GAPS=1 runs all tests as on a CPU whose GEMMs do.
_READS_GAPS = os.environ.get("GEMM_READS_GAPS") == "1"
_FAULT = ExitStack()
if _READS_GAPS:
    _FAULT.enter_context(gemm_that_reads_gaps())

# What was measured on this machine changes what auto takes: tests start without, and leave nothing.
_CACHE = tempfile.TemporaryDirectory(prefix="lora_kernels-")
os.environ["LORA_KERNELS_CACHE"] = _CACHE.name

# Tiny tensors by the thousand: on a busy machine a second thread is mostly waited for.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(20240607)


@pytest.fixture(autouse=True)
def nothing_measured():
    """A test that leaves choices behind in the cache is found by the next."""
    yield
    assert not list(Path(_CACHE.name).glob("tuned-*.json")), "LORA_KERNELS_CACHE has to be its own"


@pytest.fixture
def plans_forgotten():
    """For tests that change what a plan is made from: nobody else meets such a plan."""
    forget_plans()
    yield
    forget_plans()


@pytest.fixture(scope="module", params=["its_gemm", *([] if _READS_GAPS else ["one_reads_gaps"])])
def both_gemms(request):
    """torch's products as they are, and as they are on a CPU where they read between the rows."""
    if request.param == "its_gemm":
        yield
        return
    with gemm_that_reads_gaps():
        yield


@pytest.fixture
def poisoned_memory():
    """``torch.empty`` and its kin give NaN (the largest integer for integers)."""
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
