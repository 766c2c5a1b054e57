"""Calls of tools in an answer, as Hermes models write them (Qwen and many others too):

    <tool_call>
    {"name": "weather", "arguments": {"city": "Bern"}}
    </tool_call>

What is not such a call stays text. https://github.com/NousResearch/Hermes-Function-Calling
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from twofold.errors import did_you_mean
from twofold.server.errors import ApiError
from twofold.server.openai import Asking, CalledFunction, ChatRequest, Tool, ToolCall

BEGIN, END = "<tool_call>", "</tool_call>"


ANY_OBJECT = {"type": "object"}
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as `json.dumps` writes it, which is what chat templates show of calls."""


def forced_calls(request: ChatRequest) -> str:
    """The grammar, in llguidance's Lark, of an answer that must be calls: of the named function once, or of any of them.

    Each function's `parameters` are a JSON schema of its own, so that `$ref` finds its `$defs`.

    Raises:
        ApiError: there are no tools, or none of that name.
    """
    named = request.tool_choice
    tools = request.tools or []
    if not tools:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
    if named is None or isinstance(named, str):
        once = request.parallel_tool_calls is False
        return _lark(tools, "call" if once else r'call ("\n" call)*')
    chosen = [t for t in tools if t.function.name == named.function.name]
    if not chosen:
        hint = did_you_mean(named.function.name, [t.function.name for t in tools])
        said = f"tool_choice asks for {named.function.name[:100]!r}, which is none of the tools{hint}"
        raise ApiError(400, said, param="tool_choice")
    return _lark(chosen[:1], "call")


def _lark(tools: Sequence[Tool], start: str) -> str:
    lines = [f"start: {start}", "call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        before = f'{BEGIN}\n{{"name": {json.dumps(tool.function.name)}, "arguments": '
        lines.append(f"call_{i}: {_literal(before)} arguments_{i} {_literal('}' + chr(10) + END)}")
        lines.append(f"arguments_{i}: %json {json.dumps(_schema(tool))}")
    return "\n".join(lines)


def _schema(tool: Tool) -> dict[str, Any]:
    """A function's parameters, to be written as models have learnt to."""
    return {**ANY_OBJECT, **(tool.function.parameters or {}), "x-guidance": WRITTEN}


def _literal(text: str) -> str:
    return json.dumps(text)


def stop_texts(request: Asking) -> list[str]:
    """What ends an answer: the request's own texts, and the end of the first call where there may be one call at most."""
    if not isinstance(request, ChatRequest) or request.tool_choice not in (None, "auto"):
        return request.stops
    return [*request.stops, *([END] if request.tools and request.parallel_tool_calls is False else [])]


class Parsed(NamedTuple):
    """Text for the reader, and calls that are complete."""

    text: str
    calls: list[ToolCall]


class ToolParser:
    """Takes the pieces of an answer as they come, and parts text from calls; what may still become a call is held back."""

    def __init__(self) -> None:
        self._held = ""
        self._called = False  # just now: the space behind a call is layout

    def put(self, piece: str) -> Parsed:
        """The text and the calls that have become certain."""
        self._held = (self._held + piece).lstrip() if self._called else self._held + piece
        self._called = self._called and not self._held
        text = ""
        calls: list[ToolCall] = []
        while True:
            before, begun, after = self._held.partition(BEGIN)
            if not begun:
                kept = _possible_beginning(before)
                self._held = before[len(before) - kept :]
                return Parsed(text + before[: len(before) - kept], calls)
            inside, ended, rest = after.partition(END)
            text += before
            if not ended:
                self._held = begun + after
                return Parsed(text, calls)
            call = _call(inside)
            calls += [call] if call else []
            text += "" if call else begun + inside + ended
            self._held = rest.lstrip() if call else rest
            self._called = bool(call) and not self._held

    def finish(self) -> Parsed:
        """What is left when the answer ends: a call whose closing tag is missing counts if its JSON is whole."""
        held, self._held = self._held, ""
        call = _call(held.removeprefix(BEGIN)) if held.startswith(BEGIN) else None
        return Parsed("", [call]) if call else Parsed(held, [])


def _possible_beginning(text: str) -> int:
    """How many characters at the end of a text may be the beginning of a call."""
    return next((n for n in range(min(len(BEGIN) - 1, len(text)), 0, -1) if BEGIN.startswith(text[-n:])), 0)


def _call(inside: str) -> ToolCall | None:
    try:
        said = json.loads(inside)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return None
    arguments = said.get("arguments", {})
    plain = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(id=f"call_{secrets.token_hex(12)}", function=CalledFunction(name=said["name"], arguments=plain))
