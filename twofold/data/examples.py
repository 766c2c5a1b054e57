"""From rows to examples: tokens, loss mask, and an account of everything that was cut or left out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from twofold.base.batch import Example
from twofold.base.chat import ALPACA, Renderer
from twofold.data.formats import Format, Source, Table, as_messages, instruction_text, read_table, tools_of
from twofold.errors import ConfigError, DataError
from twofold.events import Emit, Progress, Warned, silent


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run.

    Attributes:
        train: JSONL, JSON, CSV or Parquet, a folder of them, or a hub data set. A column `tools` beside conversations describes
            the functions that they may call, to a chat template that shows them.
        evaluation: the same, held out.
        max_length: the most tokens an example may have.
        too_long: what happens to longer ones: `drop` leaves them out, `cut` keeps their first tokens,
            `refuse` stops. Counted and shown in each case. Plain text is never lost: it is split, and each
            piece begins with the last token of the one before.
        system: a system message for conversations that have none.
        template: file of a Jinja chat template in place of the base's own.
        streaming: read and render training rows while training, and never hold them all; needs training.max_steps.
            Rows are shuffled within a buffer, and the pre-flight looks at the first ones only.
    """

    train: str
    evaluation: str | None = None
    max_length: int = 2048
    too_long: Literal["drop", "cut", "refuse"] = "drop"
    system: str | None = None
    template: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(
                f"max_length is {self.max_length} but must be at least 2: a token and the one that is predicted from it"
            )

    def chat_template(self) -> str | None:
        """The text of the template file, if one is given."""
        if self.template is None:
            return None
        try:
            return Path(self.template).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot read data.template {self.template}: {error.strerror}") from error


@dataclass(frozen=True)
class DataReport:
    """What became of a data set, in examples and tokens.

    Attributes:
        too_long: examples over the limit.
        lost_supervised_tokens: supervised tokens that cutting or dropping took away.
        unsupervised: examples left out because nothing in them is supervised.
        digest: SHA-256 of all tokens and masks.
        streamed: whether these are only the first examples of a stream.
        classes: how many examples each class has, where texts are classified.
    """

    source: str
    format: Format
    columns: tuple[str, ...]
    examples: int
    tokens: int
    supervised_tokens: int
    longest: int
    too_long: int
    lost_supervised_tokens: int
    unsupervised: int
    digest: str
    streamed: bool = False
    classes: Mapping[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "columns": list(self.columns)}


@dataclass(frozen=True)
class Examples:
    """Examples ready to be packed, and the account of how they came about."""

    items: list[Example]
    report: DataReport


def load_examples(source: str, config: DataConfig, renderer: Renderer, emit: Emit = silent) -> Examples:
    """Read, render and check a data set.

    Raises:
        DataError: unreadable, over-long where that is refused, or nothing in it is supervised.
    """
    return examples_of(read_table(source), config, renderer, emit)


def examples_of(table: Table, config: DataConfig, renderer: Renderer, emit: Emit = silent) -> Examples:
    """Render and check rows that were read.

    Raises:
        DataError: a row that cannot be rendered, over-long where that is refused, or nothing is supervised.
    """
    if config.system is not None and (table.format == "text" or renderer.template is None):
        emit(Warned(text=f"data.system is left out of {table.source}, for {_why_no_system(table)}"))
    task = f"reading {Path(table.source).name}"
    rendered: list[Example] = []
    for i, row in enumerate(table.rows):
        rendered += render_row(row, table, f"{table.source}, example {i + 1}", config, renderer)
        if i % 200 == 0:
            emit(Progress(task=task, done=i, total=len(table.rows)))
    emit(Progress(task=task, done=len(table.rows), total=len(table.rows)))
    return fit(rendered, table, config)


def _why_no_system(table: Table) -> str:
    return "plain text has no place for it" if table.format == "text" else "this base has no chat template"


