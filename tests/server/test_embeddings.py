"""`/v1/embeddings`, asked for by OpenAI's client, against transformers one text at a time."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
import transformers as hf
from tiny_base import tokenizer, write_base
from tiny_server import Running, running, served

from twofold.engine.encoder import Encoder, load_encoder
from twofold.errors import BaseError
from twofold.recipes.serve import ServeConfig

pytest_plugins = ("tiny_fixtures", "server_fixtures")
TEXTS = ["hat", "colour of the cup 1?", "a boat and a lamp and a door", "h"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = tokenizer()
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = hf.BertConfig(vocab_size=len(tokens), max_position_embeddings=32, initializer_range=0.3, **sizes)
    return write_base(tmp_path_factory.mktemp("encoders") / "tiny-bert", hf.BertModel(config).eval(), tokens)


@pytest.fixture(scope="module")
def live_encoder(llama_base: Path, adapters: Path, bert: Path) -> Iterator[Running]:
    of = dataclasses.replace(served(llama_base), encoder=load_encoder(str(bert)))
    with running(of, ServeConfig(adapters=adapters)) as found:
        yield found


@pytest.fixture(scope="module")
def client(live_encoder: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live_encoder.url}/v1", api_key="none", max_retries=0)


def expected(bert: Path, text: str) -> list[float]:
    """The mean of a lone text's states, as long as one."""
    model, tokens = hf.AutoModel.from_pretrained(bert), hf.AutoTokenizer.from_pretrained(bert)
    with torch.no_grad():
        mean = model(**tokens(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
    return list((mean / mean.norm()).tolist())


def test_many_texts_at_once_have_the_vectors_that_each_has_alone(client: openai.OpenAI, bert: Path) -> None:
    found = client.embeddings.create(
        model="tiny-bert", input=TEXTS * 6
    )  # more than go into one pass; base64 on the way
    assert [d.index for d in found.data] == list(range(24))
    for text, one in zip(TEXTS * 6, found.data, strict=True):
        assert one.embedding == pytest.approx(expected(bert, text), abs=1e-5)
    assert found.usage.prompt_tokens == found.usage.total_tokens > 24


def test_between_two_steps_there_are_few_tokens_and_none_for_a_client_that_left(
    live_encoder: Running, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, embed, url = list[tuple[int, int]](), Encoder.embed, f"{live_encoder.url}/v1/embeddings"

    def seen(encoder: Encoder, texts: list[list[int]]) -> torch.Tensor:
        passes.append((len(texts), max(map(len, texts))))
        time.sleep(0.02)
        return embed(encoder, texts)

    monkeypatch.setattr(Encoder, "embed", seen)
    texts = [[5 + i] * (32 if i % 5 else 1 + i) for i in range(30)]
    found = httpx.post(url, json={"model": "tiny-bert", "input": texts}, timeout=30).json()["data"]
    alone = torch.cat([embed(load_encoder(str(bert)), [text]) for text in texts])
    torch.testing.assert_close(torch.tensor([d["embedding"] for d in found]), alone, rtol=0, atol=1e-5)
    assert sum(count for count, _ in passes) == len(texts)
    assert all(count * longest <= 512 for count, longest in passes)
    passes.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json={"model": "tiny-bert", "input": [[5] * 32] * 1600}, timeout=0.2)
    deadline = time.monotonic() + 10
    while live_encoder.service.admission.inside:
        assert time.monotonic() < deadline, "the encoder goes on although nobody listens"
        time.sleep(0.01)
    assert 0 < len(passes) < 1600 * 32 / 512


def test_one_text_tokens_and_plain_numbers(client: openai.OpenAI, bert: Path) -> None:
    tokens = hf.AutoTokenizer.from_pretrained(bert)("hat")["input_ids"]
    for given in ("hat", tokens, [tokens]):
        (one,) = client.embeddings.create(model="tiny-bert", input=given, encoding_format="float").data
        assert one.embedding == pytest.approx(expected(bert, "hat"), abs=1e-5)


def test_what_cannot_be_embedded_is_refused_in_a_sentence(client: openai.OpenAI, live: Running) -> None:
    def refused(**asked: object) -> str:
        with pytest.raises(openai.APIStatusError) as caught:
            client.embeddings.create(**{"model": "tiny-bert", "input": "hat", **asked})  # type: ignore[call-overload]
        assert caught.value.status_code in (400, 404)
        return str(caught.value)

    assert "did you mean 'tiny-bert'" in refused(model="tiny-bort")
    assert "'tiny-bert'" in refused(model="red")
    assert "1 to 32" in refused(input="hat " * 200)
    assert "text 1" in refused(input=["hat", ""])
    assert "does not know" in refused(input=[5, 10**6])
    assert "16 dimensions" in refused(dimensions=8)
    bare = live.post("/v1/embeddings", {"model": "tiny", "input": "hat"})
    assert (bare.status_code, bare.json()["error"]["code"]) == (400, "no_encoder")


def test_the_encoder_is_listed_and_does_not_chat(client: openai.OpenAI, live_encoder: Running) -> None:
    assert "tiny-bert" in [m.id for m in client.models.list()]
    assert client.models.retrieve("tiny-bert").id == "tiny-bert"
    asked = {"model": "tiny-bert", "messages": [{"role": "user", "content": "hat"}]}
    assert live_encoder.post("/v1/chat/completions", asked).status_code == 404


def test_pooling_follows_the_encoders_own_file(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for file in bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "1_Pooling").mkdir()
    described = folder / "1_Pooling" / "config.json"
    described.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    encoder = load_encoder(str(folder))
    ids = encoder.tokens("hat")
    state = encoder.model(torch.tensor([ids])).last_hidden_state[0, 0]
    torch.testing.assert_close(encoder.embed([ids])[0], state / state.norm())
    described.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(BaseError, match="pooling_mode_max_tokens"):
        load_encoder(str(folder))
