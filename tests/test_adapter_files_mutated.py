"""Any change to a good adapter directory gives a ValueError that names it, or a right load."""

import json
import os
import shutil
import struct
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_kernels.files import directory as adapter_directory
from lora_kernels.files import patterns as adapter_patterns
from lora_kernels.files.adapters import ModuleAdapter, read_adapter, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEYS = [
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "use_rslora",
    "bias",
    "peft_type",
    "init_lora_weights",
    "use_dora",
    "modules_to_save",
    "loftq_config",
]
PATTERNS = st.sampled_from(["q", ".*", "0.q", "(", "([a-z_.0-9]+)+!", "(a|.|[a-z])*[!?]", "\x00"])
NUMBERS = st.one_of(
    st.integers(-2, 5),
    st.sampled_from([2**31, 10**400, -(10**400), True, 0.5, 1e308, float("nan"), float("inf")]),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, PATTERNS, st.text(max_size=5))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(PATTERNS, st.text(max_size=4)), inner, max_size=3),
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    modules = {
        f"{i}.{name}": ModuleAdapter(torch.randn(3, 13), torch.randn(11, 3), 2.0)
        for i in range(2)
        for name in "qk"
    }
    write_adapter(path, modules)
    return path


@pytest.fixture(scope="module", autouse=True)
def hurry():
    """Bad files are new here, and are taken for half-written ones for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_directory, "_QUIET", 0.0)
        patch.setattr(adapter_patterns, "SECONDS", 0.05)
        yield


@pytest.fixture
def copied(good, tmp_path):
    shutil.copytree(good, tmp_path / "it")
    return tmp_path / "it"


def assert_refused_or_right(directory) -> bool:
    """Whether it loads; then the numbers are those of its two files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            file = read_adapter(directory)
        except ValueError as error:
            assert str(directory) in str(error), error
            assert len(str(error)) < 2000
            return False
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    config = json.loads((directory / CONFIG).read_text())
    assert file.config == config or config != config or "nan" in repr(config)
    assert file.modules
    for name, part in file.modules.items():
        theirs = tensors[f"base_model.model.{name}.lora_A.weight"]
        assert part.lora_a.shape == theirs.shape and torch.equal(part.lora_a, theirs)
        assert torch.equal(part.lora_b, tensors[f"base_model.model.{name}.lora_B.weight"])
        assert torch.isfinite(torch.tensor(part.scaling))
        if not config.get("alpha_pattern") and not config.get("rank_pattern"):
            rank = config.get("r", 8)
            divisor = rank**0.5 if config.get("use_rslora") else rank
            assert part.scaling == config.get("lora_alpha", 8) / divisor
    return True


def changed(good, directory, config=None, weights=None):
    for name, data in ((CONFIG, config), (WEIGHTS, weights)):
        shutil.copy(good / name, directory / name)
        if data is not None:
            (directory / name).write_bytes(data)
    return assert_refused_or_right(directory)


MANY = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@MANY
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
def test_settings(good, tmp_path, changes):
    config = json.loads((good / CONFIG).read_text()) | changes
    changed(good, tmp_path, config=json.dumps(config).encode())


@MANY
@given(st.sampled_from([CONFIG, WEIGHTS]), st.data())
def test_bytes(good, tmp_path, name, data):
    """Of the header, mostly."""
    content = bytearray((good / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(content), 700) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "drop", "repeat"]))
        if kind == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut" and at > 0:
            del content[at:]
        elif kind == "drop":
            del content[at : at + data.draw(st.integers(1, 9))]
        elif kind == "repeat":
            content[at:at] = content[at : at + data.draw(st.integers(1, 9))]
        if not content:
            break
    which = "config" if name == CONFIG else "weights"
    changed(good, tmp_path, **{which: bytes(content)})


def with_header(data: bytes, header: dict, rest: bytes | None = None) -> bytes:
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + (data[8 + length :] if rest is None else rest)


@MANY
@given(st.data())
def test_headers(good, tmp_path, data):
    content = (good / WEIGHTS).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    key = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    entry = header[key]
    kind = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "key", "metadata"]))
    if kind == "dtype":
        dtypes = ["F16", "BF16", "F64", "I32", "F4", "F8_E8M0", "C64", "U64", "BOOL", "?"]
        entry["dtype"] = data.draw(st.sampled_from(dtypes))
    elif kind == "shape":
        numbers = st.sampled_from([0, 1, 3, 13, 39, -1, 2**31, 2**63, 2**64, 1.5])
        entry["shape"] = data.draw(st.lists(numbers, max_size=4))
    elif kind == "data_offsets":
        numbers = st.sampled_from([0, 156, 155, 1, 2**40, 2**63, -1])
        entry["data_offsets"] = data.draw(st.lists(numbers, min_size=1, max_size=3))
    elif kind == "key":
        keys = [
            "",
            "x",
            f"{key}.alpha",
            "base_model.model.\x00.lora_A.weight",
            "a" * 5000,
            "\ud800",
        ]
        header[data.draw(st.sampled_from(keys))] = header.pop(key)
    else:
        header["__metadata__"] = data.draw(st.sampled_from([{}, {"a": 1}, {"a": "b"}, [], 3]))
    changed(good, tmp_path, weights=with_header(content, header))


def deep(levels: int) -> bytes:
    return b'{"r": 3, "x": ' + b"[" * levels + b"]" * levels + b"}"


