"""Data sets as people have them: files, folders or hub ids, their columns recognised and named."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

from twofold.base.chat import from_json
from twofold.errors import DataError

Format = Literal["messages", "conversations", "prompt-completion", "instruction", "text", "labelled"]
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""The columns that each format needs, in the order they are looked for."""
PROSE = ("prompt", "completion", "instruction", "input", "output", "text")
"""Columns that are text whatever stands in them: in CSV, where 2 and None are words too."""
Columns: TypeAlias = Mapping[Format, tuple[str, ...]]


@runtime_checkable
class Rows(Protocol):
    """Rows to be counted and gone through in order; they need not be in memory."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Source:
    """Where rows come from, and the format that their columns mean."""

    source: str
    format: Format
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Table(Source):
    """Rows as they were read."""

    rows: Rows


@dataclass(frozen=True)
class RowStream(Source):
    """Rows that are read when they are asked for, anew in every pass.

    Attributes:
        rows: what `datasets` streams.
    """

    rows: Any

    def shuffled(self, seed: int, buffer: int, epoch: int) -> Iterator[Mapping[str, Any]]:
        """One pass, each row drawn from a buffer of so many: an order that depends on seed and epoch alone."""
        ordered = self.rows.shuffle(seed=seed, buffer_size=buffer)
        ordered.set_epoch(epoch)
        return _readable(self.source, ordered)

    def first(self, count: int) -> list[Mapping[str, Any]]:
        """The first rows as they lie."""
        return list(itertools.islice(_readable(self.source, self.rows), count))


def _readable(source: str, rows: Any) -> Iterator[Mapping[str, Any]]:
    try:
        yield from rows
    except Exception as error:
        raise DataError(f"{source} cannot be read: {_innermost(error)}") from error


def read_table(source: str, known: Columns = COLUMNS) -> Table:
    """Read a JSONL, JSON, CSV or Parquet file, a folder of them, or a hub data set (its `train` split).

    Args:
        known: the formats to look for, and their columns.

    Raises:
        DataError: nothing there, nothing in it, unreadable, or columns of no known format.
    """
    rows = _read(source, streaming=False)
    columns = tuple(rows.column_names)
    if len(rows) == 0:
        raise DataError(f"{source} holds no examples")
    return Table(source, detect(columns, source, known), columns, rows)


def read_stream(source: str) -> RowStream:
    """The same, read row by row as training goes on.

    Raises:
        DataError: as for `read_table`; what lies further on is met when it is read.
    """
    rows = _read(source, streaming=True)
    first = next(_readable(source, rows), None)
    if first is None:
        raise DataError(f"{source} holds no examples")
    return RowStream(source, detect(tuple(first), source), tuple(first), rows)


def detect(columns: Sequence[str], source: str, formats: Columns = COLUMNS) -> Format:
    """The first format whose columns are all there."""
    for name, needed in formats.items():
        if all(c in columns for c in needed):
            return name
    known = "; ".join(" + ".join(f"'{c}'" for c in needed) for needed in formats.values())
    raise DataError(
        f"{source} has the columns {', '.join(map(repr, columns))}, which fit no known format; rename them to one of: {known}"
    )


def _read(source: str, *, streaming: bool) -> Any:
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetGenerationError

    disable_progress_bars()
    files = _files(source)
    if files and all(f.stat().st_size == 0 for f in files):
        raise DataError(f"{source} holds no examples: the file is empty")
    for file in files:
        _check_text(file)
    try:
        if files:
            reader, names = READERS[files[0].suffix], [str(f) for f in files]
            literal = {"keep_default_na": False, "converters": dict.fromkeys(PROSE, str)} if reader == "csv" else {}
            return load_dataset(reader, data_files=names, split="train", streaming=streaming, **literal)
        found = load_dataset(source, streaming=streaming)
    except DatasetGenerationError as error:
        broken = next((b for b in map(_broken_line, files) if b), None)
        raise DataError(broken or f"{source} cannot be read: {_innermost(error)}") from error
    except Exception as error:
        if "corresponds to no data" in str(error):  # what `datasets` says of files without a row
            raise DataError(f"{source} holds no examples") from error
        raise DataError(f"cannot load the data set {source}: {_innermost(error)}") from error
    if not isinstance(found, dict):
        return found
    if "train" not in found:
        raise DataError(
            f"{source} has no split 'train', only {', '.join(map(repr, found))}; save the one to use as a file, and name that"
        )
    return found["train"]


def _files(source: str) -> list[Path]:
    """The data files behind a path; none for a hub id."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in READERS:
            raise DataError(f"{source} is not a {', '.join(READERS)} file")
        return [path]
    if path.is_dir():
        found = sorted(f for f in path.iterdir() if f.suffix in READERS)
        kinds = sorted({READERS[f.suffix] for f in found})
        if len(kinds) != 1:
            what = f"files of several kinds ({', '.join(kinds)})" if kinds else f"no {', '.join(READERS)} files"
            raise DataError(f"the folder {source} holds {what}; give one kind")
        return found
    if path.suffix in READERS or source.startswith((".", "/", "~")) or "/" not in source:
        raise DataError(f"no data at {source}")
    return []


