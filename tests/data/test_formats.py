"""Every format from every kind of file, and a sentence for whatever cannot be read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_base import write_jsonl

from twofold.data.formats import COLUMNS, as_messages, detect, read_stream, read_table
from twofold.data.tasks import find_labels
from twofold.errors import DataError

pytest_plugins = ("tiny_fixtures",)

SAID = [{"role": "user", "content": 'hé, "2"?'}, {"role": "assistant", "content": "four\nlines"}]
ASKED, ANSWER = (m["content"] for m in SAID)
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": SAID},
    "conversations": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWER}]},
    "prompt-completion": {"prompt": ASKED, "completion": ANSWER},
    "instruction": {"instruction": ASKED, "output": ANSWER},
    "text": {"text": ASKED + ANSWER},
}
FLAT = ("prompt-completion", "instruction", "text")


def written(folder: Path, kind: str, rows: list[dict[str, Any]], name: str = "data") -> Path:
    path = folder / f"{name}.{kind}"
    if kind == "jsonl":
        return write_jsonl(path, rows)
    if kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if kind == "parquet":
        import pandas

        pandas.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("kind", "format_"),
    [(k, f) for k in ("jsonl", "json", "parquet", "csv") for f in ROWS if k != "csv" or f in FLAT],
)
def test_every_format_from_every_kind_of_file(kind: str, format_: str, tmp_path: Path) -> None:
    table = read_table(str(written(tmp_path, kind, [ROWS[format_]] * 3)))
    assert (table.format, len(table.rows)) == (format_, 3)
    assert set(COLUMNS[table.format]) <= set(table.columns)
    for row in table.rows:
        assert row["text"] == ASKED + ANSWER if format_ == "text" else as_messages(row, table.format, "here") == SAID


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        written(tmp_path, "jsonl", [{"text": f"{name}{i}"} for i in range(2)], name)
    assert [r["text"] for r in read_table(str(tmp_path)).rows] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    written(tmp_path, "csv", [{"text": "d"}], "d")
    with pytest.raises(DataError, match=r"several kinds \(csv, json\); give one kind"):
        read_table(str(tmp_path))


def test_the_rows_are_those_of_today_not_of_a_cache(tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl", [{"text": "one"}])
    assert [r["text"] for r in read_table(str(path)).rows] == ["one"]
    written(tmp_path, "jsonl", [{"text": "two"}])
    assert [r["text"] for r in read_table(str(path)).rows] == ["two"]


def test_an_instruction_takes_its_input_along() -> None:
    row = {"instruction": "add", "input": "2 2", "output": "4"}
    assert as_messages(row, "instruction", "here")[0]["content"] == "add\n\n2 2"
    assert as_messages(row | {"input": ""}, "instruction", "here")[0]["content"] == "add"
    assert as_messages(row | {"input": None}, "instruction", "here")[0]["content"] == "add"


def test_prompts_and_completions_may_be_messages() -> None:
    assert as_messages({"prompt": SAID[:1], "completion": SAID[1:]}, "prompt-completion", "here") == SAID


def test_messages_win_over_text_where_both_are_there() -> None:
    assert detect(["text", "messages", "id"], "here") == "messages"


def test_columns_of_no_format_are_named_with_what_would_do() -> None:
    with pytest.raises(DataError) as caught:
        detect(["question", "answer"], "qa.jsonl")
    assert "qa.jsonl has the columns 'question', 'answer'" in str(caught.value)
    assert "'prompt' + 'completion'" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", '{"text": "fine"}\n{"text": "cut', "a.jsonl, line 2: not valid JSON (Unterminated string"),
        (
            "a.jsonl",
            '{"text": "fine"}\n\n{"text" "no"}\n',
            "a.jsonl, line 3: not valid JSON (Expecting ':' delimiter at col",
        ),
        ("a.jsonl", '{"text": "fine"}\n' * 9000 + "word\n", "a.jsonl, line 9001: not valid JSON"),
        ("a.jsonl", '{"text": "fine"}\n[1, 2]\n', "a.jsonl, line 2: expected a JSON object, found [1, 2]"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', "a.jsonl, line 2: not UTF-8 text (invalid start byte)"),
        ("a.csv", b"text\nfine\ngr\xfcn\n", "a.csv, line 3: not UTF-8 text"),
        ("a.json", "[]", "holds no examples"),
        ("a.csv", "text\n", "holds no examples"),
        ("a.parquet", "no parquet", "not a parquet file"),
        ("a.txt", "text", "is not a .jsonl, .json, .csv, .parquet file"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: str | bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_table(str(tmp_path / name))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [lambda path: read_table(path).rows, lambda path: read_stream(path).first(9)])
def test_words_of_a_csv_stay_the_words_that_they_are(read: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nIs it?,None\nAnd 1+1?,007\nElse?,NA\n")
    assert [row["completion"] for row in read(str(tmp_path / "a.csv"))] == ["None", "007", "NA"]


def test_labels_of_a_csv_are_numbers_or_names(tmp_path: Path) -> None:
    for name, labels in (("numbers", [10, 2]), ("names", ["None", "good"])):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"1,{label}\n" for label in labels))
        assert find_labels(str(tmp_path / f"{name}.csv")) == tuple(map(str, sorted(labels)))


def test_a_hub_data_set_without_training_data_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": "a"}])
    found = datasets.DatasetDict({"test": rows, "validation": rows})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **named: found)
    with pytest.raises(DataError, match=r"^org/name has no split 'train', only 'test', 'validation'; "):
        read_table("org/name")


def test_a_broken_line_is_told_with_the_file_that_it_is_in(tmp_path: Path) -> None:
    written(tmp_path, "jsonl", [{"text": "fine"}], "a")
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: not valid JSON"):
        read_table(str(tmp_path))


def test_what_is_not_there(tmp_path: Path) -> None:
    for source in ("nowhere.jsonl", str(tmp_path / "nothing"), "plainword"):
        with pytest.raises(DataError, match="no data at"):
            read_table(source)
    with pytest.raises(DataError, match=r"no \.jsonl"):
        read_table(str(tmp_path))


@pytest.mark.parametrize(
    ("row", "kind", "said"),
    [
        ({"messages": []}, "messages", "expected a list of messages"),
        ({"messages": [{"role": "user"}]}, "messages", "needs 'role' and 'content'"),
        ({"messages": [{"content": "a"}]}, "messages", "needs 'role' and 'content'"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "conversations", "'from' must be one of human"),
        ({"prompt": [], "completion": []}, "prompt-completion", "expected a list of messages, found []"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "messages", "needs a 'function'"),
        ({"prompt": "a", "completion": None}, "prompt-completion", "expected text, found None"),
        ({"instruction": 3, "output": "b"}, "instruction", "expected text, found 3"),
    ],
)
def test_a_row_that_makes_no_sense_is_told_with_its_place(row: dict[str, Any], kind: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        as_messages(row, kind, "data.jsonl, example 7")
    assert str(caught.value).startswith("data.jsonl, example 7: ")
    assert said in str(caught.value)
