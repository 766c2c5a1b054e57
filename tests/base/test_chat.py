"""The one renderer: what is supervised, and that training and serving put the same tokens before an answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from twofold.base.batch import Example, pack, pad
from twofold.base.chat import Renderer
from twofold.errors import DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
)
"""No token ends a turn, and a space of the layout stands on each side of an answer."""
TAGGED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
"""Drops the thinking of all but the last turn, as reasoning models' templates do."""
HEADINGS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '### Response:\n\n' + m['content'] + '<|im_end|>' }}"
    "{% else %}{{ '### Instruction:\n\n' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n\n' }}{% endif %}"
)
"""Ends its prompts with two line breaks, which GPT-2's splitting takes apart once a word follows."""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "tagged": TAGGED, "forgetful": FORGETFUL, "headings": HEADINGS}

SENTENCES = ["Turn the lamp on, please.", "The lamp is on now.", "system user assistant", "dim it a bit\n\nnow  ok\n\n"]


@cache
def tokenizer(*, bos: bool = False, end: str = "<|im_end|>", metaspace: bool = False) -> Any:
    """A BPE with a few merges, one of which joins a word with the space before it.

    Over bytes as in GPT-2, or with `metaspace` as in Llama 2, where every text gets a space before it.
    """
    core = Tokenizer(models.BPE(byte_fallback=metaspace))
    core.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(SENTENCES * 20, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=end, pad_token=end, additional_special_tokens=special[2:]
    )
    made.chat_template = CHATML
    return made


def renderer(template: str, **options: Any) -> Renderer:
    return Renderer(tokenizer(**options), TEMPLATES[template])


