"""The pages, held to the tree: what they name exists, their links lead somewhere, their code runs.

A snippet of a page runs after those before it, in one namespace. What it takes for granted is put
there by the comment in front of it, ``<!-- given: llama, trainer -->``: by functions of GIVEN.
"""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lora_kernels

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
# What a command makes, or a user has.
MADE = (
    "demo-report",
    "bench-report",
    "gpu-report",
    "build",
    ".venv",
    "adapters",
    "lora_kernels/tuned",
)
PLACES = ("lora_kernels", "csrc", "tests", "benchmarks", "examples", "docs", ".ci", ".github")


def paths_of(tree: Path) -> set[str]:
    found = {path.name for path in tree.iterdir()}
    for place in PLACES:
        found |= {path.relative_to(tree).as_posix() for path in (tree / place).rglob("*")}
    return found


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# ---- what pages name


_CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
_PATH = re.compile(
    r"(?<![\w/.:-])\.?[\w-]+(?:/[\w.{},-]*)+|(?<![\w/.-])[\w-]+\.(?:py|md|cpp|h|cu)\b"
)
_BRACES = re.compile(r"\{([\w,]+)\}")


def named_paths(text: str) -> set[str]:
    """What stands in code and looks like a path of this tree, braces expanded."""
    found = set()
    for code in _CODE.findall(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)):
        if code.startswith("```python"):
            continue
        for path in _PATH.findall(code):
            braces = _BRACES.search(path)
            for each in braces[1].split(",") if braces else [""]:
                found.add(_BRACES.sub(each, path).rstrip("/.,"))
    return found


def missing_paths(text: str, tree: Path) -> set[str]:
    """A path may be whole, or begin at any folder: ``state.py``, ``nn/merging.py``."""
    known = paths_of(tree)
    ends = {end for path in known for end in _ends(path)}
    return {
        path
        for path in named_paths(text)
        if path not in ends and not path.startswith(MADE) and path.split("/")[-1] not in known
    }


def _ends(path: str) -> Iterator[str]:
    parts = path.split("/")
    return ("/".join(parts[start:]) for start in range(len(parts)))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_path_that_a_page_names_exists(page):
    assert missing_paths(page.read_text(), ROOT) == set()


