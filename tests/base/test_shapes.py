"""A base without its weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from twofold.base.shapes import meta_model
from twofold.errors import BaseError


@pytest.fixture
def header(tmp_path: Path) -> Path:
    """A GGUF file that has a header and next to no tensors: whoever reads weights from it fails."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(160)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(50)
    writer.add_tensor("output.weight", torch.zeros(50, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_planned_from_its_header(header: Path) -> None:
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 160, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    expected = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    found = meta_model(str(header))
    assert {n: p.shape for n, p in found.named_parameters()} == expected
    assert next(found.parameters()).is_meta


def test_a_gguf_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="no GGUF file at"):
        meta_model(str(tmp_path / "none.gguf"))
    (tmp_path / "odd.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(BaseError, match="cannot read the configuration"):
        meta_model(str(tmp_path / "odd.gguf"))
