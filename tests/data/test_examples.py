"""From rows to examples: what is supervised, what is cut, and an account of both."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_base import chats, pairs, tokenizer, write_jsonl
from tiny_runs import Heard

from twofold.base.batch import Example
from twofold.base.chat import ALPACA, Renderer
from twofold.data.examples import DataConfig, Examples, load_examples
from twofold.errors import ConfigError, DataError
from twofold.events import Warned

pytest_plugins = ("tiny_fixtures",)


@pytest.fixture(scope="module")
def chatty() -> Renderer:
    return Renderer(tokenizer())


@pytest.fixture(scope="module")
def bare() -> Renderer:
    return Renderer(tokenizer(template=None))


def loaded(folder: Path, rows: list[Any], renderer: Renderer, **settings: Any) -> Examples:
    path = str(write_jsonl(folder / "data.jsonl", rows))
    return load_examples(path, DataConfig(train=path, **settings), renderer)


def supervised(example: Example, renderer: Renderer) -> str:
    chosen = [t for t, s in zip(example.token_ids, example.supervised, strict=True) if s]
    return str(renderer.tokenizer.decode(chosen))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


LETTER = {"prompt": "Dear", "completion": "you"}
LONG = {"messages": [user("hm " * 50), says("yes indeed")]}


def test_only_answers_are_supervised_and_train_false_takes_one_out(chatty: Renderer, tmp_path: Path) -> None:
    turns = [user("a?"), says("one", train=False), user("b?"), says("two"), user("c?"), says("three", train=True)]
    (example,) = loaded(tmp_path, [{"messages": turns}], chatty).items
    assert supervised(example, chatty) == "two<|im_end|>three<|im_end|>"


def test_formats_without_a_template(bare: Renderer, tmp_path: Path) -> None:
    (example,) = loaded(tmp_path, [{"prompt": "2+2=", "completion": "4"}], bare).items
    assert bare.tokenizer.decode(example.token_ids) == "2+2=4<|im_end|>"
    assert supervised(example, bare) == "4<|im_end|>"
    (example,) = loaded(tmp_path, [{"instruction": "add", "input": "2 2", "output": "4"}], bare).items
    assert bare.tokenizer.decode(example.token_ids) == ALPACA.format(instruction="add\n\n2 2") + "4<|im_end|>"
    with pytest.raises(DataError, match=r"data.jsonl, example 1: .*no chat template"):
        loaded(tmp_path, chats(1), bare)


def test_a_system_message_is_put_before_conversations_that_have_none(chatty: Renderer, tmp_path: Path) -> None:
    own = {"messages": [{"role": "system", "content": "mine"}, user("a?"), says("b")]}
    found = loaded(tmp_path, [own, *chats(1)], chatty, system="yours").items
    texts = [chatty.tokenizer.decode(e.token_ids) for e in found]
    assert "mine" in texts[0]
    assert "yours" not in texts[0]
    assert texts[1].startswith("<|im_start|>system\nyours<|im_end|>")


def test_the_account_adds_up(chatty: Renderer, tmp_path: Path) -> None:
    found = loaded(tmp_path, chats(9), chatty)
    report = found.report
    assert (report.examples, report.format, report.source) == (9, "messages", "data.jsonl")
    assert report.tokens == sum(len(e.token_ids) for e in found.items)
    assert report.supervised_tokens == sum(sum(e.supervised) for e in found.items)
    assert report.longest == max(len(e.token_ids) for e in found.items)
    assert (report.too_long, report.lost_supervised_tokens, report.unsupervised) == (0, 0, 0)


def test_over_long_examples_are_dropped_cut_or_refused_and_counted(chatty: Renderer, tmp_path: Path) -> None:
    whole = loaded(tmp_path, [LONG], chatty).report.supervised_tokens
    rows = [*chats(4), LONG, LONG]
    dropped = loaded(tmp_path, rows, chatty, max_length=60)
    assert (dropped.report.examples, dropped.report.too_long) == (4, 2)
    assert dropped.report.lost_supervised_tokens == 2 * whole
    length = len(loaded(tmp_path, [LONG], chatty).items[0].token_ids)
    cut = loaded(tmp_path, rows, chatty, max_length=length - 3, too_long="cut")
    assert (cut.report.examples, cut.report.too_long) == (6, 2)
    assert cut.report.longest == length - 3
    assert cut.report.lost_supervised_tokens == 2 * 2  # the line break after the end token is not supervised
    with pytest.raises(DataError, match=r"2 examples of .* are over 60 tokens; raise data.max_length"):
        loaded(tmp_path, rows, chatty, max_length=60, too_long="refuse")


@pytest.mark.parametrize("length", [-5, 0, 1])
def test_a_limit_that_leaves_nothing_to_predict_is_refused(length: int) -> None:
    with pytest.raises(ConfigError, match=f"max_length is {length} but must be at least 2"):
        DataConfig(train="x.jsonl", max_length=length)


def test_an_answer_cut_off_whole_leaves_nothing_to_learn(chatty: Renderer, tmp_path: Path) -> None:
    found = loaded(tmp_path, [*chats(4), LONG], chatty, max_length=60, too_long="cut")
    assert (found.report.examples, found.report.unsupervised) == (4, 1)
    with pytest.raises(DataError, match="all its answers lie beyond 60 tokens"):
        loaded(tmp_path, [LONG], chatty, max_length=60, too_long="cut")


@pytest.mark.parametrize(
    "row", [{"messages": [user("a?"), says("b", train=False)]}, {"messages": [user("a?")]}], ids=["untrained", "asked"]
)
def test_a_data_set_that_teaches_nothing_is_refused(row: Any, chatty: Renderer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing in data\.jsonl is supervised"):
        loaded(tmp_path, [row, row], chatty)


TOOLS = [
    {"type": "function", "function": {"name": "dim", "parameters": {"properties": {"level": {"type": "number"}}}}},
    {"type": "function", "function": {"name": "ring", "parameters": {"properties": {"bell": {"type": "string"}}}}},
]
KNOWING = (
    "{% for t in tools or [] %}<|im_start|>tool\n{{ t | tojson }}<|im_end|>\n{% endfor %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% for c in m['tool_calls'] %}{{ c['function'] | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tools_and_calls_of_them_are_shown_as_a_server_shows_them(chatty: Renderer, tmp_path: Path) -> None:
    """Rows whose functions differ: `datasets` fills up each with what the others have."""
    calls = [{"type": "function", "function": {"name": "dim", "arguments": '{"level": 3}'}}]
    asked = [{"messages": [user("dim it"), says(None, tool_calls=calls)], "tools": [t]} for t in TOOLS]
    plain = {"messages": [user("hi"), says("yes")], "tools": None}
    told = {"messages": asked[0]["messages"], "tools": json.dumps(TOOLS)}
    knowing = Renderer(chatty.tokenizer, KNOWING)
    for rows, tools in (([*asked, plain], [[TOOLS[0]], [TOOLS[1]], []]), ([told], [TOOLS])):
        found = loaded(tmp_path, rows, knowing).items
        for example, known in zip(found, tools, strict=True):
            prompt = knowing.with_tools(known).chat_prompt([user("dim it") if known else user("hi")])
            assert example.token_ids[: len(prompt)] == prompt
            answer = '{"name": "dim", "arguments": {"level": 3}}' if known else "yes"
            assert supervised(example, knowing) == f"{answer}<|im_end|>"
    with pytest.raises(
        DataError, match=r"example 1: this conversation has tools, of which the chat template says nothing"
    ):
        loaded(tmp_path, asked, chatty)


@pytest.mark.parametrize(("row", "why"), [({"text": "one two"}, "plain text"), (LETTER, "no chat template")])
def test_a_system_message_that_has_no_place_is_said(row: Any, why: str, bare: Renderer, tmp_path: Path) -> None:
    heard = Heard()
    path = str(write_jsonl(tmp_path / "data.jsonl", [row]))
    load_examples(path, DataConfig(train=path, system="be kind"), bare, heard)
    (said,) = heard.of(Warned)
    assert "data.system is left out" in said.text
    assert why in said.text
    load_examples(path, DataConfig(train=path), bare, heard)
    assert len(heard.of(Warned)) == 1


@pytest.mark.parametrize("length", [7, 16, 1000])
def test_plain_text_is_split_and_nothing_is_lost(length: int, chatty: Renderer, tmp_path: Path) -> None:
    texts = [" ".join(f"{q} {a}" for q, a in pairs(6, start)) for start in (0, 6)]
    found = loaded(tmp_path, [{"text": t} for t in texts], chatty, max_length=length)
    assert found.report.longest <= length
    first, *others = (chatty.tokenizer(t)["input_ids"] + chatty.end_token_ids for t in texts)
    predicted = [t for e in found.items for t, s in zip(e.token_ids[1:], e.supervised[1:], strict=True) if s]
    assert predicted == [t for text in (first, *others) for t in text[1:]]
    shown = [set(itertools.pairwise(e.token_ids)) for e in found.items]
    assert set.union(*shown) == {pair for text in (first, *others) for pair in itertools.pairwise(text)}
    assert (found.report.too_long, found.report.unsupervised) == (0, 0)


def test_the_digest_is_of_what_is_learned(chatty: Renderer, tmp_path: Path) -> None:
    first = loaded(tmp_path, chats(5), chatty).report.digest
    assert loaded(tmp_path, [{**row, "id": i} for i, row in enumerate(chats(5))], chatty).report.digest == first
    assert loaded(tmp_path, chats(5)[::-1], chatty).report.digest != first
    rows = chats(5)
    rows[2]["messages"].append(user("and?"))
    rows[2]["messages"].append(says("more", train=False))
    assert loaded(tmp_path, rows, chatty).report.digest != first


def test_a_broken_row_is_told_with_its_number(chatty: Renderer, tmp_path: Path) -> None:
    rows = [*chats(2), {"messages": [{"role": "user", "content": None}]}]
    with pytest.raises(DataError, match=r"data.jsonl, example 3: a message needs 'role' and 'content'"):
        loaded(tmp_path, rows, chatty)


def test_a_template_file_takes_the_place_of_the_bases_own(tmp_path: Path) -> None:
    (tmp_path / "plain.jinja").write_text("{{ messages[0]['content'] }}")
    assert (
        DataConfig(train="x", template=str(tmp_path / "plain.jinja")).chat_template() == "{{ messages[0]['content'] }}"
    )
    with pytest.raises(DataError, match=r"cannot read data.template .*No such file"):
        DataConfig(train="x", template=str(tmp_path / "none.jinja")).chat_template()
