"""Answers over HTTP, asked for by OpenAI's own client: what it says, streamed and not, whoever answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tiny_server import CONTEXT, Running, lines, question

from twofold.base.load import load_base
from twofold.recipes.generate import GenerationConfig, answers

pytest_plugins = ("tiny_fixtures", "server_fixtures")
ALL = ("tiny", "red", "green", "blue")


@pytest.fixture(scope="module")
def client(live: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def messages(text: str = "colour of the cup 1?") -> Any:
    return [{"role": "user", "content": text}]


# ---------------------------------------------------------------------------------------------- conversations


def test_each_adapter_answers_with_its_own_voice_and_the_base_with_its_own(live: Running) -> None:
    said = {model: live.say(model) for model in ALL}
    assert len(set(said.values())) == 4
    assert {model: live.say(model) for model in reversed(ALL)} == dict(reversed(said.items()))
    assert {model: live.say(f"tiny:{model}") for model in ALL[1:]} == {m: said[m] for m in ALL[1:]}


def test_the_base_says_what_plain_generation_says(live: Running, llama_base: Path) -> None:
    base = load_base(str(llama_base), "float32", "cpu")
    (expected,) = answers(base, [messages()], GenerationConfig(max_new_tokens=12))
    assert live.say("tiny", tokens=12, ignore_eos=False) == expected
    assert expected


def test_a_stream_says_the_same_as_one_object(client: openai.OpenAI) -> None:
    settings: Any = {"model": "red", "messages": messages(), "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    *spoken, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in spoken) == whole.choices[0].message.content
    assert spoken[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in spoken][-1] == whole.choices[0].finish_reason
    assert last.usage == whole.usage
    assert last.choices == []
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.system_fingerprint is not None
    assert whole.system_fingerprint.startswith("red@")
    assert {c.id for c in chunks} == {chunks[0].id}


def test_n_answers_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    settings: Any = {"model": "green", "messages": messages(), "max_tokens": 10, "temperature": 1.0, "seed": 7, "n": 3}
    first, second = (client.chat.completions.create(**settings) for _ in range(2))
    said = [c.message.content for c in first.choices]
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert len(set(said)) == 3
    assert [c.message.content for c in second.choices] == said
    streamed: dict[int, str] = dict.fromkeys(range(3), "")
    for chunk in client.chat.completions.create(**settings, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == said


def test_stop_texts_end_an_answer_and_are_no_part_of_it(live: Running) -> None:
    whole = live.say("blue", tokens=24)
    stop = whole[len(whole) // 2 :][:3]
    body = question("blue", "colour of the cup 1?", max_tokens=24, stop=[stop])
    found = live.post("/v1/chat/completions", body).json()
    assert found["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert found["choices"][0]["finish_reason"] == "stop"
    streamed = lines(live.post("/v1/chat/completions", {**body, "stream": True}).text)
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in streamed[:-1])
    assert text == whole[: whole.index(stop)]
    assert streamed[-1] == "[DONE]"


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize("stop", [{"stop": ["<|pad|>"]}, {"stop_token_ids": [0]}], ids=str)
def test_a_stop_may_be_a_special_token_which_no_text_shows(live: Running, stop: Any, ignore_eos: bool) -> None:
    pad = {"logit_bias": {"0": 100}, "ignore_eos": ignore_eos} | stop
    found = live.post("/v1/chat/completions", question("red", **pad)).json()
    assert (found["choices"][0]["finish_reason"], found["usage"]["completion_tokens"]) == ("stop", 0)


@pytest.mark.parametrize(("ignore_eos", "ended"), [(True, ("length", 8)), (False, ("stop", 0))])
def test_an_answer_may_go_on_past_the_models_own_end(live: Running, ignore_eos: bool, ended: tuple[str, int]) -> None:
    end = {"logit_bias": {"2": 100}, "stop_token_ids": [0], "ignore_eos": ignore_eos}
    found = live.post("/v1/chat/completions", question("red", **end)).json()
    assert (found["choices"][0]["finish_reason"], found["usage"]["completion_tokens"]) == ended


def test_a_top_k_beyond_any_vocabulary_cuts_nothing(live: Running) -> None:
    asked = question("red", temperature=3, seed=5)
    all_, beyond = (live.post("/v1/chat/completions", asked | {"top_k": k}) for k in (0, 2**64))
    assert beyond.status_code == 200, beyond.text
    assert beyond.json()["choices"] == all_.json()["choices"]


def test_log_probabilities(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="red", messages=messages(), max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    assert found.choices[0].logprobs is not None
    tokens = found.choices[0].logprobs.content
    assert tokens is not None
    assert found.usage is not None
    assert len(tokens) == found.usage.completion_tokens
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(max(t.logprob for t in token.top_logprobs))
    plain = client.completions.create(model="red", prompt="hat", max_tokens=4, temperature=0, logprobs=2)
    assert plain.choices[0].logprobs is not None
    assert len(plain.choices[0].logprobs.token_logprobs or []) == 4


def test_log_probabilities_name_every_token_and_say_where_it_stands(live: Running) -> None:
    wide = {"prompt": "hat", "max_tokens": 60, "temperature": 3.0, "seed": 5, "logprobs": 20, "ignore_eos": True}
    (choice,) = live.post("/v1/completions", {"model": "red", **wide}).json()["choices"]
    found, text = choice["logprobs"], choice["text"]
    for token, logprob, likeliest in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert likeliest[token] == logprob
        assert len(likeliest) in (20, 21)  # none of the parts of characters has the name of another
    for token, place in zip(found["tokens"], found["text_offset"], strict=True):
        assert (
            text[place:].startswith(token)
            or token.startswith("bytes:")
            or token in live.service.base.tokenizer.all_special_tokens
        )
    chat = question("red", max_tokens=60, temperature=3.0, seed=5, logprobs=True)
    spoken = live.post("/v1/chat/completions", chat).json()["choices"][0]
    special = live.service.base.tokenizer.all_special_tokens
    said = b"".join(bytes(t["bytes"]) for t in spoken["logprobs"]["content"] if t["token"] not in special)
    assert said.decode(errors="replace") == spoken["message"]["content"]


def test_null_is_as_if_the_field_were_not_there(live: Running) -> None:
    body = question("red", seed=1, temperature=None)
    nulls = dict.fromkeys(
        ("top_p", "n", "stream", "presence_penalty", "frequency_penalty", "logprobs", "stop", "tools")
    )
    plain, null = (
        live.post("/v1/chat/completions", b) for b in (question("red", seed=1) | {"temperature": 1}, body | nulls)
    )
    assert null.json()["choices"] == plain.json()["choices"]
    text = {"model": "red", "prompt": "hat", "max_tokens": 2, "temperature": 0}
    bare = [live.post("/v1/completions", b).json()["choices"] for b in (text, {**text, "echo": None, "best_of": None})]
    assert bare[0] == bare[1]


def test_a_stream_that_counts_says_so_in_every_event(live: Running) -> None:
    body = question("red", stream=True, stream_options={"include_usage": True})
    *events, last, _ = lines(live.post("/v1/chat/completions", body).text)
    assert {e["usage"] for e in events} == {None}
    assert last["usage"]["completion_tokens"] == 8
    assert "usage" not in lines(live.post("/v1/chat/completions", question("red", stream=True)).text)[0]


# ---------------------------------------------------------------------------------------------- bare prompts


def test_completions_take_texts_and_tokens_many_at_once(client: openai.OpenAI, live: Running) -> None:
    tokens = live.service.base.renderer.completion_prompt("hat")
    settings: Any = {"model": "red", "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
    one = client.completions.create(prompt="hat", **settings)
    assert client.completions.create(prompt=tokens, **settings).choices[0].text == one.choices[0].text
    many = client.completions.create(prompt=["hat", "boat"], n=2, **settings)
    assert [c.index for c in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text == one.choices[0].text
    assert many.choices[2].text == client.completions.create(prompt="boat", **settings).choices[0].text
    assert "".join(c.choices[0].text for c in client.completions.create(prompt="hat", stream=True, **settings)) == (
        one.choices[0].text
    )
    assert len(one.choices[0].text) > 0


def test_a_completion_that_does_not_say_has_sixteen_tokens(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="hat", extra_body={"ignore_eos": True})
    assert found.usage is not None
    assert found.usage.completion_tokens == 16


def test_echo_gives_the_prompt_back_in_front(client: openai.OpenAI, live: Running) -> None:
    tokens = live.service.base.renderer.completion_prompt("hat")
    settings: Any = {"model": "red", "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
    plain = client.completions.create(prompt=["hat", "boat"], n=2, **settings)
    echoed = client.completions.create(prompt=["hat", "boat"], n=2, echo=True, **settings)
    prompts = ["hat", "hat", "boat", "boat"]
    assert [c.text for c in echoed.choices] == [p + c.text for p, c in zip(prompts, plain.choices, strict=True)]
    streamed = client.completions.create(prompt=tokens, echo=True, stream=True, **settings)
    assert "".join(c.choices[0].text for c in streamed) == echoed.choices[0].text


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"suffix": "end"}, "`suffix` is not done"),
        ({"echo": True, "logprobs": 1}, "`echo` with `logprobs`"),
        ({"best_of": 3}, "`best_of` above `n`"),
    ],
)
def test_what_is_not_done_is_said(client: openai.OpenAI, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.completions.create(model="red", prompt="hat", **asked)
    settings: Any = {"suffix": None, "best_of": 2, "n": 2, "max_tokens": 2}
    assert len(client.completions.create(model="red", prompt="hat", **settings).choices) == 2


# ---------------------------------------------------------------------------------------------- forms


def test_answers_have_the_form_that_was_asked_for(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"lock": {"enum": ["open", "shut"]}}, "required": ["lock"]}
    schema |= {"additionalProperties": False}
    forms: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "lock", "schema": schema}}},
        {"structured_outputs": {"json": schema}},
        {"guided_json": schema},
    ]
    for form in forms:
        found = client.chat.completions.create(
            model="red", messages=messages(), max_tokens=60, temperature=1.0, seed=3, extra_body=form
        )
        text = "".join((found.choices[0].message.content or "").split())
        assert text in ('{"lock":"open"}', '{"lock":"shut"}')
    for regex in ({"guided_regex": "[ab]{3}"}, {"structured_outputs": {"regex": "[ab]{3}"}}):
        found = client.chat.completions.create(model="blue", messages=messages(), max_tokens=9, extra_body=regex)
        text = found.choices[0].message.content or ""
        assert len(text) == 3
        assert set(text) <= {"a", "b"}
    chosen = client.chat.completions.create(
        model="blue", messages=messages(), max_tokens=20, extra_body={"guided_choice": ["left", "right"]}
    )
    assert chosen.choices[0].message.content in ("left", "right")


def test_a_form_that_cannot_be_read_is_refused(live: Running) -> None:
    many = {f"p{i}": {"type": "string"} for i in range(1500)}
    for form, words in (
        ({"guided_regex": "(("}, "regular expression '((' cannot be followed"),
        ({"guided_json": {"type": "nonsense"}}, "JSON schema cannot be followed"),
        ({"structured_outputs": {}}, "needs one of json, regex"),
        ({"guided_json": {"type": "object", "properties": many}}, "ask for a simpler form"),
        ({"guided_choice": [f"{i:06}" for i in range(60_000)]}, "guided_choice has 600000 characters"),
        ({"guided_regex": "a", "ignore_eos": True}, "leave out ignore_eos"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "one form"),
    ):
        found = live.post("/v1/chat/completions", question("red") | {"ignore_eos": False} | form)
        assert found.status_code == 400
        assert words in found.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------- refusals


def test_a_name_that_is_unknown_is_never_the_base(client: openai.OpenAI, live: Running) -> None:
    for model in ("gren", "tiny:gren", "green@00000000", "other:green", "root/green", "../outside"):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=model, messages=messages())
    with pytest.raises(openai.NotFoundError, match="did you mean 'green'"):
        client.completions.create(model="gren", prompt="hat")
    with pytest.raises(openai.NotFoundError, match="did you mean 'green'"):
        client.models.retrieve("gren")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, f"the context holds {CONTEXT}"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 4000}], "max_tokens": None}, "the context holds"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"logit_bias": {"one": 1}}, "no token id"),
        ({"logit_bias": {"999999": 1}}, "vocabulary"),
        ({"n": 1000}, "n:"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "chat template takes no tools"),
        ({"logit_bias": {"5" * 5000: 1}}, "no token id"),
        ({"stop": ["ok", ""]}, "a stop string is empty"),
        ({"stop": 5}, "stop: Input should be a valid string or Input should be a valid list"),
        ({"stream_options": {"include_usage": True}}, "needs `stream`"),
        ({"model": "tiny", "adapter_scale": 0.5}, "adapter_scale is for adapters"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_why(live: Running, change: dict[str, Any], said: str) -> None:
    found = live.post("/v1/chat/completions", question("red") | change)
    assert found.status_code == 400
    assert said in found.json()["error"]["message"]
    assert found.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"d": "\ud800"}}}]},
        {"logit_bias": {"\ud800": 1}},
        {"model": "\ud800"},
    ],
)
def test_half_a_character_is_refused_wherever_it_stands(live: Running, change: dict[str, Any]) -> None:
    content = json.dumps(question("red") | change)
    headers = {"content-type": "application/json"}
    found = httpx.post(f"{live.url}/v1/chat/completions", content=content, headers=headers)
    assert found.status_code == 400
    assert r"a text has '\ud800'" in found.json()["error"]["message"]


def test_what_may_be_of_several_kinds_is_told_in_one_sentence(live: Running) -> None:
    error = live.post("/v1/completions", {"model": "tiny", "prompt": 5}).json()["error"]
    assert error["message"] == "prompt: Input should be a valid string or Input should be a valid list"
    assert error["param"] == "prompt"


def test_a_token_that_does_not_exist_is_refused(live: Running) -> None:
    found = live.post("/v1/completions", {"model": "tiny", "prompt": [5, 999_999]})
    assert found.status_code == 400


def test_models_lists_names_and_no_paths(client: openai.OpenAI, live: Running, adapters: Any) -> None:
    live.say("red")
    cards = {m.id: m for m in client.models.list()}
    assert set(cards) == {"tiny", "red", "green", "blue", "large"}
    red: Any = cards["red"]
    assert (red.root, red.parent) == ("red", "tiny")
    assert red.generation.startswith("red@")
    assert str(adapters.parent) not in live.get("/v1/models").text
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_body_that_is_no_json_and_a_route_that_is_none_are_told_so(live: Running) -> None:
    headers = {"content-type": "application/json"}
    broken = httpx.post(f"{live.url}/v1/chat/completions", content=b'{"model"', headers=headers)
    assert broken.status_code == 400
    assert broken.json()["error"]["message"].startswith("the body is no JSON: ")
    lost = live.get("/v1/chat")
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, None)
    assert "no /v1/chat here" in lost.json()["error"]["message"]
