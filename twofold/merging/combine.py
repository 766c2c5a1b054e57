"""Adapters on disk combined into one more: their true updates by a method of `methods.py`, module by module, without a model.

What is not factors is summed by weight whatever the method: biases of B, and what adapters hold whole (biases of the base's
modules, modules trained whole, rows of tokens) as changes of the base's values. The base itself is needed for those only where
the weights of the adapters that hold a tensor do not add up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twofold.adapter.config import LoraConfig
from twofold.adapter.files import AdapterFiles
from twofold.adapter.keys import PREFIX
from twofold.adapter.names import matcher, parents, tails
from twofold.adapter.peft_config import names_in_full, with_changes
from twofold.adapter.plain import plain_config, plain_tensors, ranks_of
from twofold.adapter.updates import Pair, factors, has_groups, low_rank, pairs_of
from twofold.adapter.whole import TOKENS, Name, ReadBase, unknown_said, whole_names
from twofold.errors import ConfigError
from twofold.events import Emit, Progress
from twofold.lowrank.algebra import Reduced
from twofold.lowrank.factors import LowRank
from twofold.merging.methods import Combination, Weighted, problems_of, reduced_by


@dataclass(frozen=True)
class Weighed:
    """An opened adapter and its weight in the sum."""

    files: AdapterFiles
    weight: float


def pairs_in(given: Iterable[Weighed]) -> list[Pair]:
    """The pairs of all of them, each once."""
    return list(dict.fromkeys(pair for one in given for pair in pairs_of(one.files)))


def updates_at(given: Sequence[Weighed], pair: Pair) -> Weighted:
    """The updates at one place of those adapters that change it, in at least float32."""
    holders = [one for one in given if _holds(one.files, pair)]
    return [(_widened(low_rank(one.files, pair)), one.weight) for one in holders]


def _holds(files: AdapterFiles, pair: Pair) -> bool:
    return pair.a in files.modules().get(pair.module, {})


def _widened(update: LowRank) -> LowRank:
    dtype = torch.promote_types(update.A.dtype, torch.float32)
    return LowRank(update.A.to(dtype), update.B.to(dtype), update.scale)


def rank_for(given: Sequence[Weighed], how: Combination) -> int:
    """The largest rank that comes out, where the method brings it down to one."""
    return how.r or max(low_rank(one.files, pair).rank for one in given for pair in pairs_of(one.files))


@torch.no_grad()
def reduced_updates(given: Sequence[Weighed], how: Combination, emit: Emit) -> Iterator[tuple[Pair, Weighted, Reduced]]:
    """What goes in and what comes out at every place, one after the other.

    Raises:
        ConfigError: `linear` would not be exact.
    """
    pairs, r = pairs_in(given), rank_for(given, how)
    for i, pair in enumerate(pairs, 1):
        updates = updates_at(given, pair)
        yield pair, updates, reduced_by(how, pair.name, updates, r)
        emit(Progress(task="combining modules", done=i, total=len(pairs)))


@torch.no_grad()
def put_together(
    given: Sequence[Weighed], updates: Mapping[Pair, LowRank], base: ReadBase | None
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The combined adapter's tensors by key, and its config."""
    ranks = ranks_of(updates)
    shapes = {pair: _stored_shapes(given, pair) for pair in updates}
    tensors = plain_tensors(updates, ranks, shapes) | _summed_whole(given, base)
    if any(one.files.config.lora_bias for one in given):
        mapped = [pair for pair in updates if pair.a.endswith("lora_A.weight")]
        tensors |= {f"{PREFIX}{p.module}.{p.bias}": _summed_bias(given, p, len(updates[p].B)) for p in mapped}
    modules = list(dict.fromkeys(pair.module for pair in updates if not pair.experts))
    parameters = list(dict.fromkeys(pair.place for pair in updates if pair.experts))
    return tensors, plain_config(_common_config(given, modules, parameters), ranks)


def _stored_shapes(given: Sequence[Weighed], pair: Pair) -> tuple[torch.Size, torch.Size]:
    a, b = next(factors(one.files, pair) for one in given if _holds(one.files, pair))
    return a.shape, b.shape


# ---------------------------------------------------------------------------------------------- what cannot be combined


def check(given: Sequence[Weighed], how: Combination, base: ReadBase | None) -> None:
    """Refuse what has no exact sum, all of it in one message.

    Args:
        base: where the adapters' base is at hand.

    Raises:
        ConfigError: nothing to combine, an unknown method, or adapters that hold what does not add up.
    """
    problems = problems_of(how)
    if not given:
        problems.append("no adapters are given, so there is nothing to combine")
    if how.method in ("cat", "linear") and how.r is not None:
        problems.append(f"'{how.method}' keeps every rank and takes none; 'svd' is the best of rank {how.r}")
    if how.density != 1 and how.method in ("cat", "svd", "linear"):
        problems.append(f"'{how.method}' keeps every entry and takes no density; ties, dare and magnitude_prune do")
    problems += [
        f"the weight of {one.files.path} is {one.weight}, but must be a finite number"
        for one in given
        if not math.isfinite(one.weight)
    ]
    for one in given:
        problems += _inseparable(one.files)
    problems = problems or [*_clashes(given)]
    problems = problems or [*(_lacking(given) if base is None else _misfits(given, base))]
    if problems:
        raise ConfigError("; ".join(problems))


