"""Text in pieces: joined they are what the tokenizer makes of all tokens at once, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_base import tokenizer as tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from twofold.base.load import DEFAULT_BASE, locate
from twofold.engine.text import Offsets, TextStream, decoded, special_ids, token_bytes
from twofold.errors import ConfigError

TEXTS = [
    "Hello, world.",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 family 😀😀😀",
    "  two  spaces \n\n\ttab",
    "a�b",
    "do n't . ,",
]


@cache
def smollm2() -> Any:
    return AutoTokenizer.from_pretrained(locate(DEFAULT_BASE))


@cache
def byte_level() -> Any:
    return tiny_tokenizer()


@cache
def byte_fallback() -> Any:
    """As in Llama 2: a byte token for each byte that no other token covers, and a space before the first word."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghilnortw.,é", "▁▁"]
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "▁")], byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def word_pieces() -> Any:
    """As in BERT: spaces between words, none before a piece that begins with ##; clean-up is asked for by its config."""
    pieces = ["[UNK]", "[SEP]", *"abcdefghilnortwHdo.,'", *(f"##{c}" for c in "abcdefghilnortw"), "n't"]
    core = Tokenizer(models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", sep_token="[SEP]", clean_up_tokenization_spaces=True
    )


TOKENIZERS = {f.__name__: f for f in (smollm2, byte_level, byte_fallback, word_pieces)}
KINDS = pytest.mark.parametrize("kind", TOKENIZERS)


