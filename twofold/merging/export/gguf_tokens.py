"""A tokenizer as a GGUF file holds it: which of llama.cpp's own it is, its tokens, and what is special.

llama.cpp does not read a tokenizer's rules for splitting text, but knows some by name. Which one it is, its converter tells from
how a certain text comes out (`get_vocab_base_pre` of convert_hf_to_gguf.py, MIT licence), and so does this file; a tokenizer that
it does not know is refused, for a wrong name gives other tokens without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from twofold.errors import ConfigError

CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d\U0001f32b"
    "\ufe0f (multiple emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 3333 33333 333333 333"
    "3333 33333333 3.3 3..3 3...3 \u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f"
    "\u17a2\u17b6\u1785\U0001f601 ?\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------====="
    "== \u043d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'"
    "ll make it, 'D you like some tea? We'Ve a'lL"
)
"""The text whose tokens tell tokenizers apart."""

PRETOKENIZERS = {
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "ad851be1dba641f2e3711822f816db2c265f788b37c63b4e1aeacb9ee92de8eb": "gigachat",
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "4a2e2abae11ca2b86d570fc5b44be4d5eb5e72cc8f22dd136a94b37da83ab665": "kormo",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "7dec86086fcc38b66b7bc1575a160ae21cf705be7718b9d5598190d7c12db76f": "superbpe",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "1994ffd01900cfb37395608534236ecd63f2bd5995d6cb1004dda1af50240f15": "trillion",
}
"""SHA-256 of the list of its tokens, and what llama.cpp calls the rules that split it so; of the families in `gguf_layout`."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space."""
GEMMA, CODE_LLAMA = (108, 107), (32016, 32010)
"""Sizes of vocabularies (the first Gemma's may be larger), and the token that ends a turn, which their tokenizers do not name."""
WITHOUT_BEGINNING = 49152
"""Size of the vocabulary of the small models (SmolLM, Granite) that put no token before a text."""
NO_SCORE, ADDED = -10000.0, -1000.0
"""Scores of numbers without a token, and of tokens that were added."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by number, with their types, in one of llama.cpp's kinds of tokenizer.

    Attributes:
        kind: `gpt2` for byte-level BPE, `llama` for SentencePiece's.
        rules: how text is split before.
        scores: of SentencePiece's pieces; none for BPE, which has merges.
    """

    kind: str
    rules: str
    tokens: list[bytes]
    types: list[int]
    scores: list[float] = field(default_factory=list)

    def add_to(self, writer: gguf.GGUFWriter, folder: Path, chat_template: str | None) -> None:
        """Write it, with the special tokens and the template that the folder's files name."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.rules)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        special = gguf.SpecialVocab(folder, load_merges=not self.scores, n_vocab=len(self.tokens))
        special.chat_template = chat_template or special.chat_template
        special.add_to_gguf(writer, quiet=True)


def vocabulary(folder: Path, tokenizer: Any, size: int) -> Vocabulary:
    """The tokenizer of a model's folder.

    Args:
        tokenizer: as transformers loads it.
        size: how many rows the embedding has; numbers without a token get a name that no text has.

    Raises:
        ConfigError: it has more tokens than that, or llama.cpp has no such tokenizer.
    """
    if (largest := max(tokenizer.get_vocab().values())) >= size:
        raise ConfigError(
            f"the tokenizer in {folder} has the token {largest}, but the model has embeddings for {size} alone"
        )
    if (folder / "tokenizer.model").is_file():
        return _sentencepiece(folder, size)
    try:
        held = gguf.LlamaHfVocab(folder)
    except (FileNotFoundError, TypeError):  # its words for BPE over bytes
        return _byte_level(folder, tokenizer, size)
    found = [(text, score, int(kind)) for text, score, kind in held.all_tokens()]
    found += [(_unused(i), NO_SCORE, int(TokenType.UNUSED)) for i in range(len(found), size)]
    return Vocabulary("llama", "default", [t for t, _, _ in found], [k for _, _, k in found], [s for _, s, _ in found])


def add_habits(writer: gguf.GGUFWriter, folder: Path, config: Mapping[str, Any], architecture: str, kind: str) -> None:
    """Whether a space, or the token of a beginning, goes before a text, and what ends a turn, where the kind leaves it open.

    Args:
        kind: of the `Vocabulary`.
    """
    if architecture.startswith("gemma") and kind == "llama":
        writer.add_add_space_prefix(False)
    if architecture == "gemma" and config["vocab_size"] >= GEMMA[0]:
        writer.add_eot_token_id(GEMMA[1])
    if architecture == "llama" and config["vocab_size"] == CODE_LLAMA[0]:
        writer.add_eot_token_id(CODE_LLAMA[1])
    if architecture in ("llama", "smollm3"):
        if (habit := _read(folder / "tokenizer_config.json").get("add_prefix_space")) is not None:
            writer.add_add_space_prefix(habit)
        if config["vocab_size"] == WITHOUT_BEGINNING:
            writer.add_add_bos_token(False)


def _unused(number: int) -> bytes:
    return f"[PAD{number}]".encode()


# ---------------------------------------------------------------------------------------------- byte-level BPE


def _byte_level(folder: Path, tokenizer: Any, size: int) -> Vocabulary:
    rules = _rules(folder, tokenizer)
    by_number = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens: list[bytes] = []
    types: list[int] = []
    for number in range(size):
        text, kind = by_number.get(number), TokenType.NORMAL
        if text is None:
            tokens.append(_unused(number))
            types.append(int(TokenType.UNUSED))
            continue
        if number in added:
            text, kind = _added(tokenizer, text, added[number])
        tokens.append(text.encode())
        types.append(int(kind))
    return Vocabulary("gpt2", rules, tokens, types)


def _rules(folder: Path, tokenizer: Any) -> str:
    digest = hashlib.sha256(str(tokenizer.encode(CHECK_TEXT)).encode()).hexdigest()
    if digest not in PRETOKENIZERS:
        raise ConfigError(
            f"how the tokenizer in {folder} splits text has no name here (known are "
            f"{', '.join(sorted(set(PRETOKENIZERS.values())))}); merge the adapter (twofold merge) and use llama.cpp's own "
            "convert_hf_to_gguf.py on that"
        )
    return PRETOKENIZERS[digest]


def _added(tokenizer: Any, text: str, token: Any) -> tuple[str, TokenType]:
    """An added token as llama.cpp takes it: normalised beforehand, and either control or a word of the user's."""
    if not token.normalized:
        text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    if token.special or _looks_special(text):
        return text, TokenType.CONTROL
    return text.replace(SPACE, " "), TokenType.USER_DEFINED


