"""Answers of a model with an encoder and a decoder: the prompt is encoded once, and the decoder continues from its start token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch

from twofold.engine.request import Request, cannot_go_on
from twofold.engine.sampler import Choice, Sampler, choose


@torch.no_grad()
def answer_tokens(model: Any, request: Request) -> Iterator[int]:
    """The tokens of one answer, as they are made.

    Args:
        model: a transformers sequence-to-sequence model, whose `decoder_start_token_id` begins every answer.
        request: its `token_ids` are the prompt, which the encoder reads.

    Raises:
        AnswerError: the model's numbers overflow, or a form grew too complex.
    """
    sampler = Sampler(request)
    prompt = torch.tensor([request.token_ids], device=model.device)
    mask = torch.ones_like(prompt)
    encoded = model.get_encoder()(input_ids=prompt, attention_mask=mask)
    token, cache = int(model.config.decoder_start_token_id), None
    for _ in range(request.max_new_tokens):
        found = model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=torch.tensor([[token]], device=model.device),
            past_key_values=cache,
            use_cache=True,
        )
        cache = found.past_key_values
        token = cast(Choice, choose(found.logits[:, -1], [sampler])[0]).token
        if sampler.error:
            raise cannot_go_on(sampler.error, form=sampler.failed is None)
        if token in request.stop_ids:
            return
        yield token
        if sampler.finished:
            return
