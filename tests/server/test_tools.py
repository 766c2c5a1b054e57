"""Calls of tools: what a model writes, cut anywhere, and what a template is told."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_base import CHATML, tokenizer

from twofold.base.chat import Renderer
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
    told = tokens.decode(chat_prompt(asked(), with_tools))
    assert told.startswith("[weather]<|im_start|>")
    assert tokens.decode(chat_prompt(asked(tool_choice="none"), with_tools)).startswith("<|im_start|>")
    with pytest.raises(ApiError, match="takes no tools"):
        chat_prompt(asked(), Renderer(tokens))
    assert chat_prompt(asked(tool_choice="none"), Renderer(tokens))


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
    prompt = chat_prompt(asked(messages=turns, tools=None), renderer)
    assert renderer.tokenizer.decode(prompt) == "system:be kind;user:hat;assistant:Bern;tool:rain;"
