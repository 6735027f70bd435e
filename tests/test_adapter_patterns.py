"""A config's patterns: matched as by re and PEFT, in bounded time, whoever has written them."""

import json
import re
import sys
import time

import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_kernels import route
from lora_kernels.files import patterns as adapter_patterns
from lora_kernels.files.adapters import ModuleAdapter, read_adapter, write_adapter
from lora_kernels.files.config import check_config, idle_patterns, ranks_and_scalings, targeted
from lora_kernels.files.patterns import Allowance, EndPatterns, match

CONFIG = "adapter_config.json"
STRANGE = r"([a-z_.0-9]+)+!"
NAME = "model.layers.10.self_attn.q_proj"


def found(regex, name, method="match"):
    return match(regex, name, "rank_pattern", regex, Allowance("config"), method)


# Of every kind of syntax, also what only the package regex may match.
PATTERNS = [
    "",
    "q_proj",
    "^model",
    r"layers\.1.\.",
    r".*\.layers\.(?:\d+)\.self_attn\.(q|k|v)_proj",
    r"(.*\.)?(q_proj|v_proj)$",
    r"(?:.*?(?:language|self).*?(?:attn|mlp).*?(?:k_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)",
    r"^(?!.*vision)(?=model).*(?:q|k)_proj$",
    r"(?:[a-z_]+\.)+layers\.(?:\d+\.)*self_attn\..*",
    r"([a-z])(.*)\1_proj",
    r"(?P<start>m).*(?P=start)?.{0,5}j",
    r"(?i)MODEL\.LAYERS\..*",
    r"(?s:.*)proj\Z",
    r"(?<=x)y|(?<!x)model.*",
    r"(?:a|b|model)(?:\.[^.]+){1,4}",
    r"[^\]]*[]a-z.]+\w\W?",
    r"(\w+\.){3}.*",
    r"(m)?(?(1)odel|x).*",
    r".*\{|.*\bq_proj\b",
]


@pytest.mark.parametrize("method", ["match", "fullmatch"])
@pytest.mark.parametrize("library", [True, False], ids=["regex", "re where it may"])
def test_matches_are_res(library, method, monkeypatch):
    if library:
        monkeypatch.setattr(adapter_patterns, "_MOST_WAYS", -1)
    names = [NAME, "q_proj", "model.layers.1.x", "", "x.q_proj", "model\n", "lm_head", "x{"]
    hits = 0
    for pattern in PATTERNS:
        for name in names:
            ours, theirs = found(pattern, name, method), getattr(re, method)(pattern, name)
            assert (ours and (ours.span(), ours.groups())) == (
                theirs and (theirs.span(), theirs.groups())
            ), (pattern, name)
            hits += ours is not None
    assert hits > 15


def expressions():
    """Patterns of small alphabets, so that many match; few enough characters for re."""
    atoms = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^.]", r"\d", "1", r"\b", "^", "$"])
    repeats = st.sampled_from(["", "", "*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{,2}", "{1,}"])

    def larger(inner):
        return st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map("|".join),
            st.tuples(inner, repeats).map(lambda each: f"({each[0]}){each[1]}"),
            st.tuples(st.sampled_from(["(?:", "(?=", "(?!"]), inner).map(
                lambda e: f"{e[0]}{e[1]})"
            ),
        )

    return st.recursive(st.tuples(atoms, repeats).map("".join), larger, max_leaves=5)


@settings(max_examples=300, deadline=None)
@given(expressions(), st.text("ab.1", max_size=8))
def test_any_matches_are_res(pattern, name):
    try:
        theirs = [re.match(pattern, name), re.fullmatch(pattern, name)]
    except re.error:
        with pytest.raises(ValueError, match="is no regular expression"):
            found(pattern, name)
        return
    for ours in (
        [found(pattern, name), found(pattern, name, "fullmatch")],
        by_regex(pattern, name),
    ):
        for one, other in zip(ours, theirs, strict=True):
            assert (one and one.span()) == (other and other.span()), (pattern, name)


