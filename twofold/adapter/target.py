"""From patterns to module names, on a live model or one without weights.

Every entry that matches nothing is an error, and all of them come in one message with the nearest names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from twofold.adapter.config import LoraConfig, pattern_matches
from twofold.errors import TargetError, nearest
from twofold.layers.protocol import AdapterLayer, bare_modules

Kind = Literal["linear", "conv1d", "embedding", "other"]


@dataclass(frozen=True)
class ModuleShape:
    """A module as targets see it: its weight maps `in_features` to `out_features`, if it has one; its bias is as wide as that."""

    kind: Kind
    in_features: int = 0
    out_features: int = 0
    bias: bool = False
    parameters: int = 0
    head: bool = False
    foreign_class: str | None = None
    """Name of the class, where it is a kind of Linear or Embedding that computes something of its own."""

    @property
    def adaptable(self) -> bool:
        return self.kind != "other"


def module_shapes(model: nn.Module) -> dict[str, ModuleShape]:
    """Every named module of a model (on the meta device too); adapted layers count as the base they wrap."""
    heads = _heads(model)
    counted: dict[nn.Module, dict[int, int]] = {}
    return {
        name: _shape(
            module.base if isinstance(module, AdapterLayer) else module,
            id(module) in heads,
            sum(_sizes(module, counted).values()),
        )
        for name, module in bare_modules(model)
        if name
    }


def _sizes(module: nn.Module, counted: dict[nn.Module, dict[int, int]]) -> dict[int, int]:
    """The number of values of each of its parameters as it was before adapters came, by id; `counted` is what is known."""
    if module not in counted:
        bare = module.base if isinstance(module, AdapterLayer) else module
        found = {id(p): p.numel() for p in bare._parameters.values() if p is not None}
        for child in bare.children():
            found |= _sizes(child, counted)
        counted[module] = found
    return counted[module]


def _heads(model: nn.Module) -> set[int]:
    """What `all-linear` leaves out: the output head, and the classifier of an encoder."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    found = {id(head)} if head is not None else set()
    return found | {id(m) for n, m in model.named_children() if n in ("score", "classifier")}


def _shape(module: nn.Module, head: bool, count: int) -> ModuleShape:
    """Its shape as it was before adapters came, when it had `count` values in its parameters."""
    leaf = next(module.children(), None) is None
    bias = leaf and isinstance(getattr(module, "bias", None), nn.Parameter)
    if isinstance(module, nn.Linear | nn.Embedding | Conv1D) and not _computes_as_known(module):
        return ModuleShape("other", bias=bias, parameters=count, head=head, foreign_class=type(module).__name__)
    if isinstance(module, nn.Linear):
        return ModuleShape("linear", module.in_features, module.out_features, bias, count, head)
    if isinstance(module, Conv1D):
        return ModuleShape("conv1d", module.nx, module.nf, bias, count, head)
    if isinstance(module, nn.Embedding):
        return ModuleShape("embedding", module.num_embeddings, module.embedding_dim, bias, count, head)
    width = cast(nn.Parameter, module.bias).numel() if bias else 0
    return ModuleShape("other", 0, width, bias, count, head)


def _computes_as_known(module: nn.Module) -> bool:
    """Whether its forward is the linear map or the look-up that our layers put factors beside.

    OPT's positions are an embedding that is called with an attention mask, a router may be a linear layer that returns the best
    few: factors beside those would do something else than a changed weight does.
    """
    cls = type(module)
    if cls.forward in (nn.Linear.forward, nn.Embedding.forward, Conv1D.forward):
        return not isinstance(module, NonDynamicallyQuantizableLinear)  # of nn.MultiheadAttention, which never calls it
    weight_alone = [n for n, _ in module.named_parameters(recurse=False)] == ["weight"]
    scaled = cls.__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale") and weight_alone
    return scaled or cls.__name__ == "FalconLinear"


@dataclass(frozen=True)
class Targets:
    """The modules that an adapter touches.

    Attributes:
        adapted: those that get factors.
        saved: those trained whole.
        biased: those of which only the bias is trained.
    """

    adapted: dict[str, ModuleShape]
    saved: tuple[str, ...]
    biased: tuple[str, ...]


