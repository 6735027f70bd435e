"""How the package is built: who imports whom, how often arguments are listed, how deep calls go.

``benchmarks/house.py`` counts; it reads the sources, imports inside functions too.
"""

import ast
import importlib.util
from pathlib import Path

import pytest

import lora_kernels
from lora_kernels import old_paths
from lora_kernels.runtime import cpu_extension

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("house", ROOT / "benchmarks" / "house.py")
house = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(house)

PACKAGE = "lora_kernels"
MODULES = house.modules_of(ROOT)
# The one import against the direction: a bank's load and save, when they are called.
EXCEPTION = (f"{PACKAGE}.ops.routed.bank.bank", f"{PACKAGE}.files.adapters")
LOW = {"base_weights", "adapters", "runtime", "version"}
SHARED = "narrow"  # what operations share


def written(tmp_path: Path, sources: dict[str, str]) -> Path:
    """A tree with the package's directories, and these sources instead of its own."""
    for name, source in sources.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path


# ---- imports


def level(module: str) -> int:
    """0 for what operations stand on, 1 for operations, 2 for all that stands on them."""
    room = module.split(".")[1] if "." in module else ""
    return 0 if room in LOW else 1 if room == "ops" else 2


def operation(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if len(parts) > 2 and parts[1] == "ops" else None


def against_the_direction(edges) -> set[tuple[str, str]]:
    """Imports of a higher level, and of another operation's folder."""
    return {
        (importer, imported)
        for importer, imported in edges
        if level(imported) > level(importer)
        or (
            operation(importer) is not None
            and operation(imported) not in (None, SHARED, operation(importer))
        )
    }


def test_imports_run_one_way():
    assert against_the_direction(house.import_edges(MODULES)) == {EXCEPTION}


def test_the_exception_is_imported_when_it_is_called():
    """A bank is made, trained and pickled without the code for files."""
    assert house.import_edges(MODULES)[EXCEPTION]


@pytest.mark.parametrize(
    ("module", "source", "imported"),
    [
        (
            "runtime/plan.py",
            "def f():\n    from lora_kernels.ops.linear import op\n",
            "ops.linear.op",
        ),
        ("adapters/factors.py", "import lora_kernels.nn.base_call\n", "nn.base_call"),
        ("ops/linear/op.py", "from lora_kernels.files import adapters\n", "files.adapters"),
        ("ops/norm/op.py", "from lora_kernels.ops.linear import op\n", "ops.linear.op"),
        ("ops/narrow/products.py", "from ..linear import op\n", "ops.linear.op"),
    ],
    ids=lambda value: value.split("\n")[0],
)
def test_an_import_against_the_direction_is_found(tmp_path, module, source, imported):
    others = dict.fromkeys(["ops/linear/op.py", "nn/base_call.py", "files/adapters.py"], "")
    tree = written(tmp_path, {**others, module: source})
    importer = f"{PACKAGE}.{module.removesuffix('.py').replace('/', '.')}"
    found = against_the_direction(house.import_edges(house.modules_of(tree)))
    assert found == {(importer, f"{PACKAGE}.{imported}")}


def test_what_operations_share_may_be_imported(tmp_path):
    sources = {
        "ops/narrow/products.py": "from lora_kernels.runtime import plan\n",
        "ops/linear/op.py": "from lora_kernels.ops.narrow import products\n",
        "nn/lora_linear.py": "from lora_kernels.ops.linear import op\n",
        "runtime/plan.py": "",
    }
    edges = house.import_edges(house.modules_of(written(tmp_path, sources)))
    assert len(edges) == 3 and not against_the_direction(edges)


def test_no_circles():
    counted = house.count_imports(MODULES)
    assert counted["circles"] == []
    assert counted["left out"] == [" -> ".join(EXCEPTION)]


def test_a_circle_is_found(tmp_path):
    sources = {
        "nn/a.py": "from lora_kernels.nn import b\n",
        "nn/b.py": "def f():\n    from lora_kernels.nn.a import g\n",
    }
    counted = house.count_imports(house.modules_of(written(tmp_path, sources)))
    assert counted["circles"] == [[f"{PACKAGE}.nn.a", f"{PACKAGE}.nn.b"]]


# ---- names


def shadowing(modules: dict[str, Path]) -> list[str]:
    """Modules that bear the name of something that their package exports: importing one puts it
    in the other's place."""
    found = []
    for package, path in modules.items():
        if path.name != "__init__.py":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names = ast.literal_eval(node.value)
                found += [f"{package}.{name}" for name in names if f"{package}.{name}" in modules]
    return found


def test_no_module_bears_the_name_of_something_public():
    assert shadowing(MODULES) == []
    moved = {old.split(".")[0] for old in old_paths._MOVED}
    assert not moved & {*lora_kernels.__all__}


def test_a_module_that_shadows_is_found(tmp_path):
    sources = {"__init__.py": "def tune(): ...\n__all__ = ['route', 'tune']\n", "tune.py": ""}
    tree = written(tmp_path, {**sources, "bench/route.py": "", "bench/__init__.py": ""})
    assert shadowing(house.modules_of(tree)) == [f"{PACKAGE}.tune"]


# ---- arguments


def test_the_operands_are_one_value():
    """``weight, lora_a, lora_b, scaling`` were written out 89 times before they were."""
    assert house.count_sequence(ROOT, MODULES)["all"] <= 25


def test_a_list_of_operands_is_counted(tmp_path):
    source = "def f(x, weight, lora_a, lora_b, scaling):\n    g(weight, lora_a, lora_b, scaling)\n"
    tree = written(tmp_path, {"nn/a.py": source})
    assert house.count_sequence(tree, house.modules_of(tree))["all"] == 2


# ---- calls


@pytest.fixture(scope="module")
def calls() -> dict:
    return {}


@pytest.mark.parametrize(
    ("backend", "case", "most"),
    [
        ("native", "lora_linear, native, fp32", 14),
        ("native", "lora_linear, native, bf16, tensor", 14),
        ("native", "LoRALinear", 16),
        ("native", "PEFT, accelerated", 18),
        ("native", "routed_lora_linear, native", 45),
        ("triton", "lora_linear, triton, fp32", 50),
    ],
    ids=lambda value: value if isinstance(value, str) and "," in value else None,
)
def test_calls_between_a_function_and_its_kernel(calls, backend, case, most, monkeypatch):
    """Python calls inside the package, on the second call of each."""
    if backend == "native":
        pytest.importorskip("peft")
        if cpu_extension.missing():
            pytest.skip("the compiled kernels are not built")
        monkeypatch.setenv("LORA_KERNELS_BACKEND", "native")  # also where auto takes another
    else:
        pytest.importorskip("triton")
    if backend not in calls:
        calls[backend] = house.count_calls(ROOT, [backend])
    frames = calls[backend][case]["forward"]
    assert len(frames) <= most, "\n".join(frames)