def by_regex(pattern, name):
    most, adapter_patterns._MOST_WAYS = adapter_patterns._MOST_WAYS, -1
    try:
        return [found(pattern, name), found(pattern, name, "fullmatch")]
    finally:
        adapter_patterns._MOST_WAYS = most


def end_patterns():
    plain = st.text("ab._", min_size=1, max_size=4).map(re.escape)
    return st.lists(
        st.one_of(plain, plain.map("^{}".format), st.text("ab.", min_size=1, max_size=4)),
        max_size=5,
        unique=True,
    )


@settings(max_examples=300, deadline=None)
@example(["_"], ["_\n"])
@example(["b"], ["a\n.b"])
@given(end_patterns(), st.lists(st.text("ab._\n", max_size=6), max_size=4))
def test_the_first_pattern_counts_as_in_peft(patterns, modules):
    table = EndPatterns(patterns, "rank_pattern", Allowance("config"))
    theirs = {
        module: [each for each in patterns if re.match(rf"(.*\.)?({each})$", module)]
        for module in modules
    }
    for module, matching in theirs.items():
        assert table.first(module) == (matching[0] if matching else None)
        found = peft.utils.other.get_pattern_key(patterns, module)
        assert (table.first(module) or module) == found
    used = {pattern for matching in theirs.values() for pattern in matching}
    assert table.idle(modules) == [pattern for pattern in patterns if pattern not in used]


# --- time -------------------------------------------------------------------------------------


def saved(path, **settings) -> None:
    modules = {
        f"model.layers.{i}.self_attn.q_proj": ModuleAdapter(
            torch.randn(4, 13), torch.randn(11, 4), 2.0
        )
        for i in range(2)
    }
    write_adapter(path, modules)
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | settings))


SLOW = r"(a|.|[a-z])*[!?]"
# These re would not finish in a lifetime either; the package regex sees that they cannot match.
HOPELESS = [STRANGE, ".*.*.*.*.*.*.*.*!", "(?:.|.)?" * 40 + "!", r"(?=(.+)+!)q", r"(.*)*\1(.+)+!"]
PLACES = {
    "rank_pattern": lambda pattern: {"rank_pattern": {pattern: 4}},
    "alpha_pattern": lambda pattern: {"alpha_pattern": {pattern: 4}},
    "target_modules": lambda pattern: {"target_modules": pattern},
    "exclude_modules": lambda pattern: {"exclude_modules": pattern},
    "layers_pattern": lambda pattern: {"layers_pattern": pattern, "layers_to_transform": [0]},
}


@pytest.fixture
def short_time(monkeypatch):
    monkeypatch.setattr(adapter_patterns, "SECONDS", 0.2)


@pytest.mark.parametrize("place", PLACES)
def test_a_slow_pattern_is_refused_in_time(place, tmp_path, short_time):
    settings = PLACES[place](SLOW)
    saved(tmp_path, **{"target_modules": ["q_proj"], **settings})
    start = time.thread_time()
    with pytest.raises(ValueError, match=rf"{CONFIG}: {place}: .* takes more than 0.2 s"):
        read_adapter(tmp_path)
    assert time.thread_time() - start < 5


@pytest.mark.parametrize("pattern", HOPELESS)
def test_a_hopeless_pattern_matches_nothing_and_takes_no_time(pattern, tmp_path):
    saved(tmp_path, rank_pattern={pattern: 9, "q_proj": 4}, target_modules=["q_proj"])
    start = time.thread_time()
    with pytest.warns(UserWarning, match="no effect"):
        assert len(read_adapter(tmp_path).modules) == 2
    assert time.thread_time() - start < 2


