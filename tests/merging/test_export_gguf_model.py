"""A merged model as one GGUF file: against transformers' own reader of such files, and formulas of llama.cpp written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers as hf
from families import VOCABULARY, build_model, logits, randomise
from gguf_cases import ROPES, adapter_of, model_of, pieces, with_pieces
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from twofold.errors import ConfigError, ProofError, RunError
from twofold.events import Warned
from twofold.merging.export import gguf_model, gguf_tokens
from twofold.recipes.adapters import Asked
from twofold.recipes.export import Format, export_adapter
from twofold.recipes.merge import merge_from_disk

READ_BY_TRANSFORMERS = ["llama", "one-embedding", "mistral", "qwen2", "qwen3"]
"""Its reader knows nothing of partial rotary embeddings, biases of a Llama, and where logits are capped."""


def exported(family: str, tmp_path: Path, to: Format = "gguf-f32", **settings: Any) -> tuple[Any, Path, dict[str, Any]]:
    """The model with its adapter on, the file, and what was said of it."""
    model = model_of(family)
    base = with_pieces(tmp_path / "base", model)
    adapter = adapter_of(model, tmp_path / "adapter", **settings)
    path = tmp_path / "gguf" / "out.gguf"
    return model, path, export_adapter(adapter, to, path, str(base))


@pytest.mark.parametrize("family", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_merged_model_in_it(family: str, tmp_path: Path) -> None:
    model, path, told = exported(family, tmp_path)
    assert told["largest_difference"] < 1e-7
    found = hf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=2e-4)


def test_a_phi3_is_its_fused_maps_and_says_how_much_of_a_head_turns(tmp_path: Path) -> None:
    model, path, told = exported("phi3", tmp_path)
    assert told["largest_difference"] < 1e-7
    assert gguf.GGUFReader(path).fields["phi3.rope.dimension_count"].contents() == 4
    read = hf.AutoModelForCausalLM.from_pretrained
    found = read(path.parent, gguf_file=path.name, dtype=torch.float32, config=model.config).eval()
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=2e-4)


def test_it_holds_the_tokenizer_and_the_template(tmp_path: Path) -> None:
    _, path, _ = exported("llama", tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=pieces())
    fields = gguf.GGUFReader(path).fields
    numbers = range(theirs.vocab_size())
    assert fields["tokenizer.ggml.tokens"].contents() == [theirs.IdToPiece(i) for i in numbers]
    np.testing.assert_allclose(fields["tokenizer.ggml.scores"].contents(), [theirs.GetScore(i) for i in numbers])
    assert fields["tokenizer.ggml.token_type"].contents()[:5] == [3, 3, 3, 2, 1]  # control thrice, unknown, normal
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0].content }}"
    assert (path.with_suffix(".Modelfile")).read_text() == "FROM ./out.gguf\n"


@pytest.mark.parametrize(
    ("to", "kind"), [("gguf-f16", "F16"), ("gguf-bf16", "BF16"), ("gguf-q8_0", "Q8_0"), ("gguf-f32", "F32")]
)
def test_matrices_are_rounded_once_to_the_type_asked_for(to: Format, kind: str, tmp_path: Path) -> None:
    _, path, told = exported("qwen3", tmp_path, to)
    merge_from_disk(
        Asked(base=str(tmp_path / "base"), adapters=(str(tmp_path / "adapter"),)), tmp_path / "merged", verify=False
    )
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    held = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert len(held) == len(merged)
    down = held["blk.1.ffn_down.weight"]  # 48 columns are no whole blocks of 32, so that q8_0 has no form for it
    assert down.tensor_type.name == ("F16" if kind == "Q8_0" else kind)
    up, expected = held["blk.1.ffn_up.weight"], merged["model.layers.1.mlp.up_proj.weight"]
    assert up.tensor_type.name == kind
    values = torch.from_numpy(np.array(gguf.quants.dequantize(up.data, up.tensor_type)))
    if kind == "Q8_0":  # blocks of 32: a step d = max/127 in float16, and whole numbers of steps
        blocks = expected.reshape(-1, 32)
        steps = blocks.abs().amax(1, keepdim=True) / 127
        expected = ((blocks / steps).round() * steps.half().float()).reshape(expected.shape)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    else:
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind]
        assert torch.equal(values, expected.to(dtype).float())
    assert held["output_norm.weight"].tensor_type.name == "F32"
    assert told["largest_difference"] == pytest.approx(
        0, abs={"F32": 0, "F16": 5e-4, "BF16": 2**-8, "Q8_0": 4.6e-3}[kind]
    )


@pytest.mark.parametrize(("to", "dtype"), [("gguf-f32", torch.float32), ("gguf-f16", torch.float16)])
def test_the_sum_is_not_rounded_to_the_bases_type_before(to: Format, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of("qwen3").bfloat16()
    base, key = with_pieces(tmp_path / "base", model), "model.layers.1.mlp.up_proj"
    adapter = adapter_of(model, tmp_path / "adapter")
    export_adapter(adapter, to, tmp_path / "out.gguf", str(base))
    held = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    values = torch.from_numpy(np.array(held["blk.1.ffn_up.weight"].data)).float()
    factors = load_file(adapter / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.{key}.lora_{which}.weight"].double() for which in "AB")
    expected = load_file(base / "model.safetensors")[f"{key}.weight"].double() + 6 / 4 * B @ A
    torch.testing.assert_close(values, expected.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_frequencies_are_slowed_as_llama_31_wants(tmp_path: Path) -> None:
    _, path, _ = exported("llama3", tmp_path)
    reader = gguf.GGUFReader(path)
    found = next(t.data for t in reader.tensors if t.name == "rope_freqs.weight")
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](model_of("llama3").config, "cpu")
    plain = 1 / ROPES["llama3"][1]["rope_theta"] ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / torch.from_numpy(np.array(found)), inverse, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["linear", "yarn"])
def test_scaled_rotary_embeddings_are_told(name: str, tmp_path: Path) -> None:
    family, rope = ROPES[name]
    _, path, _ = exported(name, tmp_path)
    fields = gguf.GGUFReader(path).fields
    assert fields[f"{family}.rope.scaling.type"].contents() == name
    assert fields[f"{family}.rope.scaling.factor"].contents() == rope["factor"]
    assert fields[f"{family}.rope.freq_base"].contents() == rope["rope_theta"]


def test_an_untied_head_is_written_beside_the_embedding(tmp_path: Path) -> None:
    model, path, _ = exported("one-embedding", tmp_path, target_modules=["lm_head"])
    assert "output.weight" in {t.name for t in gguf.GGUFReader(path).tensors}
    found = hf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"llama\.cpp has no tensor for 'lm_head\.weight' in a gemma2 model"):
        exported("gemma2", tmp_path / "more", target_modules=["lm_head"])


def test_dora_goes_into_a_merged_file(tmp_path: Path) -> None:
    model, path, _ = exported("qwen2", tmp_path, use_dora=True)
    found = hf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=2e-4)


def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every fourth layer is without rotary embedding"):
        exported("smollm3", tmp_path)
    with pytest.raises(ConfigError, match=r"how llama\.cpp lays gpt2"):
        exported("gpt2", tmp_path / "2")
    with pytest.raises(ConfigError, match="query_pre_attn_scalar is 256, there it is 8"):
        model_path(build_gemma3(256), tmp_path / "3")


def build_gemma3(scalar: int) -> Any:
    config = build_model("gemma3").config
    config.query_pre_attn_scalar = scalar
    model = hf.Gemma3ForCausalLM(config)
    randomise(model.named_parameters())
    return model.eval()


def model_path(model: Any, tmp_path: Path) -> Path:
    base = with_pieces(tmp_path / "base", model)
    export_adapter(adapter_of(model, tmp_path / "adapter"), "gguf-f32", tmp_path / "out.gguf", str(base))
    return tmp_path / "out.gguf"


def test_layers_with_windows_are_told_where_they_are_unusual(tmp_path: Path) -> None:
    fields = gguf.GGUFReader(model_path(build_gemma3(8), tmp_path)).fields
    assert fields["gemma3.attention.sliding_window"].contents() == 4
    assert fields["gemma3.attention.sliding_window_pattern"].contents() == [True, False]
    assert fields["gemma3.rope.freq_base"].contents() == 1e6


def test_a_window_that_llama_cpp_ignores_is_said(tmp_path: Path) -> None:
    model = build_model("mistral-window")
    base, adapter = with_pieces(tmp_path / "base", model), adapter_of(model, tmp_path / "adapter")
    said: list[Any] = []
    export_adapter(adapter, "gguf-f16", tmp_path / "out.gguf", str(base), emit=said.append)
    expected = "llama.cpp knows no window of attention for llama: beyond 4 tokens its answers will differ"
    assert expected in [e.text for e in said if isinstance(e, Warned)]


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = build_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = 1e6
    base, adapter = with_pieces(tmp_path / "base", model), adapter_of(model, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"'blk.0.ffn_up.weight' holds values beyond float16"):
        export_adapter(adapter, "gguf-f16", tmp_path / "out.gguf", str(base))
    assert not (tmp_path / "out.gguf").exists()


def test_a_spoiled_file_is_not_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = gguf_model._encoded

    def spoiled(tensor: Any, kind: Any, name: str) -> Any:
        found = encoded(tensor, kind, name)
        if name == "blk.1.attn_k.weight":
            found[:2] = found[[1, 0]]
        return found

    monkeypatch.setattr(gguf_model, "_encoded", spoiled)
    with pytest.raises(ProofError, match=r"'blk.1.attn_k.weight' of .*out.gguf, read back, is off by"):
        exported("llama", tmp_path)
    assert not (tmp_path / "gguf" / "out.gguf").exists()


def test_an_unknown_tokenizer_and_one_that_is_too_large_are_refused(tmp_path: Path) -> None:
    from tiny_base import tokenizer

    tokens = tokenizer()
    tokens.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"how the tokenizer in .* splits text has no name here.*convert_hf_to_gguf.py"
    ):
        gguf_tokens.vocabulary(tmp_path, tokens, 400)
    with pytest.raises(ConfigError, match="but the model has embeddings for 64 alone"):
        gguf_tokens.vocabulary(tmp_path, tokens, VOCABULARY)


def test_the_modelfile_names_the_base_that_is_written_beside(tmp_path: Path) -> None:
    model = model_of("llama")
    base, adapter = with_pieces(tmp_path / "base", model), adapter_of(model, tmp_path / "adapter")
    told = export_adapter(adapter, "gguf", tmp_path / "a.gguf", str(base), tmp_path / "base.gguf")
    assert told["base_gguf"] == str(tmp_path / "base.gguf")
    assert (tmp_path / "a.Modelfile").read_text() == "FROM ./base.gguf\nADAPTER ./a.gguf\n"
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(found), logits(build_model("llama")), rtol=1e-4, atol=1e-5)
    before = (tmp_path / "base.gguf").stat().st_mtime_ns
    again = export_adapter(adapter, "gguf", tmp_path / "other" / "b.gguf", str(base), tmp_path / "base.gguf")
    assert "base_gguf" not in again
    assert (tmp_path / "base.gguf").stat().st_mtime_ns == before
    assert f"FROM {tmp_path.resolve()}/base.gguf" in (tmp_path / "other" / "b.Modelfile").read_text()
    named = export_adapter(adapter, "gguf", tmp_path / "c.gguf", str(tmp_path / "base.gguf"))
    assert named["modelfile_is_whole"]
    assert (tmp_path / "c.Modelfile").read_text() == "FROM ./base.gguf\nADAPTER ./c.gguf\n"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "out.gguf").write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        exported("llama", tmp_path)
    assert (tmp_path / "gguf" / "out.gguf").read_text() == "mine"
