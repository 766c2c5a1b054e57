"""`twofold VERB`: finds the verb's file, imports it alone, runs it, and turns errors into one sentence."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import select
import sys
from typing import Any, TextIO

from twofold.garbage import collected_rarely

VERBS = {
    "demo": "the main job on the embedded default, end to end",
    "base": "list built-in bases, or pull one into the cache",
    "plan": "parameters and memory of a training, without weights",
    "preview": "the data as the model will see it: tokens, loss mask, truncation",
    "train": "train an adapter by a configuration, and prove it",
    "sweep": "a grid of ranks and learning rates, and which to take",
    "study": "a claim about LoRA, shown on real models and data",
    "intrinsic": "how few numbers learn a task: d90 and its curve",
    "eval": "loss, accuracy and exact match on held-out data",
    "generate": "answer a prompt",
    "chat": "talk to a base and its adapter",
    "serve": "a base and a folder of adapters over HTTP, as OpenAI's API",
    "studio": "a local page: LoRA made visible, planner, runs, adapters, chat",
    "inspect": "norms, ranks and findings of an adapter, module by module",
    "compare": "how alike two adapters' updates are, module by module",
    "combine": "several adapters as one: cat, svd, linear, ties, dare",
    "resize": "an adapter at other ranks, and what that loses",
    "extract": "an adapter out of a full fine-tune",
    "merge": "fold an adapter into a standard Hugging Face folder",
    "export": "an adapter for llama.cpp, Ollama, mlx-lm or vLLM",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 1 for our mistakes, 2 for the user's."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # of characters that a terminal's encoding lacks
    try:
        try:
            return _answer(given, debug=debug)
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        if _is_read(sys.stdout):
            return _explain(error)  # another pipe broke
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # for what it still holds at the interpreter's end
        return 128 + 13  # what a shell says of an end by SIGPIPE


def _is_read(stream: TextIO) -> bool:
    """Whether somebody still reads it."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return not any(found & (select.POLLERR | select.POLLHUP) for _, found in poll.poll(0))


def _answer(given: list[str], *, debug: bool) -> int:
    try:
        return _run(given)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    except Exception as error:
        if debug:
            raise
        return _explain(error)


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if given[0] in ("--version", "version"):
        from importlib.metadata import version

        print(f"twofold {version('twofold')}")
        return 0
    verb, *rest = given
    if verb not in VERBS:
        from twofold.errors import ConfigError, did_you_mean

        raise ConfigError(f"no verb '{verb}'{did_you_mean(verb, VERBS)}; see twofold --help")
    quiet_libraries()
    with collected_rarely():
        module: Any = importlib.import_module(f"twofold.cli.{verb}_verb")
    return int(module.run(rest) or 0)


def help_text() -> str:
    """What `twofold --help` prints."""
    lines = [f"  {verb:<10} {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "twofold: plan, train, see, prove, combine, merge and serve LoRA adapters",
            "",
            "usage: twofold VERB [options]        twofold VERB --help",
            "",
            *lines,
            "",
            "Every verb but chat, serve and studio takes --json for one JSON document on stdout; all take --debug for a traceback.",
        ]
    )


def quiet_libraries() -> None:
    """What long work has to say comes as events; libraries keep their bars and hints to themselves."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _explain(error: Exception) -> int:
    from twofold.errors import TwofoldError, UserError

    if isinstance(error, TwofoldError):
        _say(f"twofold: {error}")
        return 2 if isinstance(error, UserError) else 1
    kind = type(error).__name__
    _say(f"twofold: a mistake of ours, not yours: {kind}: {error} (--debug shows where)")
    return 1


def _say(sentence: str) -> None:
    """On stderr; where several processes train together, one of them says it."""
    if "RANK" in os.environ:
        from twofold.world import tell_torchrun, tells

        if not tells():
            return
        tell_torchrun(sentence)
    print(sentence, file=sys.stderr)


def print_json(value: Any) -> None:
    """The one JSON document of a verb; null stands for numbers that JSON has no word for. Where stdout is not UTF-8, what is not
    ASCII is escaped."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=sys.stdout.encoding != "utf-8", allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
