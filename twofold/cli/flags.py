"""Flags from dataclasses, by tyro: each default stands once, in the dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import sys
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

import tyro

from twofold.errors import ConfigError, did_you_mean

T = TypeVar("T")
RULE = re.compile("───|---")
IN_PLAIN_WORDS = (
    (r"Error parsing (\S+): (.*)", r"\1: \2"),
    (r"invalid literal for int\(\) with base 10: ('.*')", r"\1 is not a whole number"),
    (r"could not convert string to float: ('.*')", r"\1 is not a number"),
    (r"no type matching (\S+) could be instantiated from \[(.*?)\]\..*", r"\2 does not fit \1"),
    (r"Missing value for argument '(\S+)'\..*", r"\1 needs a value"),
    (r"Missing from .*?: (?:-\w \S+ )?(--\S+) \S+ (.*?)\.? \(required\).*", r"\1 is missing: \2"),
    (r"Missing from .*?: [A-Z]+ (.*?)\.? \(required\).*", r"an argument is missing: \1"),
    (r"invalid choice ('.*') for argument '(\S+)'\. Expected one of \((.*)\)", r"\2: \1 is none of \3"),
    (r"Failed to parse key-value pairs!", "give pairs of a name and a number, as in q_proj 8"),
)
"""What tyro says, and what Twofold says instead."""


def parse(
    cls: type[T],
    arguments: list[str],
    *,
    verb: str,
    description: str,
    default: Any = None,
    bare: tuple[str, ...] = ("--json",),
) -> T:
    """An instance of the dataclass from flags; `bare` are flags of the verb that `take` has taken before.

    Raises:
        ConfigError: an unknown flag, with the nearest right one; a value of the wrong type; a flag that is missing.
    """
    chosen: Any = {} if default is None else {"default": default}
    if {"-h", "--help"} & set(arguments):
        arguments = ["--help"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found, left = tyro.cli(
                cls,
                args=arguments,
                prog=f"twofold {verb}",
                description=f"{description} With --json, one JSON document on stdout."
                if "--json" in bare
                else description,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
                return_unknown_args=True,
                **chosen,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        left = [a for a in given_flags(arguments) if a not in known_flags(cls)]
        raise ConfigError(_unknown(cls, left, bare, verb) if left else _sentence(said.getvalue(), verb)) from None
    sys.stderr.write(said.getvalue())
    if left:
        raise ConfigError(_unknown(cls, left, bare, verb))
    return typing.cast(T, found)


def take(arguments: list[str], flag: str) -> tuple[list[str], bool]:
    """The arguments without a bare flag, and whether it was there."""
    return [a for a in arguments if a != flag], flag in arguments


def given_flags(arguments: list[str]) -> list[str]:
    """The flags among the arguments, as the help spells them."""
    return [a.partition("=")[0].replace("_", "-") for a in arguments if re.match(r"--[a-z]", a)]


def known_flags(cls: type[Any], prefix: str = "--") -> Iterator[str]:
    """The flags of a dataclass, those of the dataclasses in it behind a dot."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            yield from known_flags(hints[field.name], f"{name}.")
        else:
            yield name.replace("--", "--no-", 1) if field.default is True and hints[field.name] is bool else name


def _unknown(cls: type[Any], left: list[str], bare: tuple[str, ...], verb: str) -> str:
    """The first flag that is unknown, else the first word that belongs nowhere."""
    flag = next((word.partition("=")[0] for word in left if word.startswith("-")), None)
    if flag is None:
        return f"unexpected argument '{left[0]}'; see twofold {verb} --help"
    known = [*known_flags(cls), *bare, "--debug", "--help"]
    return f"unknown flag '{flag}'{did_you_mean(flag.replace('_', '-'), known)}; see twofold {verb} --help"


def _sentence(box: str, verb: str) -> str:
    """The message in the box that tyro draws, above its first rule and without its frame, which is a title and a rule where stdout
    is not UTF-8."""
    rows = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    inside = rows if "╭" in box else rows[2:]
    message = " ".join(" ".join(itertools.takewhile(lambda row: not RULE.match(row), inside)).split()).rstrip(".")
    for pattern, words in IN_PLAIN_WORDS:
        message = re.sub(pattern, words, message)
    return f"{message}; see twofold {verb} --help"
