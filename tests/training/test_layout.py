"""The rows of a batch that are computed: exactly what its predictions need, each shared prefix once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segment_layouts import contexts

from twofold.base.batch import Example, pack
from twofold.training.layout import ROW_MULTIPLE, SHARED_FROM, Layout, lay_out

SHARING = pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])


@st.composite
def example_sets(draw: Any) -> list[Example]:
    """Examples some of which begin alike; whatever of them is supervised, their beginnings and ends included or not."""
    token = st.integers(1, 3)
    beginnings = draw(st.lists(st.lists(token, min_size=1, max_size=14), min_size=1, max_size=3))
    examples = []
    for _ in range(draw(st.integers(1, 7))):
        begun = draw(st.sampled_from([[], *beginnings]))
        ids = begun[: draw(st.integers(0, 20))] + draw(st.lists(token, max_size=6)) or [1]
        examples.append(Example(ids, draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))))
    return examples


def predictions(examples: Sequence[Example]) -> list[tuple[tuple[int, ...], int]]:
    """(the tokens before, the token to predict), in the batch's order."""
    return [
        (tuple(e.token_ids[:i]), e.token_ids[i])
        for e in examples
        for i in range(1, len(e.token_ids))
        if e.supervised[i]
    ]


def needed(examples: Sequence[Example]) -> list[tuple[int, ...]]:
    """Of each example the tokens up to the last from which something is predicted."""
    ends = [max((i for i in range(1, len(e.token_ids)) if e.supervised[i]), default=0) for e in examples]
    return [tuple(e.token_ids[:end]) for e, end in zip(examples, ends, strict=True)]


def predicted_in(layout: Layout) -> list[tuple[tuple[int, ...], int]]:
    """The same, read off the rows: what each predicting row sees, in order."""
    seen = contexts(layout.segments)
    rows = layout.asked[layout.predicting].tolist()
    found = []
    for row, label in zip(rows, layout.labels.tolist(), strict=True):
        context = seen[row]
        assert layout.positions[context].tolist() == list(range(len(context)))
        found.append((tuple(layout.token_ids[context].tolist()), label))
    return found


def least_rows(examples: Sequence[Example]) -> int:
    """Rows where all that begin alike share their common beginning."""
    groups: dict[object, list[tuple[int, ...]]] = {}
    for i, text in enumerate(needed(examples)):
        groups.setdefault(text[:SHARED_FROM] if len(text) >= SHARED_FROM else i, []).append(text)
    total = 0
    for texts in groups.values():
        alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False))
        common = len(list(alike)) if len(texts) > 1 else 0
        total += common + sum(len(t) - common for t in texts)
    return total


def rows_used(layout: Layout) -> int:
    return sum(s.length for s in layout.segments)


@SHARING
@given(examples=example_sets())
def test_what_is_predicted_from_what_is_exactly_that_of_the_batch(share: bool, examples: list[Example]) -> None:
    if predictions(examples):
        assert predicted_in(lay_out(pack(examples), share=share)) == predictions(examples)


@given(examples=example_sets())
def test_no_row_is_computed_twice_or_in_vain(examples: list[Example]) -> None:
    if not predictions(examples):
        return
    shared, apart = (lay_out(pack(examples), share=share) for share in (True, False))
    assert rows_used(apart) == sum(len(t) for t in needed(examples))
    assert rows_used(shared) == least_rows(examples)
    for layout in (shared, apart):
        seen = contexts(layout.segments)
        assert sorted(seen) == list(range(rows_used(layout))), "segments lie end to end and do not overlap"
        wanted = {row for asked in layout.asked[layout.predicting].tolist() for row in seen[asked]}
        assert wanted == set(seen), "nothing lies behind the last token that is predicted"


@SHARING
@given(examples=example_sets())
def test_rows_and_asked_rows_are_filled_up_with_filler(share: bool, examples: list[Example]) -> None:
    if not predictions(examples):
        return
    layout = lay_out(pack(examples), share=share)
    asked, rows = layout.asked.tolist(), layout.rows
    real = len(set(layout.predicting.tolist()))
    assert rows % ROW_MULTIPLE == len(asked) % ROW_MULTIPLE == 0
    assert rows_used(layout) < rows <= rows_used(layout) + ROW_MULTIPLE
    assert real < len(asked) <= real + ROW_MULTIPLE
    assert asked == sorted(asked)
    assert len(set(asked[:real])) == real
    assert set(asked[real:]) == {rows - 1}
    assert sorted(set(layout.predicting.tolist())) == list(range(real))
    assert layout.positions.shape == layout.token_ids.shape == (rows,)
    assert not layout.token_ids[rows_used(layout) :].any()
    assert not layout.positions[rows_used(layout) :].any()


def test_a_beginning_is_shared_from_so_many_tokens_on() -> None:
    def rows(common: int) -> int:
        texts = [[*range(1, common + 1), 90 + i, 99] for i in range(3)]
        return rows_used(lay_out(pack([Example(t, [True] * len(t)) for t in texts]), share=True))

    assert rows(SHARED_FROM - 1) == 3 * SHARED_FROM
    assert rows(SHARED_FROM) == SHARED_FROM + 3


def test_equal_examples_are_computed_once_and_counted_each() -> None:
    example = Example(list(range(1, 13)), [i > 5 for i in range(12)])
    layout = lay_out(pack([example] * 3), share=True)
    assert rows_used(layout) == 11
    assert layout.predicting.tolist() == list(range(6)) * 3
    assert torch.equal(layout.labels, torch.arange(7, 13).repeat(3))
