"""The examples, each run as a user would: by itself, in a process and a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
# finetune_demo.py is the demo, which tests/test_demo.py holds.
EXAMPLES = sorted(p for p in (ROOT / "examples").glob("*.py") if p.stem != "finetune_demo")


def run(script: Path, folder: Path) -> subprocess.CompletedProcess:
    """In a process that finds this tree's package first, and no network."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_there_is_an_example_for_each_use():
    assert {example.stem for example in EXAMPLES} >= {
        "accelerate_peft", "function", "joint_training", "merge", "mixed_batch", "module"
    }  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_says_what_it_showed(example, tmp_path):
    done = run(example, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_fits_a_screen_and_asserts_something(example):
    source = example.read_text()
    assert len(source.splitlines()) <= 40
    assert "assert" in source


def test_an_example_that_fails_is_noticed(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import lora_kernels\nassert lora_kernels.__file__ is None, 'planted'\n")
    done = run(broken, tmp_path)
    assert done.returncode != 0 and "planted" in done.stderr
