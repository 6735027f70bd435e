"""The two files of a PEFT adapter directory, read and written as one: JSON and safetensors.

A save replaces each file as a whole, the weights before the config, and the weights say which
config they go with. A reader that finds another one takes that of a save which is under way, or was
killed, or reads again, until the two go together or nobody has written for a while: then somebody
has edited the config by hand.

What is promised is for readers beside writers, not for a loss of power: nothing waits for the disk.
safetensors is needed when a file is read or written; pickles are never opened.
"""

import contextlib
import hashlib
import json
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: the writers of one process take turns, those of several do not
    fcntl = None

CONFIG = "adapter_config.json"
WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
DIGEST = "lora_kernels.config_sha256"
_LARGEST_CONFIG = 16 * 2**20  # bytes
_DEEPEST_CONFIG = 50  # tables and lists in each other
_QUIET = 0.2  # seconds after which a file that has not changed is taken for finished
_PATIENCE = 5.0  # seconds of waiting for that
_WRITERS = threading.Lock()


class AdapterContent(NamedTuple):
    """What the two files say."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_files(directory: Path) -> AdapterContent:
    """Both files as one save has left them.

    Raises:
        ValueError: a file is missing, cannot be read, is malformed, or is written to all the time.
        ImportError: safetensors is not installed.
    """
    give_up, pause = time.monotonic() + _PATIENCE, 0.001
    last, unchanged_since = None, 0.0
    while True:
        before = _stamp(directory)
        config = _read(directory / CONFIG, _LARGEST_CONFIG)
        data = _read(directory / WEIGHTS)
        error = content = digest = None
        tensors: dict[str, Tensor] = {}
        try:
            parsed = _parsed(config, directory / CONFIG)
            tensors, digest = _tensors(data, directory / WEIGHTS)
            content = AdapterContent(parsed, tensors)
        except ValueError as caught:
            error = caught
        same = before is not None and before == _stamp(directory)
        if content is not None and (digest == _digest(config) or (digest is None and same)):
            return content
        if same and (text := _unfinished(directory, digest)) is not None:
            return AdapterContent(_parsed(text, directory / CONFIG), tensors)
        now = time.monotonic()
        if before != last:
            last, unchanged_since = before, now
        changed = 0.0 if before is None else before.changed
        quiet = same and max(time.time() - changed, now - unchanged_since) > _QUIET
        if quiet and not _is_being_saved(directory):
            if content is None:
                raise error or ValueError(f"{directory}: nothing was read")
            return content
        if now > give_up:
            raise error or ValueError(
                f"{directory}: {CONFIG} and {WEIGHTS} are written to all the time; in "
                f"{_PATIENCE:g} s of reading they did not once go together"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def write_files(directory: Path, config: str, tensors: dict[str, Tensor]) -> None:
    """Replace both files once they are complete; the directory is made too.

    They get the permissions of any new file; what else is in the directory stays.

    Raises:
        ValueError: a directory is in a file's place.
        OSError: a file cannot be written. Those of before are as they were, unless it is the
            config that cannot be replaced once the weights are.
        ImportError: safetensors is not installed.
    """
    text = config.encode()
    data = _serialized(tensors, {"format": "pt", DIGEST: _digest(text)})
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        weights = stack.enter_context(_partial(directory / WEIGHTS, *data))
        settings = stack.enter_context(_partial(directory / CONFIG, text))
        stack.enter_context(_writing(directory))
        for name in (WEIGHTS, CONFIG):
            if (directory / name).is_dir():
                raise ValueError(f"{directory / name}: expected a file, got a directory")
        os.replace(weights, directory / WEIGHTS)
        os.replace(settings, directory / CONFIG)


# --- reading ----------------------------------------------------------------------------------


class _Stamp(NamedTuple):
    """What differs once a file has been replaced or written to."""

    changed: float  # time of the later change, by the file system's clock
    identities: tuple


def _unfinished(directory: Path, digest: str | None) -> bytes | None:
    """The config of a save that has put its weights in place and its config not yet, or never did
    as it was killed."""
    with contextlib.suppress(OSError):
        config, weights = (os.stat(directory / name) for name in (CONFIG, WEIGHTS))
        if digest is None or config.st_ctime_ns > weights.st_ctime_ns:  # edited since
            return None
        for path in directory.glob(f".{CONFIG}.*.partial"):
            with contextlib.suppress(OSError):
                if _digest(text := path.read_bytes()) == digest:
                    return text
    return None


def _stamp(directory: Path) -> _Stamp | None:
    try:
        files = [os.stat(directory / name) for name in (CONFIG, WEIGHTS)]
    except (OSError, ValueError):
        return None
    identities = tuple((f.st_ino, f.st_size, f.st_mtime_ns, f.st_ctime_ns) for f in files)
    return _Stamp(max(max(f.st_ctime, f.st_mtime) for f in files), identities)


def _read(path: Path, most: int | None = None) -> bytes:
    """The file's bytes. A copy: what is mapped into memory may be cut off while it is read."""
    try:
        kind = os.stat(path)
        if not stat.S_ISREG(kind.st_mode):
            came = "a directory" if stat.S_ISDIR(kind.st_mode) else "something else"
            raise ValueError(f"{path}: expected a file, got {came}")
        if most is not None and kind.st_size > most:
            raise ValueError(f"{path}: expected at most {most} bytes, got {kind.st_size}")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if path.name == CONFIG:
            text = f"directory: expected a local PEFT adapter directory, there is no {path}"
        elif (path.parent / PICKLE).is_file():
            text = (
                f"{path.parent}: there is only {PICKLE}, a pickle, which can run any code when it "
                f"is opened and is never read here; save the adapter as {WEIGHTS}"
            )
        else:
            text = f"directory: there is no {path}"
        raise ValueError(text) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text.decode(), object_pairs_hook=_table)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError too
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    inside: list[Any] = [config]
    for _ in range(_DEEPEST_CONFIG):
        lists = [each.values() if isinstance(each, dict) else each for each in inside]
        inside = [value for each in lists for value in each if isinstance(value, (dict, list))]
    if inside:
        raise ValueError(f"{path}: expected at most {_DEEPEST_CONFIG} lists in each other")
    return config


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"two values of {twice[:60]!r}")
    return table


