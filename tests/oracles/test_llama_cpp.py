"""What is exported for llama.cpp: the same files as its own converters write, and the same logits when it runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp_program as llama_cpp
import numpy as np
import pytest
import torch
from families import randomise
from gguf_cases import ROPES, adapter_of, model_of, with_pieces, with_smollm
from tiny_adapters import learned

from twofold.adapter.attach import activate, attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.base.load import DEFAULT_BASE, Base, load_base
from twofold.recipes.adapters import Asked
from twofold.recipes.export import MERGED, Format, export_adapter
from twofold.recipes.merge import merge_from_disk

pytestmark = [pytest.mark.slow, llama_cpp.needed]
OF_PIECES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", *ROPES]
OF_BYTES = ["llama", "qwen2", "qwen3", "gemma3"]
NAMED = {"general.name", "general.basename", "general.finetune", "general.size_label", "general.version"}
"""What their converter makes of the folder's name."""


def same_files(base: Path, adapter: Path, to: Format, tmp_path: Path) -> None:
    export_adapter(adapter, to, tmp_path / "ours.gguf", str(base))
    merge_from_disk(Asked(base=str(base), adapters=(str(adapter),)), tmp_path / "merged", verify=False)
    theirs = tmp_path / "theirs.gguf"
    llama_cpp.convert("convert_hf_to_gguf.py", tmp_path / "merged", "--outfile", theirs, "--outtype", MERGED[to])
    one, other = (gguf.GGUFReader(path) for path in (tmp_path / "ours.gguf", theirs))
    ours, found = ({t.name: t for t in reader.tensors} for reader in (one, other))
    assert ours.keys() == found.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == found[name].tensor_type, name
        assert np.array_equal(tensor.data, found[name].data), name
    said, told = ({k: f.contents() for k, f in r.fields.items() if not k.startswith("GGUF.")} for r in (one, other))
    differing = {k for k in said.keys() | told.keys() if said.get(k) != told.get(k)} - NAMED
    assert not {k for k in differing if not k.endswith("sliding_window_pattern")}, {
        k: (said.get(k), told.get(k)) for k in differing
    }


@pytest.mark.parametrize("to", ["gguf-f16", "gguf-q8_0"])
@pytest.mark.parametrize("family", OF_PIECES)
def test_the_model_is_that_of_llama_cpps_own_converter(family: str, to: Format, tmp_path: Path) -> None:
    model = model_of(family)
    base = with_pieces(tmp_path / "base", model)
    same_files(base, adapter_of(model, tmp_path / "adapter"), to, tmp_path)


@pytest.mark.parametrize("family", OF_BYTES)
def test_so_it_is_with_a_tokenizer_over_bytes(family: str, tmp_path: Path) -> None:
    base = with_smollm(tmp_path / "base", family)
    model = load_base(str(base), "float32", "cpu").model
    same_files(base, adapter_of(model, tmp_path / "adapter"), "gguf-bf16", tmp_path)


# ---------------------------------------------------------------------------------------------- what llama.cpp computes

PROMPTS = ("The capital of France is", "Once upon a time there was a", "def add(a, b):\n    return")
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16},
    "rslora": {"r": 8, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"k_proj": 3, "o_proj": 11},
        "alpha_pattern": {"up_proj": 4},
    },
}
TOLERANCE = {"gguf-f32": 5e-3, "gguf-f16": 0.05, "gguf-bf16": 0.25, "gguf-q8_0": 1.0}
"""Of a log-probability of the 1,000 likeliest tokens. llama.cpp rounds what a matrix is multiplied with to the matrix's own type:
nothing in float32, 11 bits in float16, 8 in bfloat16 and in q8_0, where the weights are rounded too."""


@pytest.fixture(scope="module")
def base() -> Base:
    """SmolLM2, in float32 the values of its bfloat16."""
    return load_base(DEFAULT_BASE, "float32", "cpu")


@pytest.fixture(scope="module")
def made(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Its adapters, and all of them at its model."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, settings in ADAPTERS.items():
        attach(base.model, LoraConfig(**settings), name)
        activate(base.model, name)
        randomise(learned(base.model), scale=0.02)
    for name in ADAPTERS:
        save_adapter(base.model, folder / name, name)
    yield folder
    detach(base.model)


@torch.no_grad()
def compared(base: Base, name: str, told: Callable[[list[int]], torch.Tensor], tolerance: float) -> None:
    """Next tokens after a few prompts, by the adapter kept apart and by what was told; and that the adapter matters."""
    for prompt in PROMPTS:
        ids = base.tokenizer.encode(prompt)
        found = told(ids)
        activate(base.model, name)
        ours = base.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        activate(base.model, {})
        without = base.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        best = ours.topk(1000).indices
        assert (ours - without)[best].abs().max() > 5 * min(tolerance, 0.2)
        assert (ours - found)[best].abs().max() < tolerance


def test_adapters_say_in_llama_cpp_what_they_say_here(base: Base, made: Path, tmp_path: Path) -> None:
    files = []
    for name in ADAPTERS:
        told = export_adapter(made / name, "gguf", tmp_path / f"{name}.gguf", DEFAULT_BASE)
        files.append(Path(told["output"]))
    export_adapter(made / "plain", "gguf", tmp_path / "again.gguf", DEFAULT_BASE, tmp_path / "base.gguf")
    size = base.model.config.vocab_size
    with llama_cpp.served(tmp_path / "base.gguf", files) as server:
        for i, name in enumerate(ADAPTERS):
            scales = [float(i == j) for j in range(len(files))]
            compared(base, name, lambda ids, s=scales: server.log_probabilities(ids, size, s), TOLERANCE["gguf-bf16"])


@pytest.mark.parametrize("to", TOLERANCE)
def test_merged_models_say_there_what_the_adapter_says_here(base: Base, made: Path, to: Format, tmp_path: Path) -> None:
    export_adapter(made / "patterns", to, tmp_path / "out.gguf", DEFAULT_BASE)
    with llama_cpp.served(tmp_path / "out.gguf") as server:
        size = base.model.config.vocab_size
        compared(base, "patterns", lambda ids: server.log_probabilities(ids, size), TOLERANCE[to])
