"""Whose adapter a row takes: never another one's, over all small batches, or it raises."""

import itertools

import pytest
import torch

from lora_kernels.nn.batch_rows import Forward, NamedRows, forward_of, runs_of

NAMES = ("a", "b", "c")


def tokens_of(runs) -> list[str]:
    return [name for name in runs.names for _ in range(runs.length)]


def rows_of(names, beams, stacked) -> list[str]:
    """The definition, an index at a time."""
    n = len(names)
    return [names[row // beams % n] for row in range(n * beams * stacked)]


def said(names, beams=1, stacked=1) -> NamedRows:
    return NamedRows(names, frozenset({1, beams}), stacked)


SMALL = list(itertools.product((1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2, 3, 4), (0, 1)))


def batches(n, beams, stacked, length, axis):
    """Rows that such a batch may have, the names of its tokens ``[rows, length]``, its forward."""
    for some_beams, some_stacked in itertools.product({1, beams}, {1, stacked}):
        rows = rows_of(NAMES[:n], some_beams, some_stacked)
        yield [[name] * length for name in rows], Forward(len(rows), frozenset({length}))


def flat(by_row, axis) -> list[str]:
    order = by_row if axis == 0 else zip(*by_row, strict=True)
    return [name for row in order for name in row]


def test_right_or_refused_over_small_batches():
    """Layers that keep the batch, flatten it or take one token of each row, in a forward or not."""
    answered = refused = 0
    for n, beams, stacked, length, axis in SMALL:
        of = said(NAMES[:n], beams, stacked)
        for by_row, forward in batches(n, beams, stacked, length, axis):
            rows = len(by_row)
            shape = (rows, length, 5) if axis == 0 else (length, rows, 5)
            pooled = [row[0] for row in by_row]
            cases = [
                (shape, None, flat(by_row, axis)),
                (shape, forward, flat(by_row, axis)),
                ((rows * length, 5), forward, flat(by_row, axis)),
                ((rows, 5), forward, pooled),
            ]
            for shape, forward, truth in cases:
                try:
                    runs = runs_of(shape, of, axis, forward)
                except ValueError as error:
                    assert "which take other adapters" in str(error)
                    assert beams > 1 and stacked > 1 and n > 1, (of, shape, forward)
                    refused += 1
                    continue
                answered += 1
                assert tokens_of(runs) == truth, (of, shape, forward)
    assert answered > 5 * refused > 0


def test_a_batch_stacked_inside_of_a_forward():
    for n, beams, stacked, length in itertools.product((2, 3), (1, 2), (2, 3), (1, 2, 3, 4)):
        of, forward = said(NAMES[:n], beams, stacked), Forward(n * beams, frozenset({length}))
        truth = [[name] * length for name in rows_of(NAMES[:n], beams, stacked)]
        for shape in ((len(truth), length, 5), (len(truth) * length, 5)):
            try:
                assert tokens_of(runs_of(shape, of, 0, forward)) == flat(truth, 0)
            except ValueError as error:
                assert "which take other adapters" in str(error)
                assert length == stacked or beams == stacked


def test_another_axis_is_never_taken_for_the_batch():
    for n, beams, stacked, length, axis in SMALL:
        of = said(NAMES[:n], beams, stacked)
        for by_row, forward in batches(n, beams, stacked, length, axis):
            rows = len(by_row)
            if rows == length:
                continue
            shape = (length, rows, 5) if axis == 0 else (rows, length, 5)
            with pytest.raises(ValueError):
                runs_of(shape, of, axis, forward)


def test_what_is_left_of_a_batch_without_its_padding_is_refused():
    for n, beams, stacked, length, axis in SMALL:
        of = said(NAMES[:n], beams, stacked)
        for by_row, forward in batches(n, beams, stacked, length, axis):
            rows = len(by_row)
            for left in range(rows + 1, rows * length):
                with pytest.raises(ValueError, match=r"pass .* a Routing over the tokens"):
                    runs_of((left, 5), of, axis, forward)


REFUSED = {
    "rows": ((3, 4, 5), said(NAMES[:2]), None, "expected 2 rows on axis 0 for 2 names, got [3, 4"),
    "a multiple": ((4, 4, 5), said(NAMES[:2]), None, "expected 2 rows on axis 0"),
    "one name": ((4, 4, 5), said(NAMES[:1]), None, "expected 1 rows on axis 0 for 1 names"),
    "beams": ((4, 4, 5), said(NAMES[:2], 3), None, "expected 2 or 6 rows on axis 0"),
    "all": ((5, 4, 5), said(NAMES[:2], 3, 2), None, "expected 2 or 4 or 6 or 12 rows"),
    "the other axis": ((4, 2, 5), said(NAMES[:2]), None, "(axis 1 has as many: route's batch_dim)"),
    "a part of the batch": (
        (2, 4, 5),
        said(NAMES[:2], 1, 2),
        Forward(4, frozenset({4})),
        "in a forward of 4 rows of 4 tokens; pass beams= ",
    ),
    "a matrix": ((8, 5), said(NAMES[:2]), None, "expected the tokens of 2 rows for 2 names"),
    "a matrix of packed rows": (
        (2, 5),
        said(NAMES[:2]),
        Forward(1, frozenset({2})),
        "in a forward of 1 rows of 2 tokens",
    ),
    "beams or stacked": ((4, 3, 5), said(NAMES[:2], 2, 2), None, "(beams), the batch repeated"),
}


@pytest.mark.parametrize(("shape", "of", "forward", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(shape, of, forward, message):
    with pytest.raises(ValueError) as error:
        runs_of(shape, of, 0, forward)
    assert message in str(error.value)
    assert "Routing" in str(error.value)


def test_what_comes_to_the_same_is_taken():
    same = said(("a", "a"), 2, 2)
    assert tokens_of(runs_of((4, 3, 5), same)) == ["a"] * 12
    assert tokens_of(runs_of((5,), said(("a",)))) == ["a"]  # a single token
    assert tokens_of(runs_of((2, 0, 5), said(NAMES[:2]))) == []


FORWARDS = {
    "ids": (((torch.ones(2, 7, dtype=torch.int64),), {}), (2, {7})),
    "floats": (((torch.ones(2, 7, 3),), {}), (2, {7})),
    "rows": (((torch.ones(2, 3),), {}), (2, {1})),
    "by keyword": (((), {"input_ids": torch.ones(2, 7, dtype=torch.int64)}), (2, {7})),
    "encoder and decoder": (
        (
            (),
            {
                "attention_mask": torch.ones(2, 9),
                "input_ids": torch.ones(2, 7, dtype=torch.int64),
                "labels": torch.ones(2, 5, dtype=torch.int64),
            },
        ),
        (2, {7, 5}),
    ),
    "a class per row": (
        (
            (),
            {
                "input_ids": torch.ones(2, 7, dtype=torch.int64),
                "labels": torch.ones(2, dtype=torch.int64),
            },
        ),
        (2, {7}),
    ),
    "images": (((), {"pixel_values": torch.ones(2, 3, 8, 8)}), (2, set())),
    "other arguments": ((("text", None, torch.ones(2, 7, 3)), {}), (2, {7})),
}


@pytest.mark.parametrize(("call", "expected"), FORWARDS.values(), ids=FORWARDS)
def test_what_a_forward_is_computed_on(call, expected):
    assert forward_of(*call) == Forward(expected[0], frozenset(expected[1]))


def test_a_forward_on_another_axis():
    assert forward_of([torch.ones(7, 2, 3)], {}, axis=1) == Forward(2, frozenset({7}))
    assert forward_of([torch.ones(2, 3)], {}, axis=1) == Forward(2, frozenset({1}))
    assert forward_of(["text"], {"use_cache": True}) is None
