"""A directory that is being saved: a reader gets one save's weights with its config, or waits."""

import json
import os
import stat
import subprocess
import sys
import threading
import time

import peft
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from lora_kernels.files import directory as adapter_directory
from lora_kernels.files.adapters import ModuleAdapter, read_adapter, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def version(number: int) -> dict[str, ModuleAdapter]:
    """An adapter whose weights tell its scaling."""
    return {
        "q": ModuleAdapter(torch.full((2, 13), float(number)), torch.randn(11, 2), float(number))
    }


def number_of(file) -> int:
    """Which version the file is; fails where weights and scaling are of two."""
    (part,) = file.modules.values()
    assert (part.lora_a == part.scaling).all(), (part.lora_a[0, 0], part.scaling)
    return int(part.scaling)


def names_in(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def in_threads(*loops) -> list[BaseException]:
    errors = []

    def guarded(loop):
        try:
            loop()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(loop,)) for loop in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


SAVER = """
import sys, torch
from lora_kernels.files.adapters import write_adapter
number = 1
print("ready", flush=True)
while True:
    number = number % 50 + 1
    factors = torch.full((2, 13), number * 1.0), torch.ones(11, 2)
    write_adapter(sys.argv[1], {"q": (*factors, number)})
"""


def test_a_reader_never_mixes_two_saves_of_several_writers(tmp_path):
    """Two threads and another process save while this one reads."""
    write_adapter(tmp_path, version(1))
    other = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "ready\n"
    end, loads, seen = time.monotonic() + 3, [], set()

    def save():
        number = 0
        while time.monotonic() < end:
            number = number % 50 + 1
            write_adapter(tmp_path, version(number))

    def load():
        while time.monotonic() < end:
            seen.add(number_of(read_adapter(tmp_path)))
            loads.append(1)

    try:
        assert in_threads(save, save, load, load) == []
    finally:
        other.kill()
        other.wait()
    assert len(loads) > 50 and len(seen) > 5
    number_of(read_adapter(tmp_path))
    # The process that was killed may have left its own.
    assert len(list(tmp_path.glob(".*.partial"))) <= 2
    write_adapter(tmp_path, version(51))
    assert number_of(read_adapter(tmp_path)) == 51


KILLED = """
import os, sys, torch
from lora_kernels.files.adapters import write_adapter
replace = os.replace
def killed(source, target):
    replace(source, target)
    os._exit(9)
os.replace = killed
write_adapter(sys.argv[1], {"q": (torch.full((2, 13), 2.0), torch.ones(11, 2), 2.0)})
"""


def test_a_save_that_is_killed_between_the_two_files(tmp_path):
    write_adapter(tmp_path, version(1))
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == 9
    assert number_of(read_adapter(tmp_path)) == 2
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_alpha": 14}))  # edited since
    assert read_adapter(tmp_path).modules["q"].scaling == 7.0


@pytest.mark.parametrize("partial", [True, False], ids=["by its partial", "by waiting"])
def test_between_the_two_files_of_a_save(partial, tmp_path, monkeypatch):
    if not partial:
        monkeypatch.setattr(adapter_directory, "_unfinished", lambda *_: None)
    write_adapter(tmp_path, version(1))
    replace, between, finish = os.replace, threading.Event(), threading.Event()

    def slow(source, target):
        replace(source, target)
        if os.fspath(target).endswith(WEIGHTS):
            between.set()
            finish.wait()

    monkeypatch.setattr(os, "replace", slow)
    writer = threading.Thread(target=write_adapter, args=(tmp_path, version(2)))
    writer.start()
    between.wait()
    threading.Timer(0.5, finish.set).start()  # longer than what counts as quiet
    assert number_of(read_adapter(tmp_path)) == 2
    writer.join()


def test_a_save_that_never_ends_is_an_error(tmp_path, monkeypatch):
    write_adapter(tmp_path, version(1))
    (tmp_path / CONFIG).write_text((tmp_path / CONFIG).read_text() + "\n")
    monkeypatch.setattr(adapter_directory, "_PATIENCE", 0.3)
    with (
        adapter_directory._writing(tmp_path),
        pytest.raises(ValueError, match="are written to all the time"),
    ):
        read_adapter(tmp_path)
    assert number_of(read_adapter(tmp_path)) == 1


def test_a_config_edited_by_hand_loads(tmp_path):
    write_adapter(tmp_path, version(3))
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_alpha": 14}))
    assert read_adapter(tmp_path).modules["q"].scaling == 7.0
    long_ago = time.time() - 10
    for name in (CONFIG, WEIGHTS):
        os.utime(tmp_path / name, (long_ago, long_ago))
    time.sleep(adapter_directory._QUIET)
    start = time.monotonic()
    for _ in range(20):
        assert read_adapter(tmp_path).modules["q"].scaling == 7.0
    assert time.monotonic() - start < 20 * adapter_directory._QUIET, "nobody has written meanwhile"


def test_a_file_of_others_is_read_again_where_it_is_half_written(tmp_path):
    """PEFT writes the config in place."""
    write_adapter(tmp_path, version(1))
    text = (tmp_path / CONFIG).read_text()
    data = safetensors.torch.load_file(tmp_path / WEIGHTS)
    safetensors.torch.save_file(data, tmp_path / WEIGHTS)  # without a digest
    (tmp_path / CONFIG).write_text("")
    threading.Timer(0.05, (tmp_path / CONFIG).write_text, args=(text,)).start()
    assert number_of(read_adapter(tmp_path)) == 1


