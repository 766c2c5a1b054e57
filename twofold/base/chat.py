"""The one renderer: messages to tokens and loss mask, for training, evaluation and serving alike.

The rule that keeps training and serving equal: the tokens before an answer in training are the tokens that a prompt for
that answer gets. A text is therefore tokenised up to each border of an answer; where the tokens of a longer text do not
begin with those, what follows the border is tokenised apart, in training and in prompts.

Answers are found by the template's own ``{% generation %}`` tags where it has them. Else a conversation is rendered up to each
answer and just after it, and the difference is the answer. Some templates rewrite history (they drop the thinking of
earlier turns, say): then the differences do not add up, and every answer becomes an example of its own, with the
history as the model will see it when it gives that answer.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from twofold.base.batch import Example
from twofold.errors import DataError

Message = Mapping[str, Any]
TOOLS = re.compile(r"\{[{%][^{}]*\btools\b")
"""Where a template speaks of tools."""
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
ALPACA = "### Instruction:\n{instruction}\n\n### Response:\n"
"""What instructions look like for a base without a chat template."""


def from_json(text: str) -> Any:
    """What a text says in JSON, as templates want the arguments of a call; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class _Span(NamedTuple):
    start: int
    end: int
    message: int


class _HistoryRewritten(Exception):
    """The template renders earlier turns differently once later ones follow."""


