"""Adapters on disk, in PEFT's format: read strictly, written deterministically.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's and load in PEFT, transformers and vLLM; what Twofold
knows besides (the base's fingerprint, chat template, end tokens, provenance) sits beside them in `twofold.json`.
A tensor's key is ``base_model.model.<module path>.<suffix>``; scaling is not stored, it follows from the config.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from twofold import atomic
from twofold.adapter import folder
from twofold.adapter.attach import DEFAULT_NAME, Made, adapter_layers, config_of, making_shares, put_on, shares
from twofold.adapter.config import LoraConfig, resolve
from twofold.adapter.foreign import foreign_file, read_foreign
from twofold.adapter.keys import PREFIX, says_nothing_new, split_key
from twofold.adapter.names import in_order, matcher
from twofold.adapter.peft_config import PAST_TENSORS, exceptions, names_in_full, parse_config, peft_config, with_changes
from twofold.adapter.shapes import ModuleShape, module_shapes
from twofold.adapter.target import (
    Targets,
    adapted_modules,
    adapted_names,
    adapted_parameters,
    targets_of,
    token_rows,
    wrong_tokens,
)
from twofold.adapter.ties import untied
from twofold.adapter.variants import LINEAR, check_source
from twofold.config import build
from twofold.errors import AdapterFileError, RunError
from twofold.events import Pieces, finished
from twofold.lowrank.init import Factors, unfilled
from twofold.lowrank.spectral_init import is_subtracted
from twofold.tensorfile import TensorFile, nonfinite, write_tensors

CONFIG, TENSORS, OURS = folder.CONFIG, folder.TENSORS, folder.OURS


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What Twofold keeps beside an adapter: no times, no absolute paths, so that equal training gives equal bytes.

    Attributes:
        base: the fingerprint of the base it was trained on, as `base.fingerprint` writes it.
        chat_template: the Jinja template it was trained with.
        eos_token_ids: the tokens that end an answer.
        training: how it came to be: data digests, settings, steps.
    """

    base: dict[str, Any] | None = None
    chat_template: str | None = None
    eos_token_ids: list[int] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder that was opened and understood; tensors are read when asked for."""

    path: Path
    config: LoraConfig
    tensors: TensorFile
    provenance: Provenance | None
    base_name: str | None

    @cached_property
    def _modules(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for key in self.tensors.shapes:
            module, suffix = split_key(key)
            found.setdefault(module, {})[suffix] = key
        return {module: found[module] for module in sorted(found, key=in_order)}

    def modules(self) -> dict[str, dict[str, str]]:
        """File keys by module path, the first layer's before the others', and suffix."""
        return self._modules


# ---------------------------------------------------------------------------------------------- reading


def open_adapter(path: Path) -> AdapterFiles:
    """Open an adapter folder and check that everything in its config is understood.

    Raises:
        AdapterFileError: files are missing, damaged or pickled, the config asks for what Twofold does not do, or the tensors
            alone do not say what the adapter does (PEFT's PiSSA and OLoRA): `load_adapter` then takes the base to help.
    """
    files = opened_folder(path)
    if is_subtracted(files.config.init_lora_weights):
        raise AdapterFileError(
            f"{path} holds the raw factors of init_lora_weights={files.config.init_lora_weights!r}, which fit a base that PEFT "
            "changed; load it onto its base (twofold.load_adapter) and save it again (twofold.save_adapter): that writes the plain "
            "update"
        )
    return files


def opened_folder(path: Path) -> AdapterFiles:
    """An adapter folder whose files are there and can be read.

    Raises:
        AdapterFileError: as `open_adapter`, but for factors that need the base's help.
    """
    if not path.is_dir():
        raise AdapterFileError(f"no adapter folder at {path}")
    if not (path / TENSORS).exists() and (path / "adapter_model.bin").exists():
        raise AdapterFileError(
            f"{path / 'adapter_model.bin'} is a pickle, which can run code when it is read; "
            "have its author save it as safetensors (PEFT: save_pretrained)"
        )
    raw = _read_json(path / CONFIG)
    ours = _read_json(path / OURS) if (path / OURS).exists() else None
    provenance = build(Provenance, ours, source=str(path / OURS)) if ours is not None else None
    config, tensors = parse_config(raw, path / CONFIG), TensorFile(path / TENSORS)
    return AdapterFiles(path, untied(config, tensors), tensors, provenance, raw.get("base_model_name_or_path"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterFileError(f"cannot read {path}: {error.strerror}; is this an adapter folder?") from error
    except ValueError as error:
        raise AdapterFileError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{path} should hold a JSON object")
    return value


def load_adapter(model: nn.Module, path: Path | str, name: str = DEFAULT_NAME) -> AdapterFiles:
    """Attach an adapter from its folder and make it the active one; a failure leaves the model as it was.

    Raises:
        AdapterFileError: as `read_adapter`.
    """
    files, config, made = read_adapter(model, path, name)
    put_on(model, made, config, name)
    return files


class Fitted(NamedTuple):
    """An adapter that was read and fits a model, but is not on it."""

    files: AdapterFiles
    config: LoraConfig
    made: dict[str, Made]


def read_adapter(model: nn.Module, path: Path | str, name: str = DEFAULT_NAME) -> Fitted:
    """The shares that an adapter's folder gives to a model, which stays as it is. A safetensors file without a config is read in
    the layouts of kohya's scripts and of diffusers.

    Raw factors of PiSSA and OLoRA, as PEFT writes them, fit a base from which their start was taken away; the start is computed
    again from this base, and taken away from the update instead.

    Raises:
        AdapterFileError: damaged files, or tensors that are missing, left over or of the wrong shape: all listed.
    """
    return finished(reading_adapter(model, path, name))


def reading_adapter(model: nn.Module, path: Path | str, name: str = DEFAULT_NAME) -> Pieces[Fitted]:
    """`read_adapter` in pieces."""
    if file := foreign_file(Path(path)):
        config, made = read_foreign(model, file, name)
        return Fitted(AdapterFiles(file, config, TensorFile(file), None, None), config, made)
    files = opened_folder(Path(path))
    yield
    shapes = module_shapes(model)
    yield
    claimed = adapted_modules(files.config, shapes)
    wrong = _wrong_modules(files, shapes, claimed)
    if not (claimed or adapted_parameters(files.config, shapes) or token_rows(files.config, shapes)):
        raise AdapterFileError(_mismatch(files.path, [*wrong.values()] or ["its config names no module of it"]))
    config = _exact_config(files, shapes, claimed)
    yield
    targets = targets_of(config, shapes, claimed)
    check_source(model, config, targets, files.path)
    if beyond := wrong_tokens(config, shapes, targets.tokens):
        raise AdapterFileError(_mismatch(files.path, beyond))
    yield
    made = yield from making_shares(model, targets, config, name, _places(config, targets))
    problems = [*wrong.values(), *(yield from _fill(model, files, made, set(wrong)))]
    if problems:
        raise AdapterFileError(_mismatch(files.path, problems))
    return Fitted(files, config, made)


def _places(config: LoraConfig, targets: Targets) -> dict[str, Factors] | None:
    """Where the values of a file will go; None where the start itself is needed, which the update is counted from."""
    if is_subtracted(config.init_lora_weights):
        return None
    linear = {name: shape for name, shape in targets.adapted.items() if shape.kind in LINEAR}
    return {n: unfilled(resolve(config, n).r, s.in_features, s.out_features) for n, s in linear.items()}


def _wrong_modules(
    files: AdapterFiles, shapes: Mapping[str, ModuleShape], claimed: Mapping[str, ModuleShape]
) -> dict[str, str]:
    """What is wrong with modules as a whole, by module.

    The tensors are the truth: a list of targets may hold entries for other models, but a module that the config claims
    and the file lacks, or the reverse, is an error.
    """
    held = {m for m, suffixes in files.modules().items() if any(s.startswith("lora_") for s in suffixes)}
    held -= set(adapted_parameters(files.config, shapes)) - set(claimed)
    return {
        **{m: f"no module '{m}' in this model" for m in sorted(held) if m not in shapes},
        **{m: f"'{m}' is a target of the config but has no tensors" for m in sorted(claimed) if m not in held},
        **{m: f"'{m}' has tensors but is no target of the config" for m in sorted(held & set(shapes) - set(claimed))},
        **_wrong_ranks(files, claimed),
    }


def _exact_config(
    files: AdapterFiles, shapes: Mapping[str, ModuleShape], claimed: Mapping[str, ModuleShape]
) -> LoraConfig:
    """The file's config with its targets spelled out in full."""
    resolved = {m: resolve(files.config, m) for m in sorted(adapted_names(files.config, shapes))}
    return with_changes(
        files.config,
        target_modules=names_in_full(claimed, shapes),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=exceptions({m: v.r for m, v in resolved.items()}, files.config.r),
        alpha_pattern=exceptions({m: v.alpha for m, v in resolved.items()}, files.config.lora_alpha),
        modules_to_save=_saved_names(files, shapes),
    )


def _saved_names(files: AdapterFiles, shapes: Mapping[str, ModuleShape]) -> tuple[str, ...] | None:
    return tuple(filter(matcher(files.config.modules_to_save or ()), shapes)) or None


def _wrong_ranks(files: AdapterFiles, claimed: Iterable[str]) -> dict[str, str]:
    problems = {}
    modules = files.modules()
    for module in claimed:
        suffixes = modules.get(module, {})
        r = resolve(files.config, module).r
        for suffix in ("lora_A.weight", "lora_embedding_A"):
            found = files.tensors.shapes[suffixes[suffix]][0] if suffix in suffixes else r
            if found != r:
                problems[module] = f"'{module}' has rank {found} in the tensors but {r} by the config"
    return problems


def _fill(model: nn.Module, files: AdapterFiles, made: Mapping[str, Made], told: Set[str]) -> Pieces[list[str]]:
    """Give the tensors to the shares; what is wrong with single tensors, but for modules that were `told` of whole."""
    modules = files.modules()
    problems: list[str] = []
    read: set[str] = set()
    finite = yield from files.tensors.checking_finite()
    for module, one in made.items():
        yield
        values, found = {}, []
        for suffix, wanted in one.share.saved(one.base).items():
            key = _key_of(modules, module, suffix)
            if key is None:
                found.append(f"missing tensor '{PREFIX}{module}.{suffix}'")
                continue
            read.add(key)
            values[suffix] = files.tensors.read(key)
            if values[suffix].shape != wanted.shape:
                there, here = files.tensors.shapes[key], tuple(wanted.shape)
                found.append(f"'{key}' has shape {there} where this model needs {here}")
        problems += [] if module in told else found
        problems += [] if finite else [f"'{module}.{suffix}' holds NaN or infinity" for suffix in nonfinite(values)]
        if not found:
            one.share.load(one.base, values)
    known = [k for k in sorted(files.tensors.shapes) if not k.endswith(PAST_TENSORS)]
    left = [k for k in known if k not in read and split_key(k)[0] not in told]
    if left:
        bases = {name: layer.base for name, layer in adapter_layers(model)} | {m: made[m].base for m in made}
        for key in left:
            yield
            if not says_nothing_new(model, bases, files.tensors, key, read):
                problems.append(f"unexpected tensor '{key}'")
    return problems


def _key_of(modules: Mapping[str, Mapping[str, str]], module: str, suffix: str) -> str | None:
    """The file's key, also for whole modules, whose parameter paths may have dots of their own."""
    inner, _, last = f"{module}.{suffix}".rpartition(".")
    return modules.get(module, {}).get(suffix) or modules.get(inner, {}).get(last)


def _mismatch(path: Path, problems: list[str]) -> str:
    return f"the adapter at {path} does not fit this model: {listed(problems)}"


def listed(problems: list[str]) -> str:
    """The first eight in one sentence, and how many more there are."""
    return "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")


