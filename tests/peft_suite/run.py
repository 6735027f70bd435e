"""Runs PEFT's own tests of LoRA, plain and then with every LoRA layer accelerated.

    python tests/peft_suite/run.py [--jobs N] [--folder build/peft-suite]

The tests are those of the installed PEFT's source distribution, which pip downloads. Tests that ask
a hub for a model fail in both runs where it cannot be reached. Prints both counts and the tests
that differ; exits with 1 if fewer pass accelerated than plain, or if nothing was accelerated.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

FILES = ["tests/test_custom_models.py", "tests/test_lora_variants.py"]
SELECTED = "LoRA and not AdaLora"
HERE = Path(__file__).resolve().parent


def unpacked(folder: Path) -> Path:
    """PEFT's source distribution; downloaded if it is not there."""
    release = f"peft-{version('peft')}"
    if not (folder / release / "tests").exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft",
             "--dest", str(folder), release.replace("-", "==")],
            check=True,
        )  # fmt: skip
        with tarfile.open(folder / f"{release}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    # Neither is in the distribution: the tests import their neighbours, and PEFT's own options ask
    # for plugins that have no part in this.
    (folder / release / "tests" / "__init__.py").touch()
    (folder / release / "pytest.ini").write_text("[pytest]\n")
    return folder / release


def outcomes(
    sources: Path, report: Path, jobs: int, options: list[str]
) -> tuple[dict[str, str], int]:
    """What became of each test, by its name, and how many layers were fast in all of them."""
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "-n", str(jobs), "-q",
               "--tb=short", "-p", "no:cacheprovider", "-p", "accelerated",
               f"--junitxml={report}", *options, "-k", SELECTED, *FILES]  # fmt: skip
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    subprocess.run(
        command, cwd=sources, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    )
    results, fast_layers = {}, 0
    for case in ElementTree.parse(report).iter("testcase"):
        parts = {part.tag for part in case}
        outcome = "skipped" if "skipped" in parts else "passed"
        results[f"{case.get('classname')}::{case.get('name')}"] = (
            "failed" if parts & {"failure", "error"} else outcome
        )
        fast_layers += sum(int(count.get("value")) for count in case.iter("property"))
    return results, fast_layers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the tests")
    parser.add_argument("--folder", type=Path, default=Path("build/peft-suite"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sources = unpacked(folder)

    plain, _ = outcomes(sources, folder / "plain.xml", arguments.jobs, [])
    fast, fast_layers = outcomes(
        sources, folder / "accelerated.xml", arguments.jobs, ["--accelerate"]
    )
    for name in sorted(plain.keys() | fast.keys()):
        if plain.get(name) != fast.get(name):
            print(f"differs: {name}: plain {plain.get(name)}, accelerated {fast.get(name)}")
    for title, results in (("plain", plain), ("accelerated", fast)):
        counts = Counter(results.values())
        print(f"{title}: " + ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts)))
    print(f"PEFT {version('peft')}; {fast_layers} layers were accelerated")
    passed = [sum(outcome == "passed" for outcome in each.values()) for each in (plain, fast)]
    return int(passed[1] < passed[0] or fast_layers == 0)


if __name__ == "__main__":
    sys.exit(main())
