"""Prints what is installed in this environment, as a constraints file: ``make pins``.

A release that needs a newer Python than the oldest which pyproject.toml admits is pinned from that
Python on: below it pip takes the newest release that runs there.
"""

import sys
from importlib.metadata import Distribution, distributions

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

OLDEST_PYTHON = 10
LEFT_OUT = {"lora-kernels", "pip"}  # this package; the installer, which comes with Python

HEADER = """\
# What `make` installs, and what is tested: every package, with its version. `make pins` writes this
# file anew; what it must not renew stands in the Makefile, with the reason.
"""


def pin(installed: Distribution) -> str:
    # Without "+cpu": which build of a release is served depends on where one asks.
    line = f"{canonicalize_name(installed.name)}=={Version(installed.version).public}"
    pythons = SpecifierSet(installed.metadata["Requires-Python"] or "")
    first = next(minor for minor in range(99) if f"3.{minor}.99" in pythons)
    return line if first <= OLDEST_PYTHON else f'{line}; python_version >= "3.{first}"'


if __name__ == "__main__":
    pins = {pin(each) for each in distributions() if canonicalize_name(each.name) not in LEFT_OUT}
    sys.stdout.write(HEADER + "".join(f"{line}\n" for line in sorted(pins)))
