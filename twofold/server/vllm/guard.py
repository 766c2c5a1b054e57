"""The door in front of vLLM's server: who may ask, by the rules of Twofold's own, and nobody but the launcher loads adapters.

vLLM's load endpoint takes any path and any hub id from whoever may ask; here the folder alone says what is served.
"""

from __future__ import annotations

import json
import os

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from twofold.server.errors import ApiError
from twofold.server.security import ADMINISTRATION, Gate, Policy, digest, refusal

POLICY = "TWOFOLD_VLLM_POLICY"
"""Environment variable with what `as_text` makes of a policy."""


def as_text(policy: Policy, token: str, max_body_bytes: int) -> str:
    """A policy for the environment of vLLM's process: of keys only their digests.

    Args:
        token: what the launcher shows when it unloads an adapter.
    """
    lists = {"hosts": sorted(policy.hosts), "origins": sorted(policy.origins), "keys": [k.hex() for k in policy.keys]}
    return json.dumps({**lists, "token": digest(token).hex(), "max_body_bytes": max_body_bytes})


class Guard(Gate):
    """What vLLM's `--middleware` is given."""

    def __init__(self, app: ASGIApp) -> None:
        said = json.loads(os.environ[POLICY])
        keys = frozenset(map(bytes.fromhex, said["keys"]))
        policy = Policy(hosts=frozenset(said["hosts"]), origins=frozenset(said["origins"]), keys=keys)
        super().__init__(app, policy, said["max_body_bytes"])
        self._launcher = Policy(admin_keys=frozenset({bytes.fromhex(said["token"])}), hosts=policy.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in ADMINISTRATION:
            await super().__call__(scope, receive, send)
            return
        if refusal(scope["method"], scope["path"], Headers(scope=scope), self._launcher) is None:
            await self.app(scope, receive, send)
            return
        refused = ApiError(403, "the adapter folder of this server says what is served", code="admin_key_needed")
        await JSONResponse(refused.body().model_dump(), refused.status)(scope, receive, send)