# ---------------------------------------------------------------------------------------------- writing


def save_adapter(
    model: nn.Module,
    path: Path | str,
    name: str = DEFAULT_NAME,
    *,
    provenance: Provenance | None = None,
    base_name: str | None = None,
) -> Path:
    """Write an attached adapter as a folder, whole or not at all, replacing one already there.

    Raises:
        ConfigError: no adapter of that name is attached.
        RunError: the folder cannot be written.
    """
    path = Path(path)
    shares(model, name)
    _check_replaceable(path)
    with atomic.new_folder(path, replace=True) as folder:
        write_into(model, folder, name, base_name=base_name)
        if provenance is not None:
            atomic.write_json(folder / OURS, {f.name: getattr(provenance, f.name) for f in fields(provenance)})
    return path


def write_into(model: nn.Module, folder: Path, name: str, *, base_name: str | None) -> None:
    """Write an adapter's two files among whatever else a folder holds; each of them is whole or as it was, the config last."""
    config = peft_config(model, name, base_name)
    write_tensors(folder / TENSORS, adapter_tensors(model, name))
    atomic.write_json(folder / CONFIG, config)


def _check_replaceable(path: Path) -> None:
    """Only an adapter gives way to an adapter; anything else in the folder would be lost."""
    foreign = (
        [e.name for e in path.iterdir() if e.name not in (CONFIG, TENSORS, OURS, "README.md")] if path.is_dir() else []
    )
    if foreign:
        raise RunError(
            f"{path} holds other things than an adapter ({', '.join(sorted(foreign)[:3])}); choose a new folder"
        )


