"""`twofold studio`: where it listens, what it may look into, and who may use it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path

from twofold.errors import ConfigError
from twofold.server.run import is_loopback


@dataclass(frozen=True, kw_only=True)
class StudioConfig:
    """The local web page: lesson, planner, training, inspection and chat.

    Attributes:
        root: folders that may be looked into, the first of which takes runs and uploads; where the command runs, if none is given.
        host: address to listen on.
        port: port to listen on; 0 for any that is free.
        token: what a browser must know to be let in; made anew where the address is not loopback and none is given.
        allowed_hosts: names that browsers may call it by, besides localhost and addresses.
        max_upload_mb: most megabytes of an uploaded file.
        open: open it in the browser, where there is a screen.
    """

    root: tuple[Path, ...] = ()
    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    max_upload_mb: float = 1024.0
    open: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port is {self.port} but must be a number up to 65535")
        if self.max_upload_mb <= 0:
            raise ConfigError(f"max_upload_mb is {self.max_upload_mb} but must be above 0")
        if self.token is not None and not (self.token.isascii() and self.token.isalnum()):
            raise ConfigError("the token must be made of letters and digits")

    @property
    def max_upload_bytes(self) -> int:
        return int(self.max_upload_mb * 2**20)


def with_token(config: StudioConfig) -> StudioConfig:
    """The same with a token, where others than this machine's users could reach it."""
    if config.token or is_loopback(config.host):
        return config
    return replace(config, token=secrets.token_hex(16))
