"""A model in memory with its adapters folded in for good."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from twofold.adapter.attach import detach
from twofold.merging.checkpoint import cut_ties, merged_state


def fold_in(model: nn.Module) -> None:
    """Take all adapters off; weights that the active ones changed are new tensors, no tensor of the base is written.

    Tied weights of which one was changed are tied no more.
    """
    state = merged_state(model)
    some = cast(Any, model)
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if tied and cut_ties(some, state):
        some.config.tie_word_embeddings = tied = False
    detach(model)
    bare = model.state_dict()
    changed = {k: v for k, v in state.items() if v.data_ptr() != bare[k].data_ptr()}
    model.load_state_dict(changed, strict=False, assign=True)
    if tied:
        some.tie_weights()