def adapter_tensors(model: nn.Module, name: str = DEFAULT_NAME) -> dict[str, Tensor]:
    """The adapter's tensors by their keys in the file: those of a plain update, which needs no other base than the one as it is."""
    layers = dict(adapter_layers(model))
    return {
        f"{PREFIX}{module}.{suffix}": tensor
        for module, share in shares(model, name).items()
        for suffix, tensor in share.plain(layers[module].base).items()
    }


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor], name: str = DEFAULT_NAME) -> None:
    """Give an attached adapter the values of `tensors`, by their keys in the file.

    Raises:
        AdapterFileError: a key too many or too few, another shape, or values that are not finite; all of them in one message.
    """
    if is_subtracted(config_of(model, name).init_lora_weights):
        raise AdapterFileError(
            f"adapter '{name}' counts from its start, which no file holds; load the file by load_adapter"
        )
    wanted = adapter_tensors(model, name)
    problems = [f"missing tensor '{k}'" for k in wanted if k not in tensors]
    problems += [f"unexpected tensor '{k}'" for k in tensors if k not in wanted]
    problems += [
        f"'{k}' has shape {tuple(t.shape)} where this model needs {tuple(wanted[k].shape)}"
        for k, t in tensors.items()
        if k in wanted and t.shape != wanted[k].shape
    ]
    problems += [f"'{k}' holds NaN or infinity" for k in nonfinite(tensors)]
    if problems:
        raise AdapterFileError(f"these tensors do not fit adapter '{name}': " + listed(problems))
    layers = dict(adapter_layers(model))
    for module, share in shares(model, name).items():
        suffixes = share.saved(layers[module].base)
        share.load(layers[module].base, {s: tensors[f"{PREFIX}{module}.{s}"].clone() for s in suffixes})
