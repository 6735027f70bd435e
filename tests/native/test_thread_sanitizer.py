"""csrc/cpu under the thread sanitizer: threads that read versions of a bank while one publishes.

A program of its own (threads_driver.cpp), because Python and torch are built without the sanitizer.
"""

import hashlib
import os
import runpy
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILT = ROOT / "build" / "thread-sanitizer"
KERNELS = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
HEADERS = sorted([*(ROOT / "csrc").glob("**/*.h"), *HERE.glob("*.h")])
DRIVER, TEAM = HERE / "threads_driver.cpp", HERE / "threads_team.cpp"
THREAD = ["-O1", "-g", "-fsanitize=thread"]
# Without what `make sanitize` preloads.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
SECONDS = "2"


def run(command: list, timeout: float, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), env={**ENVIRONMENT, **environment}, timeout=timeout,
        capture_output=True, text=True,
    )  # fmt: skip


def call(command: list) -> None:
    done = run(command, timeout=300)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stderr}"


@pytest.fixture(scope="module")
def compiler() -> str:
    """A C++ compiler that has the sanitizer's library."""
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if found is None:
        pytest.skip("there is no C++ compiler")
    BUILT.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILT / "lock"):
        nothing = BUILT / "nothing.cpp"
        nothing.write_text("int main() {}\n")
        tried = run([found, *THREAD, nothing, "-o", BUILT / "nothing"], timeout=60)
    if tried.returncode:
        first = (tried.stderr.strip().splitlines() or ["no reason given"])[0]
        pytest.skip(f"{found} links nothing with -fsanitize=thread: {first}")
    return found


@pytest.fixture(scope="module")
def prefix(compiler) -> list[str]:
    """What programs are run with: older sanitizers fail where addresses are drawn from too many."""
    tried = run([BUILT / "nothing"], timeout=60)
    return ["setarch", "-R"] if "unexpected memory mapping" in tried.stderr else []


@pytest.fixture(scope="module")
def programs(compiler) -> dict[str, Path]:
    """The driver over csrc/cpu as setup.py compiles it: once with threads that each call starts,
    once with a team that stays. Not again where they were made of the same files before.
    """
    flags = [*runpy.run_path(str(ROOT / "setup.py"))["FLAGS"], *THREAD, f"-I{ROOT / 'csrc'}"]
    sources = [*KERNELS, DRIVER, TEAM]
    digest = hashlib.sha256(shlex.join([compiler, *flags]).encode())
    for path in (*sources, *HEADERS, Path(__file__)):
        digest.update(path.read_bytes())
    folder = BUILT / digest.hexdigest()[:16]
    made = {name: folder / name for name in ("threads", "team")}
    with FileLock(BUILT / "lock"):
        if all(program.exists() for program in made.values()):
            return made
        folder.mkdir(exist_ok=True)
        objects = [folder / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda source, to: call([compiler, *flags, "-c", source, "-o", to]),
                          sources, objects))  # fmt: skip
        link = [compiler, *THREAD, "-pthread"]
        call([*link, *objects[:-1], "-ldl", "-o", made["threads"]])
        # Exported: parallel.cpp looks for it as it looks for libgomp's.
        call([*link, "-rdynamic", *objects, "-ldl", "-o", made["team"]])
    return made


@pytest.mark.parametrize("threads", ["threads", "team"])
def test_published_versions(programs, prefix, threads):
    done = run([*prefix, programs[threads], SECONDS], timeout=120)
    assert "WARNING: ThreadSanitizer" not in done.stderr, done.stderr[:10_000]
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"calls run on {'a team' if threads == 'team' else 'threads'}")


@pytest.mark.parametrize("threads", ["threads", "team"])
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("early", id="the table names factors before they are written"),
        pytest.param("in_place", id="a published table changes"),
        pytest.param("recycled", id="memory is taken from a version that is read"),
    ],
)
def test_a_fault_is_reported(programs, prefix, threads, fault):
    done = run(
        [*prefix, programs[threads], SECONDS, fault], timeout=10, TSAN_OPTIONS="halt_on_error=1"
    )
    assert "WARNING: ThreadSanitizer: data race" in done.stderr, done.stdout + done.stderr
    assert done.returncode == 66
