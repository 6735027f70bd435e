"""Counts on a source tree: import circles, repeated arguments, calls between the layers, lines.

    python benchmarks/house.py [TREE] [--out counts.json]

TREE is a checkout with the compiled extension beside the package, by default this one. Prints a
table, then the same as one line of JSON.

Imports are those of all modules, inside functions too; not those under ``if TYPE_CHECKING``.
``from package import name`` is an import of the submodule of that name if there is one, else of the
package's ``__init__``; that Python imports a module's parents with it does not count. The module
of ``AdapterBank`` may import the files of adapters inside a function: that edge is left out, and
named.

The sequence is weight, A, B and scaling as neighbouring elements of one bracket or one statement.
``weight``, ``weight: Tensor``, ``weight=weight``, ``layer.weight``, ``weight.detach()`` and
``constant(scaling)`` are such elements, arithmetic is none. A is ``lora_a`` or ``a``, B ``lora_b``
or ``b``, with any underscores before it. Comments, line breaks and docstrings do not count.

A call is a Python frame whose code is in the package, on the second call of a public function, from
there down to the kernel; a generator is one, however often it goes on. Frames of a ``@triton.jit``
function, and below it, are the kernel's.

Lines are those of Python outside of directories named in ``APART``; those of code have something
other than a comment or a docstring.
"""

import argparse
import ast
import functools
import inspect
import io
import json
import keyword
import os
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PACKAGE = "lora_kernels"
APART = {"bench", "testing", "measuring", "tuned", "tuning"}
SEQUENCE = ({"weight"}, {"lora_a", "a"}, {"lora_b", "b"}, {"scaling"})
WORDLESS = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT}


def modules_of(tree: Path) -> dict[str, Path]:
    """The package's modules by name."""
    found = {}
    for path in sorted((tree / PACKAGE).rglob("*.py")):
        parts = path.relative_to(tree).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """What imports below a node, and whether inside a function."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        below = node.orelse
    else:
        below = ast.iter_child_nodes(node)
    lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for child in below:
        if isinstance(child, (ast.Import, ast.ImportFrom)) or _is_import_module(child):
            yield child, lazy
        yield from imports(child, lazy)


def _is_import_module(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("import_module")
        and len(node.args) > 0
        and isinstance(node.args[0], ast.Constant)
    )


def imported(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """The dotted names that one statement of ``module`` may import."""
    if isinstance(node, ast.Call):
        yield node.args[0].value
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    else:
        base = node.module or ""
        if node.level:
            parents = module.split(".")
            parents = parents[: len(parents) - node.level + is_package]
            base = ".".join([*parents, base]).rstrip(".")
        yield from (f"{base}.{alias.name}" for alias in node.names)


def import_edges(modules: dict[str, Path]) -> dict[tuple[str, str], bool]:
    """``(importer, imported)``, and whether every such import is inside a function."""
    edges: dict[tuple[str, str], bool] = {}
    for module, path in modules.items():
        for node, lazy in imports(ast.parse(path.read_text())):
            for name in imported(node, module, path.name == "__init__.py"):
                if name not in modules and isinstance(node, ast.ImportFrom):
                    name = name.rpartition(".")[0]
                if name in modules and name != module:
                    edges[module, name] = edges.get((module, name), True) and lazy
    return edges


def circles(edges: dict[tuple[str, str], bool]) -> list[list[str]]:
    """The strongly connected components of more than one module."""
    targets: dict[str, set[str]] = {}
    for source, target in edges:
        targets.setdefault(source, set()).add(target)

    def reached_from(start: str) -> set[str]:
        found, waiting = set(), [start]
        while waiting:
            new = targets.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    reached = {module: reached_from(module) for module in targets}
    found = {
        tuple(sorted(other for other in reached[module] if module in reached.get(other, ())))
        for module in targets
        if module in reached[module]
    }
    return [list(circle) for circle in sorted(found)]


def count_imports(modules: dict[str, Path]) -> dict:
    edges = import_edges(modules)
    bank = [name for name, path in modules.items() if "\nclass AdapterBank(" in path.read_text()]
    allowed = [
        edge for edge, lazy in edges.items() if lazy and edge[0] in bank and "files" in edge[1]
    ]
    kept = {edge: lazy for edge, lazy in edges.items() if edge not in allowed}
    found = circles(kept)
    return {
        "circles": found,
        "circles with what is left out": circles(edges),
        "imports inside functions": [
            [" -> ".join(edge) for edge, lazy in kept.items() if lazy and {*edge} <= {*circle}]
            for circle in found
        ],
        "left out": [" -> ".join(edge) for edge in allowed],
        "modules": len(modules),
    }


def elements(source: str) -> Iterator[list[list[str]]]:
    """For each bracket and each statement the elements between its commas, as words."""
    open_lists: list[list[list[str]]] = [[[]]]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        word, last = token.string, open_lists[-1]
        if token.type == tokenize.NEWLINE:
            yield last
            open_lists[-1] = [[]]
        elif token.type in WORDLESS:
            continue
        elif token.type == tokenize.OP and word in "([{":
            last[-1].append(word)
            open_lists.append([[]])
        elif token.type == tokenize.OP and word in ")]}":
            inner = open_lists.pop()
            yield inner
            open_lists[-1][-1] += [*(w for element in inner for w in element), word]
        elif word == ",":
            last.append([])
        else:
            last[-1].append(word)


def names(element: list[str], words: set[str]) -> bool:
    """Whether an element, or a side of ``=`` or ``:`` in it, is one of the words or leads to it."""
    sides = [[]]
    for word in element:
        if word in ("=", ":", "return"):
            sides.append([])
        else:
            sides[-1].append(word)
    return any(
        all(word in ".()" or (word.isidentifier() and not keyword.iskeyword(word)) for word in side)
        and any(word.lstrip("_") in words for word in side)
        for side in sides
    )


def count_sequence(tree: Path, modules: dict[str, Path]) -> dict:
    found: Counter[str] = Counter()
    for path in modules.values():
        for listed in elements(path.read_text()):
            listed = [element for element in listed if element != ["*"]]
            for start in range(len(listed) - len(SEQUENCE) + 1):
                if all(names(listed[start + i], words) for i, words in enumerate(SEQUENCE)):
                    found[str(path.relative_to(tree / PACKAGE))] += 1
    apart = sum(count for path, count in found.items() if APART & {*Path(path).parts})
    return {
        "all": found.total(),
        f"outside {'/, '.join(sorted(APART))}/": found.total() - apart,
        "by file": dict(found.most_common()),
    }


def lines_of_code(source: str) -> int:
    """Lines that hold something other than a comment or a docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in {*WORDLESS, tokenize.NEWLINE, tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        if ast.get_docstring(node) is not None:
            lines -= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return len(lines)


def count_lines(tree: Path, modules: dict[str, Path]) -> dict:
    counts = {"package": [0, 0, 0], "ops": [0, 0, 0]}
    for path in modules.values():
        parts = path.relative_to(tree / PACKAGE).parts
        if APART & {*parts}:
            continue
        source = path.read_text()
        for name in ("package", "ops") if parts[0] == "ops" else ("package",):
            own = source.count("\n"), lines_of_code(source), 1
            counts[name] = [sum(pair) for pair in zip(counts[name], own, strict=True)]
    return {
        name: dict(zip(("lines", "code", "files"), found, strict=True))
        for name, found in counts.items()
    }


def frames_of(package: Path, kernels: set[tuple[str, str]], function: Callable) -> list[str]:
    """The package's frames during a call, those of kernels and below them aside."""
    found, generators, kernel = [], [], None

    def follow(frame, event, _):
        nonlocal kernel
        code = frame.f_code
        if event == "return" and frame is kernel:
            kernel = None
        if event != "call" or kernel is not None or not code.co_filename.startswith(str(package)):
            return
        if (code.co_filename, code.co_name) in kernels:
            kernel = frame
        elif frame not in generators:  # one that goes on is not called again
            if code.co_flags & inspect.CO_GENERATOR:
                generators.append(frame)
            found.append(f"{Path(code.co_filename).relative_to(package)}:{code.co_name}")

    sys.setprofile(follow)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def kernels_of(package: Path) -> set[tuple[str, str]]:
    """The functions that Triton compiles, as (file, name)."""
    return {
        (str(path), node.name)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def cases(backend: str) -> dict[str, Callable]:
    """Forward calls of public functions by name; small, as only the host's side counts."""
    import torch
    from torch import nn

    from lora_kernels import AdapterBank, Routing, explain, lora_linear, routed_lora_linear

    def drawn(*shape: int, dtype=torch.float32, trains=True):
        return torch.randn(*shape, dtype=dtype).requires_grad_(trains)

    def named(dtype=torch.float32) -> dict:
        """Nothing where auto takes this backend: a name asks more questions."""
        probe = drawn(1, 1, dtype=dtype)
        auto = explain(probe, None, probe, probe).backend == backend
        return {} if auto else {"backend": backend}

    def function(dtype, scaling, **options):
        x, a, b = (drawn(*shape, dtype=dtype) for shape in ((4, 32), (4, 32), (16, 4)))
        weight = drawn(16, 32, dtype=dtype, trains=False)
        options |= named(dtype)
        return lambda: lora_linear(x, weight, a, b, scaling, **options)

    def routed(trains: bool):
        bank = AdapterBank(32, 16)
        for index in range(16):
            bank.add(f"n{index}", drawn(4, 32), drawn(16, 4), 0.5)
        routing = Routing.from_sequences(list(bank), 4, bank)
        x, weight = drawn(64, 32, trains=trains), drawn(16, 32, trains=False)
        options = named()

        def call():
            with torch.set_grad_enabled(trains):
                return routed_lora_linear(x, weight, bank, routing, **options)

        return call

    fp32, bf16, tensor = torch.float32, torch.bfloat16, torch.tensor(0.5)
    made = {
        f"lora_linear, {backend}, fp32": function(fp32, 0.5),
        f"lora_linear, {backend}, fp32, dropout": function(fp32, 0.5, dropout_p=0.1),
        f"routed_lora_linear, {backend}": routed(trains=True),
        f"routed_lora_linear, {backend}, inference": routed(trains=False),
    }
    if backend == "triton":
        return made
    made |= {
        f"lora_linear, {backend}, fp32, tensor": function(fp32, tensor),
        f"lora_linear, {backend}, bf16": function(bf16, 0.5),
        f"lora_linear, {backend}, bf16, tensor": function(bf16, tensor),
    }
    if backend != "native":
        return made
    import peft

    from lora_kernels import LoRALinear, accelerate

    def module(dropout_p: float):
        layer = LoRALinear(32, 16, rank=4, alpha=8, dropout_p=dropout_p)
        return lambda: layer(drawn(4, 32))

    def accelerated(dropout_p: float):
        config = peft.LoraConfig(r=4, target_modules=["q"], lora_dropout=dropout_p)
        model = peft.get_peft_model(nn.ModuleDict({"q": nn.Linear(32, 16)}), config)
        accelerate(model)
        layer = model.base_model.model["q"]
        return lambda: layer(drawn(4, 32))

    for name, layer in (("LoRALinear", module), ("PEFT, accelerated", accelerated)):
        made |= {name: layer(0.0), f"{name}, dropout": layer(0.1)}
    return made


def count_calls_here(backend: str) -> dict:
    """Frames by case, forward and backward apart, in this process."""
    import torch

    import lora_kernels

    package = Path(lora_kernels.__file__).parent
    kernels = kernels_of(package)
    counts = {}
    for name, forward in cases(backend).items():
        for _ in range(2):
            y = None

            def call(forward=forward):
                nonlocal y
                y = forward()

            found = {"forward": frames_of(package, kernels, call)}
            if y.requires_grad:
                backward = functools.partial(y.backward, torch.ones_like(y))
                found["backward"] = frames_of(package, kernels, backward)
        counts[name] = found
    return counts


def count_calls(tree: Path, backends: Sequence[str] = ("native", "composed", "triton")) -> dict:
    """Frames by case, forward and backward apart, in a process for each backend."""
    counts = {}
    for backend in backends:
        interpreter = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
        worker = subprocess.run(
            [sys.executable, os.path.abspath(__file__), "--worker", backend],
            capture_output=True, text=True, cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), **interpreter},
        )  # fmt: skip
        if worker.returncode:
            raise SystemExit(worker.stderr)
        counts.update(json.loads(worker.stdout.splitlines()[-1]))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--out", type=Path, help="write the JSON there, with the frames' names")
    arguments = parser.parse_args()
    tree = arguments.tree.resolve()
    modules = modules_of(tree)
    frames = count_calls(tree)
    counts = {
        "imports": count_imports(modules),
        "weight, A, B, scaling": count_sequence(tree, modules),
        "calls": {
            name: {direction: len(found) for direction, found in each.items()}
            for name, each in frames.items()
        },
        "lines": count_lines(tree, modules),
    }
    imports = counts["imports"]
    print(f"import circles among {imports['modules']} modules: {len(imports['circles'])}")
    for circle in imports["circles"]:
        print("   ", ", ".join(circle))
    for edge in imports["left out"]:
        print(f"    left out: {edge}")
    print("    with what is left out:", len(imports["circles with what is left out"]))
    *sums, by_file = counts["weight, A, B, scaling"].items()
    print("weight, A, B, scaling:", ", ".join(f"{count} {where}" for where, count in sums))
    for path, count in by_file[1].items():
        print(f"    {count:3} {path}")
    print(f"{'calls':48} forward  backward")
    for name, each in counts["calls"].items():
        print(f"    {name:44} {each['forward']:7}  {each.get('backward', ''):>8}")
    for name, found in counts["lines"].items():
        print(f"{name}: {found['lines']} lines, {found['code']} of code, in {found['files']} files")
    print(json.dumps(counts))
    if arguments.out:
        arguments.out.write_text(json.dumps({**counts, "frames": frames}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(count_calls_here(sys.argv[2])))
    else:
        main()
