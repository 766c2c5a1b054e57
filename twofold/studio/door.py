"""Who may use Studio: pages of its own address, on this machine or with the token; nobody else's pages in the same browser."""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twofold.server.errors import ApiError
from twofold.server.security import Policy, digest, refusal

COOKIE = "twofold_studio"
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
"""Of every answer: the page takes nothing from elsewhere and stands in nobody's frame."""


class Door:
    """Checks Host and Origin of every request, and the token where there is one.

    The token comes once as `/?token=...`, which makes it a cookie, or in every request as `Authorization: Bearer ...`.
    """

    def __init__(self, app: ASGIApp, policy: Policy, token: str | None) -> None:
        self.app, self.policy = app, policy
        self._token = None if token is None else digest(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = self._instead(scope)
        await (self.app if answer is None else answer)(scope, receive, sending)

    def _instead(self, scope: Scope) -> Response | None:
        """What is answered in place of the application, if it may not be asked."""
        headers = Headers(scope=scope)
        error = refusal(scope["method"], scope["path"], headers, self.policy)
        if error is None and headers.get("sec-fetch-site") in ("cross-site", "same-site") and _is_api(scope):
            error = ApiError(403, "another page may not use this Studio", code="origin_refused")
        if error is None and self._token is not None:
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if scope["path"] == "/" and self._is_token(given):
                return _let_in(given)
            error = None if self._knows(headers) else _unknown()
        return None if error is None else JSONResponse(error.body().model_dump(), error.status)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return self._is_token(_cookie(headers)) or (scheme.lower() == "bearer" and self._is_token(key.strip()))

    def _is_token(self, given: str) -> bool:
        return self._token is not None and hmac.compare_digest(digest(given), self._token)


def _is_api(scope: Scope) -> bool:
    return str(scope["path"]).startswith("/api/")


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def _let_in(token: str) -> Response:
    """To the page, with a cookie in place of the token in the address."""
    answer = RedirectResponse("/", 303)
    answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
    return answer


def _unknown() -> ApiError:
    return ApiError(401, "this Studio asks for its token: open the address that `twofold studio` printed", code="token")