class Renderer:
    """Tokens and loss masks from messages, prompts and texts, for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        template: a Jinja chat template in place of the tokenizer's own.
        extra_end_ids: tokens that end an answer besides the tokenizer's eos, such as those of a generation config.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, extra_end_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.template: str | None = template or tokenizer.chat_template
        ends = [*extra_end_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
        self.tools: list[dict[str, Any]] = []
        end_of_turn = self._end_of_turn()
        self.ends_turns = bool(end_of_turn)
        self.end_token_ids = list(dict.fromkeys([*ends, *end_of_turn]))

    # -------------------------------------------------------------------------- training

    def chat(self, messages: Sequence[Message]) -> list[Example]:
        """One example for a conversation, or one per answer where the template rewrites history.

        Supervised are the assistant's turns with their end-of-turn token, save those marked ``train: false``.

        Raises:
            DataError: the messages do not fit the template, or there is no template.
        """
        wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
        try:
            return [self._example(messages, wanted)]
        except _HistoryRewritten:
            return [self._example(messages[: i + 1], [i], alone=True) for i in wanted]

    def completion(self, prompt: str, completion: str) -> Example:
        """A prompt and its continuation without a template; the continuation and the end token are supervised."""
        before, after = self.completion_prompt(prompt), self._tokens(completion)
        after += [] if after and after[-1] in self.end_token_ids else self._eos()
        return Example(before + after, [False] * len(before) + [True] * len(after))

    def text(self, text: str) -> Example:
        """Plain text, all of it supervised, ended by the end token."""
        tokens = self.completion_prompt(text)
        tokens += [] if tokens and tokens[-1] in self.end_token_ids else self._eos()
        return Example(tokens, [True] * len(tokens))

    # -------------------------------------------------------------------------- serving

    def chat_prompt(self, messages: Sequence[Message], most: int | None = None) -> list[int]:
        """The tokens that a model is given to write the next answer: those it saw before that answer in training.

        A prompt of more than `most` tokens, which is of no use then, comes back before the costly search for its answers.

        Raises:
            DataError: the messages do not fit the template, or there is no template.
        """
        text = self._render(messages, answer_next=True)
        if most is not None and len(tokens := self._tokens(text)) > most:
            return tokens
        return self._encode(text, self._cuts(messages, text))[0]

    @property
    def takes_tools(self) -> bool:
        """Whether the template has a place for descriptions of tools."""
        return self.template is not None and TOOLS.search(self.template) is not None

    def with_tools(self, tools: Sequence[dict[str, Any]]) -> Renderer:
        """The same renderer, whose conversations know these tools; JSON schemas of functions, as OpenAI writes them."""
        other = copy(self)
        other.tools = list(tools)
        return other

    def completion_prompt(self, prompt: str) -> list[int]:
        """Tokens of a bare prompt, with the beginning-of-text token where the tokenizer uses one: once."""
        tokens: list[int] = self.tokenizer(prompt, add_special_tokens=True)["input_ids"]
        bos = self.tokenizer.bos_token_id
        if tokens and tokens[-1] == self.tokenizer.eos_token_id and not prompt.endswith(self.tokenizer.eos_token):
            tokens = tokens[:-1]
        return tokens[1:] if bos is not None and tokens[:2] == [bos, bos] else tokens

    # -------------------------------------------------------------------------- inside

    def _eos(self) -> list[int]:
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def _render(self, messages: Sequence[Message], *, answer_next: bool) -> str:
        if self.template is None:
            raise DataError("this base has no chat template, so it cannot read `messages`; give data.template a file")
        plain = [{k: v for k, v in m.items() if k != "train"} for m in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                plain,
                tools=self.tools or None,
                tokenize=False,
                add_generation_prompt=answer_next,
                chat_template=self.template,
            )
        except Exception as error:
            roles = ", ".join(str(m.get("role")) for m in messages) or "none"
            raise DataError(f"the chat template does not take these messages (roles {roles}): {error}") from error
        return text

    def _example(self, messages: Sequence[Message], wanted: Sequence[int], *, alone: bool = False) -> Example:
        """`wanted` are the answers that count; `alone` says that only the last answer can be located."""
        text = self._render(messages, answer_next=False)
        spans = [self._span(messages, len(messages) - 1, text)] if alone else self._spans(messages, text)
        history = self._cuts(messages[:-1], text[: spans[0].start]) if alone else []
        tokens, before = self._encode(text, [*history, *(p for s in spans for p in (s.start, s.end))])
        supervised = [False] * len(tokens)
        for span in (s for s in spans if s.message in wanted):
            for at in range(before[span.start], before[span.end]):
                supervised[at] = True
        return Example(tokens, supervised)

    def _cuts(self, messages: Sequence[Message], prompt: str) -> list[int]:
        """Where answers begin and end in a prompt; nowhere if they cannot be located."""
        try:
            spans = self._spans(messages, prompt)
        except (DataError, _HistoryRewritten):
            return []
        return [p for s in spans for p in (s.start, s.end)]

    def _spans(self, messages: Sequence[Message], text: str) -> list[_Span]:
        return [self._span(messages, i, text) for i, m in enumerate(messages) if m["role"] == "assistant"]

    def _span(self, messages: Sequence[Message], i: int, text: str) -> _Span:
        """Where the answer `messages[i]` stands in the rendered `text`, its end token included."""
        if i == 0:
            raise DataError("a conversation cannot begin with the assistant's answer; put a user message before it")
        before = self._render(messages[:i], answer_next=True)
        after = self._render(messages[: i + 1], answer_next=False)
        if not after.startswith(before):
            raise DataError(
                "the chat template renders an answer differently from its generation prompt, so training could not match "
                "serving; give data.template a corrected template"
            )
        if not text.startswith(after):
            raise _HistoryRewritten
        if self.template and GENERATION_TAG.search(self.template):
            return self._tagged_span(messages[: i + 1], i)
        return _Span(len(before), len(before) + len(self._through_end_token(after[len(before) :])), i)

    def _tagged_span(self, messages: Sequence[Message], i: int) -> _Span:
        tokens = self.tokenizer.special_tokens_map
        _, found = render_jinja_template(
            conversations=[list(messages)],
            tools=self.tools or None,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **tokens,
        )
        answers = sum(m["role"] == "assistant" for m in messages)
        if len(found[0]) != answers:
            raise DataError(
                f"the chat template tags {len(found[0])} generations in a conversation with {answers} answers; "
                "each answer needs one {% generation %} block"
            )
        start, end = found[0][-1]
        return _Span(start, end, i)

    def _through_end_token(self, answer: str) -> str:
        """The answer without the layout that follows its end-of-turn token."""
        bare = answer.rstrip()
        return bare if bare.endswith(tuple(self._special_tokens())) else answer

    def _special_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return [*self.tokenizer.all_special_tokens, *(str(t) for t in added if t.special)]

    def _end_of_turn(self) -> list[int]:
        """The token that the template puts at the end of an answer, if it puts one."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            example = self._example(probe, [1])
        except (DataError, _HistoryRewritten):
            return []
        last = next(
            (t for t, s in zip(reversed(example.token_ids), reversed(example.supervised), strict=True) if s), None
        )
        ends = last is not None and self.tokenizer.convert_ids_to_tokens(last) in self._special_tokens()
        return [last] if ends and last is not None else []

    def _encode(self, text: str, cuts: Sequence[int]) -> tuple[list[int], dict[int, int]]:
        """Token ids of `text`, and how many of them come before each cut: those of the text up to it, whatever follows."""
        ids: list[int] = []
        before: dict[int, int] = {}
        for begin, end in itertools.pairwise(sorted({0, *cuts, len(text)})):
            before[begin] = len(ids)
            whole = self._tokens(text[:end])
            ids = whole if whole[: len(ids)] == ids else ids + self._tokens(text[begin:end])
        return ids, before | {len(text): len(ids)}
