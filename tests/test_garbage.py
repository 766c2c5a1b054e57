"""Python's collector is as it was after whatever made it wait."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from twofold.base.load import load_base
from twofold.errors import BaseError
from twofold.garbage import RARELY, collected_rarely

pytest_plugins = ("tiny_fixtures",)


def test_it_waits_while_something_is_loaded_and_not_after() -> None:
    before = gc.get_threshold()
    with collected_rarely():
        assert gc.get_threshold() == (RARELY, *before[1:])
        with pytest.raises(BaseError), collected_rarely():
            load_base("./nothing")
        assert gc.get_threshold() == (RARELY, *before[1:])
    assert gc.get_threshold() == before


def test_it_waits_while_a_base_is_loaded(llama_base: Path) -> None:
    seen: set[int] = set()
    load_base(str(llama_base), "float32", "cpu", lambda event: seen.add(gc.get_threshold()[0]))
    assert seen == {RARELY}


def test_where_it_is_switched_off_it_stays_off() -> None:
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        with collected_rarely():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


def test_it_is_as_it_was_after_a_failure() -> None:
    before = gc.get_threshold()
    with pytest.raises(BaseError):
        load_base("./nothing")
    assert gc.get_threshold() == before


def test_one_that_outlives_the_one_around_it_leaves_nothing_behind() -> None:
    before = gc.get_threshold()
    outer, inner = collected_rarely(), collected_rarely()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert gc.get_threshold() == before
