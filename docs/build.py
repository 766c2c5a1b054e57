"""Writes docs/configuration.md from the dataclasses: `python docs/build.py`. A test fails when the page is behind."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from docstring_parser import parse

from twofold.recipes.settings import TrainConfig

HEAD = """# Configuration of a run

What `twofold train CONFIG.yaml` reads. Every key has a flag of the same name: `adapter.lora_alpha` is `--adapter.lora-alpha`.
Unknown keys are errors. This page is written by `python docs/build.py` from the dataclasses that hold the defaults.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(section(name, cls) for name, cls in sections())


def sections() -> list[tuple[str, type[Any]]]:
    """The top level first, then each key that holds a group of keys."""
    hints = typing.get_type_hints(TrainConfig)
    groups = [(n, t) for n, t in hints.items() if dataclasses.is_dataclass(t)]
    return [("", TrainConfig), *groups]


def section(name: str, cls: type[Any]) -> str:
    """One table of keys."""
    said = {
        p.arg_name: " ".join((p.description or "").split())
        for c in reversed(cls.__mro__)
        if c.__doc__ and dataclasses.is_dataclass(c)
        for p in parse(c.__doc__).params
    }
    rows = [row(f, said[f.name]) for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(f.default_factory)]
    title = f"\n## `{name}`\n" if name else "\n## Top level\n"
    return "\n".join([title, "| key | default | meaning |", "|---|---|---|", *rows, ""])


def row(field: dataclasses.Field[Any], meaning: str) -> str:
    if field.default is not dataclasses.MISSING:
        default = "" if field.default is None else f"`{field.default}`"
    else:
        default = "required" if field.default_factory is dataclasses.MISSING else f"`{field.default_factory()}`"
    return f"| `{field.name}` | {default} | {meaning.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page(), encoding="utf-8")
