"""Docstrings on the site: Google's sections with Sphinx's roles and formulas, made Markdown.

mkdocstrings reads the sections as they are. What it does not know is rewritten before it looks:
``:func:`name` `` becomes a link, ``.. math::`` a drawing that needs no script, ``::`` a colon.
"""

import io
import re

import griffe
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image

_PUBLIC = "lora_kernels"
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`([^`]+)`")
_FORMULA = re.compile(r"^( *)\.\. math::\n((?:\1 +\S.*\n?)+)", re.MULTILINE)
_LITERAL_BLOCK = re.compile(r"::$", re.MULTILINE)
# What stands before a colon would be taken for the type of what is returned.
_RETURNED = re.compile(r"^( *Returns:\n +[^\n]*?):(?= )", re.MULTILINE)


class SphinxToMarkdown(griffe.Extension):
    """Rewrites the docstrings of a package when all of it is known, so that names resolve."""

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        _rewrite(pkg, set())


def _rewrite(where: griffe.Object, seen: set[str]) -> None:
    if where.path in seen:
        return
    seen.add(where.path)
    if where.docstring is not None:
        where.docstring.value = markdown(where.docstring.value, where)
    for member in where.members.values():
        if not member.is_alias:
            _rewrite(member, seen)


def markdown(text: str, where: griffe.Object) -> str:
    text = _FORMULA.sub(lambda found: f"{found[1]}{drawing(' '.join(found[2].split()))}\n", text)
    text = _LITERAL_BLOCK.sub(":", text)
    text = _RETURNED.sub(r"\1 -", text)
    return _ROLE.sub(lambda found: _link(found[1], where), text)


def _link(name: str, where: griffe.Object) -> str:
    """A link where the name has a page; elsewhere the name alone."""
    first, dot, rest = name.partition(".")
    scope = where
    while scope is not None and not scope.is_module and first not in scope.members:
        scope = scope.parent
    try:
        path = scope.resolve(first)
    except griffe.NameResolutionError:
        path = f"{_PUBLIC}.{first}" if first != _PUBLIC else first
    return f'<autoref optional identifier="{path}{dot}{rest}"><code>{name}</code></autoref>'


def drawing(formula: str) -> str:
    """The formula as SVG in the colour of the text around it."""
    drawn = io.BytesIO()
    math_to_image(f"${formula}$", drawn, format="svg", prop=FontProperties(size=12))
    svg = drawn.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)  # the paper
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{formula.replace("<", "&lt;")}" ', 1)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    return f'<div class="formula" style="fill: currentColor">{" ".join(svg.split())}</div>'