def test_many_patterns_that_are_nearly_slow_share_the_time(short_time):
    patterns = {f"(?:[a-z_]+){{1,4}}{i}!": 4 for i in range(2000)}
    modules = [f"{NAME}{i}" for i in range(100)]
    start = time.thread_time()
    with pytest.raises(ValueError, match=r"takes more than 0\.2 s"):
        ranks_and_scalings({"rank_pattern": patterns}, modules)
    assert time.thread_time() - start < 3


def test_a_pattern_of_every_module_costs_a_look_up(short_time):
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(1500)]
    config = {"rank_pattern": {f"^{re.escape(name)}": i + 1 for i, name in enumerate(modules)}}
    kinds = ranks_and_scalings(config, modules)
    assert [rank for rank, _ in kinds.values()] == list(range(1, 1501))
    (idle,) = idle_patterns(config, modules[1:])
    assert idle == f"rank_pattern {f'^{re.escape(modules[0])}'!r}"


def test_what_route_is_told_is_bounded_too(short_time):
    model = nn.ModuleDict({"a_long_name_of_a_layer_in_a_model_of_somebody": nn.Linear(4, 4)})
    for call in (
        lambda: route(model).add("one", rank=2, alpha=2, target_modules=SLOW),
        lambda: route(model, SLOW).add("one", rank=2, alpha=2, target_modules="all-linear"),
    ):
        with pytest.raises(ValueError, match=r"target_modules: .*takes more than"):
            call()


@pytest.mark.parametrize("pattern", [STRANGE, r"^(?!.*vision).*q_proj", r"(?i)Q_PROJ"])
def test_without_regex_what_it_is_needed_for_is_refused(pattern, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "regex", None)
    saved(tmp_path, target_modules=pattern)
    with pytest.raises(ValueError, match=rf"{CONFIG}: target_modules: .* pip install regex"):
        read_adapter(tmp_path)


def test_without_regex_the_usual_patterns_are_matched(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "regex", None)
    saved(
        tmp_path,
        target_modules=r"model\.layers\.\d+\.self_attn\.(q_proj|k_proj)",
        rank_pattern={"q_proj": 4, r"^model\.layers\.0": 5},
        alpha_pattern={r"layers.1.*": 12, r"layers\.0\.self_attn\.q_proj": 20},
    )
    with pytest.warns(UserWarning, match="no effect"):
        scalings = [part.scaling for part in read_adapter(tmp_path).modules.values()]
    assert scalings == [5.0, 3.0]


REFUSED = {
    "nested groups": "(" * 30 + "a" + "{1,50})" * 30,
    "groups without end": "(" * 5000 + ")" * 5000,
    "a number": "a{99999999999999999999}",
    "long": "a*" * 50_000,
    "classes": "[\u1000-\u3000\u5000]" * 5000,
    "case of everything": "(?i:[\u0000-\U0010ffff])" * 500,
    "case by number": r"(?i:[\u0000-\U0010ffff])" * 500,
    "named class": "([[:alpha:]]+)+!",
    "fuzzy": "(abc+)+{e<=1}",
    "open": "(",
}


@pytest.mark.filterwarnings("ignore:Possible nested set")
@pytest.mark.parametrize("pattern", REFUSED.values(), ids=REFUSED)
def test_what_no_package_bounds_is_refused_at_once(pattern):
    config = {"peft_type": "LORA", "target_modules": ["q"], "rank_pattern": {pattern: 3}}
    start = time.thread_time()
    with pytest.raises(ValueError, match="the file: rank_pattern: "):
        check_config(config, "the file")
        ranks_and_scalings(config, [NAME, "a" * 40], "the file")
    assert time.thread_time() - start < 1


def test_names_are_matched_to_the_end():
    """Of two branches the one that fits the whole name counts."""
    assert targeted({"target_modules": "q|q_proj"}, ["q_proj", "q", "q_projs"]) == ["q_proj", "q"]
    assert targeted({"target_modules": "q", "exclude_modules": "q"}, ["q"]) == []
