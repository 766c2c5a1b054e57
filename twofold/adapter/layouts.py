"""How kohya's scripts and diffusers name the tensors of an adapter: one table for both directions, and how to read it.

A key is ``<part><joint><module><dot><ending>``. Kohya writes the module's name with underscores for dots,
``lora_unet_down_blocks_0_attn1_to_q.lora_down.weight``; which dots they were is found by writing the model's own names so.
Diffusers keeps the dots, ``unet.down_blocks.0.attn1.to_q.lora_A.weight``. Both come with any of the endings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from twofold.adapter.shapes import ModuleShape
from twofold.errors import nearest

Role = Literal["A", "mid", "B", "alpha", "magnitude", "bias"]
"""What a tensor is: a factor, the convolution between the factors (LoCon), alpha, DoRA's lengths, or the bias of B."""


class Layout(NamedTuple):
    """How the files of one tool are named today.

    Attributes:
        joint: what stands between the words of a module's name, and after the part.
        parts: the first word of a key, and the modules of a pipeline that it may stand for: the first that there is.
        endings: of a tensor, by its role.
    """

    joint: str
    parts: dict[str, tuple[str, ...]]
    endings: dict[Role, str]


KOHYA = Layout(
    "_",
    {
        "lora_unet": ("unet", "transformer"),
        "lora_transformer": ("transformer",),
        "lora_te": ("text_encoder",),
        "lora_te1": ("text_encoder",),
        "lora_te2": ("text_encoder_2",),
        "lora_te3": ("text_encoder_3", "text_encoder_2"),
    },
    {
        "A": "lora_down.weight",
        "mid": "lora_mid.weight",
        "B": "lora_up.weight",
        "alpha": "alpha",
        "magnitude": "dora_scale",
    },
)
DIFFUSERS = Layout(
    ".",
    {
        **{part: (part,) for part in ("unet", "transformer", "transformer_2")},
        **{part: (part,) for part in ("text_encoder", "text_encoder_2", "text_encoder_3")},
        "diffusion_model": ("transformer", "unet"),
    },
    {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "bias": "lora_B.bias",
        "alpha": "alpha",
        "magnitude": "lora_magnitude_vector",
    },
)
OLDER: dict[str, Role] = {
    **dict.fromkeys(("lora.down.weight", "lora_linear_layer.down.weight", "down.weight"), "A"),
    **dict.fromkeys(("lora.up.weight", "lora_linear_layer.up.weight", "up.weight"), "B"),
    **dict.fromkeys(("lora.alpha", "lora_linear_layer.alpha"), "alpha"),
    "lora_magnitude_vector.weight": "magnitude",
}
"""Endings that diffusers wrote before."""

ROLES: dict[str, Role] = OLDER | {e: role for layout in (KOHYA, DIFFUSERS) for role, e in layout.endings.items()}
ENDINGS = sorted(ROLES, key=len, reverse=True)

NOT_LORA = {
    **dict.fromkeys(("hada_w1_a", "hada_w2_a"), "LoHa"),
    **dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"), "LoKr"),
    **dict.fromkeys(("oft_blocks", "oft_diag"), "OFT"),
    **dict.fromkeys(("diff", "diff_b"), "a whole difference of weights"),
}
"""Endings of what stands in such files beside or instead of LoRA."""


@dataclass(frozen=True)
class Named:
    """One module of a file: its name there, the part of a pipeline it is in, and the keys of its tensors by role."""

    name: str
    layout: Layout
    part: str | None
    keys: dict[Role, str] = field(default_factory=dict)


def by_module(keys: Iterable[str]) -> tuple[list[Named], list[str]]:
    """The modules of a file in order of their names, and what is wrong with keys that belong to none."""
    found: dict[str, Named] = {}
    problems = []
    for key in sorted(keys):
        ending = next((e for e in ENDINGS if key.endswith(f".{e}")), None)
        if ending is None:
            problems.append(_stranger(key))
            continue
        name = _plain(key.removesuffix(f".{ending}"))
        layout = KOHYA if name.startswith(tuple(f"{p}_" for p in KOHYA.parts)) else DIFFUSERS
        parts = [p for p in layout.parts if name.startswith(p + layout.joint)]
        found.setdefault(name, Named(name, layout, max(parts, key=len, default=None))).keys[ROLES[ending]] = key
    return list(found.values()), problems


def _stranger(key: str) -> str:
    kind = NOT_LORA.get(key.rpartition(".")[2])
    return f"'{key}' is {kind}, which is no LoRA" if kind else f"unexpected tensor '{key}'"


def _plain(name: str) -> str:
    """Early diffusers put factors beside attention, into a processor: ``attn1.processor.to_q_lora`` is of ``attn1.to_q``."""
    plain = re.sub(r"\.processor\.(to_\w+)_lora$", r".\1", name)
    return f"{plain}.0" if plain != name and plain.endswith("to_out") else plain


def resolved(found: Iterable[Named], shapes: Mapping[str, ModuleShape]) -> tuple[dict[str, Named], list[str]]:
    """The modules of a file by their names in the model, and what is wrong with those that have none or share one.

    Args:
        shapes: of the modules of a live model, or of one without weights.
    """
    written: dict[str, list[str]] = {}
    for module, shape in shapes.items():
        if shape.adaptable:
            for name in {module, module.replace(".", KOHYA.joint)}:
                written.setdefault(name, []).append(module)
    by_name: dict[str, Named] = {}
    problems = []
    for one in found:
        readings = _readings(one, shapes)
        fitting = sorted({m for reading in readings for m in written.get(reading, ())})
        if not fitting:
            near = nearest(readings[0], written, 1)
            problems.append(f"no module for '{one.name}'" + (f" (nearest: '{written[near[0]][0]}')" if near else ""))
        elif len(fitting) > 1:
            problems.append(f"'{one.name}' may be {' or '.join(repr(m) for m in fitting)}")
        elif fitting[0] in by_name:
            problems.append(f"'{one.name}' and '{by_name[fitting[0]].name}' are both '{fitting[0]}'")
        else:
            by_name[fitting[0]] = one
    return by_name, problems


def _readings(one: Named, shapes: Mapping[str, ModuleShape]) -> list[str]:
    """The names in the model that a module's name in the file may stand for, kohya's with underscores."""
    if one.part is None:
        return [one.name]
    joint = one.layout.joint
    rest = one.name.removeprefix(one.part + joint)
    there = module_of_part(one, shapes)
    inner = [
        rest,
        rest.removeprefix("text_model" + joint),
    ]  # a level that CLIP's text encoders had before transformers 5
    return [f"{there}{joint}{name}" if there else name for name in dict.fromkeys(inner)]


def module_of_part(one: Named, shapes: Mapping[str, ModuleShape]) -> str | None:
    """The model's module of the part that a module of the file is in; None where the model is that part alone."""
    return next((m for m in one.layout.parts.get(one.part or "", ()) if m in shapes), None)
