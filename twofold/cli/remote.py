"""Answers from a server that speaks OpenAI's API, `twofold serve` or another."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import fields
from http.client import HTTPException
from typing import Any

from twofold.base.chat import Message
from twofold.engine.request import Sampling
from twofold.errors import ConfigError
from twofold.recipes.generate import GenerationConfig
from twofold.recipes.serve import usable_key

KEY = "TWOFOLD_API_KEY"
"""Where the server's API key is looked for."""
SECONDS = 600
UNREADABLE = (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError)
"""What reading an answer raises where it is cut off or is not what was asked for."""


def first_model(url: str) -> str:
    """What a server lists first: the base.

    Raises:
        ConfigError: no such server answers there.
    """
    with _opened(url, "models", None) as response:
        try:
            return str(json.load(response)["data"][0]["id"])
        except UNREADABLE as error:
            raise ConfigError(f"{url} lists no models, so it speaks no API of OpenAI's; see --url") from error


def stream_remote(url: str, model: str, messages: Sequence[Message], config: GenerationConfig) -> Iterator[str]:
    """One answer of a model of the server, in pieces of text as they come.

    Raises:
        ConfigError: the server cannot be reached, does not answer this, or leaves in the middle.
    """
    sampling = config.sampling
    asked = {"model": model, "messages": list(messages), "stream": True, "max_tokens": config.max_new_tokens}
    asked |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
    default = Sampling(logprobs=sampling.logprobs)  # of which a conversation shows none
    names = (f.name for f in fields(sampling))
    asked |= {n: value for n in names if (value := getattr(sampling, n)) != getattr(default, n)}
    with _opened(url, "chat/completions", asked) as response:
        for said in _events(url, response):
            if said == "[DONE]":
                return
            yield _text(url, said)
    raise ConfigError(f"{url} ended the answer in the middle; ask again")


def _events(url: str, response: Any) -> Iterator[str]:
    """What each event of a stream says."""
    try:
        for line in response:
            name, _, said = line.decode(errors="replace").partition(":")
            if name == "data":
                yield said.strip()
    except (OSError, HTTPException) as error:
        raise ConfigError(f"{url} was lost in the middle of the answer ({error}); ask again") from error


def _text(url: str, said: str) -> str:
    try:
        event = json.loads(said)
        refused = event.get("error")
        if refused is None:
            return "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        raise ConfigError(f"{url} says: {refused['message']}")
    except UNREADABLE as error:
        raise ConfigError(f"{url} sent an event that is none of an answer: {said[:100]!r}") from error


def _opened(url: str, path: str, body: dict[str, Any] | None) -> Any:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url is {url}, but must begin with http:// or https://")
    headers = {"content-type": "application/json"}
    if os.environ.get(KEY):
        headers["authorization"] = f"Bearer {usable_key(KEY, os.environ[KEY])}"
    data = None if body is None else json.dumps(body).encode()
    place = f"{url.rstrip('/').removesuffix('/v1')}/v1/{path}"
    try:
        return urllib.request.urlopen(urllib.request.Request(place, data, headers), timeout=SECONDS)
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url} says: {_reason(error)}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise ConfigError(f"no server answers at {url}: {getattr(error, 'reason', error)}") from error


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except UNREADABLE:
        return f"status {error.code}"
