"""What the tests of the upper floors share: bases, data and a command line, each made once.

A test file says `pytest_plugins = ("tiny_fixtures",)` and asks for these by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_base import chats, gpt2, llama, tokenizer, write_base, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM
from warm_cli import WarmCli

from twofold.data.examples import DataConfig
from twofold.recipes.settings import AdapterSettings, TrainConfig
from twofold.training.optim import TrainingConfig


@pytest.fixture(scope="session")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a chat template."""
    tokens = tokenizer()
    return write_base(tmp_path_factory.mktemp("bases") / "tiny-llama", llama(len(tokens)), tokens)


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of the same shapes with other weights."""
    tokens = tokenizer()
    return write_base(tmp_path_factory.mktemp("bases") / "other-llama", llama(len(tokens), seed=2), tokens)


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of widths that bitsandbytes' own modules can multiply on a CPU: whole blocks in every row."""
    tokens = tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    config = LlamaConfig(**sizes, vocab_size=len(tokens), num_key_value_heads=2, initializer_range=0.15)
    return write_base(tmp_path_factory.mktemp("bases") / "wide-llama", LlamaForCausalLM(config), tokens)


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose input and output embeddings are one tensor."""
    tokens = tokenizer()
    model = llama(len(tokens), tie_word_embeddings=True)
    return write_base(tmp_path_factory.mktemp("bases") / "tied-llama", model, tokens)


@pytest.fixture(scope="session")
def gpt2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 without a chat template."""
    tokens = tokenizer(template=None)
    return write_base(tmp_path_factory.mktemp("bases") / "tiny-gpt2", gpt2(len(tokens)), tokens)


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 conversations."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", chats(23))


@pytest.fixture(scope="session")
def held_out_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 more."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "held_out.jsonl", chats(7, start=40))


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCli]:
    """`cli("plan", "--base", folder)` as a process of its own."""
    warm = WarmCli(tmp_path_factory.mktemp("cli"))
    yield warm
    warm.close()


@pytest.fixture
def config(llama_base: Path, train_file: Path, held_out_file: Path, tmp_path: Path) -> TrainConfig:
    """A training of 16 steps, which takes about a second."""
    return TrainConfig(
        base=str(llama_base),
        data=DataConfig(train=str(train_file), evaluation=str(held_out_file)),
        adapter=AdapterSettings(r=4),
        training=TrainingConfig(batch_size=6, epochs=4, learning_rate=0.02),
        output=str(tmp_path / "run"),
        dtype="float32",
        device="cpu",
    )