def _inseparable(files: AdapterFiles) -> Iterator[str]:
    if files.config.use_dora:
        yield (
            f"{files.path} is DoRA, which sets the lengths of the weight's rows beside B·A, and lengths do not add up; merge it "
            "into the base, and extract a plain update from the result (twofold merge, twofold extract)"
        )
    else:
        groups = [pair.name for pair in pairs_of(files) if has_groups(files, pair)]
        if groups:
            yield f"'{groups[0]}' is a convolution with groups, whose update is no one product of two factors"
    if unknown := unknown_said(files):
        yield unknown
    if not any(True for _ in pairs_of(files)):
        yield f"{files.path} holds no factors, so there is nothing to combine"


def _clashes(given: Sequence[Weighed]) -> Iterator[str]:
    """Adapters that each are fine, but not together."""
    configs = [one.files.config for one in given]
    for pair in pairs_in(given):
        found = {(len(u.B), u.A.shape[1]) for u, _ in updates_at(given, pair)}
        if len(found) > 1:
            shapes = " and ".join(f"{o} x {i}" for o, i in sorted(found))
            yield f"'{pair.name}' is {shapes}: the adapters were trained on different bases"
    for module in {p.module for p in pairs_in(given) if p.experts}:
        if len({_parameters(one.files, module) for one in given} - {frozenset()}) > 1:
            yield (
                f"they adapt different parameters of '{module}' (target_parameters), which a file tells apart by position alone; "
                "merge them into the base together (twofold merge)"
            )
    biased = any(c.lora_bias for c in configs)
    if biased and (beyond := [p.name for p in pairs_in(given) if not _of_linear_layer(given, p)]):
        yield f"'{beyond[0]}' is no linear layer, so it cannot go with the biases of B that another adapter has (lora_bias)"
    yield from _claimed_twice(given)
    if len({c.bias for c in configs}) > 1 or len({_biases(one.files) for one in given}) > 1:
        yield f"they train different biases (bias {', '.join(sorted({c.bias for c in configs}))}), and only equal ones add up"
    if len({str(c.trainable_token_indices) for c in configs if c.trainable_token_indices}) > 1:
        yield "they train different tokens (trainable_token_indices), and only equal ones add up"


def _biases(files: AdapterFiles) -> frozenset[Name]:
    """Those that `bias` trains; of a module that is trained whole the bias is its own affair."""
    saved = matcher(files.config.modules_to_save or ())
    return frozenset((m, s) for m, s in whole_names(files) if s.endswith("bias") and not any(map(saved, parents(m))))


def _claimed_twice(given: Sequence[Weighed]) -> Iterator[str]:
    """Modules that one adapter changes in one way and another in another, or that are of different sizes."""
    saved = matcher([entry for one in given for entry in one.files.config.modules_to_save or ()])
    held, factored = _whole(given), {p.module for p in pairs_in(given)}
    tokens = {module for module, suffix in held if suffix == TOKENS}
    if twice := sorted(m for m in factored if any(map(saved, parents(m)))):
        yield f"'{twice[0]}' has factors in one adapter and is trained whole by another (modules_to_save)"
    if twice := sorted(tokens & factored):
        yield f"'{twice[0]}' has factors in one adapter and tokens of its own in another (trainable_token_indices)"
    if twice := sorted(m for m in tokens if any(map(saved, parents(m)))):
        yield f"'{twice[0]}' is trained whole by one adapter (modules_to_save), and in single tokens by another"
    for (module, suffix), holders in held.items():
        found = dict.fromkeys(_held(one.files, module, suffix).shape for one in holders)
        if len(found) > 1:
            sizes = " and ".join(map(_size, found))
            yield f"'{module}.{suffix}' is {sizes}: the adapters were trained on different bases"


def _parameters(files: AdapterFiles, module: str) -> frozenset[tuple[str, str, int]]:
    """What of a module's own parameters an adapter changes, and where its file keeps that."""
    return frozenset((p.parameter, p.a, p.experts) for p in pairs_of(files) if p.module == module and p.experts)


def _of_linear_layer(given: Sequence[Weighed], pair: Pair) -> bool:
    plain = pair.a == "lora_A.weight" and not pair.experts
    return plain and len(_stored_shapes(given, pair)[0]) == 2


def _size(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))


