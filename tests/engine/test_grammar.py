"""Answers under a grammar: whatever the logits are, the answer has the form and ends."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema_rs
import pytest
import torch
from tiny_base import llama
from tiny_base import tokenizer as tiny_tokenizer
from transformers import AutoTokenizer

from twofold.base.load import DEFAULT_BASE, locate
from twofold.engine.engine import Engine
from twofold.engine.grammar import Grammar, Grammars
from twofold.engine.request import Request, Sampling
from twofold.engine.sampler import Sampler, choose
from twofold.engine.text import decoded
from twofold.errors import ConfigError

END = 2
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": ["string", "null"], "pattern": "^[a-z]{1,8}@[a-z]{1,8}$"},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "ünïcode"]}, "maxItems": 3},
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "age", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"city": {"const": 'Pa"r\nis'}, "at": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}},
            "required": ["city", "at"],
            "additionalProperties": False,
        }
    },
}
SUM = 'start: number (sign number)*\nsign: "+" | "-"\nnumber: /[0-9]{1,3}/ | "(" start ")"'


@cache
def smollm2() -> Any:
    return AutoTokenizer.from_pretrained(locate(DEFAULT_BASE))


@cache
def grammars() -> Grammars:
    return Grammars(smollm2(), [END])


def answer(grammar: Grammar, seed: int, temperature: float = 1.0, most: int = 400) -> str | None:
    """The text that random logits make, a little in favour of the end and of short things; none if it did not end."""
    request = Request(
        token_ids=[1],
        stop_ids=(END,),
        grammar=grammar,
        sampling=Sampling(temperature=temperature, seed=seed, logit_bias={END: 8.0}),
    )
    sampler, made = Sampler(request), []
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([t for piece in ('"', "}", '"}', "]", ")") for t in smollm2()(piece)["input_ids"]])
    while len(made) < most:
        logits = torch.randn(1, 49152, generator=generator)
        logits[0, ends] += 12
        (choice,) = choose(logits, [sampler])
        assert choice is not None
        assert sampler.error is None
        if choice.token == END:
            return decoded(smollm2(), made)
        made.append(choice.token)
    return None


# ---------------------------------------------------------------------------------------------- the form is kept


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_random_logits_make_json_that_the_schema_allows(temperature: float) -> None:
    grammar, judge = grammars().json_schema(PERSON), jsonschema_rs.validator_for(PERSON)
    texts = [answer(grammar, seed, temperature) for seed in range(8)]
    assert all(text is not None for text in texts)
    for text in texts:
        judge.validate(json.loads(str(text)))
    assert len(set(texts)) > 1


def test_random_logits_make_a_json_object() -> None:
    texts = [answer(grammars().json_object(), seed) for seed in range(8)]
    assert sum(text is not None for text in texts) >= 6
    assert all(isinstance(json.loads(text), dict) for text in texts if text is not None)


@pytest.mark.parametrize("pattern", [r"[a-z]{3}-[0-9]{2,4}", r"(yes|no), (sir|madam)\.", "日本(語|人)+é?", "x"])
def test_random_logits_match_a_pattern_from_end_to_end(pattern: str) -> None:
    grammar = grammars().regex(pattern)
    for seed in range(4):
        assert re.fullmatch(pattern, answer(grammar, seed) or "")


def test_random_logits_make_sentences_of_a_lark_grammar() -> None:
    for seed in range(4):
        text = answer(grammars().lark(SUM), seed) or ""
        assert re.fullmatch(r"[0-9()+-]+", text)
        assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", text)), int)


def test_white_space_in_json_has_an_end() -> None:
    matcher = grammars().json_object().matcher()
    for token in smollm2()("{\n" + 31 * " ")["input_ids"]:
        matcher.take(token)
    assert matcher.error is None
    assert not matcher.allowed(49152)[smollm2()(" \n")["input_ids"]].any()


def test_a_choice_is_one_of_its_options() -> None:
    options = ["yes", "no", 'a "quoted"\nline', "nöt"]
    found = {answer(grammars().choice(options), seed) for seed in range(12)}
    assert found <= set(options)
    assert len(found) > 1


def test_a_neighbour_without_a_grammar_is_not_touched_and_a_logit_that_is_forbidden_stays_so() -> None:
    logits = torch.randn(2, 49152)
    plain = Request(token_ids=[1], sampling=Sampling(logprobs=1))
    pushed = Sampling(logit_bias={int(logits[1].argmin()): 100.0}, logprobs=0)
    bound = Request(token_ids=[1], stop_ids=(END,), grammar=grammars().choice(["yes"]), sampling=pushed)
    first, second = choose(logits, [Sampler(plain), Sampler(bound)])
    assert first is not None
    assert second is not None
    assert first.token == logits[0].argmax()
    assert smollm2().decode([second.token]) in ("y", "ye", "yes")
    assert second.logprobs is not None
    assert second.logprobs.logprob == pytest.approx(logits[1].log_softmax(-1)[second.token].item(), abs=1e-5)


def test_logits_wider_than_the_tokenizer_are_never_chosen_beyond_it() -> None:
    """Vocabularies are padded to round numbers."""
    logits = torch.zeros(1, 49152 + 64)
    logits[0, 49152:] = 100.0
    request = Request(token_ids=[1], stop_ids=(END,), grammar=grammars().regex("[a-z]+"))
    (choice,) = choose(logits, [Sampler(request)])
    assert choice is not None
    assert choice.token < 49152


def test_a_complete_form_says_so_and_leaves_nothing_but_the_end() -> None:
    request = Request(token_ids=[1], stop_ids=(END, 0), grammar=grammars().choice(["yes"]))
    sampler = Sampler(request)
    while not sampler.finished:
        choose(torch.randn(1, 49152), [sampler])
    (last,) = choose(torch.randn(1, 49152), [sampler])
    assert last is not None
    assert last.token == END
    assert sampler.error is None


def test_a_tiny_model_answers_in_json_through_the_engine() -> None:
    tokens = tiny_tokenizer()
    made = Grammars(tokens, [END])
    schema = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    prompt: list[int] = tokens("colour of the cup?")["input_ids"]
    requests = [
        Request(token_ids=prompt, stop_ids=(END,), grammar=grammar, sampling=Sampling(temperature=1.0, seed=seed))
        for seed, grammar in enumerate(
            [made.json_schema(schema), made.json_schema(schema), made.regex("(red|blue) cup")]
        )
    ]
    found = Engine(llama(len(tokens))).generate([*requests, Request(token_ids=prompt, max_new_tokens=5)])
    assert [c.finish_reason for c in found] == ["stop", "stop", "stop", "length"]
    for completion in found[:2]:
        assert set(json.loads(decoded(tokens, completion.token_ids))) == {"on"}
    assert decoded(tokens, found[2].token_ids) in ("red cup", "blue cup")


# ---------------------------------------------------------------------------------------------- compiled once, refused clearly


def test_the_same_text_is_compiled_once() -> None:
    made = grammars()
    assert made.json_schema(PERSON) is made.json_schema(json.dumps(PERSON))
    assert made.regex("a+") is made.regex("a+")
    assert made.regex("a+") is not made.lark('start: "a"+')


def test_two_answers_of_one_grammar_go_their_own_way() -> None:
    grammar = grammars().choice(["ab", "cd"])
    one, other = grammar.matcher(), grammar.matcher()
    (a,) = smollm2()("a")["input_ids"]
    one.take(a)
    assert one.allowed(49152)[a] != other.allowed(49152)[a]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda g: g.json_schema({"type": "objec"}), "the JSON schema cannot be followed: Invalid type: objec"),
        (lambda g: g.json_schema("{"), "the JSON schema cannot be followed"),
        (lambda g: g.json_schema({"$ref": "#/$defs/no"}), "Pointer '/\\$defs/no' does not exist"),
        (lambda g: g.json_schema({"type": "array", "uniqueItems": True}), "Unimplemented keys: .*uniqueItems"),
        (lambda g: g.regex("a(b"), r"the regular expression 'a\(b' cannot be followed: unclosed group"),
        (lambda g: g.regex("a(?=b)"), "look-around"),
        (lambda g: g.lark("start: nope"), 'the Lark grammar cannot be followed: .*unknown name: "nope"'),
        (lambda g: g.choice([]), "a choice needs at least one option"),
        (lambda g: g.choice(["a", ""]), "none of them may be empty"),
        (lambda g: Grammars(smollm2(), []), "a grammar needs a token that ends the answer"),
        (lambda g: Grammars(object(), [END]), "grammars cannot be used with this tokenizer"),
        (lambda g: Request(token_ids=[1], grammar=g.regex("a")), r"ends answers with the tokens \[2\]"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_sentence(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        make(grammars())
    assert "\n" not in str(refused.value)


def test_a_token_that_the_grammar_forbids_is_an_error_of_that_request_alone() -> None:
    matcher = grammars().choice(["yes"]).matcher()
    matcher.take(smollm2()("no")["input_ids"][0])
    assert "doesn't satisfy the grammar" in str(matcher.error)
