"""Formulas as data: the text that is shown is the text that is computed, so that neither can lag behind the other."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max}


class Term(NamedTuple):
    """A named quantity and its formula over symbols and earlier terms."""

    name: str
    formula: str

    def shown(self) -> str:
        """The formula as it is printed."""
        return self.formula.replace("*", "·")


def worked_out(terms: Sequence[Term], symbols: Mapping[str, float]) -> dict[str, float]:
    """The value of every term, each of which may use the ones before it."""
    known = dict(symbols)
    for term in terms:
        known[term.name] = _value(ast.parse(term.formula, mode="eval").body, known)
    return {term.name: known[term.name] for term in terms}


def symbols_in(terms: Sequence[Term]) -> set[str]:
    """Every name that the formulas use, those of other terms included."""
    nodes = [n for t in terms for n in ast.walk(ast.parse(t.formula, mode="eval"))]
    return {n.id for n in nodes if isinstance(n, ast.Name)} - set(_FUNCTIONS)


def _value(node: ast.expr, known: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name):
            return known[name]
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, known), _value(right, known))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name](*(_value(a, known) for a in arguments))
    raise ValueError(f"no part of a formula: {ast.unparse(node)}")
