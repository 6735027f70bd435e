"""Preparing providers: which of them can be timed here, and why the others cannot."""

from collections.abc import Callable
from typing import TypeVar

Timed = TypeVar("Timed")


class Unavailable(Exception):
    """A provider that cannot run here; the message says why."""


class MissingExtra(Exception):
    """A package of the `bench` extra is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(
            f"this benchmark needs {package}, which is not installed: "
            'pip install "lora_kernels[bench]"'
        )


def import_peft():
    try:
        import peft
    except ImportError:
        raise MissingExtra("peft") from None
    return peft


def import_transformers():
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers") from None
    return transformers


def prepare_each(
    names: list[str], make: Callable[[str], Timed]
) -> tuple[dict[str, Timed], dict[str, str]]:
    """What ``make`` gives for each name, warmed up and held to the error policy (an AssertionError
    says what breaks it); and for those that cannot be timed, why."""
    timed, skipped = {}, {}
    for name in names:
        try:
            timed[name] = make(name)
        except MissingExtra:
            raise
        except AssertionError as error:
            skipped[name] = f"not timed, its result is wrong: {error}"
        except Exception as error:  # one provider's trouble is not the others'
            skipped[name] = f"{type(error).__name__}: {error}"
    return timed, skipped
