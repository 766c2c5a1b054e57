"""The home-command data set: nothing leaks, everything is right, and a seed fixes every byte."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from twofold.data.home_intents import (
    NAMES,
    SYSTEM,
    Command,
    Grammar,
    HomeIntents,
    Template,
    build,
    draw,
    load_grammar,
    split_templates,
    write,
)
from twofold.data.splits import Row
from twofold.errors import DataError
from twofold.events import Event, Warned, silent


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return load_grammar()


@pytest.fixture(scope="module")
def data() -> HomeIntents:
    return build(1500, 240)


def _sentence(row: Row) -> str:
    return row["messages"][1]["content"]


def _meaning(row: Row) -> dict[str, object]:
    meaning = json.loads(row["messages"][2]["content"])
    assert isinstance(meaning, dict)
    return meaning


def _keys(templates: list[Template]) -> set[tuple[str, str]]:
    return {(template.intent, template.text) for template in templates}


def _drawn(grammar: Grammar, text: str, count: int) -> list[Command]:
    """Commands of the templates with one text."""
    chosen = [template for template in grammar.templates if template.text == text]
    assert chosen, f"no template {text!r}"
    return draw(grammar, chosen, count, random.Random(0), set(), emit=silent)


def test_the_grammar_is_the_one_described(grammar: Grammar) -> None:
    assert len(grammar.templates) == 862
    assert len({template.intent for template in grammar.templates}) == 42
    assert all(template.names for template in grammar.templates if "{name}" in template.text)


def test_counts_and_coverage(data: HomeIntents) -> None:
    assert (len(data.train), len(data.evaluation), len(data.intents)) == (1500, 240, 42)
    trained = {_meaning(row)["intent"] for row in data.train}
    assert trained == set(data.intents)
    assert {_meaning(row)["intent"] for row in data.evaluation} <= trained


def test_equal_seeds_give_equal_rows(data: HomeIntents) -> None:
    assert build(1500, 240) == data
    assert build(1500, 240, seed=1).train != data.train


def test_evaluation_does_not_depend_on_the_training_size(data: HomeIntents) -> None:
    assert build(50, 240).evaluation == data.evaluation
    assert build(50, 100).evaluation == data.evaluation[:100]


def test_no_sentence_twice_within_or_across_splits(data: HomeIntents) -> None:
    sentences = [_sentence(row).lower() for row in data.train + data.evaluation]
    assert len(set(sentences)) == len(sentences)


def test_no_template_in_both_splits(grammar: Grammar) -> None:
    training, held_out = split_templates(grammar.templates)
    assert not _keys(training) & _keys(held_out)
    assert len(training) + len(held_out) == len(grammar.templates)
    assert {t.intent for t in held_out} <= {t.intent for t in training}


def test_about_15_percent_of_each_intent_is_held_out(grammar: Grammar) -> None:
    training, held_out = (_keys(templates) for templates in split_templates(grammar.templates))
    for intent in {template.intent for template in grammar.templates}:
        held = sum(1 for name, _ in held_out if name == intent)
        total = held + sum(1 for name, _ in training if name == intent)
        assert held == (max(1, round(0.15 * total)) if total > 1 else 0), intent


def test_evaluation_is_drawn_from_held_out_templates_only(grammar: Grammar, data: HomeIntents) -> None:
    _, held_out = split_templates(grammar.templates)
    drawn = draw(grammar, held_out, 240, random.Random("evaluation 0"), set(), emit=silent)
    assert [command.row() for command in drawn] == data.evaluation


def test_templates_take_turns(grammar: Grammar) -> None:
    timers = [template for template in grammar.templates if template.intent == "HassStartTimer"][:10]
    rounds = draw(grammar, timers, 30, random.Random(3), set(), emit=silent)
    first = [sorted(command.slots) for command in rounds[:10]]
    assert [sorted(command.slots) for command in rounds[10:20]] == first
    assert [sorted(command.slots) for command in rounds[20:]] == first


def test_a_prefix_covers_the_intents(grammar: Grammar) -> None:
    training, held_out = split_templates(grammar.templates)
    assert len({template.intent for template in training[:42]}) == 42
    assert len({template.intent for template in held_out[:39]}) == 39, "three intents have a single template"


def test_rows_are_chats_with_compact_sorted_json(data: HomeIntents) -> None:
    for row in data.train + data.evaluation:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == SYSTEM
        answer, meaning = row["messages"][2]["content"], _meaning(row)
        assert set(meaning) == {"intent", "slots"}
        assert meaning["intent"] in data.intents
        slots = meaning["slots"]
        assert isinstance(slots, dict)
        assert list(slots) == sorted(slots)
        assert answer == json.dumps(meaning, separators=(",", ":"), ensure_ascii=False)


def test_sentences_are_clean_text(data: HomeIntents) -> None:
    for sentence in map(_sentence, data.train + data.evaluation):
        assert sentence == " ".join(sentence.split())
        assert sentence
        assert not re.search(r"[][(){}<>|;]", sentence), "template syntax came through"


def test_one_sentence_has_one_meaning(grammar: Grammar) -> None:
    """Drawn without memory, so that one sentence may come from several templates: they must agree."""
    meanings: dict[str, str] = {}
    for seed in range(2):
        for template in grammar.templates:
            for command in draw(grammar, [template], 2, random.Random(seed), set(), emit=silent):
                answer = command.row()["messages"][2]["content"]
                assert meanings.setdefault(command.text.lower(), answer) == answer, command.text


def test_slots_hold_the_meaning_of_list_values(grammar: Grammar) -> None:
    covers = _drawn(grammar, "<close> [<the>] {area} {cover_classes:device_class}", 40)
    assert {command.slots["domain"] for command in covers} == {"cover"}
    garages = [command for command in covers if "garage door" in command.text]
    assert garages
    assert {command.slots["device_class"] for command in garages} == {"garage"}

    down = _drawn(grammar, "decrease [the] volume [by] {volume_step_down:volume_step}[%| percent]", 8)
    assert all(command.slots["volume_step"] == -int(re.findall(r"\d+", command.text)[0]) for command in down)


def test_an_area_from_context_is_no_slot(grammar: Grammar) -> None:
    commands = _drawn(grammar, "<turn> on [<the>] <light> [<here>]", 20)
    assert all(command.slots == {"domain": "light"} for command in commands)


def test_names_fit_the_domain(grammar: Grammar) -> None:
    fans = _drawn(grammar, "[<set>] [<the>] {name} [speed] [to] {fan_speed:percentage}[%| percent]", 20)
    assert {command.slots["name"] for command in fans} <= set(NAMES["fan"])
    occupied = _drawn(grammar, "<is> [<the>] {name} {bs_occupancy_states:state}", 20)
    assert {command.slots["name"] for command in occupied} <= set(NAMES["occupancy"])


def test_what_nobody_says_is_not_taught(data: HomeIntents) -> None:
    wrong = re.compile(
        r"\b(the|my|our) (the|my|our)\b|\bfloor floor\b|\b1 hours\b|\ball( the)? light\b|\bare the kettle"
    )
    assert not [sentence for sentence in map(_sentence, data.train + data.evaluation) if wrong.search(sentence)]


def test_asking_for_too_much_gives_less_and_says_so(grammar: Grammar) -> None:
    events: list[Event] = []
    nevermind = [template for template in grammar.templates if template.intent == "HassNevermind"]
    drawn = draw(grammar, nevermind, 5, random.Random(0), set(), emit=events.append)
    assert sorted(command.text for command in drawn) == ["never mind", "nevermind"]
    assert [type(event) for event in events] == [Warned]


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(DataError, match="ask for 1 or more"):
        build(0, 10)


def test_write_gives_the_same_rows_as_jsonl(tmp_path: Path) -> None:
    data = write(tmp_path / "home", 60, 20, seed=7)
    for name, rows in (("train", data.train), ("evaluation", data.evaluation)):
        lines = (tmp_path / "home" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["evaluation.jsonl", "train.jsonl"]