def find_targets(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> Targets:
    """The modules that `config` names.

    Raises:
        TargetError: lists every entry that matches nothing or nothing that can be adapted, with the nearest names.
    """
    chosen = _chosen(config, shapes)
    adapted = {name: shapes[name] for name in chosen if shapes[name].adaptable}
    problems = [*_unmatched(config, shapes, adapted)]
    saved = _saved(config, shapes)
    problems += [
        f"'{name}' matches target_modules but {_why_not(shapes[name])}" for name in sorted(set(chosen) - set(adapted))
    ]
    problems += [f"'{name}' is in both target_modules and modules_to_save" for name in saved if name in adapted]
    if not adapted and not problems:
        problems.append("target_modules leaves nothing to adapt once exclude_modules and layers_to_transform apply")
    if problems:
        raise TargetError("; ".join(problems))
    return targets_of(config, shapes, adapted)


def targets_of(config: LoraConfig, shapes: Mapping[str, ModuleShape], adapted: dict[str, ModuleShape]) -> Targets:
    """What an adapter with factors on `adapted` touches besides."""
    saved = _saved(config, shapes)
    return Targets(adapted, saved, _biased(config, shapes, adapted, saved))


def _why_not(shape: ModuleShape) -> str:
    if shape.foreign_class:
        return f"is a {shape.foreign_class}, whose forward is its own, so that factors cannot stand beside it; leave it out"
    return "is neither linear nor an embedding; name the projections inside it"


def adapted_modules(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> dict[str, ModuleShape]:
    """The adaptable modules that the patterns match, whether or not every entry matches something."""
    return {name: shapes[name] for name in _chosen(config, shapes) if shapes[name].adaptable}


def matches(patterns: str | Iterable[str], name: str) -> bool:
    """PEFT's rule: one regular expression for the whole name, or a list of names and endings."""
    return matcher(patterns)(name)


def matcher(patterns: str | Iterable[str]) -> Callable[[str], bool]:
    """`matches` for many names, at a cost that does not grow with the length of the list."""
    if isinstance(patterns, str):
        whole = re.compile(patterns)
        return lambda name: whole.fullmatch(name) is not None
    listed = frozenset(patterns)
    return lambda name: not listed.isdisjoint(_endings(name))


def _endings(name: str) -> list[str]:
    """The name, and what follows each of its dots."""
    return [name, *(name[i + 1 :] for i, letter in enumerate(name) if letter == ".")]


def _chosen(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> list[str]:
    preset = PRESETS.get(config.target_modules) if isinstance(config.target_modules, str) else None
    targeted = matcher(config.target_modules)
    found = [n for n, s in shapes.items() if (preset(n, s) if preset else targeted(n))]
    if config.exclude_modules:
        excluded = matcher(config.exclude_modules)
        found = [n for n in found if not excluded(n)]
    if config.layers is not None:
        found = [n for n in found if layer_index(n, config.layers_pattern) in config.layers]
    return [n for n in found if not _inside_saved(config, n)] if config.modules_to_save else found


def _inside_saved(config: LoraConfig, name: str) -> bool:
    """A preset does not reach into modules that are trained whole."""
    parts = name.split(".")
    parents = [".".join(parts[:i]) for i in range(1, len(parts) + isinstance(config.target_modules, str))]
    return any(matches(config.modules_to_save or (), p) for p in parents)


def layer_index(name: str, pattern: str | None) -> int | None:
    """The index of the layer that a module lies in, by PEFT's rule; None outside the layers."""
    found = re.match(rf".*\.{pattern}\.(\d+)\." if pattern else r".*\.[^.]*\.(\d+)\.", f".{name}")
    return int(found.group(1)) if found else None


def _all_linear(name: str, shape: ModuleShape) -> bool:
    return shape.kind in ("linear", "conv1d") and not shape.head


def _attention(name: str, shape: ModuleShape) -> bool:
    return _all_linear(name, shape) and any("attn" in p or "attention" in p for p in name.lower().split("."))


def _mlp(name: str, shape: ModuleShape) -> bool:
    in_layers = any(p.isdigit() for p in name.split("."))
    return _all_linear(name, shape) and in_layers and not _attention(name, shape)


PRESETS = {"all-linear": _all_linear, "attention": _attention, "mlp": _mlp}


def _saved(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> tuple[str, ...]:
    return tuple(filter(matcher(config.modules_to_save or ()), shapes))


def _biased(
    config: LoraConfig, shapes: Mapping[str, ModuleShape], adapted: Mapping[str, ModuleShape], saved: tuple[str, ...]
) -> tuple[str, ...]:
    if config.bias != "all":
        return ()
    return tuple(n for n, s in shapes.items() if s.bias and n not in adapted and n not in saved)


def _unmatched(config: LoraConfig, shapes: Mapping[str, ModuleShape], adapted: Mapping[str, ModuleShape]) -> list[str]:
    adaptable = [n for n, s in shapes.items() if s.adaptable]
    problems = []
    problems += _unmatched_names("target_modules", config.target_modules, adaptable, list(shapes))
    problems += _unmatched_names("exclude_modules", config.exclude_modules or (), adaptable, list(shapes))
    problems += _unmatched_names("modules_to_save", config.modules_to_save or (), list(shapes), list(shapes))
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        problems += [
            f"{key} '{p}' matches no adapted module{_nearest(p, list(adapted))}"
            for p in patterns
            if not any(pattern_matches(p, n) for n in adapted)
        ]
    indices = {layer_index(n, config.layers_pattern) for n in adaptable} if config.layers else set()
    missing = [str(i) for i in sorted(config.layers or ()) if i not in indices]
    if missing:
        known = sorted(i for i in indices if i is not None)
        there = f"the model's layers are {known[0]} to {known[-1]}" if known else "the model has no numbered layers"
        problems.append(f"layers_to_transform {', '.join(missing)}: no such layer; {there}")
    return problems


def _unmatched_names(key: str, patterns: str | Sequence[str], like: list[str], names: list[str]) -> list[str]:
    if isinstance(patterns, str) and (patterns in PRESETS or any(matches(patterns, n) for n in names)):
        return []
    if isinstance(patterns, str) and any(matches((patterns,), n) for n in names):
        return [f"{key} '{patterns}' is one text, so a regular expression for whole names; write the list [{patterns}]"]
    entries = (patterns,) if isinstance(patterns, str) else patterns
    known = {ending for n in names for ending in _endings(n)} if entries else set()
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
