"""What a client is told when something goes wrong: OpenAI's shape, one clear sentence, and never a path."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel

from twofold.errors import TwofoldError

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}
"""OpenAI's word for each status; every other is a `server_error`."""
PATH = re.compile(r"(?<![\w.:/@])/(?:[^\s/'\":;,()]+/)*[^\s/'\":;,()]+")
"""An absolute path in a sentence."""


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the field of the request that is to blame."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's body of an error."""

    error: ErrorDetail


class ApiError(TwofoldError):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one sentence for the client.
        code: a word that programs can test for.
        param: the field of the request that is to blame.
        retry_after: seconds after which it makes sense to ask again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {} if retry_after is None else {"retry-after": str(retry_after)}
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    def body(self) -> ErrorBody:
        detail = ErrorDetail(
            message=str(self), type=KINDS.get(self.status, "server_error"), param=self.param, code=self.code
        )
        return ErrorBody(error=detail)

    def event(self) -> bytes:
        """As an event of a stream."""
        return b"data: " + self.body().model_dump_json().encode() + b"\n\n"


def draining() -> ApiError:
    """What is said while the server shuts down."""
    return ApiError(503, "the server is shutting down; ask another", code="draining", retry_after=1)


def without_paths(message: str, folder: Path, words: str) -> str:
    """A sentence in which `folder` is called by `words`, and any other absolute path has gone."""
    return PATH.sub("a file of the server", message.replace(str(folder), words))