def pieces(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    return [*(stream.put(t) for t in tokens), stream.finish()], stream


@st.composite
def token_lists(draw: st.DrawFn, tokenizer: Any) -> list[int]:
    """Tokens of real texts, any tokens, byte tokens and special ones, in any order."""
    some = st.lists(st.integers(0, len(tokenizer) - 1), max_size=4)
    first = st.lists(st.integers(0, min(258, len(tokenizer) - 1)), max_size=6)
    real = st.sampled_from(TEXTS).map(lambda t: tokenizer(t, add_special_tokens=False)["input_ids"])
    cut = st.tuples(real, st.integers(0, 12)).map(lambda pair: pair[0][: pair[1]])
    special = st.sampled_from([[i] for i in tokenizer.all_special_ids])
    return [token for part in draw(st.lists(some | first | real | cut | special, max_size=6)) for token in part]


# ---------------------------------------------------------------------------------------------- pieces


@KINDS
@given(st.data())
def test_pieces_joined_are_the_text_of_all_tokens(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]()
    tokens = data.draw(token_lists(tokenizer))
    found, stream = pieces(tokenizer, tokens)
    assert "".join(found) == decoded(tokenizer, tokens)
    assert not stream.stopped
    assert stream.finish() == ""


@KINDS
@given(st.data())
def test_no_piece_is_taken_back_by_what_follows(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]()
    tokens = data.draw(token_lists(tokenizer))
    stream, given_out = TextStream(tokenizer), ""
    for at, token in enumerate(tokens):
        given_out += stream.put(token)
        for more in ([], tokens[at + 1 :], tokenizer("é")["input_ids"], tokenizer("x")["input_ids"]):
            assert decoded(tokenizer, [*tokens[: at + 1], *more]).startswith(given_out)


@pytest.mark.parametrize("kind", ["smollm2", "byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_half_character_is_given_out(kind: str, text: str) -> None:
    """Only the text with a U+FFFD of its own has one; most of these characters are several tokens."""
    tokenizer = TOKENIZERS[kind]()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    found, _ = pieces(tokenizer, tokens)
    assert "".join(found) == decoded(tokenizer, tokens)
    assert "".join(found).count("\ufffd") == text.count("\ufffd")
    stream = TextStream(tokenizer)
    if "\ufffd" not in text:
        assert all("\ufffd" not in stream.put(t) for t in tokens)


def test_text_is_given_out_at_once_where_nothing_can_change_it() -> None:
    tokenizer = smollm2()
    tokens = tokenizer("The sea is blue and wide.")["input_ids"]
    found, _ = pieces(tokenizer, tokens)
    assert found == [*(tokenizer.decode([t]) for t in tokens), ""]
    assert pieces(byte_fallback(), byte_fallback()("hi 日a")["input_ids"])[0] == [
        "",
        "h",
        "i",
        " ",
        "",
        "",
        "",
        "日a",
        "",
    ]


@pytest.mark.parametrize("kind", ["smollm2", "byte_fallback"])
def test_a_character_that_is_cut_off_within_is_marked_at_the_end_alone(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    tokens = tokenizer("ab 🦆", add_special_tokens=False)["input_ids"][:-1]
    stream = TextStream(tokenizer)
    assert "".join(stream.put(t) for t in tokens) == "ab "
    assert set(stream.finish()) == {"\ufffd"}


# ---------------------------------------------------------------------------------------------- stop strings


def stopped_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string to be complete, letter by letter."""
    for end in range(1, len(text) + 1):
        here = [s for s in stop if text[:end].endswith(s)]
        if here:
            return text[: end - max(map(len, here))]
    return text


@pytest.mark.parametrize("kind", ["smollm2", "byte_level", "byte_fallback"])
@given(st.text("abc .é", max_size=30), st.lists(st.text("abc .é", min_size=1, max_size=5), max_size=3))
def test_text_ends_before_the_first_stop_string_wherever_tokens_part(kind: str, text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS[kind]()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = decoded(tokenizer, tokens)
    found, stream = pieces(tokenizer, tokens, stop)
    assert "".join(found) == stopped_at(whole, stop)
    assert stream.stopped == any(s in whole for s in stop)


def test_a_stop_string_is_found_as_soon_as_it_is_whole_and_ends_the_stream() -> None:
    tokenizer = smollm2()
    tokens = tokenizer("one two###three")["input_ids"]
    stream, given_out = TextStream(tokenizer, ["##t", "###"]), []
    for token in tokens:
        given_out.append(stream.put(token))
        if stream.stopped:
            break
    assert "".join(given_out) == "one two"
    assert stream.put(tokens[0]) == stream.finish() == ""


def test_what_only_begins_like_a_stop_string_is_held_and_then_given_out() -> None:
    tokenizer = smollm2()
    stream = TextStream(tokenizer, [" END"])
    assert "".join(stream.put(t) for t in tokenizer("the E")["input_ids"]) == "the"
    assert stream.put(*tokenizer("X")["input_ids"]) == " EX"
    assert "".join(stream.put(t) for t in tokenizer(" EN")["input_ids"]) == ""
    assert stream.finish() == " EN"
    assert not stream.stopped


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="a stop string is empty"):
        TextStream(smollm2(), ["a", ""])


# ---------------------------------------------------------------------------------------- tokens one by one


@KINDS
@pytest.mark.parametrize("text", TEXTS)
def test_what_tokens_add_is_together_the_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    tokens = [t for t in tokenizer(text)["input_ids"] if t not in tokenizer.all_special_ids]
    whole, places = decoded(tokenizer, tokens), Offsets(tokenizer)
    added = b"".join(token_bytes(tokenizer, t) for t in tokens).decode()
    assert added in (whole, f" {whole}")
    for i, token in enumerate(tokens):
        before, place = decoded(tokenizer, tokens[:i]), places.put(token)
        assert place == len(before) if whole.startswith(before) and "\ufffd" not in before else place < len(whole)


def test_special_tokens_take_no_place_and_are_found_by_name() -> None:
    tokenizer = byte_level()
    places = Offsets(tokenizer)
    a, end = tokenizer("a")["input_ids"][0], tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [places.put(t) for t in (a, end, end, a, a)] == [0, 1, 1, 1, 2]
    assert special_ids(tokenizer, ["a", "<|im_end|>", "<|im_", "nothing"]) == [end]
