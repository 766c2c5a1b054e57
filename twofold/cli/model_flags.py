"""Flags shared by the verbs that load a base and adapters."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import UseAppendAction

from twofold.base.load import DEFAULT_BASE, Base, Precision
from twofold.events import Emit
from twofold.quant import Kind, Scheme
from twofold.recipes.adapters import Asked


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """A base with adapters.

    Attributes:
        base: a Hugging Face directory, a hub id, a `.gguf` file or a built-in name.
        adapter: a folder, with an optional scale after a colon; several are added up, each behind a flag of its own.
        dtype: type of the base's weights; `auto` takes what this machine multiplies fastest.
        device: `auto` takes a GPU where there is one.
        quantization: pack the base's linear layers while they are read, `nf4` or `int8`.
        allow_foreign_base: use adapters that were trained on another base.
    """

    base: str = DEFAULT_BASE
    adapter: UseAppendAction[tuple[str, ...]] = ()
    dtype: Precision = "auto"
    device: str = "auto"
    quantization: Kind | None = None
    allow_foreign_base: bool = False

    def load(self, emit: Emit) -> Base:
        """The base with these adapters active."""
        return self.load_as(emit, None if self.quantization is None else Scheme(self.quantization))

    def load_as(self, emit: Emit, quantization: Scheme | None) -> Base:
        """The same, packed in this way whatever the flags say."""
        return self.asked().load(emit, quantization)

    def asked(self) -> Asked:
        """The base and the adapters, whatever is to be done with them."""
        return Asked(
            base=self.base,
            adapters=self.adapter,
            dtype=self.dtype,
            device=self.device,
            allow_foreign=self.allow_foreign_base,
        )
