"""All that is counted."""

from collections.abc import Iterator

from .cases import (
    EmbeddingCase,
    Launched,
    LinearCase,
    count_embedding,
    count_linear,
    embedding_cases,
    linear_cases,
)
from .counter import Counter
from .routed_cases import RoutedCase, count_routed, routed_cases

Case = LinearCase | EmbeddingCase | RoutedCase


def every_case() -> Iterator[Case]:
    yield from linear_cases()
    yield from embedding_cases()
    yield from routed_cases()


def count(case: Case, counter: Counter) -> dict[str, Launched]:
    """What each provider launches: ``ours``, and ``PEFT`` and ``handwritten`` where they can."""
    counts = {
        LinearCase: count_linear, EmbeddingCase: count_embedding, RoutedCase: count_routed
    }  # fmt: skip
    return counts[type(case)](case, counter)
