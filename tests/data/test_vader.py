"""Rated sentences: read as they stand, each once, and split without overlap."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from twofold.data.vader import load, read_ratings, write
from twofold.errors import DataError


def test_ratings_become_labels_and_texts_stand_once() -> None:
    lines = ["1\t2.5\tGood.", "2\t-0.1\tBad.", "3\t0\tNeither.", "4\t-3\tGood."]
    assert read_ratings("\r\n".join(lines)) == [
        {"text": "Good.", "label": "positive"},
        {"text": "Bad.", "label": "negative"},
    ]


def test_the_splits_are_written_and_share_no_sentence(tmp_path: Path) -> None:
    train, held_out = write(tmp_path, 300, 100)
    assert [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()] == train
    assert (len(train), len(held_out)) == (300, 100)
    assert not {r["text"] for r in train} & {r["text"] for r in held_out}
    assert write(tmp_path, 200, 100) == (train[:200], held_out)
    assert write(tmp_path, 200, 100, seed=1) != (train[:200], held_out)


def test_the_data_is_that_described(tmp_path: Path) -> None:
    rows = load()
    assert len(rows) == 10_566
    assert 0.4 < Counter(r["label"] for r in rows)["positive"] / len(rows) < 0.6
    with pytest.raises(DataError, match="not 20,000; ask for fewer"):
        write(tmp_path, 10_000, 10_000)
