"""The King James pairs: verses that belong together, nothing leaks, and a seed fixes every byte."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from twofold.data.king_james import SYSTEM, Pair, build, load_pairs, plain, read_verses, split_books, write
from twofold.data.splits import Splits
from twofold.errors import DataError
from twofold.events import Event, Warned

ARCHAIC = re.compile(r"\b(?:thou|thee|thy|thine|ye|hath|doth|saith|unto|shalt|hast|\w+eth|\w+est)\b", re.IGNORECASE)
A_BIBLE = '''
from somewhere import Book, Version
bible = Bible(Version.ODD, """One. Two two. Three.""", {1001001: 0, 1001002: 5}, {1001001: 4, 1001002: 13}, {Book.A: "A"})
raise RuntimeError("this file must be read, not run")
'''


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return load_pairs()


@pytest.fixture(scope="module")
def data() -> Splits:
    return build(1500, 240)


def _modern(rows: list[dict[str, list[dict[str, str]]]]) -> list[str]:
    return [row["messages"][1]["content"] for row in rows]


def test_a_bible_is_read_without_being_run() -> None:
    assert read_verses(A_BIBLE) == {1001001: "One.", 1001002: "Two two."}


@pytest.mark.parametrize("source", ["", "bible = 3", "bible = Bible(1, 2)"])
def test_a_file_without_a_bible_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="no Bible is in this file"):
        read_verses(source)


def test_the_marks_of_the_editions_go() -> None:
    assert plain(" it [was] God`s,\n    and the king’s. ") == "it was God's, and the king's."


def test_the_pairs_are_those_described(pairs: list[Pair]) -> None:
    assert len(pairs) == 30_254
    assert sorted({pair.book for pair in pairs}) == list(range(1, 67))
    assert pairs[0] == Pair(
        1,
        "In the beginning God created the heavens and the earth.",
        "In the beginning God created the heaven and the earth.",
    )
    assert Pair(2, '"You shall not murder.', "Thou shalt not kill.") in pairs
    assert pairs[-1].king_james == "The grace of our Lord Jesus Christ be with you all. Amen."


def test_verses_are_aligned(pairs: list[Pair]) -> None:
    """Two tellings of a verse share words; of neighbours far fewer. A drift of the offsets would even them out."""

    def overlap(a: str, b: str) -> float:
        left, right = (Counter(re.findall(r"\w+", text.lower())) for text in (a, b))
        return (left & right).total() / min(left.total(), right.total())

    own = [overlap(p.modern, p.king_james) for p in pairs]
    neighbour = [overlap(p.modern, q.king_james) for p, q in pairwise(pairs)]
    for start in range(0, len(pairs) - 500, 500):
        here = slice(start, start + 500)
        assert sum(own[here]) > 1.4 * sum(neighbour[here]), pairs[start]
    assert sum(share < 0.25 for share in own) < 0.005 * len(own)


def test_one_side_is_archaic_and_the_other_is_not(pairs: list[Pair]) -> None:
    assert sum(bool(ARCHAIC.search(pair.modern)) for pair in pairs) < 0.07 * len(pairs)
    assert sum(bool(ARCHAIC.search(pair.king_james)) for pair in pairs) > 0.55 * len(pairs)


def test_nothing_of_the_edition_is_left(pairs: list[Pair]) -> None:
    for pair in pairs:
        for text in (pair.modern, pair.king_james):
            assert text == " ".join(text.split()) != ""
            assert not re.search(r"[\[\]`’{}<>\\]|Psalm \d|by amos|  ", text)
        assert not re.search(r"(?:Beloved|Lover|Friends|BEIT|ALEPH|TAV)$", pair.modern)
        assert pair.modern != pair.king_james


def test_whole_books_are_held_out(pairs: list[Pair]) -> None:
    training, held_out = split_books(pairs)
    books = {pair.book for pair in held_out}
    assert not books & {pair.book for pair in training}
    assert len(training) + len(held_out) == len(pairs)
    assert sum(book <= 39 for book in books) == 6
    assert sum(book > 39 for book in books) == 4
    assert {pair.book for pair in split_books(pairs, seed=1)[1]} != books


def test_rows_come_from_their_split(pairs: list[Pair], data: Splits) -> None:
    training, held_out = ({pair.modern: pair for pair in split} for split in split_books(pairs))
    assert (len(data.train), len(data.evaluation)) == (1500, 240)
    for rows, known in ((data.train, training), (data.evaluation, held_out)):
        assert all(row == known[text].row() for row, text in zip(rows, _modern(rows), strict=True))


def test_rows_are_chats(data: Splits) -> None:
    for row in data.train + data.evaluation:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == SYSTEM


def test_no_sentence_twice_within_or_across_splits(data: Splits) -> None:
    sentences = [text.lower() for text in _modern(data.train + data.evaluation)]
    assert len(set(sentences)) == len(sentences)


def test_counts_only_cut(data: Splits) -> None:
    smaller = build(50, 100)
    assert smaller.train == data.train[:50]
    assert smaller.evaluation == data.evaluation[:100]


def test_a_prefix_is_a_mixture_of_books(pairs: list[Pair], data: Splits) -> None:
    book_of = {pair.modern: pair.book for pair in pairs}
    assert len({book_of[text] for text in _modern(data.train[:200])}) > 25


def test_asking_for_too_much_gives_all_and_says_so(pairs: list[Pair]) -> None:
    events: list[Event] = []
    found = build(40_000, 10, emit=events.append)
    assert len(found.train) == len(split_books(pairs)[0])
    assert [type(event) for event in events] == [Warned]


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(DataError, match="ask for 1 or more"):
        build(10, 0)


def test_equal_seeds_write_equal_files(data: Splits, tmp_path: Path) -> None:
    write(tmp_path / "a", 60, 20)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["evaluation.jsonl", "train.jsonl"]
    for name, rows in (("train", data.train[:60]), ("evaluation", data.evaluation[:20])):
        lines = (tmp_path / "a" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows
    assert write(tmp_path / "b", 60, 20, seed=1).train != data.train[:60]