@pytest.mark.parametrize("changed", [CONFIG, WEIGHTS])
def test_a_file_of_others_that_changes_while_it_is_read_is_read_again(
    changed, tmp_path, monkeypatch
):
    for number in (1, 2):
        write_adapter(tmp_path / str(number), version(number))
        path = tmp_path / str(number) / WEIGHTS
        safetensors.torch.save_file(safetensors.torch.load_file(path), path)
    old, new = tmp_path / "1", tmp_path / "2"
    read, todo = adapter_directory._read, [CONFIG, WEIGHTS]

    def read_beside_a_writer(path, *args):
        data = read(path, *args)
        if todo and path.name == changed:
            for name in todo:
                os.replace(new / name, old / name)
            todo.clear()
        return data

    monkeypatch.setattr(adapter_directory, "_read", read_beside_a_writer)
    assert number_of(read_adapter(old)) == 2


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_files_have_the_permissions_of_any_new_file(umask, tmp_path):
    before = os.umask(umask)
    try:
        for number in (1, 2):
            write_adapter(tmp_path / "new", version(number))
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / "new" / name).stat().st_mode) for name in (CONFIG, WEIGHTS)}
    assert modes == {0o666 & ~umask}


def test_what_else_is_in_the_directory_stays(tmp_path):
    """A checkpoint's other files; the directory stays the same one, and a link to it a link."""
    inner = tmp_path / "checkpoint-5"
    inner.mkdir()
    (inner / "optimizer.pt").write_bytes(b"moments")
    (inner / "tokenizer").mkdir()
    (tmp_path / "latest").symlink_to(inner, target_is_directory=True)
    identity = inner.stat().st_ino
    for number in (1, 2):
        write_adapter(tmp_path / "latest", version(number))
    assert (tmp_path / "latest").is_symlink()
    assert inner.stat().st_ino == identity and not inner.is_symlink()
    assert names_in(inner) == [CONFIG, WEIGHTS, "optimizer.pt", "tokenizer"]
    assert (inner / "optimizer.pt").read_bytes() == b"moments"
    assert number_of(read_adapter(inner)) == 2


def test_a_linked_file_is_replaced_and_what_it_links_to_is_not(tmp_path):
    """As the files of a downloaded snapshot are."""
    write_adapter(tmp_path / "blobs", version(1))
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    write_adapter(tmp_path / "snapshot", version(2))
    assert number_of(read_adapter(tmp_path / "snapshot")) == 2
    assert number_of(read_adapter(tmp_path / "blobs")) == 1


@pytest.mark.parametrize("at", [1, 2])
def test_a_save_that_fails_leaves_the_files_of_before(at, tmp_path, monkeypatch):
    write_adapter(tmp_path, version(1))
    calls = []

    def full(path, mode, **options):
        calls.append(path)
        if len(calls) == at:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return open(path, mode, **options)

    monkeypatch.setattr(adapter_directory, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(tmp_path, version(2))
    assert number_of(read_adapter(tmp_path)) == 1
    assert names_in(tmp_path) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_directory_in_a_files_place_is_neither_read_nor_replaced(name, tmp_path):
    write_adapter(tmp_path, version(1))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}: expected a file, got a directory"):
        read_adapter(tmp_path)
    with pytest.raises(ValueError, match=f"{name}: expected a file, got a directory"):
        write_adapter(tmp_path, version(2))
    (tmp_path / name).rmdir()
    left = names_in(tmp_path)
    assert left == [other for other in (CONFIG, WEIGHTS) if other != name]
    if name == CONFIG:
        weights = safetensors.torch.load_file(tmp_path / WEIGHTS)
        assert (weights["base_model.model.q.lora_A.weight"] == 1).all()


def test_what_other_readers_see(tmp_path):
    """The digest is metadata, which PEFT and safetensors pass over."""
    write_adapter(tmp_path, version(3))
    with safetensors.safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata().keys() == {"format", adapter_directory.DIGEST}
        assert file.metadata()["format"] == "pt"
    model = nn.ModuleDict({"q": nn.Linear(13, 11)})
    loaded = peft.PeftModel.from_pretrained(model, tmp_path).base_model.model["q"]
    assert loaded.scaling["default"] == 3.0
    assert (loaded.lora_A["default"].weight == 3).all()
    assert not {"metadata", adapter_directory.DIGEST} & read_adapter(tmp_path).config.keys()


def test_modules_are_read_in_the_files_order(tmp_path):
    names = [f"layers.{i}.q" for i in range(50)]
    write_adapter(tmp_path, {name: version(1)["q"] for name in reversed(names)})
    assert list(read_adapter(tmp_path).modules) == sorted(names)


def test_a_save_gives_the_same_bytes_again(tmp_path):
    modules = version(5)
    for place in range(8):
        write_adapter(tmp_path / str(place), modules)
    for name in (CONFIG, WEIGHTS):
        assert len({(tmp_path / str(place) / name).read_bytes() for place in range(8)}) == 1
