"""Adapters that are loaded, replaced and removed beside batches."""

import os

import pytest
from servers import Server

from lora_kernels.ops.routed.bank import slots

# Under the suite 10 seconds beside other tests; `make test-stress` has the machine for itself.
SECONDS = float(os.environ.get("STRESS_SECONDS", "10"))
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")
ALONE = not SANITIZED and "PYTEST_XDIST_WORKER" not in os.environ


@pytest.fixture
def server(tmp_path) -> Server:
    return Server(tmp_path)


def test_answers_beside_a_loader(server):
    quiet = server.run(min(3.0, SECONDS), changes=False)
    assert not quiet.wrong
    report = server.run(SECONDS)
    later = server.run(min(3.0, SECONDS), changes=False)
    rate = (quiet.answers + later.answers) / (quiet.seconds + later.seconds)
    print(
        f"quiet: {rate:.0f} answers a second; beside changes {report.rate:.0f}, "
        f"{report.loads / report.seconds:.1f} loads: {report}"
    )
    assert not report.wrong, report.wrong[:5]
    assert report.loads and report.replaced and report.removed
    if ALONE:
        assert report.loads / report.seconds >= 20
        assert report.rate >= 0.5 * rate
    if not SANITIZED:
        assert report.memory < 8 << 20


def test_a_change_that_is_published_early_is_found(server, monkeypatch):
    whole = slots.Change.set_bank

    def early(change, bank, version):
        whole(change, bank, version)
        bank.slots.current = change.version  # one layer after the other

    monkeypatch.setattr(slots.Change, "set_bank", early)
    report = server.run(10.0, until_wrong=True)
    assert report.wrong, "10 seconds, and nobody has noticed"
