"""Writes docs/configuration.md from the dataclasses and docs/interchange.md from the cases of its test: `python docs/build.py`.

A test fails when a page is behind.
"""

from __future__ import annotations

import dataclasses
import sys
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


INTERCHANGE = """# Adapters of other tools

## PEFT

Each line is a case of `tests/oracles/test_interchange.py`, which runs both ways against PEFT 0.21.2 on a tiny random model. "Equal"
says that the outputs are the same to 1e-4 and that PEFT finds no key missing or left over; anything else is a refusal, of which
the test finds these words. This page is written by `python docs/build.py` from the list of those cases.

| kind | settings | PEFT writes, Twofold reads | Twofold writes, PEFT reads |
|---|---|---|---|
"""
INTERCHANGE_END = """
A converted file is one that PEFT saved with `path_initial_model_for_weight_conversion`: of a start that changes the base it holds
the plain update. What Twofold writes is always plain, and the base is never changed.

"Equal, doubled": the tensors are the same, and the outputs are equal once the update of the output projection is doubled, for
PEFT 0.21.2 adds it twice.

## kohya's scripts and diffusers

`load_adapter` also reads one safetensors file without a config, or the folder that diffusers' `save_lora_weights` writes. The model
is one part of a pipeline, or all of them as modules of their names, `nn.ModuleDict({"unet": pipe.unet, ...})`:

```python
import torch
from safetensors.torch import save_file
from torch import nn

import twofold

factors = {"lora_down.weight": torch.randn(2, 8), "lora_up.weight": torch.randn(8, 2), "alpha": torch.tensor(1.0)}
save_file({f"lora_unet_mid_block_to_q.{name}": factor for name, factor in factors.items()}, "style.safetensors")

pipeline = nn.ModuleDict({"unet": nn.ModuleDict({"mid_block": nn.ModuleDict({"to_q": nn.Linear(8, 8)})})})
print(twofold.load_adapter(pipeline, "style.safetensors").config.lora_alpha)
twofold.save_adapter(pipeline, "style")  # in PEFT's format from now on
```

Kohya's names have underscores for dots. Which they were is found by writing the model's own names so; a name that may be two
modules is refused.

| in the file | what is done |
|---|---|
| `lora_unet` | `unet`, else `transformer` |
| `lora_te` or `lora_te1`, `lora_te2`, `lora_te3` | `text_encoder`, `text_encoder_2`, `text_encoder_3` or else `text_encoder_2` |
| `lora_down`, `lora_up`, `alpha` | read; the scale is alpha / r of each module, 1 without an alpha |
| `lora_mid` (LoCon) | read: A is the product of the two convolutions |
| `dora_scale`, `lora_magnitude_vector`, `lora_B.bias` | read, of linear maps and where all modules have it |
| diffusers' names, of today and before (`lora.down`, `processor.to_q_lora`, `lora_linear_layer`) | read |
| diffusers' `lora_adapter_metadata` in the header | read: PEFT's ranks, alphas, patterns and rsLoRA, by part |
| diffusers' factors without metadata or alphas | read at scale 1, as diffusers does |
| alphas for some modules of a part in diffusers' names, and for others none | refused: the scale of those is not to be known |
| LoHa, LoKr, OFT, whole differences of weights | refused: no LoRA |
| names of another model, such as the original code of Stable Diffusion | refused, with the nearest names |
| a convolution with groups | refused |
"""


def interchange() -> str:
    """The page of what round-trips."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from interchange_cases import CASES

    def told(settings: dict[str, Any]) -> str:
        return ", ".join(f"`{k}={v!r}`" for k, v in settings.items()).replace("|", chr(92) + "|")

    def cell(case: Any, refusal: str) -> str:
        return f"refused: {refusal}" if refusal else "equal, doubled" if case.doubled else "equal"

    rows = [
        f"| {case.name} | {told(case.settings)} | {cell(case, case.refused_read)} | {cell(case, case.refused_written)} |\n"
        for case in CASES
    ]
    return INTERCHANGE + "".join(rows) + INTERCHANGE_END


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page(), encoding="utf-8")
    Path(__file__).with_name("interchange.md").write_text(interchange(), encoding="utf-8")