def talk(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Turns of user and assistant by turns."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def runs(example: Example) -> list[str]:
    """The text of each stretch of supervised tokens."""
    found: list[list[int]] = []
    previous = False
    for token, supervised in zip(example.token_ids, example.supervised, strict=True):
        if supervised:
            found = found if previous else [*found, []]
            found[-1].append(token)
        previous = supervised
    return [tokenizer().decode(ids, clean_up_tokenization_spaces=False) for ids in found]


def text(tokens: Sequence[int]) -> str:
    decoded: str = tokenizer().decode(tokens, clean_up_tokenization_spaces=False)
    return decoded


# ---------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("template", ["chatml", "tagged", "forgetful", "headings"])
def test_every_answer_with_its_end_token_is_supervised_and_nothing_else(template: str) -> None:
    messages = talk("Turn the lamp on.", "It is on.", "And off?", "Off now.", system="Be brief.")
    (example,) = renderer(template).chat(messages)
    assert runs(example) == ["It is on.<|im_end|>", "Off now.<|im_end|>"]
    rendered = tokenizer().apply_chat_template(messages, chat_template=TEMPLATES[template], tokenize=False)
    assert text(example.token_ids) == rendered


def test_answers_without_an_end_token_are_supervised_as_they_stand() -> None:
    (example,) = renderer("llama2").chat(talk("Lamp?", "It is on.", "Off?", "Now."))
    assert [r.strip() for r in runs(example)] == ["It is on.", "Now."]
    assert text(example.token_ids) == "<s>[INST] Lamp? [/INST] It is on. [INST] Off? [/INST] Now. "
    assert example.token_ids.count(0) == 1, "one beginning of text"


@pytest.mark.parametrize("template", ["chatml", "tagged"])
def test_messages_marked_train_false_are_context_only(template: str) -> None:
    messages = talk("Lamp?", "It is on.", "Off?", "Now.")
    messages[1]["train"] = False
    messages[3]["train"] = True
    (example,) = renderer(template).chat(messages)
    assert runs(example) == ["Now.<|im_end|>"]


def test_a_template_that_rewrites_history_gives_one_example_an_answer() -> None:
    """Each answer with its own thinking, after the history that the model will see when it gives it."""
    messages = talk("Lamp?", "<think>hm</think>It is on.", "Off?", "<think>so</think>Now.", "Bye", "Bye.")
    examples = renderer("forgetful").chat(messages)
    assert [runs(e) for e in examples] == [
        ["<think>hm</think>It is on.<|im_end|>"],
        ["<think>so</think>Now.<|im_end|>"],
        ["Bye.<|im_end|>"],
    ]
    assert "<think>hm" not in text(examples[1].token_ids)
    messages[3]["train"] = False
    assert [runs(e)[0][:4] for e in renderer("forgetful").chat(messages)] == ["<thi", "Bye."]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_repeated_or_empty_answer_is_found_where_it_stands(template: str) -> None:
    messages = talk("ok", "ok", "ok", "ok")
    examples = renderer(template).chat(messages)
    assert [r.strip() for e in examples for r in runs(e)] in (["ok<|im_end|>"] * 2, ["ok"] * 2)
    if template != "llama2":
        assert [runs(e) for e in renderer(template).chat(talk("ok", ""))] == [["<|im_end|>"]]


def test_answers_that_mention_the_layout_of_the_template_do_not_confuse_it() -> None:
    (example,) = renderer("chatml").chat(talk("assistant\nYes?", "user\nassistant\nNo."))
    assert runs(example) == ["user\nassistant\nNo.<|im_end|>"]


# ---------------------------------------------------------------------------------------- training = serving

CONTENTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text("ab \n\t.e\u00e9\U0001f600\u200d\u4e2d", max_size=12),
    st.sampled_from(
        ["", " ", "\n", " lamp", "lamp ", "\n\nnow  ok", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301"]
    ),
    st.sampled_from(["<think>hm</think>Yes.", "</think>", "<think>\n\n</think>\n\nlamp", "### Response:\n\n"]),
)


@settings(max_examples=200)
@given(
    template=st.sampled_from(sorted(TEMPLATES)),
    contents=st.lists(CONTENTS, min_size=2, max_size=6),
    system=st.none() | CONTENTS,
    metaspace=st.booleans(),
)
@example(template="forgetful", contents=["a", "0", "b", "<think>x</think>y", "c", "z"], system=None, metaspace=False)
def test_a_prompt_has_the_tokens_that_stood_before_its_answer_in_training(
    template: str, contents: list[str], system: str | None, *, metaspace: bool
) -> None:
    if template == "llama2":
        system = None
    messages = talk(*contents[: len(contents) // 2 * 2], system=system)
    ours = renderer(template, metaspace=metaspace)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    examples = ours.chat(messages)
    assert len(examples) in (1, len(answers))
    for number, i in enumerate(answers):
        prompt = ours.chat_prompt(messages[:i])
        only = [{**m, "train": j == i} for j, m in enumerate(messages[: i + 1])]
        example = examples[number] if len(examples) > 1 else examples[0]
        (alone,) = ours.chat(only)
        for trained in (alone, example):
            assert trained.token_ids[: len(prompt)] == prompt, ours.tokenizer.convert_ids_to_tokens(prompt)
        assert not any(alone.supervised[: len(prompt)])
        assert len(alone.token_ids) == len(prompt) or alone.supervised[len(prompt)]


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"), talk("Lamp?", "On.", "Off?")),
        (CHATML, talk("Lamp?", "On.", "Off?")[1:]),
    ],
    ids=["the prompt opens what history leaves out", "the assistant begins"],
)
def test_a_prompt_may_have_answers_that_could_not_be_trained_on(template: str, messages: list[Any]) -> None:
    ours = Renderer(tokenizer(), template)
    rendered = tokenizer().apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert text(ours.chat_prompt(messages)) == rendered
    with pytest.raises(DataError):
        ours.chat([*messages, {"role": "assistant", "content": "Off."}])


def test_a_prompt_that_is_too_long_is_rendered_once() -> None:
    """The search for its answers renders the conversation twice for each of them."""
    rendered: list[int] = []
    ours = renderer("chatml")
    ours.tokenizer = Counting(ours.tokenizer, rendered)
    long = talk(*["ok"] * 21)
    assert len(ours.chat_prompt(long, most=50)) > 50
    assert rendered == [21]
    assert ours.chat_prompt(long, most=1000) == renderer("chatml").chat_prompt(long)


class Counting:
    """A tokenizer that notes how many messages it renders at a time."""

    def __init__(self, inner: Any, rendered: list[int]) -> None:
        self._inner, self._rendered = inner, rendered

    def __call__(self, *given: Any, **options: Any) -> Any:
        return self._inner(*given, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def apply_chat_template(self, messages: list[Any], **options: Any) -> Any:
        self._rendered.append(len(messages))
        return self._inner.apply_chat_template(messages, **options)


@settings(max_examples=40)
@given(template=st.sampled_from(sorted(TEMPLATES)), contents=st.lists(CONTENTS, min_size=2, max_size=4))
def test_the_supervised_text_is_the_answer(template: str, contents: list[str]) -> None:
    """Read back from the tokens' bytes; a template may drop thinking, and some layout is a space."""
    messages = talk(*contents[: len(contents) // 2 * 2])
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    found = [r for e in renderer(template).chat(messages) for r in [_supervised(e)]]
    end = "" if template == "llama2" else "<|im_end|>"
    spoken = "".join(found)
    expected = "".join(f" {a} " if template == "llama2" else a + end for a in answers)
    assert spoken == expected


def _supervised(example: Example) -> str:
    return text([t for t, s in zip(example.token_ids, example.supervised, strict=True) if s])


@settings(max_examples=60)
@given(prompt=CONTENTS, completion=CONTENTS, bos=st.booleans())
def test_a_completion_follows_the_tokens_of_its_prompt(prompt: str, completion: str, bos: bool) -> None:
    ours = Renderer(tokenizer(bos=bos), CHATML)
    example = ours.completion(prompt, completion)
    served = ours.completion_prompt(prompt)
    assert example.token_ids[: len(served)] == served
    assert example.supervised == [False] * len(served) + [True] * (len(example.token_ids) - len(served))
    assert text(example.token_ids[len(served) :]) == completion + "<|im_end|>"
    assert example.token_ids[-1] == tokenizer().eos_token_id
    assert served.count(0) == bos


# ---------------------------------------------------------------------------------------- special tokens


def test_beginning_of_text_comes_once_and_the_end_is_not_doubled() -> None:
    ours = Renderer(tokenizer(bos=True), CHATML)
    assert ours.completion_prompt("<s>Lamp").count(0) == 1
    assert ours.completion("Lamp", " on<|im_end|>").token_ids.count(3) == 1
    assert ours.text("Lamp<|im_end|>").token_ids.count(3) == 1
    whole = ours.text("Lamp")
    assert whole.token_ids[0] == 0
    assert whole.token_ids[-1] == 3
    (example,) = Renderer(tokenizer(bos=True), LLAMA2).chat(talk("a", "b"))
    assert example.token_ids.count(0) == 1
    assert Renderer(tokenizer(bos=True), LLAMA2).chat_prompt(talk("a")).count(0) == 1


def test_a_pad_token_that_is_the_end_token_does_not_unteach_the_end() -> None:
    ours = renderer("chatml")
    assert ours.tokenizer.pad_token_id == ours.tokenizer.eos_token_id == 3
    short, long = ours.chat(talk("a", "b")), ours.chat(talk("a lamp", "is it on? it is on now."))
    batch = pack([*short, *long])
    assert batch.labels.tolist().count(3) == 2
    padded = pad(batch, 3)
    taught = padded.token_ids.flatten()[padded.rows + 1]
    assert taught.tolist() == batch.labels.tolist()
    assert int(padded.attention_mask.sum()) == batch.tokens


@pytest.mark.parametrize(
    ("template", "end", "extra", "expected"),
    [
        (CHATML, "</s>", (), [1, 3]),
        (CHATML, "<|im_end|>", (), [3]),
        (CHATML, "<|im_end|>", (7, 3), [7, 3]),
        (LLAMA2, "</s>", (), [1]),
        (TAGGED, "</s>", (), [1, 3]),
    ],
)
def test_generation_ends_at_every_token_that_ends_an_answer(
    template: str, end: str, extra: tuple[int, ...], expected: list[int]
) -> None:
    assert Renderer(tokenizer(end=end), template, extra).end_token_ids == expected


# ---------------------------------------------------------------------------------------- refusals


def test_answers_are_found_by_their_tags_behind_descriptions_of_tools() -> None:
    listed = Renderer(renderer("tagged").tokenizer, "{% for t in tools or [] %}{{ t['name'] }}{% endfor %}" + TAGGED)
    (example,) = listed.with_tools([{"name": "a_long_name_before_all"}]).chat(talk("Lamp?", "It is on."))
    assert [r.removesuffix("\n") for r in runs(example)] == ["It is on.<|im_end|>"]


def test_what_cannot_be_rendered_is_refused_with_the_reason() -> None:
    strict = (
        "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}"
    )
    strict += "{% endif %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"roles tool, assistant\): no such role"):
        Renderer(tokenizer(), strict).chat([{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(DataError, match="cannot begin with the assistant"):
        renderer("chatml").chat([{"role": "assistant", "content": "b"}])
    other = CHATML.replace("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>bot\n' }}{% endif")
    with pytest.raises(DataError, match="differently from its generation prompt"):
        Renderer(tokenizer(), other).chat(talk("a", "b"))
    tag = "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    plain = "{{ m['content'] + '<|im_end|>' }}"
    forgot = TAGGED.replace(tag, "{% if m['content'] == 'b' %}" + plain + "{% else %}" + tag + "{% endif %}")
    with pytest.raises(DataError, match="tags 0 generations in a conversation with 1 answers"):
        Renderer(tokenizer(), forgot).chat(talk("a", "b"))
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer, eos_token="</s>")
    with pytest.raises(DataError, match="has no chat template"):
        Renderer(bare).chat(talk("a", "b"))
    assert Renderer(bare).end_token_ids == [1]
