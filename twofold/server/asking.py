"""From a request over HTTP to requests of the engine: prompts, sampling, and the form that the answer must have."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from twofold.base.chat import Message, Renderer, from_json
from twofold.engine.grammar import Grammar, Grammars
from twofold.engine.request import Request, Sampling
from twofold.engine.text import special_ids
from twofold.server.errors import ApiError
from twofold.server.openai import Asking, ChatMessage, ChatRequest, CompletionRequest
from twofold.server.tools import forced_calls

TOKEN_ID = re.compile(r"[0-9]{1,18}")
LARGEST_FORM = 200_000
"""Characters of a form as JSON: what is much larger takes seconds to compile."""

# ---------------------------------------------------------------------------------------------- prompts


def chat_prompt(request: ChatRequest, renderer: Renderer, context: int) -> list[int]:
    """The tokens of a conversation by the template that the adapter was trained with; of one beyond the context, roughly.

    Raises:
        ApiError: there is no template, or none that takes tools.
        DataError: the messages do not fit the template.
    """
    if renderer.template is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
    tools = [] if request.tool_choice == "none" else [t.model_dump(exclude_none=True) for t in request.tools or []]
    if tools and not renderer.takes_tools:
        raise ApiError(400, "this model's chat template takes no tools; leave out `tools`", param="tools")
    return renderer.with_tools(tools).chat_prompt([_message(m) for m in request.messages], context)


def _message(said: ChatMessage) -> Message:
    """A message as templates know it: text in one piece, the arguments of calls as objects."""
    parts = said.content if isinstance(said.content, list) else []
    message: dict[str, Any] = {"role": "system" if said.role == "developer" else said.role}
    message["content"] = "".join(p.text for p in parts) if parts else said.content or ""
    if said.name is not None:
        message["name"] = said.name
    if said.tool_call_id is not None:
        message["tool_call_id"] = said.tool_call_id
    if said.tool_calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": c.function.name, "arguments": from_json(c.function.arguments)}}
            for c in said.tool_calls
        ]
    return message


def completion_prompts(request: CompletionRequest, renderer: Renderer) -> list[list[int]]:
    """The tokens of bare prompts."""
    return [renderer.completion_prompt(p) if isinstance(p, str) else p for p in request.prompts]


# ---------------------------------------------------------------------------------------------- sampling


def most_tokens(asked: int | None, prompts: Sequence[Sequence[int]], context: int, default: int | None) -> int:
    """How many tokens an answer may have.

    Raises:
        ApiError: a prompt and its answer do not fit into the context.
    """
    longest = max(map(len, prompts))
    left = context - longest
    wanted = asked if asked is not None else min(left, default or left)
    if left < 1 or wanted > left:
        raise ApiError(
            400,
            f"the prompt has {longest} tokens and the answer may have {max(wanted, 1)}, but the context holds {context}; "
            "shorten the prompt or lower max_tokens",
            code="context_length_exceeded",
            param="max_tokens" if left >= 1 else None,
        )
    return wanted


def engine_requests(
    request: Asking,
    prompts: Sequence[list[int]],
    tokens: int,
    renderer: Renderer,
    adapters: Mapping[str, float],
    grammar: Grammar | None,
    logprobs: int | None,
) -> list[Request]:
    """One request for each choice: `n` for each prompt, each with a seed of its own that follows from the request's."""
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    unseen = special_ids(renderer.tokenizer, request.stops)
    ends = [] if request.ignore_eos else renderer.end_token_ids
    stop_ids = tuple(dict.fromkeys([*ends, *request.stop_token_ids, *unseen]))
    return [
        Request(
            token_ids=prompt,
            max_new_tokens=tokens,
            stop_ids=stop_ids,
            sampling=_sampling(request, (seed + i * request.n + k) % 2**63, logprobs),
            adapters=adapters,
            grammar=grammar,
        )
        for i, prompt in enumerate(prompts)
        for k in range(request.n)
    ]


def _sampling(request: Asking, seed: int, logprobs: int | None) -> Sampling:
    return Sampling(
        temperature=request.temperature,
        top_k=max(request.top_k, 0),
        top_p=request.top_p,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=_biases(request.logit_bias or {}),
        logprobs=logprobs,
        seed=seed,
    )


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    wrong = next((k for k in given if not TOKEN_ID.fullmatch(k)), None)
    if wrong is not None:
        raise ApiError(400, f"logit_bias has the key {wrong[:50]!r}, which is no token id", param="logit_bias")
    return {int(k): v for k, v in given.items()}


# ---------------------------------------------------------------------------------------------- form


class Form(NamedTuple):
    """A form that an answer must have: the request's field, the kind, and what describes it."""

    field: str
    kind: str
    description: Any

    def grammar(self, grammars: Grammars) -> Grammar:
        """The form, compiled: this may take a second.

        Raises:
            ConfigError: it cannot be read.
        """
        if self.kind == "object":
            return grammars.json_object()
        makers: dict[str, Any] = {"json": grammars.json_schema, "regex": grammars.regex}
        makers |= {"choice": grammars.choice, "grammar": grammars.lark}
        made: Grammar = makers[self.kind](self.description)
        return made


def form_of(request: Asking) -> Form | None:
    """The form that an answer must have, if the request asks for one.

    Raises:
        ApiError: it asks for several, for one that is too large, or for one that the answer may not end with.
    """
    forms = _forms(request)
    if not forms:
        return None
    names = ", ".join(f.field for f in forms)
    if len(forms) > 1:
        raise ApiError(400, f"an answer can have one form, but the request asks for {names}")
    if request.ignore_eos:
        raise ApiError(
            400, f"an answer with {names} ends where its form does; leave out ignore_eos", param="ignore_eos"
        )
    size = len(json.dumps(forms[0].description))
    if size > LARGEST_FORM:
        said = f"{names} has {size} characters, but a form may have {LARGEST_FORM}; ask for a simpler one"
        raise ApiError(400, said, param=names)
    return forms[0]


def _forms(request: Asking) -> list[Form]:
    """Each form that is asked for."""
    found: list[Form] = []
    if isinstance(request, ChatRequest) and request.forced:
        found.append(Form("tool_choice", "grammar", forced_calls(request)))
    response, structured = request.response_format, request.structured_outputs
    if response and response.type == "json_object":
        found.append(Form("response_format", "object", None))
    if response and response.type == "json_schema":
        if response.json_schema is None:
            raise ApiError(400, "response_format of type json_schema needs a json_schema", param="response_format")
        found.append(Form("response_format", "json", response.json_schema.schema_))
    kinds = ("json", "regex", "choice", "grammar")
    if structured:
        values = (structured.json_, structured.regex, structured.choice, structured.grammar)
        given = [Form(f"structured_outputs.{k}", k, v) for k, v in zip(kinds, values, strict=True) if v is not None]
        if not given:
            raise ApiError(400, "structured_outputs needs one of json, regex, choice and grammar")
        found += given
    guided = (request.guided_json, request.guided_regex, request.guided_choice, request.guided_grammar)
    return found + [Form(f"guided_{k}", k, v) for k, v in zip(kinds, guided, strict=True) if v is not None]
