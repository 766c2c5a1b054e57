"""Renderers of adapters: each answers with the chat template and the end tokens that it was trained with."""

from __future__ import annotations

from twofold.adapter.files import Provenance
from twofold.base.chat import Renderer
from twofold.base.load import Base


class Renderers:
    """One renderer for each template and set of end tokens; most adapters share one."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._made: dict[tuple[str | None, tuple[int, ...]], Renderer] = {}

    def of(self, provenance: Provenance | None) -> Renderer:
        """The renderer for an adapter with this provenance; the base's own for one that has none."""
        if provenance is None:
            return self.base.renderer
        ours = self.base.renderer
        template = provenance.chat_template or ours.template
        ends = tuple(dict.fromkeys([*ours.end_token_ids, *provenance.eos_token_ids]))
        if template == ours.template and ends == tuple(ours.end_token_ids):
            return ours
        if (template, ends) not in self._made:
            self._made[template, ends] = Renderer(self.base.tokenizer, template, ends)
        return self._made[template, ends]