def _check_text(file: Path) -> None:
    """Raises DataError at a line that is not UTF-8, which `datasets` would tell only when the row is used."""
    if READERS[file.suffix] == "parquet":
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{file}, line {number}: not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _broken_line(file: Path) -> str | None:
    """The first line of a JSONL file that holds no JSON object: `datasets` counts rows from the start of a block."""
    if file.suffix != ".jsonl":
        return None
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                value = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                return f"{file}, line {number}: not valid JSON ({error.msg} at column {error.colno})"
            if not isinstance(value, dict):
                return f"{file}, line {number}: expected a JSON object, found {line.strip():.80}"
    return None


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def as_messages(row: Mapping[str, Any], kind: Format, place: str) -> list[dict[str, Any]]:
    """The conversation in a row of any format but `text`.

    Raises:
        DataError: a message without role or content, or of an unknown speaker, with its place.
    """
    if kind == "prompt-completion":
        prompt, answer = row["prompt"], row["completion"]
        return _list([*_turns(prompt, "user", place), *_turns(answer, "assistant", place)], place)
    if kind == "instruction":
        asked = instruction_text(row, place)
        return [{"role": "user", "content": asked}, *_turns(row["output"], "assistant", place)]
    if kind == "conversations":
        return [_sharegpt(m, place) for m in _list(row["conversations"], place)]
    return [_message(m, place) for m in _list(row["messages"], place)]


def tools_of(row: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """The functions that a conversation may call, as its `tools` column describes them: a list, or the JSON of one.

    Raises:
        DataError: it is something else.
    """
    given = row.get("tools")
    tools = from_json(given) if isinstance(given, str) else given
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{place}: expected a list of functions' descriptions in 'tools', found {given!r:.80}")
    return cast(list[dict[str, Any]], _given(tools))


def _given(value: Any) -> Any:
    """The value without the None that stands for what other rows have."""
    if isinstance(value, Mapping):
        return {k: _given(v) for k, v in value.items() if v is not None}
    return [_given(v) for v in value] if isinstance(value, list) else value


def instruction_text(row: Mapping[str, Any], place: str) -> str:
    """An instruction with its optional input."""
    extra = row.get("input")
    return f"{_text(row['instruction'], place)}\n\n{extra}" if extra else _text(row["instruction"], place)


def _turns(value: Any, role: str, place: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [_message(m, place) for m in value]
    return [{"role": role, "content": _text(value, place)}]


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: expected a list of messages, found {value!r:.80}")
    return value


def _message(message: Any, place: str) -> dict[str, Any]:
    """A message as templates know it: where it calls functions, the text may be missing, and arguments are objects."""
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or not message.get("role") or (message.get("content") is None and not calls):
        raise DataError(f"{place}: a message needs 'role' and 'content', found {message!r:.120}")
    said = {"content": "", **_given(message)}
    return {**said, "tool_calls": [_call(c, place) for c in said["tool_calls"]]} if calls else said


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{place}: a call in 'tool_calls' needs a 'function' with a 'name', found {call!r:.120}")
    arguments = function.get("arguments", {})
    plain = from_json(arguments) if isinstance(arguments, str) else arguments
    return {**call, "function": {**function, "arguments": plain}}


def _sharegpt(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or message.get("from") not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise DataError(f"{place}: 'from' must be one of {known}, found {message!r:.120}")
    marked = {} if message.get("train") is None else {"train": message["train"]}
    return {"role": SHAREGPT_ROLES[message["from"]], "content": _text(message.get("value"), place), **marked}


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text, found {value!r:.80}")
    return value