def _lacking(given: Sequence[Weighed]) -> Iterator[str]:
    """Whole values whose sum needs the base's, which is not at hand."""
    needed = sorted({module for (module, _), holders in _whole(given).items() if not _sums_to_one(holders)})
    if needed:
        more = f" (and {len(needed) - 1} more)" if len(needed) > 1 else ""
        yield (
            f"'{needed[0]}'{more} is held whole, and the weights of the adapters that hold it do not add up to 1: the base's own "
            "values are needed; name it with --base"
        )


def _misfits(given: Sequence[Weighed], base: ReadBase) -> Iterator[str]:
    """What adapters hold whole that is not of the base's shape."""
    for (module, suffix), holders in _whole(given).items():
        theirs = _held(holders[0].files, module, suffix).shape
        if not _sums_to_one(holders) and theirs != (ours := _own(base, holders[0].files, module, suffix).shape):
            yield f"'{module}.{suffix}' is {_size(theirs)}, but {_size(ours)} by the base: it is not the adapters' own"


# ---------------------------------------------------------------------------------------------- what is not factors


def _held(files: AdapterFiles, module: str, suffix: str) -> Tensor:
    return files.tensors.read(files.modules()[module][suffix])


def _whole(given: Sequence[Weighed]) -> dict[tuple[str, str], list[Weighed]]:
    """The adapters that hold a whole tensor, by module and suffix."""
    found: dict[tuple[str, str], list[Weighed]] = {}
    for one in given:
        for name in sorted(whole_names(one.files)):
            found.setdefault(name, []).append(one)
    return found


def _sums_to_one(holders: Sequence[Weighed]) -> bool:
    return math.isclose(sum(one.weight for one in holders), 1.0, abs_tol=1e-9)


def _summed_whole(given: Sequence[Weighed], base: ReadBase | None) -> dict[str, Tensor]:
    """base + Σ w (whole − base) of every tensor that is held whole."""
    found = {}
    for (module, suffix), holders in _whole(given).items():
        held = [_held(one.files, module, suffix) for one in holders]
        total = sum((w.float() * one.weight for w, one in zip(held, holders, strict=True)), torch.zeros(held[0].shape))
        if not _sums_to_one(holders) and base is not None:
            total = (
                total + (1 - sum(one.weight for one in holders)) * _own(base, holders[0].files, module, suffix).float()
            )
        found[f"{PREFIX}{module}.{suffix}"] = total.to(held[0].dtype)
    return found


def _own(base: ReadBase, files: AdapterFiles, module: str, suffix: str) -> Tensor:
    """The base's values of what an adapter holds whole."""
    if suffix != TOKENS:
        return base(f"{module}.{'bias' if suffix.endswith('base_layer.bias') else suffix}")
    rows = files.config.trainable_token_indices or ()
    if isinstance(rows, Mapping):
        rows = next(r for entry, r in rows.items() if entry in tails(module))
    table = base(f"{module}.weight")
    if max(rows) >= len(table):
        raise ConfigError(
            f"token {max(rows)} of '{module}' is beyond the base's vocabulary of {len(table)}: it is not the adapters' own"
        )
    return table[list(rows)]


def _summed_bias(given: Sequence[Weighed], pair: Pair, width: int) -> Tensor:
    """Σ w s b of the biases of B, zero for those that have none."""
    total = torch.zeros(width)
    for one in given:
        key = one.files.modules().get(pair.module, {}).get(pair.bias)
        if key is not None:
            total += one.weight * low_rank(one.files, pair).scale * one.files.tensors.read(key).float()
    return total


def _common_config(given: Sequence[Weighed], modules: list[str], parameters: list[str]) -> LoraConfig:
    """One config for what any of them changes, parameters by their names in full; its ranks are still to come."""
    configs = [one.files.config for one in given]
    saved = sorted({entry for c in configs for entry in c.modules_to_save or ()})
    return with_changes(
        configs[0],
        **_targets(configs, modules),
        lora_dropout=configs[0].lora_dropout if len({c.lora_dropout for c in configs}) == 1 else 0.0,
        init_lora_weights=True,
        lora_bias=any(c.lora_bias for c in configs),
        modules_to_save=saved or None,
        target_parameters=parameters or None,
        trainable_token_indices=next((c.trainable_token_indices for c in configs if c.trainable_token_indices), None),
    )


def _targets(configs: Sequence[LoraConfig], modules: list[str]) -> dict[str, object]:
    """What says which modules are adapted: what all say, else the lists of all in one, else the names in full."""
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    said = [{key: getattr(config, key) for key in keys} for config in configs]
    if all(one == said[0] for one in said):
        return said[0]
    listed = [one["target_modules"] for one in said if not isinstance(one["target_modules"], str)]
    narrowed = any(one[key] for one in said for key in keys[1:])
    union = sorted({entry for entries in listed for entry in entries})
    in_one = len(listed) == len(said) and not narrowed
    return {**dict.fromkeys(keys), "target_modules": union if in_one else names_in_full(modules, modules)}