def _tensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors, and the digest of the config that they were saved with."""
    library = _safetensors()
    try:
        tensors = library.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        digest = (header.pop("__metadata__", None) or {}).get(DIGEST)
        # In the file's order: the library's is another one in every run.
        tensors = {key: tensors[key] for key in header}
    except MemoryError:
        raise
    except Exception as error:  # also of what torch makes of a shape or a dtype that it has not
        raise ValueError(
            f"{path}: not a safetensors file: {type(error).__name__}: {error}"
        ) from None
    return tensors, digest


def _digest(config: bytes) -> str:
    return hashlib.sha256(config).hexdigest()


# --- writing ----------------------------------------------------------------------------------


def _serialized(
    tensors: dict[str, Tensor], metadata: dict[str, str]
) -> tuple[bytes, bytes, memoryview]:
    """A safetensors file in pieces, the same bytes for the same values.

    The library writes several entries of metadata in another order in every run.
    """
    data = _safetensors().save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end]) | {"__metadata__": metadata}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little"), text, memoryview(data)[end:]


@contextlib.contextmanager
def _partial(path: Path, *pieces: bytes | memoryview) -> Iterator[Path]:
    """A new file beside ``path`` with a name of its own, which does not outlive the context."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            file.writelines(pieces)
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """One save at a time replaces the files of a directory, also of several processes."""
    if fcntl is None:
        with _WRITERS:
            yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        # Without locks, as on some file systems over the net, each file is still whole.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_being_saved(directory: Path) -> bool:
    if fcntl is None:
        return _WRITERS.locked()
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("adapter files need safetensors: pip install safetensors") from error
    return safetensors.torch