def test_a_path_that_is_not_there_is_found(tmp_path):
    for name in ("lora_kernels/nn/merging.py", "benchmarks/NOTES.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = """Look at `nn/merging.py` and `benchmarks/NOTES.md`, `lora_kernels/nn/`, `demo-report/`,
    `nn/{merging,unmerging}.py`, `gone.py` and `tests/ops/`; 1/65536 and A / B are none.
    ```
    run ── nn/gone_too.py -> lora_kernels/nn/merging.py
    ```"""
    missing = {"nn/unmerging.py", "gone.py", "tests/ops", "nn/gone_too.py"}
    assert missing_paths(text, tmp_path) == missing


def missing_commands(text: str, tree: Path) -> set[str]:
    """Targets of make and modules of ``python -m`` that are not there."""
    targets = set(re.findall(r"^([\w.-]+):", (tree / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(_CODE.findall(text) + re.findall(r"^ {4}\S.*$", text, re.MULTILINE))
    made = set(re.findall(r"\bmake ([a-z][\w-]*)", code))
    modules = set(re.findall(r"python -m ([\w.]+)", code)) - {"pytest"}
    absent = {module for module in modules if not _is_module(module, tree)}
    return {f"make {target}" for target in made - targets} | {f"python -m {m}" for m in absent}


def _is_module(name: str, tree: Path) -> bool:
    path = tree / name.replace(".", "/")
    return (path / "__main__.py").exists() or path.with_suffix(".py").exists()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_that_a_page_names_exists(page):
    assert missing_commands(page.read_text(), ROOT) == set()


def test_a_command_that_is_not_there_is_found(tmp_path):
    (tmp_path / "Makefile").write_text("test: x\n\tpytest\n")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").touch()
    text = "`make test`, `make tests`, to make sense, `python -m benchmarks step`\n\n"
    text += "    python -m bench\n"
    assert missing_commands(text, tmp_path) == {"make tests", "python -m bench"}


def variables_of(tree: Path) -> set[str]:
    """Of the environment, named anywhere in the sources."""
    sources = [tree / "setup.py", *(tree / "lora_kernels").rglob("*.py")]
    return {
        name
        for source in sources
        if source.exists()
        for name in re.findall(r"\bLORA_KERNELS_[A-Z_]+[A-Z]\b", source.read_text())
    }


def test_every_variable_is_explained(tmp_path):
    explained = set(
        re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/build.md").read_text(), re.MULTILINE)
    )
    assert variables_of(ROOT) <= explained
    (tmp_path / "setup.py").write_text("os.environ.get('LORA_KERNELS_PLANTED')\n")
    assert not variables_of(tmp_path) <= explained


# ---- where pages point


_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors_of(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


def broken_links(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    broken = set()
    for link in _LINK.findall(text):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            broken.add(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_leads_somewhere(page):
    assert broken_links(page) == set()


def test_a_broken_link_is_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# A title, with `code`\n")
    page.write_text(
        "# Here\n[a](other.md) [b](other.md#a-title-with-code) [c](#here) [d](https://x.org/)\n"
        "[e](gone.md) [f](other.md#gone) [g](#gone)\n"
    )
    assert broken_links(page) == {"gone.md", "other.md#gone", "#gone"}


def test_the_site_shows_every_page():
    listed = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1])
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[2:]]
    assert sorted(listed) == sorted(pages)


# ---- the reference


def documented() -> list[str]:
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    return re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)


def test_everything_public_has_its_place_in_the_reference():
    public = {f"lora_kernels.{name}" for name in lora_kernels.__all__} - {
        "lora_kernels.__version__"
    }
    assert public <= set(documented())


@pytest.fixture(scope="module")
def package():
    """The package as the site reads it."""
    griffe = pytest.importorskip("griffe")
    pytest.importorskip("matplotlib")
    extensions = griffe.load_extensions(str(ROOT / "docs" / "docstrings.py"))
    options = {"warnings": False, "returns_named_value": False, "returns_multiple_items": False}
    return griffe.load(
        "lora_kernels",
        search_paths=[str(ROOT)],
        extensions=extensions,
        docstring_parser="google",
        docstring_options=options,
    )


# Constructors whose docstrings have entries for what is new, and prose for the rest.
IN_PROSE = {"from_tokens", "from_sequences", "from_segments"}


def methods_of(target) -> list:
    own = [each for each in target.members.values() if each.is_function and not each.is_alias]
    return [each for each in own if not each.name.startswith("_") and each.docstring]


def described_parameters(target) -> set[str]:
    sections = [each for each in target.docstring.parsed if each.kind.value == "parameters"]
    return {name for each in sections for entry in each.value for name in entry.name.split(", ")}


def missing_parameters(target) -> set[str]:
    """Parameters that the docstring's list leaves out, where it has one."""
    variadic = ("variadic positional", "variadic keyword")
    names = {each.name for each in target.parameters if each.kind.value not in variadic}
    described = described_parameters(target)
    if not described or target.name in IN_PROSE:
        return set()
    return names - described - {"self", "cls"}


@pytest.mark.parametrize("path", documented())
def test_a_docstring_is_read_whole(package, path):
    """No role or formula of Sphinx's is left, and a list of parameters has all of them."""
    target = package[path.removeprefix("lora_kernels.")]
    target = target.final_target if target.is_alias else target
    assert target.docstring, path
    methods = [] if target.is_function else methods_of(target)
    for each in (target, *methods):
        assert not re.search(r":(func|class|meth|mod|attr):`|\.\. math::", each.docstring.value)
        assert missing_parameters(each) == set(), each.path


def test_a_formula_is_drawn_and_a_name_linked(package):
    text = package["ops.linear.lora_linear"].docstring.value
    assert "<svg" in text and "diag" in text
    assert '<autoref optional identifier="lora_kernels.base_weights.base.BaseWeight">' in text or (
        'identifier="lora_kernels.base_weights.BaseWeight">' in text
    )


def test_every_class_of_peft_is_in_the_table():
    """Read, not imported: some are defined only where a library is installed."""
    pytest.importorskip("peft")
    from peft.tuners import lora

    source = "\n".join(path.read_text() for path in Path(lora.__file__).parent.glob("*.py"))
    names = re.findall(r"^ *class ([A-Z]\w*)\(.*\b(?:LoraLayer|_ConvNd)\)", source, re.MULTILINE)
    names += re.findall(r"^class ([A-Z]\w*Variant)\(", source, re.MULTILINE)
    table = (ROOT / "docs" / "peft.md").read_text()
    assert len(names) > 25 and {name for name in names if f"`{name}`" not in table} == set()


# ---- code


_SNIPPET = re.compile(r"(?:<!-- given: ([\w, ]+) -->\n)?```python\n(.*?)```", re.DOTALL)


def snippets(text: str) -> list[tuple[list[str], str]]:
    """What each takes for granted, and its code behind as many lines as stand before it."""
    found = []
    for match in _SNIPPET.finditer(text):
        given = match[1].split(", ") if match[1] else []
        found.append((given, "\n" * text[: match.start(2)].count("\n") + match[2]))
    return found


def run_page(page: Path) -> dict:
    namespace: dict = {}
    for given, code in snippets(page.read_text()):
        for name in given:
            GIVEN[name](namespace)
        exec(compile(code, str(page), "exec"), namespace)
    return namespace


def llama(namespace: dict) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=None,
        pad_token_id=0,
    )
    namespace["model"] = transformers.LlamaForCausalLM(config)


