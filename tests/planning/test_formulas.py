"""Formulas: computed as they are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from twofold.planning.formulas import Term, symbols_in, worked_out
from twofold.planning.memory import FAST, KEPT, PLAIN, STATE, STOCK, STOCK_FULL, SYMBOLS, WHOLE, Loop, memory_terms
from twofold.planning.time import OPERATIONS


def test_terms_are_worked_out_in_order() -> None:
    terms = (Term("area", "a * (a + 2) / 2"), Term("most", "max(area, 3) - min(1, a)"))
    assert worked_out(terms, {"a": 4.0}) == {"area": 12.0, "most": 11.0}
    assert symbols_in(terms) == {"a", "area"}
    assert terms[0].shown() == "a · (a + 2) / 2"


@pytest.mark.parametrize("formula", ["a ** 9", "__import__('os')", "a.b", "'text'", "open(a)"])
def test_nothing_but_arithmetic_is_computed(formula: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        worked_out([Term("x", formula)], {"a": 1.0})


@pytest.mark.parametrize("loop", [FAST, PLAIN, STOCK, STOCK_FULL])
@pytest.mark.parametrize("recompute", KEPT)
def test_every_symbol_is_explained(loop: Loop, recompute: bool) -> None:
    terms = [t for m in STATE for t in memory_terms(loop, recompute, *STATE[m])]
    assert symbols_in(terms) <= {*SYMBOLS, *(t.name for t in terms)}
    assert {s for m in OPERATIONS for s in symbols_in(OPERATIONS[m])} <= {*SYMBOLS, "again"}


def test_the_page_shows_every_formula_as_it_is_computed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()
    by_loop = [
        Term("", f) for loop in (FAST, PLAIN, STOCK, STOCK_FULL) for f in (loop.layer, loop.passing, loop.logits)
    ]
    common = [t for m in STATE for recompute in KEPT for t in memory_terms(FAST, recompute, WHOLE, *STATE[m])[2:]]
    operations = [t for m in OPERATIONS for t in OPERATIONS[m]]
    missing = {t.shown() for t in [*by_loop, *common, *operations] if f"`{t.shown()}`" not in page}
    assert not missing
