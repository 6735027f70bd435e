"""Two texts that every machine with Python and numpy has, as sequences of tokens."""

import importlib
import inspect
import re
import sys
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

HELD_OUT_EVERY = 8  # one document in so many is held out
REPEAT_LENGTH = 80  # paragraphs from this many characters on count as repeats

NUMPY_MODULES = (
    "numpy",
    "numpy.fft",
    "numpy.lib.stride_tricks",
    "numpy.linalg",
    "numpy.ma",
    "numpy.polynomial",
    "numpy.random",
    "numpy.testing",
)


@dataclass(frozen=True)
class Text:
    """A text cut into training and held-out sequences. name: also that of its adapter."""

    name: str
    title: str
    prompt: str
    documents: int
    characters: int
    train: Tensor  # [n, length] token ids
    held_out: Tensor  # [m, length] token ids


def load_texts(tokenizer: PreTrainedTokenizerBase, length: int, held_out: int) -> list[Text]:
    """Both texts, in sequences of `length` tokens; at most `held_out` of them are held out."""
    sources = (
        (
            "python-reference",
            f"Python {_python_version()} language reference (`pydoc_data.topics`)",
            'The "repeat" statement\n**********************\n\nThe "repeat" statement is used to',
            python_reference(),
        ),
        (
            "numpy-docstrings",
            f"numpy {importlib.import_module('numpy').__version__} docstrings",
            "Return the moving average of an array.\n\nParameters\n----------\n",
            numpy_docstrings(),
        ),
    )
    texts = []
    for name, title, prompt, documents in sources:
        train, test = split(without_repeats(documents))
        texts.append(
            Text(
                name=name,
                title=title,
                prompt=prompt,
                documents=len(documents),
                characters=sum(map(len, documents)),
                train=pack(tokenizer, train, length),
                held_out=spread(pack(tokenizer, test, length), held_out),
            )
        )
    return texts


def python_reference() -> list[str]:
    """The chapters of the language reference that `help("if")` and its like print."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return [topics[name] for name in sorted(topics)]


def numpy_docstrings() -> list[str]:
    """The docstrings of numpy's public classes and functions, by name."""
    documents = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking a deprecated name for its docstring warns
        for module_name in NUMPY_MODULES:
            module = importlib.import_module(module_name)
            for name in sorted(dir(module)):
                member = getattr(module, name, None)
                if name.startswith("_") or not callable(member):
                    continue
                text = inspect.getdoc(member) or ""
                if "\n" in text:
                    documents.setdefault(text, f"{module_name}.{name}")
    return sorted(documents, key=documents.get)


def without_repeats(documents: list[str]) -> list[str]:
    """The documents without the long paragraphs that stand in an earlier one.

    Both texts repeat themselves a lot; a repeat across the split would be trained on and held out.
    """
    seen = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", document):
            key = " ".join(paragraph.split())
            if len(key) >= REPEAT_LENGTH and key in seen:
                continue
            seen.add(key)
            paragraphs.append(paragraph)
        kept.append("\n\n".join(paragraphs))
    return [document for document in kept if document.strip()]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents: one in `HELD_OUT_EVERY` is held out, whole."""
    last = HELD_OUT_EVERY - 1
    train = [text for i, text in enumerate(documents) if i % HELD_OUT_EVERY != last]
    return train, documents[last::HELD_OUT_EVERY]


def pack(tokenizer: PreTrainedTokenizerBase, documents: list[str], length: int) -> Tensor:
    """Token ids `[n, length]`: the documents one after the other, each closed by the end token."""
    ids = []
    for tokens in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids += [*tokens, tokenizer.eos_token_id]
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"documents: {len(ids)} tokens do not fill one sequence of {length}")
    return torch.tensor(ids[: count * length]).view(count, length)


def spread(sequences: Tensor, count: int) -> Tensor:
    """At most `count` of the sequences, evenly spaced from the first to the last."""
    count = min(count, len(sequences))
    return sequences[torch.linspace(0, len(sequences) - 1, count).round().long()]


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
