"""Regular expressions of a config that somebody else wrote, matched as by re and in bounded time.

A match by re takes time exponential in the pattern in the worst case, and no other thread runs
meanwhile. So re matches only what has few ways to try. Anything else needs the package regex, which
stops after a given time and lets other threads run.
"""

import functools
import math
import re
import time
from collections.abc import Iterable

SECONDS = 2.0
_LONGEST = 50_000  # characters of a pattern
_MOST_WAYS = 100_000  # that re may have to try, a few milliseconds
_LARGEST_PROGRAM = 1 << 18  # regex compiles what is in n groups up to 2^n times

# An atom, or a group, alternation or quantifier around atoms; a backreference, a look-around, a
# flag and whatever else there is are none of them.
_TOKEN = re.compile(
    r"(?P<atom>\\[^1-9N]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\\[(){}*+?|])"
    r"|(?P<open>\((?!\?)|\(\?:|\(\?P<\w+>)"
    r"|(?P<close>\))"
    r"|(?P<branch>\|)"
    r"|(?P<quantifier>[*+?]|\{(?P<least>\d*),(?P<most>\d*)\}|\{(?P<times>\d+)\})[?+]?",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\.", re.DOTALL)
# Valid for both packages, and of another meaning to regex: named classes and fuzzy matches.
_OTHER_TO_REGEX = re.compile(r"\[[:.=]|\{(?!(?:\d+|\d*,\d*)\})")
_IGNORES_CASE = re.compile(r"\(\?[a-zA-Z]*i")
_PLAIN = re.compile(r"(?P<start>\^?)(?P<text>(?:[\w-]|\\[^\w\s])+)", re.ASCII)


class Allowance:
    """The time that one question about a config may take in its patterns.

    Args:
        where: the file, or the argument, that the patterns are from.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._end = time.thread_time() + SECONDS  # a busy machine takes nothing of it

    def left(self, what: str, pattern: str) -> float:
        """Seconds that are left; a ValueError that names the pattern if none are."""
        left = self._end - time.thread_time()
        if left <= 0:
            raise ValueError(
                f"{self.where}: {what}: it takes more than {SECONDS:g} s to match {short(pattern)} "
                "and the patterns before it"
            )
        return left


def compiled(regex: str, what: str, pattern: str, allowance: Allowance) -> re.Pattern:
    """What re makes of ``regex``, of which ``pattern`` is the part that stands in the config.

    Raises:
        ValueError: it is no regular expression, or a very long one.
    """
    allowance.left(what, pattern)
    where = f"{allowance.where}: {what}"
    most = _LONGEST if pattern.isascii() else _LONGEST // 10  # classes of others take re longer
    if len(pattern) > most:
        raise ValueError(
            f"{where}: expected at most {most} characters, got {len(pattern)}: {short(pattern)}"
        )
    # Takes re long, as it looks at every character of a range, and means other letters to regex.
    if _IGNORES_CASE.search(regex) and not (regex.isascii() and not re.search(r"\\[uUN]", regex)):
        raise ValueError(f"{where}: expected ASCII where case is ignored, got {short(pattern)}")
    try:
        return re.compile(regex)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: {short(pattern)} is no regular expression: {error}") from None


def match(
    regex: str, name: str, what: str, pattern: str, allowance: Allowance, method: str = "match"
):
    """``re.match(regex, name)``, or an equal match of the package regex, or None.

    Args:
        method: "match", or "fullmatch" for ``re.fullmatch``.

    Raises:
        ValueError: as :func:`compiled`; or the match takes too long, or needs the package regex and
            that is not installed or would understand something else.
    """
    quick = compiled(regex, what, pattern, allowance)
    ways, repeats = _cost(regex)
    if ways * (len(name) + 1) ** repeats <= _MOST_WAYS:
        return getattr(quick, method)(name)
    where = f"{allowance.where}: {what}: {short(pattern)}"
    try:
        import regex as library
    except ImportError:
        raise ValueError(
            f"{where} can take re a very long time to match; with the package regex it is matched "
            "in bounded time: pip install regex"
        ) from None
    bare = _ESCAPE.sub("", regex)
    large = len(regex) << _depth(bare) > _LARGEST_PROGRAM
    if large or "\\N" in regex or _OTHER_TO_REGEX.search(bare):
        raise ValueError(f"{where} cannot be matched in bounded time: expected a simpler pattern")
    try:
        limited = library.compile(regex, library.V0)
        return getattr(limited, method)(name, timeout=allowance.left(what, pattern))
    except TimeoutError:
        raise ValueError(f"{where} takes more than {SECONDS:g} s to match {short(name)}") from None
    except (library.error, RecursionError, MemoryError) as error:
        raise ValueError(f"{where} cannot be matched in bounded time: {error}") from None


class EndPatterns:
    """Patterns for ends of modules' names, in their order, as ``rank_pattern`` has them for PEFT.

    A pattern without special characters is looked up, so that there may be one for every module.
    """

    def __init__(self, patterns: Iterable[str], what: str, allowance: Allowance) -> None:
        self._patterns, self._what, self._allowance = list(patterns), what, allowance
        # Plain patterns by what they match: a whole name, or the end of one after a dot.
        self._whole: dict[str, list[int]] = {}
        self._ends: dict[str, list[int]] = {}
        self._others = []
        for place, pattern in enumerate(self._patterns):
            if plain := _PLAIN.fullmatch(pattern):
                texts = self._whole if plain["start"] else self._ends
                texts.setdefault(re.sub(r"\\(.)", r"\1", plain["text"]), []).append(place)
            else:
                compiled(_at_end(pattern), what, pattern, allowance)
                self._others.append(place)

    def first(self, module: str) -> str | None:
        """The first pattern that matches the end of the module's name."""
        if "\n" in module:  # which a dot does not match, and $ may stand before
            places = filter(lambda place: self._matches(place, module), range(len(self._patterns)))
            return next((self._patterns[place] for place in places), None)
        plain = [self._ends[end][0] for end in ends(module) if end in self._ends]
        best = min([*plain, *self._whole.get(module, [])[:1]], default=len(self._patterns))
        earlier = (place for place in self._others if place < best)
        best = next((place for place in earlier if self._matches(place, module)), best)
        return self._patterns[best] if best < len(self._patterns) else None

    def idle(self, modules: Iterable[str]) -> list[str]:
        """The patterns that match none of the modules."""
        modules = list(modules)
        odd = [module for module in modules if "\n" in module]  # as in first
        plain = [module for module in modules if "\n" not in module]
        known = {end for module in plain for end in ends(module)}
        used = {place for text in known & self._ends.keys() for place in self._ends[text]}
        for name in self._whole.keys() & set(plain):
            used.update(self._whole[name])
        used.update(place for place in self._others if self._matches_any(place, plain))
        used.update(place for place in range(len(self._patterns)) if self._matches_any(place, odd))
        return [pattern for place, pattern in enumerate(self._patterns) if place not in used]

    def _matches_any(self, place: int, modules: Iterable[str]) -> bool:
        return any(self._matches(place, module) for module in modules)

    def _matches(self, place: int, module: str) -> bool:
        pattern = self._patterns[place]
        found = match(_at_end(pattern), module, self._what, pattern, self._allowance)
        return found is not None


def ends(module: str) -> list[str]:
    """The name, and what is left of it after each of its dots."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _at_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


# --- what a match may take --------------------------------------------------------------------


@functools.lru_cache(512)
def _cost(regex: str) -> tuple[float, int]:
    """(ways, repeats): re tries at most ``ways * (length of the name + 1) ** repeats`` ways.

    Every unbounded quantifier takes one of at most length + 1 numbers of characters, every ``?``
    and alternation one of its branches. Infinite where groups are repeated, or for other syntax.
    """
    ways, repeats, at = 1.0, 0, 0
    branches, after = [1], ""
    while at < len(regex):
        token = _TOKEN.match(regex, at)
        if token is None:
            return math.inf, 0
        kind, at = token.lastgroup, token.end()
        if token["quantifier"] is not None:
            kind = "quantifier"
            if token["quantifier"] == "?":
                ways *= 2
            elif after == "close":
                return math.inf, 0
            elif token["times"] is None:
                repeats += 1
        elif kind == "open":
            branches.append(1)
        elif kind == "branch":
            branches[-1] += 1
        elif kind == "close":
            if len(branches) == 1:
                return math.inf, 0
            ways *= branches.pop()
        after = kind
    return ways * math.prod(branches), min(repeats, 20)


def _depth(regex: str) -> int:
    depth = deepest = 0
    for character in regex:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def short(value: object) -> str:
    """A value in an error message."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