def peft_model(namespace: dict) -> None:
    peft = pytest.importorskip("peft")
    llama(namespace)
    config = peft.LoraConfig(target_modules="all-linear")
    namespace["peft_model"] = peft.get_peft_model(namespace["model"], config)


def trainer(namespace: dict) -> None:
    def train() -> None:
        model = namespace.get("peft_model", namespace["model"])
        tokens = torch.randint(61, (2, 7))
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert any(parameter.grad is not None for parameter in model.parameters())

    namespace["trainer"] = SimpleNamespace(train=train)


def module(namespace: dict) -> None:
    model = nn.Module()
    model.proj, model.forward = nn.Linear(23, 19), lambda x: model.proj(x)
    namespace["model"], namespace["x"] = model, torch.randn(5, 23)


def prompts(namespace: dict) -> None:
    for name, rows in (("two_prompts", 2), ("three_prompts", 3)):
        tokens = torch.randint(1, 61, (rows, 5))
        mask = torch.ones_like(tokens)
        namespace[name] = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": 3}
    tokens = torch.randint(1, 61, (3, 9))
    namespace["three_texts"] = {"input_ids": tokens, "labels": tokens}


def files(namespace: dict) -> None:
    peft = pytest.importorskip("peft")
    made: dict = {}
    llama(made)
    for name in ("sql", "law-2"):
        config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(copy.deepcopy(made["model"]), config)
        adapted.save_pretrained(f"adapters/{name}")


def tensors(namespace: dict) -> None:
    a, b = torch.randn(3, 23, requires_grad=True), torch.randn(19, 3, requires_grad=True)
    operands = {"x": torch.randn(5, 23), "weight": torch.randn(19, 23), "lora_a": a, "lora_b": b}
    namespace.update(operands, scaling=2.0, bias=torch.randn(19))


def qkv(namespace: dict) -> None:
    def made(*shape: int):
        return torch.randn(shape, dtype=torch.bfloat16)

    factors = {
        "a_q": made(4, 4096),
        "a_k": made(2, 4096),
        "b_q": made(4096, 4),
        "b_k": made(1024, 2),
    }
    ids, others = torch.tensor([0, -1, 0]), torch.tensor([-1, -1, 0])
    namespace.update(factors, x=made(3, 4096), w_qkv=made(6144, 4096), ids=ids, other_ids=others)


GIVEN = {
    "llama": llama,
    "peft": peft_model,
    "trainer": trainer,
    "module": module,
    "prompts": prompts,
    "files": files,
    "tensors": tensors,
    "qkv": qkv,
}
WITH_CODE = [page for page in PAGES if snippets(page.read_text())]


def test_pages_have_code():
    assert sum(len(snippets(page.read_text())) for page in WITH_CODE) >= 10


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_code_that_does_not_run_is_found_with_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\na = 1\n```\n\n<!-- given: tensors -->\n```python\nx\na, b\n```\n"
    )
    with pytest.raises(NameError) as caught:
        run_page(page)
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 10)


def test_the_uses_of_the_readme_are_short():
    for _, code in snippets((ROOT / "README.md").read_text()):
        assert len(code.strip().splitlines()) <= 7 and len(re.findall(r"\S.*", code)) <= 6
