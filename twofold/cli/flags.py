"""Flags from dataclasses, by tyro: each default stands once, in the dataclass."""

from __future__ import annotations

from typing import Any, TypeVar

import tyro

T = TypeVar("T")


def parse(cls: type[T], arguments: list[str], *, verb: str, description: str, default: Any = None) -> T:
    """An instance of the dataclass from flags; a wrong flag ends the process with code 2, as argparse does."""
    chosen: Any = {} if default is None else {"default": default}
    found: T = tyro.cli(
        cls,
        args=arguments,
        prog=f"twofold {verb}",
        description=description,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
        **chosen,
    )
    return found


def take(arguments: list[str], flag: str) -> tuple[list[str], bool]:
    """The arguments without a bare flag, and whether it was there."""
    return [a for a in arguments if a != flag], flag in arguments
