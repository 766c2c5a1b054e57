"""What is exported for llama.cpp: the same files as its own converters write, and the same logits when it runs them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
from torch import nn

from twofold.adapter.attach import activate, attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.base.load import DEFAULT_BASE, Base, load_base
from twofold.layers.linear import LoraLinear
from twofold.recipes.adapters import Asked
from twofold.recipes.export import MERGED, Format, export_adapter
from twofold.recipes.merge import merge_from_disk

pytestmark = [pytest.mark.slow, llama_cpp.needed]
OF_PIECES = ["llama", "llama-tied", "code-llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", *ROPES]
OF_BYTES = ["llama", "qwen3", "gemma3"]
"""Of a Qwen2's tokenizer transformers splits texts as Qwen2 does, whatever its file says, so SmolLM2's is none."""
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
TIMES: dict[Format, float] = {"gguf-f32": 5.0, "gguf-f16": 5.0, "gguf-bf16": 5.0, "gguf-q8_0": 2.0}
"""How far llama.cpp may be off, in multiples of what rounding alone does here: it rounds at other places too, and the weights.
It was 0.3 to 2.8 times when this was written, and a file with its keys' rows in the wrong order 12 to 400,000 times. Eight
bits make so much noise that an adapter is only a few times as loud."""


def blocks_of_eight_bits(x: torch.Tensor) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind))


ROUNDED: dict[Format, Callable[[torch.Tensor], torch.Tensor]] = {
    "gguf-f32": lambda x: x + x * 2.0**-19 * torch.rand_like(x),
    "gguf-f16": lambda x: x.half().float(),
    "gguf-bf16": lambda x: x.bfloat16().float(),
    "gguf-q8_0": blocks_of_eight_bits,
}
"""What llama.cpp does on a CPU to the vectors that it multiplies a matrix with: it rounds them to the matrix's own type
(`vec_dot_type` in ggml-cpu.c). In float32, sums of up to 1,536 products are made in another order, which moves them by the root of
that many roundings."""


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
        randomise(learned(base.model), scale=0.05)
    for name in ADAPTERS:
        save_adapter(base.model, folder / name, name)
    yield folder
    detach(base.model)


@contextmanager
def rounding(model: nn.Module, rounded: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Every linear map takes its input rounded."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | LoraLinear)]
    hooks = [m.register_forward_pre_hook(lambda _, given: (rounded(given[0]), *given[1:])) for m in linear]
    yield
    for hook in hooks:
        hook.remove()


def next_token(model: Any, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return found


@torch.no_grad()
def errors(base: Base, name: str, told: Callable[[list[int]], torch.Tensor], to: Format) -> list[float]:
    """After each prompt, how far what was told of the next token is from what the adapter says, in multiples of what rounding does.

    By log-probabilities of the 1,000 likeliest tokens, up to a constant: the server sums 49,152 probabilities in float32, and that
    error is in all of them. The adapter itself must move them by far more.
    """
    found = []
    for prompt in PROMPTS:
        ids = base.tokenizer.encode(prompt)
        activate(base.model, {})
        without = next_token(base.model, ids)
        activate(base.model, name)
        ours = next_token(base.model, ids)
        with rounding(base.model, ROUNDED[to]):
            noisy = next_token(base.model, ids)
        best = ours.topk(1000).indices
        moved, noise, off = (float((x - ours)[best].std()) for x in (without, noisy, told(ids)))
        assert moved > 1.5 * TIMES[to] * noise
        found.append(off / noise)
    return found


def test_adapters_say_in_llama_cpp_what_they_say_here(base: Base, made: Path, tmp_path: Path) -> None:
    files = [Path(export_adapter(made / n, "gguf", tmp_path / f"{n}.gguf", DEFAULT_BASE)["output"]) for n in ADAPTERS]
    files += [spoiled(file, tmp_path / f"wrong-{file.name}") for file in files[:1]]
    export_adapter(made / "plain", "gguf", tmp_path / "again.gguf", DEFAULT_BASE, tmp_path / "base.gguf")
    size = base.model.config.vocab_size
    with llama_cpp.served(tmp_path / "base.gguf", files) as server:

        def through(file: int, scale: float, ids: list[int]) -> torch.Tensor:
            return server.log_probabilities(ids, size, [scale * (file == i) for i in range(len(files))])

        for i, name in enumerate(ADAPTERS):
            assert max(errors(base, name, partial(through, i, 1.0), "gguf-bf16")) < TIMES["gguf-bf16"]
            assert min(errors(base, name, partial(through, i, 0.5), "gguf-bf16")) > TIMES["gguf-bf16"]
        assert min(errors(base, "plain", partial(through, len(ADAPTERS), 1.0), "gguf-bf16")) > TIMES["gguf-bf16"]


@pytest.mark.parametrize("to", ROUNDED)
def test_merged_models_say_there_what_the_adapter_says_here(base: Base, made: Path, to: Format, tmp_path: Path) -> None:
    export_adapter(made / "patterns", to, tmp_path / "out.gguf", DEFAULT_BASE)
    size = base.model.config.vocab_size
    for file, is_right in (
        (tmp_path / "out.gguf", True),
        (spoiled(tmp_path / "out.gguf", tmp_path / "wrong.gguf"), False),
    ):
        with llama_cpp.served(file) as server:
            found = errors(base, "patterns", lambda ids, s=server: s.log_probabilities(ids, size), to)
        assert max(found) < TIMES[to] if is_right else min(found) > TIMES[to]


def spoiled(path: Path, wrong: Path) -> Path:
    """The same file, with keys in the order that transformers has their rows in."""
    shutil.copy(path, wrong)
    for tensor in gguf.GGUFReader(wrong, "r+").tensors:
        if re.search(r"attn_k\.weight(\.lora_b)?$", tensor.name):
            heads = 3 * 2
            rows = tensor.data.reshape(heads // 2, len(tensor.data) // heads, 2, -1)
            tensor.data[:] = rows.swapaxes(1, 2).reshape(tensor.data.shape)
    return wrong