def render_row(
    row: Mapping[str, Any], table: Source, place: str, config: DataConfig, renderer: Renderer
) -> list[Example]:
    """The examples of one row: one, or one per answer where the template rewrites history. `place` is for errors."""
    try:
        if table.format == "text":
            return _windows(renderer.text(_plain_text(row, "text", place)), config.max_length)
        if renderer.template is None and table.format == "instruction":
            prompt = ALPACA.format(instruction=instruction_text(row, place))
            return [renderer.completion(prompt, _plain_text(row, "output", place))]
        if renderer.template is None and table.format == "prompt-completion" and isinstance(row["prompt"], str):
            return [renderer.completion(row["prompt"], _plain_text(row, "completion", place))]
        messages = with_system(as_messages(row, table.format, place), config.system)
        return _knowing(tools_of(row, place), renderer).chat(messages)
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(place) else f"{place}: {error}") from error


def _knowing(tools: list[dict[str, Any]], renderer: Renderer) -> Renderer:
    if tools and not renderer.takes_tools:
        raise DataError(
            "this conversation has tools, of which the chat template says nothing, so the model would not see them; give "
            "data.template one that does, or leave out the column 'tools'"
        )
    return renderer.with_tools(tools) if tools else renderer


def with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """The messages, behind a system message if one is wanted and none is there."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _plain_text(row: Mapping[str, Any], column: str, place: str) -> str:
    if not isinstance(row[column], str):
        raise DataError(f"{place}: expected text in '{column}', found {row[column]!r:.80}")
    return str(row[column])


def _windows(example: Example, length: int) -> list[Example]:
    """Pieces of at most `length` tokens; each further one begins with the last token of the one before, to predict from."""
    tokens, supervised = example.token_ids, example.supervised
    further = range(length - 1, len(tokens) - 1, length - 1)
    return [
        example.first(length),
        *(Example(tokens[s : s + length], [False, *supervised[s + 1 : s + length]]) for s in further),
    ]


def within(rendered: list[Example], config: DataConfig, source: str) -> list[Example]:
    """The examples with those over the limit dropped or cut.

    Raises:
        DataError: there are such, and the configuration refuses them.
    """
    limit = config.max_length
    long = [e for e in rendered if len(e.token_ids) > limit]
    if long and config.too_long == "refuse":
        raise DataError(f"{len(long)} examples of {source} are over {limit} tokens; raise data.max_length")
    kept = [e for e in rendered if len(e.token_ids) <= limit or config.too_long == "cut"]
    return [e.first(limit) for e in kept]


def fit(rendered: list[Example], table: Table, config: DataConfig) -> Examples:
    """The examples within the length limit, with the account of them.

    Raises:
        DataError: over-long where that is refused, or nothing is supervised.
    """
    limit = config.max_length
    long = [e for e in rendered if len(e.token_ids) > limit]
    kept = within(rendered, config, table.source)
    useful = [e for e in kept if e.supervised_tokens]
    report = _account(rendered, long, kept, useful, table)
    if not useful:
        raise DataError(_nothing_supervised(report, limit))
    return Examples(useful, report)


def _account(
    rendered: list[Example], long: list[Example], kept: list[Example], useful: list[Example], table: Table
) -> DataReport:
    supervised = sum(e.supervised_tokens for e in useful)
    return DataReport(
        source=Path(table.source).name,
        format=table.format,
        columns=table.columns,
        examples=len(useful),
        tokens=sum(len(e.token_ids) for e in useful),
        supervised_tokens=supervised,
        longest=max((len(e.token_ids) for e in useful), default=0),
        too_long=len(long),
        lost_supervised_tokens=sum(e.supervised_tokens for e in rendered) - supervised,
        unsupervised=len(kept) - len(useful),
        digest=_digest(useful),
    )


def _nothing_supervised(report: DataReport, limit: int) -> str:
    if report.too_long:
        return f"nothing is left of {report.source}: all its answers lie beyond {limit} tokens; raise data.max_length"
    return (
        f"nothing in {report.source} is supervised, so nothing could be learned: no assistant turn is trained "
        "(are all marked `train: false`, or are the answers empty?)"
    )


def _digest(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(tuple(part for part in example if part is not None)).encode())
    return digest.hexdigest()
