"""Who may speak to the server, and how much: pure ASGI, so that disconnects stay visible to the routes.

`Host` is checked even on loopback, because a page in a browser can let its own name point here (DNS rebinding): its
requests then carry that name. An address in numbers cannot be such a name and is always taken. A request that a page of
another origin sends carries `Origin`, and is refused unless that origin was allowed.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twofold.server.errors import ApiError

OPEN = frozenset({"/health", "/ready", "/metrics"})
"""What probes and scrapers read without a key."""
ADMINISTRATION = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


def digest(key: str) -> bytes:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode()).digest()


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Who is let in.

    Attributes:
        hosts: names by which the server may be called besides `localhost` and addresses; `*` for any.
        origins: plain origins of pages that may use it besides its own; `*` for any.
        keys: digests of API keys; none: no key is needed but for what `admin_keys` guard.
        admin_keys: digests of the keys that may load and unload adapters, and all else too; none: every key may.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    keys: frozenset[bytes] = field(default=frozenset(), repr=False)
    admin_keys: frozenset[bytes] = field(default=frozenset(), repr=False)


def refusal(method: str, path: str, headers: Headers, policy: Policy) -> ApiError | None:
    """Why a request is not let in, if it is not."""
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not _known_host(hosts[0], policy):
        return ApiError(403, "this Host is not served here; start the server with --allowed-hosts", code="host_refused")
    origin = headers.get("origin")
    if origin is not None and not _known_origin(origin, hosts[0], policy):
        return ApiError(403, "this Origin may not use the server; see --allowed-origins", code="origin_refused")
    free = path in OPEN or method == "OPTIONS"  # a browser asks without a key whether it may ask with one
    return None if free else _wrong_key(headers.get("authorization", ""), path, policy)


def _known_host(host: str, policy: Policy) -> bool:
    name = host.lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return "*" in policy.hosts or name == "localhost" or name in policy.hosts or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _known_origin(origin: str, host: str, policy: Policy) -> bool:
    allowed = "*" in policy.origins or plain_origin(origin) in policy.origins
    return allowed or origin.lower().partition("://")[2] == host.lower()


def plain_origin(origin: str) -> str:
    """An origin as browsers send it."""
    return origin.lower().rstrip("/")


def _wrong_key(authorization: str, path: str, policy: Policy) -> ApiError | None:
    administers = path in ADMINISTRATION and policy.admin_keys
    needed = policy.admin_keys if administers else policy.keys and policy.keys | policy.admin_keys
    if not needed:
        return None
    scheme, _, key = authorization.partition(" ")
    given, is_bearer = digest(key.strip()), scheme.lower() == "bearer"
    if is_bearer and _among(given, needed):
        return None
    if is_bearer and _among(given, policy.keys):
        return ApiError(403, "this API key may not load or unload adapters", code="admin_key_needed")
    return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")


def _among(given: bytes, keys: Iterable[bytes]) -> bool:
    """Compares with every key, so that the time says nothing about them."""
    return any([hmac.compare_digest(given, key) for key in keys])  # noqa: C419


class Gate:
    """Lets requests in by the policy, with bodies up to a size."""

    def __init__(self, app: ASGIApp, policy: Policy, max_body_bytes: int) -> None:
        self.app, self.policy, self.max_body_bytes = app, policy, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = refusal(scope["method"], scope["path"], headers, self.policy)
        body = None if refused else await _body(receive, headers.get("content-length", "0"), self.max_body_bytes)
        if refused is None and body is None:
            refused = ApiError(413, f"a request may have at most {self.max_body_bytes} bytes", code="too_large")
        if refused is not None:
            response = JSONResponse(refused.body().model_dump(), refused.status, refused.headers)
            await response(scope, receive, send)
            return
        await self.app(scope, _replayed(body or b"", receive), send)


async def _body(receive: Receive, announced: str, limit: int) -> bytes | None:
    """The whole body; None when it is longer than the limit, in which case the rest is not read."""
    if not announced.isdecimal() or int(announced) > limit:
        return None
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then whatever comes after it: the disconnect."""
    pending = [body]

    async def replay() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay
