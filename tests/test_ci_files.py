"""What continuous integration is told agrees with the Makefile and pyproject.toml."""

import importlib.util
import json
import re
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text())
             for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}  # fmt: skip
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUN = (ROOT / ".ci/run").read_text()
PYTHONS = [
    name.rpartition(" ")[2]
    for name in PROJECT["project"]["classifiers"]
    if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", name)
]


def script(name: str):
    """A script of .ci as a module."""
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def made(text: str) -> set[str]:
    """Targets that a shell script makes."""
    return set(re.findall(r"\bmake ([\w.$/()-]+)", text))


def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    venv = re.search(r"^VENV := (\S+)$", text, re.M)[1]
    named = re.findall(r"^((?:[\w.$()/-]+ )*[\w.$()/-]+):(?!=)", text, re.M)
    return {name.replace("$(VENV)", venv) for names in named for name in names.split()}


def test_what_is_made_can_be_made():
    ran = "\n".join(step.get("run", "") for each in WORKFLOWS.values() for step in steps(each))
    assert made(ran) == {"lint", "test", "docs"}
    comments = re.compile(r"^#.*$", re.M)
    assert made(comments.sub("", RUN)) == {
        ".venv/.dev", "lint", "test", "docs", "demo",
    }  # fmt: skip
    suites = script("slow_suites").SUITES
    assert made(ran) | made(comments.sub("", RUN)) | suites.keys() <= targets()


def test_pythons_are_those_of_the_classifiers():
    assert f">={PYTHONS[0]}" == PROJECT["project"]["requires-python"]
    assert [f"3.{minor}" for minor in range(10, 10 + len(PYTHONS))] == PYTHONS
    matrix = WORKFLOWS["test"]["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python-version"] == PYTHONS
    (build,) = (step["env"] for step in steps(WORKFLOWS["wheels"]) if "env" in step)
    assert build["CIBW_BUILD"].split() == [f"cp{each.replace('.', '')}-*" for each in PYTHONS]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{PYTHONS[0].replace('.', '')}"
    assert PROJECT["tool"]["basedpyright"]["pythonVersion"] == PYTHONS[0]


def test_wheels_are_made_of_tags_and_published_by_hand():
    workflow = WORKFLOWS["wheels"]
    assert workflow[True].keys() == {"push", "workflow_dispatch"}  # "on", to YAML
    assert workflow[True]["push"] == {"tags": ["v*"]}
    assert workflow["permissions"] == WORKFLOWS["test"]["permissions"] == {"contents": "read"}
    used = {step["uses"].partition("@")[0] for step in steps(workflow) if "uses" in step}
    assert used == {"actions/checkout", "pypa/cibuildwheel", "actions/upload-artifact"}
    jobs = workflow["jobs"]["wheels"]["strategy"]["matrix"]["include"]
    assert {each["arch"] for each in jobs} == {"x86_64", "aarch64"}
    (build,) = (step["env"] for step in steps(workflow) if "env" in step)
    assert build["CIBW_ENVIRONMENT"] == "LORA_KERNELS_CUDA=0"


def test_hooks_have_the_pinned_versions():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {each["repo"].rpartition("/")[2]: each["rev"] for each in hooks}
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", "\n".join(
        PROJECT["project"]["optional-dependencies"]["dev"]), re.M))  # fmt: skip
    assert revisions == {
        "ruff-pre-commit": f"v{pins['ruff']}",
        "mirrors-clang-format": f"v{pins['clang-format']}",
    }
    names = {hook["id"] for each in hooks for hook in each["hooks"]}
    assert names == {"ruff-check", "ruff-format", "clang-format"}


def test_hooks_format_the_same_files_as_make():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (pattern,) = (hook["files"] for each in hooks for hook in each["hooks"] if "files" in hook)
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    globs = re.search(r"^FORMATTED := \$\(wildcard (.*)\)$", makefile, re.M)[1].split()
    by_make = {str(path.relative_to(ROOT)) for each in globs for path in ROOT.glob(each)}
    sources = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "tests")
        for path in (ROOT / folder).rglob("*.*")
        if path.is_file()
    }
    assert by_make and {path for path in sources if re.search(pattern, path)} == by_make


# ---- .ci/slow_suites.py

OUTPUT = """\
LORA_KERNELS_SANITIZE=1 .venv/bin/python -m pytest -n 0 tests/native
FAILED tests/native/test_threads.py::test_a - AssertionError: 3 passed in 1.00s it said
ERROR tests/native/test_threads.py::test_b - RuntimeError
= 2 failed, 1290 passed, 31 skipped, 4 deselected, 7 warnings, 1 error in 612.08s (0:10:12) =
.venv/bin/python -m pytest -q tests/cuda
12 passed in 0.51s
=========================== 1 passed, 2 skipped in 3.40s ============================
plain: 12 failed, 400 passed, 3 skipped
"""


