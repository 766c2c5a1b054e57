"""A LoRA adapter as mlx-lm keeps one: both factors transposed, one rank and one scale for all modules."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from twofold import atomic
from twofold.errors import ConfigError, ProofError
from twofold.lowrank.factors import LowRank
from twofold.merging.export.factors import commonest_scale, of_one_rank, prove
from twofold.tensorfile import TensorFile, write_tensors

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
LAYER = re.compile(r"(.*\.layers\.)(\d+)\.(.+)")


def write_mlx(updates: Mapping[str, LowRank], layers: int, folder: Path) -> float:
    """Write the folder, read it back, and compare: the largest relative difference.

    Args:
        layers: of the base: mlx-lm counts the adapted ones from the last.

    Raises:
        ConfigError: a module lies outside of the decoder's layers, where mlx-lm puts no adapter.
        RunError: the folder exists or cannot be written.
        ProofError: what was read back is something else.
    """
    matches = {module: LAYER.fullmatch(module) for module in updates}
    outside = [module for module, match in matches.items() if match is None]
    if outside:
        raise ConfigError(
            f"mlx-lm puts adapters on the layers of a decoder alone, and {', '.join(outside[:4])} lies outside; merge this adapter "
            "into its base (twofold merge), or train without"
        )
    alike = of_one_rank(updates, commonest_scale(updates))
    first = next(iter(alike.values()))
    settings = {
        "rank": first.rank,
        "scale": first.scale,
        "dropout": 0.0,
        "keys": sorted({match[3] for match in matches.values() if match}),
    }
    with atomic.new_folder(folder) as temporary:
        tensors = {f"{module}.lora_a": update.A.T for module, update in alike.items()}
        tensors |= {f"{module}.lora_b": update.B.T for module, update in alike.items()}
        write_tensors(temporary / WEIGHTS, tensors)
        config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": settings}
        atomic.write_json(temporary / CONFIG, config)
        return prove(updates, read_mlx(temporary, layers), str(folder))


def read_mlx(folder: Path, layers: int) -> dict[str, LowRank]:
    """The updates in a folder as mlx-lm would apply them: of the modules in `keys`, in the last `num_layers` of the base's layers.

    Raises:
        ProofError: the factors have another rank than the config says.
    """
    file = TensorFile(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    settings, first = config["lora_parameters"], layers - config["num_layers"]
    found = {}
    for module in sorted({key.rpartition(".")[0] for key in file.shapes}):
        match = LAYER.fullmatch(module)
        if match is None or int(match[2]) < first or match[3] not in settings["keys"]:
            continue
        A, B = (file.read(f"{module}.{end}").T for end in ("lora_a", "lora_b"))
        found[module] = LowRank(A, B, settings["scale"])
        if len(A) != settings["rank"]:
            said = f"{CONFIG}, read back, says rank {settings['rank']}, but '{module}' has {len(A)}"
            raise ProofError(f"{said}; do not use it")
    return found
