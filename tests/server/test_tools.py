"""Calls of tools: what a model writes, cut anywhere, and what a template is told."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_base import CHATML, llama, tokenizer, write_base
from tiny_server import Running, running, served, write_adapter

from twofold.base.chat import Renderer
from twofold.recipes.serve import ServeConfig
from twofold.server.asking import chat_prompt
from twofold.server.errors import ApiError
from twofold.server.openai import ChatRequest
from twofold.server.tools import ToolParser

WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
TIME = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
WITH_TOOLS = "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}" + CHATML


def parsed(text: str, cuts: list[int]) -> tuple[str, list[tuple[str, Any]]]:
    parser, said, calls = ToolParser(), "", []
    borders = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    for begin, end in itertools.pairwise(borders):
        found = parser.put(text[begin:end])
        said += found.text
        calls += found.calls
    rest = parser.finish()
    return said + rest.text, [(c.function.name, json.loads(c.function.arguments)) for c in [*calls, *rest.calls]]


@given(st.lists(st.integers(0, 400), max_size=12))
def test_calls_are_found_however_the_text_is_cut(cuts: list[int]) -> None:
    text, calls = parsed(f"I look. {WEATHER}\n{TIME}", cuts)
    assert (text, calls) == ("I look. ", [("weather", {"city": "Bern"}), ("time", {})])


@given(st.lists(st.integers(0, 400), max_size=12))
def test_what_is_no_call_stays_text(cuts: list[int]) -> None:
    for said in (
        "a < b <tool",
        "<tool_call>no json</tool_call> x",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>",
    ):
        assert parsed(said, cuts) == (said, [])


def test_a_call_without_its_end_counts_when_it_is_whole() -> None:
    assert parsed(WEATHER.removesuffix("\n</tool_call>"), []) == ("", [("weather", {"city": "Bern"})])


def asked(**more: Any) -> ChatRequest:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    messages = [{"role": "user", "content": "hat"}]
    return ChatRequest.model_validate({"model": "m", "messages": messages, "tools": [tool], **more})


def test_the_template_is_told_of_tools_if_it_takes_them() -> None:
    tokens = tokenizer()
    with_tools = Renderer(tokens, WITH_TOOLS)
    assert with_tools.takes_tools
    told = tokens.decode(chat_prompt(asked(), with_tools, 256))
    assert told.startswith("[weather]<|im_start|>")
    assert tokens.decode(chat_prompt(asked(tool_choice="none"), with_tools, 256)).startswith("<|im_start|>")
    with pytest.raises(ApiError, match="takes no tools"):
        chat_prompt(asked(), Renderer(tokens), 256)
    assert chat_prompt(asked(tool_choice="none"), Renderer(tokens), 256)


def test_calls_and_their_results_come_back_to_the_template() -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}"
    renderer = Renderer(tokenizer(), template + "{% endfor %};{% endfor %}{# tools #}")
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "hat"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
    ]
    prompt = chat_prompt(asked(messages=turns, tools=None), renderer, 256)
    assert renderer.tokenizer.decode(prompt) == "system:be kind;user:hat;assistant:Bern;tool:rain;"


# ---------------------------------------------------------------------------------------------- calls that must come

CITY = {"$ref": "#/$defs/city"}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": CITY, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["city", "days"],
                "additionalProperties": False,
                "$defs": {"city": {"enum": ["Bern", 'Zürich "West"']}},
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "maxProperties": 0}}},
]


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server over a base whose template takes tools; nothing that it says of itself is a call."""
    folder, tokens = tmp_path_factory.mktemp("tools"), tokenizer(WITH_TOOLS)
    of = served(write_base(folder / "base", llama(len(tokens)), tokens))
    write_adapter(of.base, folder / "adapters" / "red", 1)
    with running(of, ServeConfig(adapters=folder / "adapters")) as found:
        yield found


def call(caller: Running, **asked: Any) -> Any:
    client = openai.OpenAI(base_url=f"{caller.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "hat"}]
    return client.chat.completions.create(
        **{"model": "red", "messages": messages, "tools": TOOLS, "max_tokens": 200, **asked}
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_named_function_is_called_once_with_arguments_that_fit(caller: Running, seed: int) -> None:
    chosen = {"type": "function", "function": {"name": "weather"}}
    (choice,) = call(caller, tool_choice=chosen, seed=seed).choices
    assert choice.message.content is None
    (made,) = choice.message.tool_calls
    assert made.function.name == "weather"
    jsonschema_rs.validate(TOOLS[0]["function"]["parameters"], json.loads(made.function.arguments))
    assert choice.finish_reason == "tool_calls"


def test_required_gives_calls_of_any_function(caller: Running) -> None:
    answers = call(caller, tool_choice="required", parallel_tool_calls=False, n=12, seed=1).choices
    assert all(len(a.message.tool_calls) == 1 and a.message.content is None for a in answers)
    assert {a.message.tool_calls[0].function.name for a in answers} == {"weather", "now"}
    several = call(caller, tool_choice="required", n=12, seed=1).choices
    assert all(a.message.tool_calls for a in several)
    assert max(len(a.message.tool_calls) for a in several) > 1


def test_an_answer_that_is_a_call_has_the_key_of_its_content(caller: Running) -> None:
    body = {
        "model": "red",
        "messages": [{"role": "user", "content": "hat"}],
        "tools": TOOLS[1:],
        "tool_choice": "required",
    }
    message = caller.post("/v1/chat/completions", {**body, "max_tokens": 200}).json()["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"]


@pytest.mark.parametrize("parallel", [True, False])
def test_without_parallel_calls_an_answer_ends_with_its_first(caller: Running, *, parallel: bool) -> None:
    said = '<tool_call>\\n\\{"name": "now", "arguments": \\{\\}\\}\\n</tool_call>'
    form = {"guided_regex": f"{said}\\n{said}"}
    (answer,) = call(caller, tool_choice="auto", parallel_tool_calls=parallel, extra_body=form).choices
    assert len(answer.message.tool_calls) == 1 + parallel
    assert answer.finish_reason == "tool_calls"


def test_a_forced_call_is_streamed(caller: Running) -> None:
    chosen = {"type": "function", "function": {"name": "now"}}
    chunks = list(call(caller, tool_choice=chosen, stream=True))
    found = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [(c.index, c.function.name, json.loads(c.function.arguments)) for c in found] == [(0, "now", {})]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "wether"}}}, "did you mean 'weather'"),
        ({"tool_choice": "required", "tools": None}, "there are no tools"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "can have one form"),
        ({"tool_choice": "must"}, "tool_choice"),
    ],
)
def test_a_call_that_cannot_be_forced_is_refused(caller: Running, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        call(caller, **asked)
