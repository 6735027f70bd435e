"""Constraints files for pip, as the Makefile uses them.

    python .ci/pins.py write         every package that is installed here, with its version
    python .ci/pins.py hold FILE     FILE without what the installed torch does not go with

Both are printed.
"""

import sys
from collections.abc import Iterable
from importlib.metadata import distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

OLDEST_PYTHON = 10  # 3.10, as pyproject.toml says
LEFT_OUT = {"lora-kernels", "pip"}  # this package; the installer, which comes with Python

HEADER = """\
# What `make` installs, and what is tested: every package, with its version. `make pins` writes this
# file anew; what it must not renew stands in the Makefile, with the reason.
"""


def installed() -> Iterable[str]:
    """A release that needs a newer Python than we do is pinned from that Python on: below it pip
    takes the newest that runs there. No "+cpu": who serves which build depends on where one asks.
    """
    for each in distributions():
        name = canonicalize_name(each.name)
        if name in LEFT_OUT:
            continue
        pin = f"{name}=={Version(each.version).public}"
        pythons = SpecifierSet(each.metadata["Requires-Python"] or "")
        first = next(minor for minor in range(OLDEST_PYTHON, 99) if f"3.{minor}.99" in pythons)
        yield pin if first == OLDEST_PYTHON else f'{pin}; python_version >= "3.{first}"'


def held(lines: Iterable[str]) -> Iterable[str]:
    """The torch that is there, and every pin that it allows: builds for GPUs name one release of
    Triton, and some releases a bound on setuptools.
    """
    asked = {}
    for line in requires("torch"):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            asked[canonicalize_name(requirement.name)] = requirement.specifier
    yield f"torch=={version('torch')}"
    for line in lines:
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        name = canonicalize_name(pin.name)
        pinned = next(iter(pin.specifier)).version
        if name != "torch" and pinned in asked.get(name, SpecifierSet()):
            yield line


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write"]:
            print(HEADER + "\n".join(sorted(set(installed()))))
        case ["hold", file]:
            print("\n".join(held(Path(file).read_text().splitlines())))
        case _:
            sys.exit(__doc__)
