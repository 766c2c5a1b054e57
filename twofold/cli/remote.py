"""Answers from a server that speaks OpenAI's API, `twofold serve` or another."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from twofold.base.chat import Message
from twofold.errors import ConfigError
from twofold.recipes.generate import GenerationConfig

KEY = "TWOFOLD_API_KEY"
"""Where the server's API key is looked for."""
SECONDS = 600


def first_model(url: str) -> str:
    """What a server lists first: the base.

    Raises:
        ConfigError: no such server answers there.
    """
    with _opened(url, "models", None) as response:
        listed = json.load(response)
    return str(listed["data"][0]["id"])


def stream_remote(url: str, model: str, messages: Sequence[Message], config: GenerationConfig) -> Iterator[str]:
    """One answer of a model of the server, in pieces of text as they come.

    Raises:
        ConfigError: the server cannot be reached, or does not answer this.
    """
    sampling = config.sampling
    asked = {"model": model, "messages": list(messages), "stream": True, "max_tokens": config.max_new_tokens}
    asked |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
    asked |= {"top_k": sampling.top_k} if sampling.top_k else {}
    with _opened(url, "chat/completions", asked) as response:
        for line in response:
            said = line.decode().strip().removeprefix("data: ")
            if said == "[DONE]":
                return
            if said.startswith("{"):
                yield _text(url, json.loads(said))


def _text(url: str, event: dict[str, Any]) -> str:
    if "error" in event:
        raise ConfigError(f"{url} says: {event['error']['message']}")
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def _opened(url: str, path: str, body: dict[str, Any] | None) -> Any:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url is {url}, but must begin with http:// or https://")
    headers = {"content-type": "application/json"}
    if os.environ.get(KEY):
        headers["authorization"] = f"Bearer {os.environ[KEY]}"
    data = None if body is None else json.dumps(body).encode()
    place = f"{url.rstrip('/').removesuffix('/v1')}/v1/{path}"
    try:
        return urllib.request.urlopen(urllib.request.Request(place, data, headers), timeout=SECONDS)
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url} says: {_reason(error)}") from error
    except OSError as error:
        raise ConfigError(f"no server answers at {url}: {getattr(error, 'reason', error)}") from error


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {error.code}"
