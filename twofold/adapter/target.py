"""From patterns to module names, on a live model or one without weights.

Every entry that matches nothing is an error, and all of them come in one message with the nearest names.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from twofold.adapter.claims import broken_ties, claimed_twice
from twofold.adapter.config import LoraConfig, pattern_matches
from twofold.adapter.names import layer_index, matcher, matches, matches_around, parents, tails
from twofold.adapter.parameters import ParameterShape
from twofold.adapter.shapes import ModuleShape
from twofold.errors import TargetError, nearest


@dataclass(frozen=True)
class Targets:
    """The modules that an adapter touches.

    Attributes:
        adapted: those that get factors.
        saved: those trained whole.
        biased: those without factors of their own whose bias is trained, alone or beside their parameters or tokens.
        parameters: by module, those of its own parameters that get factors.
        tokens: by module, the rows of its weight that are trained.
        tied: modules whose rows are those of another, by its name.
    """

    adapted: dict[str, ModuleShape]
    saved: tuple[str, ...]
    biased: tuple[str, ...]
    parameters: dict[str, tuple[ParameterShape, ...]]
    tokens: dict[str, tuple[int, ...]]
    tied: dict[str, str]


def find_targets(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> Targets:
    """The modules that `config` names.

    Raises:
        TargetError: lists every entry that matches nothing or nothing that can be adapted, with the nearest names.
    """
    chosen = _chosen(config, shapes)
    adapted = {name: shapes[name] for name in chosen if shapes[name].adaptable}
    problems = [*_unmatched(config, shapes, adapted)]
    targets = targets_of(config, shapes, adapted)
    problems += [
        f"'{name}' matches target_modules but {_why_not(shapes[name])}" for name in sorted(set(chosen) - set(adapted))
    ]
    saved, parameters, tokens, tied = targets.saved, targets.parameters, targets.tokens, targets.tied
    problems += wrong_tokens(config, shapes, tokens)
    problems += [
        f"'{name}' in modules_to_save has no parameters, so nothing of it could be trained; leave it out"
        for name in saved
        if not shapes[name].parameters
    ]
    if config.bias == "all" and any(s.kind == "attention" for s in shapes.values()):
        problems.append("bias='all' does not reach the biases inside MultiheadAttention; use 'none' or 'lora_only'")
    if config.ensure_weight_tying:
        problems += broken_ties(
            {n: s.tied_to for n, s in shapes.items() if s.tied_to}, tied, {*adapted, *saved, *tokens}
        )
    problems += claimed_twice(adapted, saved, parameters, {**tokens, **tied}, targets.biased)
    if not (adapted or parameters or tokens or problems):
        problems.append("target_modules leaves nothing to adapt once exclude_modules and layers_to_transform apply")
    if problems:
        raise TargetError("; ".join(problems))
    return targets


def targets_of(config: LoraConfig, shapes: Mapping[str, ModuleShape], adapted: dict[str, ModuleShape]) -> Targets:
    """What an adapter with factors on `adapted` touches besides."""
    saved = _saved(config, shapes)
    parameters, tokens, tied = adapted_parameters(config, shapes), token_rows(config, shapes), tied_rows(config, shapes)
    return Targets(adapted, saved, _biased(config, shapes, {*adapted, *saved}, parameters), parameters, tokens, tied)


def _why_not(shape: ModuleShape) -> str:
    if shape.foreign_class:
        return f"is a {shape.foreign_class}, whose forward is its own, so that factors cannot stand beside it; leave it out"
    return "is neither linear nor an embedding nor a convolution; name those inside it"


def adapted_modules(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> dict[str, ModuleShape]:
    """The adaptable modules that the patterns match, whether or not every entry matches something."""
    return {name: shapes[name] for name in _chosen(config, shapes) if shapes[name].adaptable}


def adapted_parameters(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> dict[str, tuple[ParameterShape, ...]]:
    """By module, the parameters that `target_parameters` names, in the module's order."""
    entries = config.target_parameters or ()
    if not entries:
        return {}
    found = {n: tuple(p for p in s.own if matches(entries, f"{n}.{p.name}")) for n, s in shapes.items()}
    return {name: parameters for name, parameters in found.items() if parameters}


