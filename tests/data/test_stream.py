"""A stream gives a step the same examples however many processes share it, and goes on from any step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_base import chats, tokenizer, write_jsonl

from twofold.base.batch import Example
from twofold.base.chat import Renderer
from twofold.data.examples import DataConfig, load_examples
from twofold.data.stream import FIRST_ROWS, Streamed, first_examples, open_stream
from twofold.errors import DataError

pytest_plugins = ("tiny_fixtures",)

ROWS, BATCH = 30, 4


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tokenizer())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_jsonl(tmp_path_factory.mktemp("stream") / "rows.jsonl", chats(ROWS)))


def opened(file: str, renderer: Renderer, seed: int = 0, **settings: Any) -> Streamed:
    return open_stream(DataConfig(train=file, streaming=True, **settings), renderer, BATCH, seed)


def taken(stream: Streamed, steps: range, size: int = 1) -> list[set[str]]:
    """The examples of each step, all processes' together."""
    processes = [stream] if size == 1 else [opened(stream.stream.source, stream.renderer) for _ in range(size)]
    return [{key(e) for r, p in enumerate(processes) for e in p.examples(s, r, size)} for s in steps]


def key(example: Example) -> str:
    return json.dumps(example)


def test_a_pass_sees_every_row_once_and_the_next_one_in_another_order(file: str, renderer: Renderer) -> None:
    stream = opened(file, renderer)
    seen = [key(e) for step in range(15) for e in stream.examples(step)]
    expected = sorted(key(e) for e in load_examples(file, DataConfig(train=file), renderer).items)
    assert sorted(seen[:ROWS]) == sorted(seen[ROWS:]) == expected
    assert seen[:ROWS] != seen[ROWS:]
    assert seen[:ROWS] != expected
    assert stream.passes == 1


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_step_has_the_same_rows_with_any_number_of_processes(file: str, renderer: Renderer, size: int) -> None:
    steps = range(10)
    assert taken(opened(file, renderer), steps, size) == taken(opened(file, renderer), steps)


def test_it_goes_on_from_any_step_and_another_seed_is_another_order(file: str, renderer: Renderer) -> None:
    whole = taken(opened(file, renderer), range(12))
    assert taken(opened(file, renderer), range(9, 12)) == whole[9:]
    assert taken(opened(file, renderer, seed=1), range(12)) != whole


def test_examples_that_teach_nothing_are_left_out_and_counted(renderer: Renderer, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "hm " * 60}, {"role": "assistant", "content": "yes"}]}
    file = str(write_jsonl(tmp_path / "rows.jsonl", [*chats(6), long, long]))
    dropping = opened(file, renderer, max_length=64)
    assert sum(len(dropping.examples(step)) for step in range(2)) == 6
    assert dropping.left_out == 2
    with pytest.raises(DataError, match="over 64 tokens"):
        taken(opened(file, renderer, max_length=64, too_long="refuse"), range(2))


def test_the_first_rows_stand_for_the_rest_and_say_so(renderer: Renderer, tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "rows.jsonl", chats(FIRST_ROWS + 5)))
    found = first_examples(opened(file, renderer))
    assert found.report.streamed
    assert found.report.examples == len(found.items) == FIRST_ROWS


def test_a_row_that_cannot_be_rendered_is_named(renderer: Renderer, tmp_path: Path) -> None:
    broken = {"messages": [{"role": "assistant", "content": "who asked?"}]}
    file = str(write_jsonl(tmp_path / "rows.jsonl", [*chats(3), broken]))
    with pytest.raises(DataError, match=r"rows\.jsonl, a row of step 1: a conversation cannot begin with"):
        opened(file, renderer).examples(0)


def test_a_stream_cut_short_and_an_empty_one_are_refused(renderer: Renderer, tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl"
    cut.write_text(json.dumps(chats(1)[0]) + '\n{"messages": [')
    with pytest.raises(DataError, match=r"cut\.jsonl.* cannot be read|cannot load"):
        opened(str(cut), renderer).examples(0)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no examples"):
        opened(str(tmp_path / "empty.jsonl"), renderer)
