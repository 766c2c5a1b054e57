"""YAML to keyword-only frozen dataclasses and back.

Each default stands once, in the dataclass beside what it configures; the file's schema, the flags and the docs are
derived from it. An unknown key is an error with a suggestion, every mistake of a file is reported at once, and
``1e-3`` is a number although YAML 1.1 reads it as text.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from twofold.errors import ConfigError, did_you_mean

T = TypeVar("T")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no configuration: expected keys like `base:`, found {type(value).__name__}")
    return value


def build(cls: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """An instance of the dataclass `cls` from nested mappings.

    Raises:
        ConfigError: lists every unknown key, missing key and wrong type at once, each with its place.
    """
    problems: list[str] = []
    arguments = _arguments(cls, values, "", problems)
    if problems:
        raise ConfigError(f"{source}: " + "; ".join(problems))
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def check_seed(seed: int) -> None:
    """A seed that every generator takes.

    Raises:
        ConfigError: it is negative, or too large.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed is {seed} but must be at least 0 and below 2**32")


def as_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a dataclass, as YAML and JSON write them."""
    plain: dict[str, Any] = dataclasses.asdict(config, dict_factory=lambda pairs: {k: _plain(v) for k, v in pairs})
    return plain


def write_yaml(config: Any) -> str:
    """The YAML text of a dataclass, in the order of its fields."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _arguments(cls: type[Any], values: Mapping[str, Any], place: str, problems: list[str]) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            problems.append(f"unknown key '{place}{key}'{did_you_mean(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            problems.append(f"missing key '{place}{name}'")
    return {
        name: _convert(value, hints[name], place + name, problems) for name, value in values.items() if name in fields
    }


def _convert(value: Any, hint: Any, place: str, problems: list[str]) -> Any:
    """`value` as the type `hint`; a value that does not fit is noted in `problems` and returned as it is."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping):
            before = len(problems)
            arguments = _arguments(hint, value, f"{place}.", problems)
            return _construct(hint, arguments, place, problems) if len(problems) == before else value
        return value if isinstance(value, hint) else _wrong(value, "a mapping", place, problems)
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, typing.get_args(hint), place, problems)
    if origin is Literal:
        return _convert_choice(value, typing.get_args(hint), place, problems)
    if origin in (list, tuple):
        return _convert_sequence(value, hint, place, problems)
    if origin is dict:
        return _convert_mapping(value, typing.get_args(hint)[1], place, problems)
    return _convert_scalar(value, hint, place, problems)


def _construct(cls: type[Any], arguments: dict[str, Any], place: str, problems: list[str]) -> Any:
    try:
        return cls(**arguments)
    except ConfigError as error:
        problems.append(f"{place}: {error}")
        return None


def _convert_union(value: Any, options: tuple[Any, ...], place: str, problems: list[str]) -> Any:
    if value is None and type(None) in options:
        return None
    tries: list[list[str]] = []
    for option in (o for o in options if o is not type(None)):
        trial: list[str] = []
        converted = _convert(value, option, place, trial)
        if not trial:
            return converted
        tries.append(trial)
    problems.extend(tries[-1])
    return value


def _convert_choice(value: Any, choices: tuple[Any, ...], place: str, problems: list[str]) -> Any:
    if value in choices:
        return value
    listed = ", ".join(str(c) for c in choices)
    problems.append(f"'{place}' is {value!r} but may be {listed}{did_you_mean(str(value), map(str, choices))}")
    return value


def _convert_sequence(value: Any, hint: Any, place: str, problems: list[str]) -> Any:
    if not isinstance(value, list | tuple):
        return _wrong(value, "a list", place, problems)
    item, make = typing.get_args(hint)[0], typing.get_origin(hint)
    return make(_convert(v, item, f"{place}[{i}]", problems) for i, v in enumerate(value))


def _convert_mapping(value: Any, item: Any, place: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        return _wrong(value, "a mapping", place, problems)
    return {str(k): _convert(v, item, f"{place}.{k}", problems) for k, v in value.items()}


def _convert_scalar(value: Any, hint: Any, place: str, problems: list[str]) -> Any:
    if hint is Any or (hint is type(None) and value is None):
        return value
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return _wrong(value, "a number", place, problems)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is int and isinstance(value, bool):
        return _wrong(value, "a whole number", place, problems)
    if isinstance(value, hint):
        return value
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    return _wrong(value, words.get(hint, getattr(hint, "__name__", str(hint))), place, problems)


def _wrong(value: Any, expected: str, place: str, problems: list[str]) -> Any:
    problems.append(f"'{place}' is {value!r} but should be {expected}")
    return value