def _looks_special(text: str) -> bool:
    """Some models do not say of their control tokens that they are."""
    pairs = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(start) and text.endswith(end) for start, end in pairs
    )


# ---------------------------------------------------------------------------------------------- SentencePiece


def _sentencepiece(folder: Path, size: int) -> Vocabulary:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    model.LoadFromFile(str(folder / "tokenizer.model"))
    tokens = [_unused(i) for i in range(size)]
    scores, types = [NO_SCORE] * size, [int(TokenType.UNUSED)] * size
    kinds: list[tuple[Callable[[int], bool], TokenType]] = [
        (model.IsUnknown, TokenType.UNKNOWN),
        (model.IsControl, TokenType.CONTROL),
        (model.IsUnused, TokenType.UNUSED),
        (model.IsByte, TokenType.BYTE),
    ]
    for i in range(min(size, model.vocab_size())):
        tokens[i], scores[i] = model.IdToPiece(i).encode(), model.GetScore(i)
        types[i] = int(next((kind for holds, kind in kinds if holds(i)), TokenType.NORMAL))
    for number, (text, special) in _added_to_pieces(folder, types).items():
        if number < size:
            control = special or _looks_special(text)
            tokens[number] = (text if control else text.replace(SPACE, " ")).encode()
            types[number], scores[number] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED), ADDED
    return Vocabulary("llama", "default", tokens, types, scores)


def _added_to_pieces(folder: Path, types: list[int]) -> dict[int, tuple[str, bool]]:
    """Tokens beside SentencePiece's own, by number, and whether they are said to be special.

    Newer folders say them in tokenizer.json alone, which says the pieces' own once more.
    """
    whole = {
        int(t["id"]): (t["content"], bool(t.get("special")))
        for t in _read(folder / "tokenizer.json").get("added_tokens", [])
    }
    found = {n: told for n, told in whole.items() if n < len(types) and types[n] == TokenType.UNUSED}
    found |= {number: (text, False) for text, number in _read(folder / "added_tokens.json").items()}
    for number, token in _read(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        found[int(number)] = (token["content"], bool(token.get("special")))
    return found


def _read(path: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return held
