"""Launches and bytes of what ``auto`` takes on a GPU: at most PEFT's, and at most the bounds."""

import inspect

import pytest

from benchmarks.gpu_counts.bounds import broken
from benchmarks.gpu_counts.every_case import count, every_case
from benchmarks.gpu_counts.stand_ins import STAND_INS, launcher_of, missing


@pytest.mark.parametrize("case", [*every_case()], ids=lambda case: case.name)
def test_counts(counter, case):
    assert not broken(case, count(case, counter))


def test_every_stand_in_has_its_launcher():
    """And takes what it takes."""
    assert not missing()
    for (module, name), stand_in in STAND_INS.items():
        expected, given = map(inspect.signature, (launcher_of(module, name), stand_in))
        assert [*given.parameters] == [*expected.parameters], name
