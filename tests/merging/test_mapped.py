"""Merging without loading: bases mapped from their files, mixtures whose experts lie apart there, and what is held in memory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import build_model, randomise
from safetensors.torch import load_file, save_file
from tiny_adapters import learned
from tiny_base import tokenizer, write_base

from twofold.adapter.attach import attach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import save_adapter
from twofold.base.load import load_base
from twofold.base.mapped import NotMapped, map_base
from twofold.base.streamed import open_streamed
from twofold.events import Event, Message
from twofold.merging.checkpoint import write_merged
from twofold.recipes.adapters import Asked
from twofold.recipes.merge import check_merged, merge_from_disk

pytest_plugins = ("tiny_fixtures",)

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
}


def mixture(folder: Path, family: str) -> Path:
    """A mixture as its makers store it: a tensor for each expert; in bfloat16 and several files."""
    torch.manual_seed(3)
    if family == "mixtral":
        config: Any = hf.MixtralConfig(**SIZES, num_local_experts=12, num_experts_per_tok=2)
    else:
        config = hf.Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=12, num_experts_per_tok=2, moe_intermediate_size=16)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer().save_pretrained(folder)
    assert any("experts.11." in key for path in folder.glob("*.safetensors") for key in load_file(path))
    return folder


def adapters(base: Path, folder: Path, *settings: dict[str, Any]) -> tuple[str, ...]:
    """Adapters of these settings that change something, as folders."""
    found = []
    for i, one in enumerate(settings):
        model = load_base(str(base), "bfloat16", "cpu").model
        attach(model, LoraConfig(**{"r": 3, "lora_alpha": 4, **one}))
        randomise(learned(model), seed=i)
        found.append(str(save_adapter(model, folder / f"adapter-{i}")))
    return tuple(found)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def check_as_in_memory(asked: Asked, tmp_path: Path) -> None:
    heard: list[Event] = []
    found = merge_from_disk(asked, tmp_path / "disk", heard.append)
    assert not any(isinstance(e, Message) and "in memory" in e.text for e in heard)
    assert found["verification"]["passed"] or found["verification"]["inconclusive"]  # a token that no prompt has
    loaded = asked.load(heard.append)
    write_merged(loaded.model, loaded.tokenizer, tmp_path / "memory")
    ours, theirs = tensors(tmp_path / "disk"), tensors(tmp_path / "memory")
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    assert check_merged(asked.mapped(heard.append), tmp_path / "disk")["holds_the_adapter"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3"])
def test_experts_apart_as_in_memory(family: str, tmp_path: Path) -> None:
    base = mixture(tmp_path / "base", family)
    settings = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    one, two = adapters(base, tmp_path, settings, {"target_modules": [], "target_parameters": EXPERTS[:1], "r": 2})
    asked = Asked(base=str(base), adapters=(f"{one}:0.5", f"{two}:-2"), dtype="bfloat16", device="cpu")
    check_as_in_memory(asked, tmp_path)
    before, after = tensors(base), tensors(tmp_path / "disk")
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {k for k in before if ".experts." in k or "q_proj" in k}


def test_joined_experts_of_a_mapped_base_take_no_memory(tmp_path: Path) -> None:
    base = mixture(tmp_path / "base", "mixtral")
    mapped = map_base(str(base))
    joined = [p for n, p in mapped.model.named_parameters() if ".experts." in n]
    assert len(joined) == 4
    assert all(p.untyped_storage().nbytes() == 2 for p in joined)
    assert mapped.fingerprint == load_base(str(base), "bfloat16", "cpu").fingerprint
    assert mapped.fingerprint == open_streamed(str(base)).fingerprint()


CASES: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora-bias": {"use_rslora": True, "bias": "all", "rank_pattern": {"q_proj": 5}},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, settings) for family in ("llama-tied", "qwen2") for settings in CASES.values()),
        ("gemma3", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ],
)
def test_every_variant_of_a_mapped_base_as_in_memory(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = build_model(family)
    model.resize_token_embeddings(300)
    base = write_base(tmp_path / "base", model.to(torch.bfloat16), tokenizer())
    asked = Asked(base=str(base), adapters=adapters(base, tmp_path, settings), dtype="bfloat16", device="cpu")
    check_as_in_memory(asked, tmp_path)


def test_keys_with_another_prefix_are_found(llama_base: Path, tmp_path: Path) -> None:
    """A checkpoint of the body alone names its tensors without the prefix; the head is tied."""
    model = build_model("llama-tied")
    model.resize_token_embeddings(300)
    base = write_base(tmp_path / "base", model, tokenizer())
    model.model.save_pretrained(base)
    assert "layers.0.self_attn.q_proj.weight" in tensors(base)
    asked = Asked(base=str(base), adapters=adapters(base, tmp_path, {}), device="cpu")
    merge_from_disk(asked, tmp_path / "merged", verify=False)
    before, after = tensors(base), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert not torch.equal(before["layers.0.self_attn.q_proj.weight"], after["layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("equal", [True, False], ids=["twice the same", "apart"])
@pytest.mark.parametrize(
    ("settings", "untied"),
    [
        ({"target_modules": ["embed_tokens"]}, True),
        ({"target_modules": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, False),
    ],
    ids=["embedding", "head", "tokens"],
)
def test_a_head_that_lies_beside_its_embedding(
    settings: dict[str, Any], untied: bool, equal: bool, tied_base: Path, tmp_path: Path
) -> None:
    """transformers ties the two where their values are equal, and warns where they are not."""
    base = Path(shutil.copytree(tied_base, tmp_path / "base"))
    held = load_file(base / "model.safetensors")
    embedding = held["model.embed_tokens.weight"]
    save_file(
        {**held, "lm_head.weight": embedding.clone() if equal else -embedding},
        base / "model.safetensors",
        {"format": "pt"},
    )
    asked = Asked(base=str(base), adapters=adapters(base, tmp_path, settings), dtype="float32", device="cpu")
    loaded = asked.load(lambda _: None)
    assert map_base(str(base)).fingerprint == load_base(str(base), "float32", "cpu").fingerprint
    merge_from_disk(asked, tmp_path / "merged", verify=False)
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is not (untied and equal)
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(merged(ids).logits, loaded.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_is_not_safetensors_is_merged_in_memory(llama_base: Path, tmp_path: Path) -> None:
    found = adapters(llama_base, tmp_path, {})
    heard: list[Event] = []
    asked = Asked(base=str(llama_base), adapters=found, dtype="bfloat16", device="cpu")
    with pytest.raises(NotMapped, match="float32, but bfloat16 is asked for"):
        asked.mapped(heard.append)
    merge_from_disk(asked, tmp_path / "merged", heard.append, verify=False)
    assert any(isinstance(e, Message) and "in memory" in e.text for e in heard)
    assert all(t.dtype is torch.bfloat16 for t in tensors(tmp_path / "merged").values())


# ----------------------------------------------------------------------------------------------- memory


def largest_anonymous(process: subprocess.Popen[Any]) -> int:
    """The most memory of its own, not of files, that a process was seen to hold, in bytes."""
    largest = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        held = re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB", status, re.MULTILINE)
        largest = max(largest, 1024 * sum(map(int, held)))
        time.sleep(0.002)
    return largest


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells memory of one's own from that of files")
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    config = hf.LlamaConfig(
        vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=9, num_attention_heads=8
    )
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="100MB")
    tokenizer().save_pretrained(tmp_path / "base")
    size, largest = sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters())
    attach(model, LoraConfig(r=8))
    randomise(learned(model))
    save_adapter(model, tmp_path / "adapter")
    flags = ["--base", "base", "--adapter", "adapter", "-o", "merged", "--no-verify"]
    running = subprocess.Popen([sys.executable, "-m", "twofold", "merge", *flags], cwd=tmp_path)
    found = largest_anonymous(running)
    assert running.wait() == 0
    assert size > 300e6
    assert found < 4 * largest + 300e6