CONFIGS = {
    "deep": deep(100_000),
    "rather deep": deep(200),
    "an alpha of 400 digits": b'{"peft_type": "LORA", "lora_alpha": 1%s}' % (b"0" * 400),
    "an alpha of 5000 digits": b'{"peft_type": "LORA", "lora_alpha": 1%s}' % (b"0" * 5000),
    "a rank of 400 digits": b'{"peft_type": "LORA", "r": 1%s}' % (b"0" * 400),
    "a rank that is true": b'{"peft_type": "LORA", "r": true}',
    "a rank in words": b'{"peft_type": "LORA", "r": "3"}',
    "a rank that is no number": b'{"peft_type": "LORA", "r": NaN}',
    "twice": b'{"peft_type": "LORA", "r": 4, "r": 3}',
    "twice inside": b'{"peft_type": "LORA", "r": 3, "rank_pattern": {"q": 3, "q": 3}}',
    "null bytes": b'{"peft_type": "LORA", "r": 3}\x00',
    "UTF-16": '{"peft_type": "LORA", "r": 3}'.encode("utf-16"),
    "no UTF-8": b'{"peft_type": "LORA\xff"}',
    "infinite": b'{"peft_type": "LORA", "lora_alpha": -Infinity}',
    "huge": b'{"peft_type": "LORA", "r": 3, "x": "' + b"a" * 17_000_000 + b'"}',
    "rslora in words": b'{"peft_type": "LORA", "r": 3, "use_rslora": "false"}',
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configs_that_are_refused(config, copied):
    (copied / CONFIG).write_bytes(config)
    assert not assert_refused_or_right(copied)


def test_a_nesting_that_is_read_survives_what_follows(copied):
    config = json.loads((copied / CONFIG).read_text())
    config["x"] = json.loads("[" * 40 + "]" * 40)
    (copied / CONFIG).write_text(json.dumps(config))
    assert assert_refused_or_right(copied)
    file = read_adapter(copied)
    write_adapter(copied, file.modules, config=file.config)
    assert read_adapter(copied).config == file.config


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["a directory", "a pipe", "a link to itself", "nothing"])
def test_what_is_no_file(kind, name, copied):
    (copied / name).unlink()
    if kind == "a directory":
        (copied / name).mkdir()
    elif kind == "a pipe":
        os.mkfifo(copied / name)
    elif kind == "a link to itself":
        (copied / name).symlink_to(copied / name)
    assert not assert_refused_or_right(copied)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_may_not_be_read(name, copied, monkeypatch):
    """A superuser may read anything, so the system's answer is put in its place."""
    read_bytes = type(copied).read_bytes

    def denied(path):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(type(copied), "read_bytes", denied)
    with pytest.raises(ValueError, match=f"{name}: cannot be read: .*Permission denied") as raised:
        read_adapter(copied)
    assert isinstance(raised.value.__cause__, PermissionError)


@pytest.mark.parametrize("path", ["\x00", "a" * 5000, "", "\ud800"], ids=ascii)
def test_paths_that_are_none(path, tmp_path):
    with pytest.raises(ValueError):
        read_adapter(tmp_path / "none" / path)


def test_headers_that_claim_more_than_there_is(copied):
    key = "base_model.model.0.q.lora_A.weight"
    entry = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    for data in (
        with_header(b"\0" * 8, {key: entry}, b"\0" * 100),
        with_header(b"\0" * 8, {key: entry | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}),
        struct.pack("<Q", 2**44) + b"{}",
    ):
        (copied / WEIGHTS).write_bytes(data)
        assert not assert_refused_or_right(copied)


# --- keys -------------------------------------------------------------------------------------


def rekeyed(directory, change) -> None:
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    safetensors.torch.save_file(
        {change(key): value for key, value in tensors.items()}, directory / WEIGHTS
    )


def test_an_adapters_name_inside_of_the_keys(good, copied):
    """As PEFT loads them for that name."""
    rekeyed(copied, lambda key: key.replace(".weight", ".default.weight"))
    expected = read_adapter(good).modules
    found = read_adapter(copied).modules
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        assert torch.equal(found[name].lora_a, part.lora_a)
        assert torch.equal(found[name].lora_b, part.lora_b)


@pytest.mark.parametrize("other", ["another", None])
def test_the_keys_of_two_adapters(other, copied):
    middle = f".{other}.weight" if other else ".weight"
    rekeyed(copied, lambda key: key.replace(".weight", middle if "0.q" in key else ".one.weight"))
    named = "'another', 'one'" if other else "'one', no name"
    with pytest.raises(ValueError, match=f"{WEIGHTS}: expected one adapter, got keys .*{named}"):
        read_adapter(copied)


def test_an_alpha_beside_the_factors(copied):
    tensors = safetensors.torch.load_file(copied / WEIGHTS)
    tensors["base_model.model.0.q.alpha"] = torch.tensor(8.0)
    safetensors.torch.save_file(tensors, copied / WEIGHTS)
    with pytest.raises(ValueError, match=r"an alpha of kohya's or diffusers' .*: base_m.*q\.alpha"):
        read_adapter(copied)
    rekeyed(copied, lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"))
    with pytest.raises(ValueError, match=r"an alpha of .* and kohya's or diffusers' factors"):
        read_adapter(copied)
