"""The compiled kernels one by one: skipped where the extension was not built."""

import pytest

from lora_kernels.runtime import cpu_extension as native


def pytest_collection_modifyitems(items):
    reason = native.missing()
    for item in items:
        needs_it = not any(name in item.nodeid for name in ("absent", "test_thread_sanitizer.py"))
        if reason and "tests/native/" in item.nodeid and needs_it:
            item.add_marker(pytest.mark.skip(reason=reason))


def levels() -> list[int]:
    """The instruction sets of this machine, all of which must be right."""
    extension = native.extension()
    return list(range(extension.best_level() + 1)) if extension else [0]


@pytest.fixture(params=levels(), ids=lambda level: native.LEVELS[level].replace(" ", "_"))
def level(request):
    """Every kernel of one instruction set."""
    extension = native.extension()
    before = extension.level()
    extension.set_level(request.param)
    yield request.param
    extension.set_level(before)
