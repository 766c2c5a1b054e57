"""Text from tokens as they come, in pieces that no later token changes.

A tokenizer's text of many tokens is not that of each one joined: a character may be made of several tokens, and some
tokenizers write or drop a space by what stands before. So the newest tokens are decoded together with the last ones that
made text, and what is new is what the text has grown by. Held back are

- a character that is not whole yet: decoded it ends in U+FFFD;
- a run of byte tokens such as <0xE2>, until another token ends it: the tokenizers library makes U+FFFD of each of its
  bytes if one of them fits nowhere, so that whole characters of it are not certain before;
- what may be the beginning of a stop string.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from twofold.errors import ConfigError

HALF = "\ufffd"
CONTINUES = re.compile(rb"[\x80-\xbf]")
"""A byte within a character of UTF-8."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _letters_of_bytes() -> dict[str, int]:
    """How byte-level tokenizers since GPT-2 write bytes: the printable as they are, the others as letters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


LETTERS = _letters_of_bytes()


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of an answer: special tokens left out, spaces left as they are."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@lru_cache(maxsize=2**16)
def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What a token adds to a text that has begun already, as UTF-8, of which it may be a part that is no character."""
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    if byte := BYTE_TOKEN.fullmatch(piece):
        return bytes.fromhex(byte[1])
    alone, twice = (tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
    if HALF in alone and all(letter in LETTERS for letter in piece):
        return bytes(LETTERS[letter] for letter in piece)
    return str(twice)[len(alone) :].encode()


def special_ids(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Those of the texts that are special tokens, which no answer's text shows."""
    special = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return [special[text] for text in texts if text in special]


@lru_cache(maxsize=2**16)
def _left_out(tokenizer: Any, token: int) -> bool:
    """Whether it is a special token, which `decoded` passes over as if it were not there."""
    return decoded(tokenizer, [token]) == "" and bool(tokenizer.decode([token], clean_up_tokenization_spaces=False))


@lru_cache(maxsize=2**16)
def _is_byte(tokenizer: Any, token: int) -> bool:
    return BYTE_TOKEN.fullmatch(tokenizer.convert_ids_to_tokens(token) or "") is not None


class TextStream:
    """One answer's text as its tokens come; the pieces joined are `decoded` of all tokens, up to a stop string.

    Args:
        tokenizer: a transformers tokenizer.
        stop: texts that end the answer and are not part of it. The first that is complete counts; of those complete at
            the same character the longest.

    Attributes:
        stopped: whether a stop string came; nothing is given out after it.

    Raises:
        ConfigError: a stop string is empty.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise ConfigError("a stop string is empty, which would end every answer at once; leave it out")
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._recent: list[int] = []  # the last tokens that made text, and those since
        self._shown = ""  # their text as far as it is certain
        self._settled = 0  # how many of them made it
        self._held = ""  # certain text that may begin a stop string

    def put(self, token: int) -> str:
        """Text that is certain now that this token has come; often the token's own, sometimes none or more."""
        if self.stopped or _left_out(self._tokenizer, token):
            return ""
        self._recent.append(token)
        if _is_byte(self._tokenizer, token):
            return ""
        text = decoded(self._tokenizer, self._recent)
        new = text.removesuffix(HALF)[len(self._shown) :]
        self._shown += new
        if not text.endswith(HALF):
            self._forget()
        return self._without_stop(new)

    def finish(self) -> str:
        """The rest, once no more tokens come; a character that was cut off within is U+FFFD, as the tokenizer has it."""
        if self.stopped:
            return ""
        new = decoded(self._tokenizer, self._recent)[len(self._shown) :]
        self._recent, self._shown, self._settled = [], "", 0
        given = self._without_stop(new) + self._held
        self._held = ""
        return given

    def _forget(self) -> None:
        """Let go of the tokens before the last ones that made text: those alone tell how the next are written."""
        last = self._recent[self._settled :]
        text = decoded(self._tokenizer, last)
        if text:
            self._recent, self._shown, self._settled = last, text, len(last)

    def _without_stop(self, new: str) -> str:
        """What may be given out of the held text and the new; a stop string and all behind it are dropped."""
        text = self._held + new
        found = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        kept = len(text) - self._beginning(text)
        self._held = text[kept:]
        return text[:kept]

    def _beginning(self, text: str) -> int:
        """The length of the longest end of the text with which a stop string begins."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        return next((n for n in range(min(longest, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)

    def _may_begin(self, end: str) -> bool:
        return any(s.startswith(end) for s in self._stop)


class Offsets:
    """Where in an answer's text its tokens stand, in characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._whole = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False
        self._next = 0

    def put(self, token: int) -> int:
        """The place of the next token: of a part of a character the character's; special tokens take no place."""
        if _left_out(self._tokenizer, token):
            return self._next
        alone = decoded(self._tokenizer, [token])
        new = token_bytes(self._tokenizer, token) if self._begun or HALF in alone else alone.encode()
        if not CONTINUES.match(new):
            self._next += len(self._whole.decode(b"", final=True))  # of a character that was begun and left
        place = self._next
        self._next += len(self._whole.decode(new))
        self._begun = True
        return place
