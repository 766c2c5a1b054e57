"""Twofold's server as an application of Ray Serve: the same routes, in as many replicas as asked for.

    serve run twofold.server.ray_serve:app base=smollm2-135m-instruct adapters=/adapters

Every replica loads the base and watches the same adapter folder, which is what keeps them alike: adapters are put into the folder,
not loaded over HTTP, because such a request reaches one replica alone.
"""

from __future__ import annotations

from typing import Any

import yaml
from fastapi import FastAPI

from twofold.config import build
from twofold.errors import ConfigError
from twofold.events import Event, Message, Warned
from twofold.recipes.serve import ServeConfig, load_served
from twofold.server.access import log_as_json
from twofold.server.app import make_app
from twofold.server.worker import EngineThread

QUEUE_OF_RAY = 4
"""Requests that a replica may get at a time, in streams: past them Ray waits, so that our own queue refuses before."""


def app(settings: dict[str, Any]) -> Any:
    """What `serve run` and a Serve config file start: the fields of `ServeConfig`, as `base=...` or under `args`.

    Returns:
        a `ray.serve.Application`.

    Raises:
        ConfigError: an unknown setting, with the nearest right one; or one that Ray decides.
    """
    from ray import serve

    values = {name: _value(given) for name, given in settings.items()}
    config = build(ServeConfig, values, source="the arguments of the application")
    if config.engine != "twofold":
        raise ConfigError("under Ray Serve this is Twofold's own engine; vLLM has an application of Ray's")
    deployment = serve.deployment(
        name="twofold",
        max_ongoing_requests=QUEUE_OF_RAY * config.streams,
        health_check_period_s=10,
        graceful_shutdown_timeout_s=config.drain_seconds,
    )
    return deployment(serve.ingress(lambda: _app(config))(Replica)).bind()


def _value(given: Any) -> Any:
    """`serve run` hands on texts, a config file numbers and lists as they are."""
    return yaml.safe_load(given) if isinstance(given, str) else given


def _app(config: ServeConfig) -> FastAPI:
    """The application of one replica, made in its process."""
    log_as_json()
    thread = EngineThread()
    served = thread.submit(lambda: load_served(config, _say)).result()
    made = make_app(served, config, thread)
    Replica.service = made.state.service
    return made


def _say(event: Event) -> None:
    if isinstance(event, Message | Warned):
        print(event.text, flush=True)


class Replica:
    """What Ray asks for its health."""

    service: Any = None

    def check_health(self) -> None:
        """Raise if the engine has failed: Ray then starts another replica."""
        if self.service is not None and not self.service.worker.healthy:
            raise RuntimeError("the engine of this replica has failed")
