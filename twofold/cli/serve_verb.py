"""twofold serve --base B --adapters DIR"""

from __future__ import annotations

import os
from dataclasses import replace

from twofold.cli.flags import parse
from twofold.cli.remote import KEY
from twofold.cli.terminal import Terminal
from twofold.garbage import collected_rarely
from twofold.recipes.serve import ServeConfig


def run(arguments: list[str]) -> int:
    config = parse(ServeConfig, arguments, verb="serve", description="Serve a base and adapters over HTTP.", bare=())
    if os.environ.get(KEY):
        config = replace(config, api_key=(*config.api_key, os.environ[KEY]))
    with Terminal() as terminal:
        if config.engine == "vllm":
            from twofold.server.vllm.launch import serve as serve_with_vllm

            return serve_with_vllm(config, terminal)
        with collected_rarely():
            from twofold.server.run import serve

        serve(config, terminal)
    return 0
