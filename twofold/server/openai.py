"""The shapes of requests and answers: OpenAI's, with vLLM's additions. An unknown field is refused, with the nearest right name;
one that is null is as if it were not there.

What OpenAI's clients send for its own bookkeeping (`user`, `metadata`, ...) is taken and means nothing here.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from twofold.errors import did_you_mean

MOST_CHOICES, MOST_STOPS, MOST_PROMPTS, MOST_LIKELIEST = 16, 16, 64, 20
Name = Annotated[str, Field(min_length=1, max_length=512)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Strict(BaseModel):
    """A request in which an unknown field is an error that names the nearest right one, and null means the default."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(f"unknown field {str(key)[:100]!r}{did_you_mean(str(key)[:100], cls.model_fields)}")
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class Body(Strict):
    """A whole request, all of whose texts can be written as UTF-8."""

    @model_validator(mode="before")
    @classmethod
    def _characters(cls, values: Any) -> Any:
        try:
            json.dumps(values, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(
                f"a text has {half!r}, half of a surrogate pair and no character; send both halves"
            ) from error
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        return values


# ---------------------------------------------------------------------------------------------- requests


class StreamOptions(Strict):
    """`include_usage`: one more event at the end with the counts of tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A function that the model called, its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call as it stands in an answer and comes back in the next request."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionTool(Strict):
    """What a function is called and what it takes."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionTool


class FunctionName(Strict):
    """One of the request's functions."""

    name: Name


class ToolChoice(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Strict):
    """A JSON schema with its name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        return values


class ResponseFormat(Strict):
    """The form of an answer: any JSON object, or one after a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's: exactly one of a JSON schema, a regular expression, a choice of texts, and a grammar in Lark's syntax."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        return values


class Asking(Body):
    """What both kinds of requests may say."""

    model: Name
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MOST_STOPS)] = []
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    adapter_scale: Annotated[float, Field(ge=-8, le=8)] = 1.0
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @model_validator(mode="after")
    def _streamed(self) -> Asking:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream` to be true")
        return self


class ChatRequest(Asking):
    """OpenAI's `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    tools: Annotated[list[Tool], Field(max_length=256)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice not in (None, "none", "auto")


class CompletionRequest(Asking):
    """OpenAI's `POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None

    @model_validator(mode="after")
    def _done_here(self) -> CompletionRequest:
        if self.suffix:
            raise ValueError(
                "`suffix` is not done: models here go on from a prompt; write the tokens for filling in, if the model has some, "
                "into the prompt"
            )
        if self.echo and self.logprobs is not None:
            raise ValueError(
                "`echo` with `logprobs` is not done: the tokens of a prompt are not scored; leave out one of them"
            )
        if self.best_of not in (None, self.n):
            raise ValueError("`best_of` above `n` is not done; ask for all with `n`, and `logprobs`, and choose")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or tokens."""
        given: Any = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)


class LoadAdapter(Body):
    """vLLM's `POST /v1/load_lora_adapter`; `lora_path` is below the adapter root of the server."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] = False


class UnloadAdapter(Body):
    """vLLM's `POST /v1/unload_lora_adapter`."""

    lora_name: Name
    lora_int_id: int | None = None


# ---------------------------------------------------------------------------------------------- answers


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(BaseModel):
    """The answer in a conversation."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: str


class ChatCompletion(BaseModel):
    """The answer to a `ChatRequest`; `system_fingerprint` is the generation of the adapter."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    """One of the continuations."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str


class Completion(BaseModel):
    """The answer to a `CompletionRequest`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[TextChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that can be asked for. `root` is a name, never a path; `generation` is there once the adapter is in memory."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["twofold"] = "twofold"
    root: str
    parent: str | None = None
    generation: str | None = None
    permission: list[Any] = []


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class AdapterState(BaseModel):
    """An adapter as the server sees it."""

    name: str
    generation: str | None
    bytes: int | None
    requests: int
    refused: str | None


class AdapterList(BaseModel):
    """All adapters."""

    object: Literal["list"] = "list"
    data: list[AdapterState]


class Health(BaseModel):
    """Whether the server works, in a word."""

    status: str