def token_rows(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> dict[str, tuple[int, ...]]:
    """By module, the rows of its weight that `trainable_token_indices` names."""
    given = config.trainable_token_indices or ()
    if not given:
        return {}
    if not isinstance(given, Mapping):
        return {n: tuple(given) for n, s in shapes.items() if s.input_embedding}
    return {n: tuple(rows) for entry, rows in given.items() for n in shapes if matches((entry,), n)}


def tied_rows(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> dict[str, str]:
    """The modules that follow the input embedding's rows, since they have its weight: PEFT's rule, for every such module."""
    rows = token_rows(config, shapes)
    source = next((n for n in rows if shapes[n].input_embedding), None)
    if source is None:
        return {}
    first = shapes[source].tied_to or source
    same = [n for n, s in shapes.items() if n != source and first in (n, s.tied_to)]
    return {n: source for n in same if rows.get(n, rows[source]) == rows[source]}


def wrong_tokens(
    config: LoraConfig, shapes: Mapping[str, ModuleShape], tokens: Mapping[str, tuple[int, ...]]
) -> list[str]:
    problems = []
    for name, rows in tokens.items():
        shape = shapes[name]
        count = shape.in_features if shape.kind == "embedding" else shape.out_features
        if shape.kind not in ("embedding", "linear"):
            problems.append(f"'{name}' in trainable_token_indices is neither an embedding nor a linear head")
        elif not rows:
            problems.append(f"trainable_token_indices of '{name}' names no token; leave it out")
        elif len(set(rows)) < len(rows):
            problems.append(f"trainable_token_indices of '{name}' names a token twice")
        elif not all(0 <= row < count for row in rows):
            wrong = next(row for row in rows if not 0 <= row < count)
            problems.append(f"token {wrong} is beyond '{name}', which has {count}; resize the model's embeddings first")
    return problems


def _chosen(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> list[str]:
    preset = PRESETS.get(config.target_modules) if isinstance(config.target_modules, str) else None
    targeted = matcher(config.target_modules)
    found = [n for n, s in shapes.items() if (preset(n, s) if preset else targeted(n))]
    if config.exclude_modules:
        excluded = matcher(config.exclude_modules)
        found = [n for n in found if not excluded(n)]
    if config.layers is not None:
        whole = () if isinstance(config.target_modules, str) else config.target_modules
        found = [n for n in found if n in whole or layer_index(n, config.layers_pattern) in config.layers]
    return [n for n in found if not _inside_saved(config, n)] if config.modules_to_save else found


def _inside_saved(config: LoraConfig, name: str) -> bool:
    """A preset does not reach into modules that are trained whole."""
    place = name if isinstance(config.target_modules, str) else name.rpartition(".")[0]
    return matches_around(config.modules_to_save or (), place)


def _all_linear(name: str, shape: ModuleShape) -> bool:
    return shape.kind in ("linear", "conv1d") and not shape.head


def _attention(name: str, shape: ModuleShape) -> bool:
    return _all_linear(name, shape) and any("attn" in p or "attention" in p for p in name.lower().split("."))


def _mlp(name: str, shape: ModuleShape) -> bool:
    in_layers = any(p.isdigit() for p in name.split("."))
    return _all_linear(name, shape) and in_layers and not _attention(name, shape)


PRESETS = {"all-linear": _all_linear, "attention": _attention, "mlp": _mlp}


def _saved(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> tuple[str, ...]:
    if not config.modules_to_save:
        return ()
    found = set(filter(matcher(config.modules_to_save), shapes))
    return tuple(n for n in shapes if n in found and found.isdisjoint(parents(n)[:-1]))


def _biased(
    config: LoraConfig, shapes: Mapping[str, ModuleShape], others: Set[str], parameters: Container[str]
) -> tuple[str, ...]:
    """Those whose bias is not among what is trained of others; a module with adapted parameters is an adapted one."""
    asked: Container[str] = {"none": (), "lora_only": parameters, "all": shapes}[config.bias]
    return tuple(n for n, s in shapes.items() if s.bias and n in asked and others.isdisjoint(parents(n)))


def _unmatched(config: LoraConfig, shapes: Mapping[str, ModuleShape], adapted: Mapping[str, ModuleShape]) -> list[str]:
    adaptable = [n for n, s in shapes.items() if s.adaptable]
    problems = []
    problems += _unmatched_names("target_modules", config.target_modules, adaptable, list(shapes))
    problems += _unmatched_names("exclude_modules", config.exclude_modules or (), adaptable, list(shapes))
    problems += _unmatched_names("modules_to_save", config.modules_to_save or (), list(shapes), list(shapes))
    problems += _unmatched_inside(config, shapes)
    named = [*adapted, *_parameter_names(config, shapes)]
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        problems += [
            f"{key} '{p}' matches no adapted module{_nearest(p, named)}"
            for p in patterns
            if not any(pattern_matches(p, n) for n in named)
        ]
    indices = {layer_index(n, config.layers_pattern) for n in adaptable} if config.layers else set()
    missing = [str(i) for i in sorted(config.layers or ()) if i not in indices]
    if missing:
        known = sorted(i for i in indices if i is not None)
        there = f"the model's layers are {known[0]} to {known[-1]}" if known else "the model has no numbered layers"
        problems.append(f"layers_to_transform {', '.join(missing)}: no such layer; {there}")
    return problems


def adapted_names(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> list[str]:
    """The names that patterns of rank and scale are matched with: of adapted modules, and of adapted parameters."""
    return [*adapted_modules(config, shapes), *_parameter_names(config, shapes)]


def _parameter_names(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> list[str]:
    return [f"{n}.{p.name}" for n, found in adapted_parameters(config, shapes).items() for p in found]


def _unmatched_inside(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> list[str]:
    """Entries for parameters and tokens that match nothing, with the nearest names."""
    names = [f"{n}.{p.name}" for n, s in shapes.items() for p in s.own]
    entries = [e for e in config.target_parameters or () if not any(matches((e,), n) for n in names)]
    problems = [
        f"target_parameters '{e}' matches no parameter of two or three dimensions{_nearest(e, _endings(e, names))}"
        for e in entries
    ]
    given = config.trainable_token_indices
    embeddings = [n for n, s in shapes.items() if s.kind == "embedding"]
    if isinstance(given, Mapping):
        missing = [e for e in given if not any(matches((e,), n) for n in shapes)]
        return problems + [f"trainable_token_indices '{e}' matches no module{_nearest(e, embeddings)}" for e in missing]
    if given and not token_rows(config, shapes):
        problems.append("trainable_token_indices must say which embedding it is of, as in {embed_tokens: [3, 4]}")
    return problems


def _endings(entry: str, names: Iterable[str]) -> list[str]:
    """The ends of the names with as many parts as the entry, each once."""
    return list(dict.fromkeys(".".join(n.split(".")[-entry.count(".") - 1 :]) for n in names))


def _unmatched_names(key: str, patterns: str | Sequence[str], like: list[str], names: list[str]) -> list[str]:
    if isinstance(patterns, str) and (patterns in PRESETS or any(matches(patterns, n) for n in names)):
        return []
    if isinstance(patterns, str) and any(matches((patterns,), n) for n in names):
        return [f"{key} '{patterns}' is one text, so a regular expression for whole names; write the list [{patterns}]"]
    entries = (patterns,) if isinstance(patterns, str) else patterns
    known = {ending for n in names for ending in tails(n)} if entries else set()
    return [
        f"{key} '{entry}' matches no module{_nearest(entry, like)}"
        for entry in entries
        if isinstance(patterns, str) or entry not in known
    ]


def _nearest(entry: str, names: list[str]) -> str:
    """The endings of names most like the entry, or all endings when none is close."""
    endings = list(dict.fromkeys(n.rsplit(".", entry.count(".") + 1)[-1] if "." not in entry else n for n in names))
    found = nearest(entry, [*endings, *PRESETS])
    if found:
        return f"; did you mean {' or '.join(repr(f) for f in found)}?"
    return f"; the model has {', '.join(repr(e) for e in endings[:12])}" if endings else ""