def test_counts_of_every_pytest_are_added():
    counts = script("slow_suites").counts
    assert counts(OUTPUT) == {"passed": 1303, "failed": 3, "skipped": 33}
    assert counts("make: *** [Makefile:35: test] Error 2\n") == {
        "passed": 0, "failed": 0, "skipped": 0,
    }  # fmt: skip


@pytest.mark.parametrize("code", [0, 2])
def test_a_suite_is_a_row(code, monkeypatch, tmp_path, capsys):
    module = script("slow_suites")
    (tmp_path / "Makefile").write_text(
        f"test-stress:\n\t@echo '= 5 passed, 1 skipped in 2.00s ='; exit {code}\n"
    )
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "rows.jsonl")
    monkeypatch.setitem(module.SUITES, "test-stress", sys.prefix)
    monkeypatch.setattr(sys, "argv", ["slow_suites.py", "test-stress"])
    ran = module.output_of

    def output_of(*command: str) -> str:
        return "abc123" if command[0] == "git" else ran(*command)

    monkeypatch.setattr(module, "output_of", output_of)
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert bool(ended.value.code) == bool(code)
    row, again = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert again["suite"] == row["suite"] == "test-stress"
    assert (row["passed"], row["failed"], row["skipped"]) == (5, 0, 1)
    assert row["commit"] == "abc123" and (row["exit"] != 0) == bool(code)
    assert row["versions"]["python"].startswith("3.") and "torch" in row["versions"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) and row["cpu"] and row["seconds"] >= 0
    assert "5 passed" in capsys.readouterr().out


def test_an_unknown_suite_is_named(monkeypatch):
    module = script("slow_suites")
    monkeypatch.setattr(sys, "argv", ["slow_suites.py", "slowest"])
    with pytest.raises(SystemExit, match=r"expected suites out of peft-suite, .*, got slowest"):
        module.main()


# ---- .ci/wheel.py


def wheel_of(folder: Path, *more: str, without: str = "") -> Path:
    """A wheel with the modules of this tree, empty, and more."""
    names = [str(path.relative_to(ROOT)) for path in (ROOT / "lora_kernels").rglob("*.py")]
    names += ["lora_kernels/py.typed", "lora_kernels-1.dist-info/METADATA", *more]
    path = folder / "lora_kernels-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in names:
            if name != without:
                wheel.writestr(name, "")
    return path


@pytest.mark.parametrize(
    ("more", "without", "native", "found"),
    [
        ((), "", False, []),
        (("lora_kernels/_native.cpython-311-x86_64-linux-gnu.so",), "", True, []),
        (("lora_kernels/_native_error.txt",), "", True, ["the compiled extension is not in it"]),
        (("tests/test_policy.py",), "", False, ["tests/test_policy.py is in it, and not of"]),
        (("lora_kernels/gone.py",), "", False, ["lora_kernels/gone.py is in it, and not in the"]),
        ((), "lora_kernels/py.typed", False, ["lora_kernels/py.typed is not in it"]),
        ((), "lora_kernels/version.py", False, ["lora_kernels/version.py is not in it"]),
    ],
    ids=str,
)
def test_contents_of_wheels(more, without, native, found, tmp_path):
    said = script("wheel").faults(wheel_of(tmp_path, *more, without=without), native)
    assert len(said) == len(found)
    for sentence, start in zip(said, found, strict=True):
        assert sentence.startswith(f"lora_kernels-1-py3-none-any.whl: {start}")


def test_a_slow_import_is_refused(monkeypatch, tmp_path, capsys):
    module = script("wheel")
    path = tmp_path / "lora_kernels-1-py3-none-any.whl"
    monkeypatch.setattr(sys, "argv", ["wheel.py", "import", str(path)])
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("torch.py", "")  # in place of the real one, which takes seconds
        busy = "import time\nbegan = time.process_time()\n"
        busy += "while time.process_time() < began + 0.1: pass\n"
        wheel.writestr("lora_kernels/__init__.py", busy)
    module.main()
    assert re.search(r"imported in 0\.\d+ s after torch", capsys.readouterr().out)
    monkeypatch.setattr(module, "MAX_SECONDS", 0.05)
    with pytest.raises(SystemExit, match=r"more than 0\.05 s"):
        module.main()
