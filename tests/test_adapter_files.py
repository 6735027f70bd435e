"""PEFT's adapter directories: what PEFT writes is read, what is written PEFT loads, bad files."""

import copy
import json
import math
import re
import struct
import subprocess
import sys

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from lora_kernels.files.adapters import (
    ModuleAdapter,
    load_adapter,
    read_adapter,
    save_adapter,
    write_adapter,
)
from lora_kernels.ops.routed import AdapterBank, AdapterSlots, Routing, routed_lora


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(13, 11), nn.Linear(13, 5), nn.Linear(13, 5)
        self.down = nn.Linear(11, 13)

    def forward(self, x):
        return self.down(torch.tanh(self.q(x)) + (self.k(x) + self.v(x)).mean(-1, keepdim=True))


def base():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


CONFIGS = {
    "plain": {"r": 3, "lora_alpha": 7, "target_modules": ["q", "v"]},
    "rslora": {"r": 5, "use_rslora": True, "lora_dropout": 0.25, "target_modules": ["down"]},
    "patterns": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": r".*\.[qkv]",
        "rank_pattern": {"0.q": 7, "k": 2, "q": 4},
        "alpha_pattern": {r"1\.[kv]": 11, "v": 0.5},
    },
}


def peft_model(**settings):
    config = peft.LoraConfig(**settings)
    model = peft.get_peft_model(base(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    return model


def peft_modules(model) -> dict[str, ModuleAdapter]:
    return {
        name.removeprefix("base_model.model."): ModuleAdapter(
            layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        )
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


def assert_same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, part in ours.items():
        assert torch.equal(part.lora_a, theirs[name].lora_a), name
        assert torch.equal(part.lora_b, theirs[name].lora_b), name
        # Not every number is some alpha divided by some rank.
        assert math.isclose(part.scaling, theirs[name].scaling, rel_tol=2**-52), name


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_reads_what_peft_writes(settings, tmp_path):
    model = peft_model(**settings)
    model.save_pretrained(tmp_path)
    file = read_adapter(tmp_path)
    theirs = peft_modules(model)
    assert_same(file.modules, theirs)
    assert all(part.scaling == theirs[name].scaling for name, part in file.modules.items())
    assert file.dropout_p == settings.get("lora_dropout", 0.0)
    assert file.config == json.loads((tmp_path / "adapter_config.json").read_text())


def written_and_loaded(path, modules, **options):
    write_adapter(path, modules, **options)
    loaded = peft.PeftModel.from_pretrained(base(), path)
    assert_same(peft_modules(loaded), modules)
    return loaded


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("keep_config", [True, False])
def test_peft_loads_what_is_written(settings, keep_config, tmp_path):
    model = peft_model(**settings).eval()
    model.save_pretrained(tmp_path / "theirs")
    file = read_adapter(tmp_path / "theirs")
    loaded = written_and_loaded(
        tmp_path / "ours",
        file.modules,
        dropout_p=file.dropout_p,
        config=file.config if keep_config else None,
    )
    x = torch.randn(4, 13)
    assert torch.equal(loaded(x), model(x))
    if keep_config:
        assert read_adapter(tmp_path / "ours").config == file.config
    again = read_adapter(tmp_path / "ours")
    assert_same(again.modules, file.modules)
    assert again.dropout_p == file.dropout_p


@pytest.mark.parametrize("use_rslora", [True, False])
def test_any_ranks_and_scalings_survive(use_rslora, tmp_path):
    shapes = {"0.q": (11, 13), "0.k": (5, 13), "1.v": (5, 13), "1.down": (13, 11)}
    scalings = [1 / 3, 2.0, math.pi, 0.1]
    modules = {
        name: ModuleAdapter(torch.randn(rank, k), torch.randn(n, rank), scaling)
        for (name, (n, k)), rank, scaling in zip(
            shapes.items(), [1, 3, 3, 24], scalings, strict=True
        )
    }
    write_adapter(
        tmp_path, modules, config={"use_rslora": use_rslora, "base_model_name_or_path": "base"}
    )
    for ours in (
        read_adapter(tmp_path).modules,
        peft_modules(peft.PeftModel.from_pretrained(base(), tmp_path)),
    ):
        assert_same(ours, modules)
    assert read_adapter(tmp_path).config["base_model_name_or_path"] == "base"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_files(dtype, tmp_path):
    modules = {"0.q": ModuleAdapter(torch.randn(2, 13).to(dtype), torch.randn(11, 2).to(dtype), 2)}
    write_adapter(tmp_path, modules)
    assert_same(read_adapter(tmp_path).modules, modules)


def test_a_new_file_replaces_the_old_at_once(tmp_path):
    modules = {"0.q": ModuleAdapter(torch.randn(2, 13), torch.randn(11, 2), 2.0)}
    write_adapter(tmp_path, modules)
    before = read_adapter(tmp_path)
    write_adapter(tmp_path, {"0.q": modules["0.q"]._replace(scaling=3.0, lora_a=torch.ones(2, 13))})
    assert_same(before.modules, modules)
    assert read_adapter(tmp_path).modules["0.q"].scaling == 3.0
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


# --- files that are refused ------------------------------------------------------------------


def good(path, **changes) -> None:
    tensors = {
        "base_model.model.0.q.lora_A.weight": torch.randn(3, 13),
        "base_model.model.0.q.lora_B.weight": torch.randn(11, 3),
    }
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q"]}
    for key, value in changes.items():
        if value is None:
            tensors.pop(f"base_model.model.0.q.{key}")
        elif isinstance(value, torch.Tensor):
            tensors[f"base_model.model.{key}"] = value
        else:
            config[key] = value
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))


def test_the_good_file_is_good(tmp_path):
    good(tmp_path)
    part = read_adapter(tmp_path).modules["0.q"]
    assert (part.scaling, part.lora_a.shape, part.lora_b.shape) == (2.0, (3, 13), (11, 3))


NAN = torch.tensor([[0.5, math.nan, 1.0]]).expand(11, 3).contiguous()
REFUSED = {
    "dora": ({"use_dora": True}, "use_dora = True: DoRA is not served"),
    "dora tensors": ({"0.q.lora_magnitude_vector": torch.ones(11)}, "DoRA's magnitudes: base"),
    "lora_bias": ({"lora_bias": True}, "a bias on lora_B is not served"),
    "lora_bias tensor": ({"0.q.lora_B.bias": torch.ones(11)}, "got a bias on lora_B"),
    "bias": ({"bias": "all"}, "bias = 'all': trained biases of the base model"),
    "embedding": ({"e.lora_embedding_A": torch.ones(3, 13)}, "an embedding's adapter"),
    "conv": (
        {"0.q.lora_A.weight": torch.ones(3, 13, 3), "0.q.lora_B.weight": torch.ones(11, 3, 1)},
        "expected matrices lora_A and lora_B",
    ),
    "modules_to_save": ({"modules_to_save": ["head"]}, "whole modules beside the adapter"),
    "saved module": (
        {"head.weight": torch.ones(3)},
        "parameters of the base model too, which a bank cannot compare with its own: head.weight",
    ),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens = [1, 2]: aLoRA"),
    "parameters": ({"target_parameters": ["experts.up"]}, "adapters on parameters (experts)"),
    "peft_type": ({"peft_type": "LOHA"}, "expected peft_type 'LORA', got 'LOHA'"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' has changed the base"),
    "variant": ({"use_something": True}, "use_something = True is not known here"),
    "rank of A": ({"0.q.lora_A.weight": torch.ones(4, 13)}, "expected rank 3 by the config"),
    "rank of B": ({"0.q.lora_B.weight": torch.ones(11, 2)}, "expected rank 3 by the config"),
    "rank": ({"r": 4}, "0.q: expected rank 4 by the config, got lora_A [3, 13]"),
    "rank 0": ({"r": 0}, "r: expected an integer of at least 1, got 0"),
    "rank text": ({"rank_pattern": {"q": "3"}}, "r: expected an integer of at least 1, got '3'"),
    "patterns": ({"rank_pattern": [3]}, "rank_pattern: expected a table, got [3]"),
    "pattern": ({"rank_pattern": {"(": 3}}, "rank_pattern: '(' is no regular expression"),
    "targets": ({"target_modules": "(.*"}, "target_modules: '(.*' is no regular expression"),
    "a target": ({"target_modules": ["q", 3]}, "expected a regular expression or a list of names"),
    "targets by key": ({"target_modules": {"q": 3}}, "or a list of names, got {'q': 3}"),
    "excluded": ({"exclude_modules": "q("}, "exclude_modules: 'q(' is no regular expression"),
    "layers": ({"layers_to_transform": "1"}, "expected a number or a list of them, got '1'"),
    "layer's name": (
        {"layers_to_transform": 1, "layers_pattern": ["h", "(l"]},
        "layers_pattern: '(l' is no regular expression",
    ),
    "other targets": ({"target_modules": ["k"]}, "targets none of the file's modules: 0.q"),
    "alpha": ({"lora_alpha": math.inf}, "lora_alpha: expected a finite number, got inf"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout: expected a probability in [0, 1), got 1.5"),
    "nan": ({"0.q.lora_B.weight": NAN}, "0.q.lora_B.weight: expected finite values"),
    "ints": ({"0.q.lora_B.weight": torch.ones(11, 3, dtype=torch.int8)}, "got torch.int8"),
    "no B": ({"lora_B.weight": None}, "0.q: there is no lora_B for its lora_A"),
    "no A": ({"lora_A.weight": None}, "0.q: there is no lora_A for its lora_B"),
    "empty": ({"lora_A.weight": None, "lora_B.weight": None}, "there is no adapter in it"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes, message, tmp_path):
    good(tmp_path, **changes)
    bank = AdapterBank(13, 11)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_adapter(bank, "sql", tmp_path, "0.q")
    assert len(bank) == len(bank.slots) == bank.slots.version == 0


def header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


BROKEN = {
    "no config": ("adapter_config.json", None, "there is no .*adapter_config.json"),
    "no weights": ("adapter_model.safetensors", None, "there is no .*adapter_model.safetensors"),
    "not json": ("adapter_config.json", b'{"r": 3,', "adapter_config.json: not JSON"),
    "not text": ("adapter_config.json", b"\xff\xfe{}", "adapter_config.json: not JSON"),
    "a list": ("adapter_config.json", b"[]", "expected a JSON object, got list"),
    "weights of 0 bytes": ("adapter_model.safetensors", b"", "not a safetensors file"),
    "cut off": ("adapter_model.safetensors", slice(-5), "not a safetensors file"),
    "header too large": (
        "adapter_model.safetensors",
        struct.pack("<Q", 2**60) + b"{}",
        "not a safetensors file",
    ),
    "data outside of the file": (
        "adapter_model.safetensors",
        header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
        "not a safetensors file",
    ),
    "a pickle": ("adapter_model.safetensors", b"\x80\x04K\x01.", "not a safetensors file"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken(name, content, message, tmp_path):
    good(tmp_path)
    path = tmp_path / name
    if isinstance(content, slice):
        content = path.read_bytes()[content]
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    good(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return exec, ("raise SystemExit('opened')",)

    torch.save({"x": Trap()}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"only adapter_model.bin, a pickle"):
        read_adapter(tmp_path)
    with pytest.raises(ValueError, match="local PEFT adapter directory"):
        read_adapter(tmp_path / "absent")


def test_what_needs_safetensors_and_what_does_not(tmp_path):
    """With every optional package refused a model is routed and trained, but not saved."""
    program = f"""
import sys
OPTIONAL = "triton peft transformers numpy safetensors".split()
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"{{name}} is absent")
sys.meta_path.insert(0, Refuse())
import torch, lora_kernels
model = torch.nn.Sequential(torch.nn.Linear(8, 6))
routed = lora_kernels.route(model)
routed.add("one", rank=2, alpha=4, target_modules=["0"])
with routed.adapters(["one", "__base__"]):
    model(torch.randn(2, 8)).sum().backward()
print(routed.parameters_of("one")[1].grad.abs().sum() > 0)
try:
    routed.save("one", {str(tmp_path / "new")!r})
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.splitlines() == [
        "tensor(True)",
        "adapter files need safetensors: pip install safetensors",
    ], result.stderr
    assert not (tmp_path / "new").exists()


# --- one bank --------------------------------------------------------------------------------


def test_a_bank_loads_and_saves(tmp_path):
    model = peft_model(**CONFIGS["patterns"])
    model.save_pretrained(tmp_path / "theirs")
    bank = AdapterBank(13, 11)
    adapter = load_adapter(bank, "sql", tmp_path / "theirs", "0.q")
    theirs = peft_modules(model)["0.q"]
    assert torch.equal(adapter.lora_a, theirs.lora_a)
    assert torch.equal(bank["sql"].lora_b, theirs.lora_b)
    assert adapter.scaling == theirs.scaling
    save_adapter(bank, "sql", tmp_path / "ours", "0.q")
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert_same(peft_modules(loaded), {"0.q": theirs})
    with pytest.raises(KeyError, match="no adapter 'none'"):
        save_adapter(bank, "none", tmp_path, "0.q")


def test_a_sliced_bank_loads_and_saves(tmp_path):
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q", "v"], "lora_dropout": 0.5}
    model = peft_model(**settings)
    model.save_pretrained(tmp_path / "theirs")
    bank = AdapterBank(13, [11, 5, 5])
    names = ["1.q", "1.k", "1.v"]
    adapter = load_adapter(bank, "sql", tmp_path / "theirs", names)
    assert adapter.ranks == (3, 0, 3)
    assert adapter.dropout_p == 0.5
    layer = model.base_model.model[1]
    x = torch.randn(7, 13)
    y = routed_lora(x, bank.eval(), Routing.from_tokens([adapter.slot] * 7, bank))
    expected = [
        (each.lora_B["default"](each.lora_A["default"](x))) * 2 for each in (layer.q, layer.v)
    ]
    torch.testing.assert_close(y[:, :11], expected[0])
    assert (y[:, 11:16] == 0).all()
    torch.testing.assert_close(y[:, 16:], expected[1])
    save_adapter(bank, "sql", tmp_path / "ours", names)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    kept = {name: part for name, part in peft_modules(model).items() if name.startswith("1.")}
    assert_same(peft_modules(loaded), kept)


def test_what_a_bank_cannot_take_leaves_it_unchanged(tmp_path):
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q", "k"], "rank_pattern": {"k": 2}}
    peft_model(**settings).save_pretrained(tmp_path)
    bank = AdapterBank(13, 11)
    load_adapter(bank, "held", tmp_path, "0.q")
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    sliced = AdapterBank(13, [11, 5])
    half = AdapterBank(13, 11, dtype=torch.float16)
    cases = {
        "has none of": (bank, "new", "0.v"),
        "expected a name for each of the 1 slices": (bank, "new", ["0.q", "0.k"]),
        "all different": (sliced, "new", ["0.q", "0.q"]),
        "there is an adapter 'held' already": (bank, "held", "1.q"),
        "name: expected one that is not": (bank, "keys", "0.q"),
        "lora_b: expected [11, 2]": (bank, "new", "0.k"),
        "has one scaling, and those of": (sliced, "new", ["0.q", "0.k"]),
    }
    for message, (target, name, module) in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            load_adapter(target, name, tmp_path, module)
    with pytest.raises(TypeError, match="expected an AdapterBank, got AdapterSlots"):
        load_adapter(AdapterSlots(), "new", tmp_path, "0.q")
    assert list(bank) == ["held"] and not len(sliced)
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())

    large = ModuleAdapter(torch.full((3, 13), 1e5), torch.ones(11, 3), 1.0)
    write_adapter(tmp_path, {"0.q": large})
    with pytest.raises(ValueError, match=r"lora_A .* overflows the bank's torch.float16"):
        load_adapter(half, "new", tmp_path, "0.q")


def test_slices_are_those_that_the_config_targets(tmp_path):
    """q, k and v in one launch: a slice without an adapter is one that was not to have any."""
    factors = {"q": (11, 0.5), "k": (5, -1.0), "v": (5, 2.0)}
    modules = {
        f"0.{name}": ModuleAdapter(torch.full((2, 13), value), torch.randn(n, 2), 1.0)
        for name, (n, value) in factors.items()
    }
    names = list(modules)
    write_adapter(tmp_path, modules)
    bank = AdapterBank(13, [11, 5, 5])
    assert [pair is not None for pair in bank.load("all", tmp_path, names).factors()] == [True] * 3

    write_adapter(tmp_path, {name: modules[name] for name in ("0.q", "0.v")})
    assert [pair is not None for pair in bank.load("two", tmp_path, names).factors()] == [
        True,
        False,
        True,
    ]

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = ["q", "k", "v"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    version = bank.slots.version
    with pytest.raises(ValueError, match=r"targets 1 modules .* have: 0\.k"):
        bank.load("part", tmp_path, names)
    assert "part" not in bank and bank.slots.version == version
    with pytest.warns(UserWarning, match=r"does not have: 0.k; they stay without the adapter"):
        adapter = bank.load("part", tmp_path, names, strict=False)
    assert [pair is not None for pair in adapter.factors()] == [True, False, True]

    config["target_modules"] = ["q", "k"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning) as warned:
        adapter = load_adapter(bank, "q", tmp_path, names, strict=False)
    assert "does not target 0.v, which are in the file" in str(warned[0].message)
    assert [pair is not None for pair in adapter.factors()] == [True, False, False]
    with (
        pytest.warns(UserWarning, match="does not target 0.v"),
        pytest.raises(ValueError, match=r"has none of \['0.v'\]; it has 0.q"),
    ):
        load_adapter(AdapterBank(13, 5), "v", tmp_path, "0.v")


BAD_MODULES = {
    "none": ({}, "expected at least one"),
    "vectors": ({"q": (torch.ones(3), torch.ones(3), 1.0)}, "expected lora_a [R, K]"),
    "ranks": ({"q": (torch.ones(3, 4), torch.ones(4, 2), 1.0)}, "got [3, 4] and [4, 2]"),
    "scaling": ({"q": (torch.ones(3, 4), torch.ones(4, 3), math.nan)}, "a finite scaling, got nan"),
}


@pytest.mark.parametrize(("modules", "message"), BAD_MODULES.values(), ids=BAD_MODULES)
def test_what_is_not_written(modules, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_adapter(tmp_path / "new", modules)
    assert not (tmp_path / "new").exists()


LIES = {
    "dora": ({"use_dora": True}, "config: use_dora = True"),
    "targets": ({"target_modules": ["k"]}, "leave out modules that are written: q"),
    "excluded": ({"exclude_modules": "q|v"}, "leave out modules that are written: q"),
}


@pytest.mark.parametrize(("config", "message"), LIES.values(), ids=LIES)
def test_a_config_that_lies_is_not_written(config, message, tmp_path):
    modules = {"q": (torch.ones(3, 4), torch.ones(4, 3), 1.0)}
    with pytest.raises(ValueError, match=message):
        write_adapter(tmp_path / "new", modules, config=config)
    assert not (tmp_path / "new").exists()


def test_a_config_object_of_peft_can_be_kept(tmp_path):
    model = peft_model(**CONFIGS["plain"])
    config = copy.deepcopy(model.peft_config["default"]).to_dict()
    written_and_loaded(tmp_path, peft_modules(model), config=config)
