"""twofold base list | pull NAME"""

from __future__ import annotations

from twofold.base.known_shapes import KNOWN_SHAPES
from twofold.base.load import BUILT_IN, pull
from twofold.cli.flags import take
from twofold.cli.main import print_json
from twofold.cli.terminal import Terminal, stdout
from twofold.errors import ConfigError

USAGE = "usage: twofold base list | twofold base pull NAME"


def run(arguments: list[str]) -> int:
    arguments, as_json = take(arguments, "--json")
    match arguments:
        case ["-h" | "--help"]:
            print(f"{USAGE}\n\nList the built-in bases, or fetch and convert one into the cache.")
            return 0
        case ["list"]:
            found = [{"name": n, "hub_id": b.hub_id, "licence": b.licence} for n, b in BUILT_IN.items()]
        case ["pull", name]:
            with Terminal() as terminal:
                found = [{"name": name, "folder": str(pull(name, terminal))}]
        case _:
            raise ConfigError(f"{USAGE}; see twofold base --help")
    if as_json:
        print_json(found)
        return 0
    for entry in found:
        stdout.print("  ".join(entry.values()), soft_wrap=True)
    if arguments == ["list"]:
        stdout.print("\nshapes only, without weights, for twofold plan:")
        for name, shape in KNOWN_SHAPES.items():
            stdout.print(f"{name}  {shape.hub_id}", soft_wrap=True)
    return 0
