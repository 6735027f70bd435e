"""What a wheel must be.

    python .ci/wheel.py contents [--native] WHEEL...   this tree's package and nothing else
    python .ci/wheel.py import WHEEL...                imported soon after torch has been

--native asks for the compiled extension too.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_MB = 16  # the CUDA part takes about 6
MAX_SECONDS = 0.5  # of one processor, for importing it where torch has been imported already

TIMED = """
import time, torch
began = time.process_time()  # what else the machine does is no matter
import lora_kernels
print(time.process_time() - began, lora_kernels.__file__)
"""


def faults(wheel: Path, native: bool) -> list[str]:
    """What is wrong with the files in a wheel, as sentences."""
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if not name.endswith("/")}
    names = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    ours = {name for name in names if name.startswith("lora_kernels/")}
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "lora_kernels").rglob("*.py")}
    stale = {name for name in ours if name.endswith(".py")} - here
    found = [f"{name} is in it, and not of the package" for name in sorted(names - ours)]
    found += [f"{name} is in it, and not in the tree" for name in sorted(stale)]
    found += [f"{name} is not in it" for name in sorted({*here, "lora_kernels/py.typed"} - names)]
    if native and not any(name.startswith("lora_kernels/_native.") for name in names):
        found.append("the compiled extension is not in it")
    size = wheel.stat().st_size / 1e6
    if size > MAX_MB:
        found.append(f"it has {size:.1f} MB, more than {MAX_MB}")
    return [f"{wheel.name}: {fault}" for fault in found]


def import_seconds(wheel: Path) -> float:
    """How long its package takes to import over torch, the median of five processes."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(folder)
        seconds = []
        for _ in range(5):
            said = subprocess.run(
                [sys.executable, "-c", TIMED], cwd=folder, env=os.environ | {"PYTHONPATH": folder},
                capture_output=True, text=True, check=True,
            ).stdout.split()  # fmt: skip
            if not said[1].startswith(folder):
                sys.exit(f"{said[1]} was imported instead of the wheel")
            seconds.append(float(said[0]))
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("what", choices=["contents", "import"])
    parser.add_argument("--native", action="store_true")
    parser.add_argument("wheels", type=Path, nargs="+")
    asked = parser.parse_args()
    for wheel in asked.wheels:
        if asked.what == "contents":
            found = faults(wheel, asked.native)
            print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        else:
            seconds = import_seconds(wheel)
            print(f"{wheel.name}: imported in {seconds:.3f} s after torch")
            found = [f"more than {MAX_SECONDS} s"] if seconds > MAX_SECONDS else []
        if found:
            sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
