"""What the entries of a configuration may not do to modules between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set


def broken_ties(ties: Mapping[str, str], kept: Iterable[str], changed: Set[str]) -> list[str]:
    """Pairs of modules with one weight of which only one would change; `kept` are those that follow another."""
    pairs = [(name, first) for name, first in ties.items() if {name, first} & changed and name not in kept]
    return [
        f"'{name}' and '{first}' have one weight, which ensure_weight_tying keeps, but an adapter would change one without the "
        "other; train single tokens of it (trainable_token_indices, equal for both), or drop ensure_weight_tying"
        for name, first in pairs
    ]


def claimed_twice(
    adapted: Iterable[str],
    saved: Iterable[str],
    parameters: Iterable[str],
    rows: Iterable[str],
    biased: Iterable[str],
) -> list[str]:
    """Modules that two entries of the config would change, each in its own way, or inside of one another."""
    claims: dict[str, list[str]] = {}
    keys = {
        "target_modules": adapted,
        "modules_to_save": saved,
        "target_parameters": parameters,
        "trainable_token_indices": rows,
    }
    for key, names in keys.items():
        for name in names:
            claims.setdefault(name, []).append(key)
    twice = [f"'{name}' is in both {' and '.join(found)}" for name, found in claims.items() if len(found) > 1]
    around = [(p, n) for p in parameters for n in dict.fromkeys([*claims, *biased]) if n.startswith(f"{p}.")]
    twice += [f"'{p}' has a parameter that is adapted, so '{n}' inside it cannot be" for p, n in around]
    inside = [(s, n, key) for s in saved for n, (key, *_) in claims.items() if n.startswith(f"{s}.")]
    return twice + [
        f"'{n}' is in {key}, but modules_to_save trains '{s}' whole, and it with that" for s, n, key in inside
    ]
