"""The choice of a token, against transformers' own processors and warpers.

Distributions are compared without chance: a whole batch of the same logits gets shares spread evenly over 0 to 1 in place of
random numbers, so that each token is drawn as often as its probability says, to one in the size of the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twofold.engine.draw import at_share, cut, cut_by_sorting, likeliest
from twofold.engine.request import Completion, Request, Sampling
from twofold.engine.sampler import Choice, Sampler, choose
from twofold.errors import ConfigError

SHARES = 1000
PROMPT = [3, 5, 5, 8]


def random_logits(rows: int, vocabulary: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def sampler(prompt: Sequence[int] = (1,), **settings: Any) -> Sampler:
    return Sampler(Request(token_ids=list(prompt), sampling=Sampling(**settings)))


def chosen(logits: Tensor, samplers: Sequence[Sampler | None]) -> list[Choice]:
    return [c for c in choose(logits, samplers) if c is not None]


class AtShare(Sampler):
    """A sampler whose random number is given."""

    def __init__(self, request: Request, share: float) -> None:
        super().__init__(request)
        self.share = share

    def uniform(self) -> float:
        return self.share


def drawn(logits: Tensor, made: Sequence[int] = (), **settings: Any) -> Tensor:
    """How often each token is drawn when shares are spread evenly, after an answer that begins with `made`."""
    request = Request(token_ids=PROMPT, sampling=Sampling(**settings))
    samplers = [AtShare(request, (i + 0.5) / SHARES) for i in range(SHARES)]
    for token in made:
        forced = torch.full_like(logits, -1e9).index_fill(0, torch.tensor([token]), 1e9)
        assert {c.token for c in chosen(forced.expand(SHARES, -1), samplers)} == {token}
    counts = Counter(c.token for c in chosen(logits.expand(SHARES, -1), samplers))
    return torch.tensor([counts[t] / SHARES for t in range(len(logits))])


def warped(logits: Tensor, made: Sequence[int] = (), **settings: Any) -> Tensor:
    """The same probabilities, by transformers; presence and frequency as in OpenAI's reference."""
    wanted, scores = Sampling(**settings), logits[None].float().clone()
    if wanted.logit_bias:
        scores = hf.SequenceBiasLogitsProcessor({(t,): b for t, b in wanted.logit_bias.items()})(
            torch.tensor([PROMPT]), scores
        )
    if wanted.repetition_penalty != 1:
        ids = torch.tensor([[*PROMPT, *made]])
        scores = hf.RepetitionPenaltyLogitsProcessor(wanted.repetition_penalty)(ids, scores)
    for token, count in Counter(made).items():
        scores[0, token] -= count * wanted.frequency_penalty + wanted.presence_penalty
    return hf_cut(hf.TemperatureLogitsWarper(wanted.temperature)(None, scores), wanted)[0]


def hf_cut(scores: Tensor, wanted: Sampling) -> Tensor:
    if wanted.min_p:
        scores = hf.MinPLogitsWarper(wanted.min_p)(None, scores)
    if wanted.top_k:
        scores = hf.TopKLogitsWarper(wanted.top_k)(None, scores)
    if wanted.top_p < 1:
        scores = hf.TopPLogitsWarper(wanted.top_p)(None, scores)
    return scores.softmax(-1)


# ---------------------------------------------------------------------------------------------- distributions

CUTS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"min_p": 0.02, "top_k": 30, "top_p": 0.9},
]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("settings", CUTS, ids=str)
def test_tokens_are_drawn_by_the_probability_that_transformers_gives_them(
    settings: dict[str, Any], temperature: float
) -> None:
    (logits,) = random_logits(1, 300)
    found, expected = (f(logits, temperature=temperature, **settings) for f in (drawn, warped))
    assert (found - expected).abs().max() <= 1.01 / SHARES
    assert set(found.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "settings",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -1.0, "presence_penalty": -0.5},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"logit_bias": {2: 5.0, 9: -100.0}},
        {"logit_bias": {3: 2.0}, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    ],
    ids=str,
)
def test_penalties_and_bias_count_what_they_say_they_count(settings: dict[str, Any]) -> None:
    """Repetition over prompt and answer; presence and frequency over the answer: PROMPT has 5 twice, the answer has 2."""
    (logits,) = random_logits(1, 12, seed=4, spread=2.0)
    made = [2, 3, 2, 2, 11]
    found, expected = (f(logits, made, temperature=1.0, **settings) for f in (drawn, warped))
    assert (found - expected).abs().max() <= 1.01 / SHARES
    assert (expected - warped(logits, made, temperature=1.0)).abs().max() > 0.02


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_greedy_with_penalties_takes_the_greatest_of_the_changed_logits(kind: torch.dtype) -> None:
    settings = {"repetition_penalty": 1.4, "frequency_penalty": 0.9, "logit_bias": {1: 1.0}}
    stream, made = sampler(PROMPT, **settings), []
    for step in range(25):
        logits = random_logits(1, 20, seed=step, spread=0.4).to(kind) + torch.arange(20, dtype=kind) % 3
        expected = warped(logits[0], made, temperature=1.0, **settings).argmax().item()
        made.append(chosen(logits, [stream])[0].token)
        assert made[-1] == expected
    assert len(set(made)) > 8


@given(
    st.integers(0, 10**6),
    st.sampled_from([5, 255, 256, 257, 3000, 20_000]),
    st.sampled_from([0.2, 1.0, 6.0]),
    st.integers(0, 3000),
    st.sampled_from([1.0, 0.98, 0.9, 0.5, 0.05]),
    st.sampled_from([0.0, 0.01, 0.3]),
)
def test_cuts_leave_exactly_what_transformers_leaves(
    seed: int, vocabulary: int, spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Flat rows, whose nucleus is most of the vocabulary, and peaked ones."""
    scores = random_logits(3, vocabulary, seed, spread)
    wanted = Sampling(temperature=1.0, top_k=min(top_k, vocabulary), top_p=top_p, min_p=min_p)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    expected = hf_cut(weights.double().log(), wanted)
    for found in (cut_by_sorting(weights * (weights >= min_p), [wanted] * 3), cut(weights, [wanted] * 3)):
        assert torch.equal(found > 0, expected > 0)
        torch.testing.assert_close(found.double() / found.sum(-1, keepdim=True, dtype=torch.float64), expected)


@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1.0, 0.9, 0.5])), min_size=3, max_size=3),
)
def test_with_many_equal_weights_bins_cut_as_sorting_does(seed: int, wanted: list[tuple[int, float]]) -> None:
    """bfloat16 logits are often equal."""
    scores = random_logits(3, 3000, seed, 0.7).to(torch.bfloat16).float()
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    samplings = [Sampling(temperature=1.0, top_k=k, top_p=p) for k, p in wanted]
    assert torch.equal(cut_by_sorting(weights.clone(), samplings), cut(weights, samplings))


def test_of_equally_likely_tokens_the_first_stay() -> None:
    """As few as reach top_p; top_k keeps all that are as likely as its last, as transformers does."""
    weights = torch.tensor([[0.5, 1.0, 0.5, 0.5, 1.0, 0.5]])
    for top_p, kept in ((0.2, [1]), (0.4, [1, 4]), (0.6, [0, 1, 4]), (0.7, [0, 1, 2, 4]), (0.99, [0, 1, 2, 3, 4, 5])):
        for cutting in (cut, cut_by_sorting):
            found = cutting(weights.clone(), [Sampling(temperature=1.0, top_p=top_p)])
            assert found[0].nonzero().flatten().tolist() == kept
    assert torch.equal(cut(weights.clone(), [Sampling(temperature=1.0, top_k=3)]), weights)
    many = cut(torch.ones(1, 5000), [Sampling(temperature=1.0, top_k=2, top_p=0.5)])
    assert many[0].nonzero().flatten().tolist() == list(range(2500))


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 255, 256, 300, 512, 5000]), st.floats(0, 1, exclude_max=True))
def test_a_share_of_the_probability_belongs_to_one_token(seed: int, vocabulary: int, share: float) -> None:
    random = np.random.default_rng(seed)
    weights = random.random((2, vocabulary)).astype(np.float32) * (random.random((2, vocabulary)) < 0.3)
    weights[:, random.integers(vocabulary)] = 1.0
    shares = torch.full((2, 1), share, dtype=torch.float64)
    for row, token in zip(weights, at_share(torch.from_numpy(weights), shares).tolist(), strict=True):
        upto = np.cumsum(row.astype(np.float64))
        assert row[token] > 0
        assert (upto[token] - row[token]) / upto[-1] <= share + 1e-12
        assert upto[token] / upto[-1] >= share - 1e-12


@given(st.integers(0, 10**6), st.sampled_from([1, 255, 256, 300, 1024, 1025]))
def test_the_likeliest_token_is_the_first_with_the_greatest_logit(seed: int, vocabulary: int) -> None:
    logits = random_logits(4, vocabulary, seed).round().to(torch.bfloat16)
    assert likeliest(logits).tolist() == np.argmax(logits.float().numpy(), axis=1).tolist()


# ---------------------------------------------------------------------------------------------- streams

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-7, 0.7, 2.5]),
    top_k=st.sampled_from([0, 3, 400]),
    top_p=st.sampled_from([1.0, 0.97, 0.4]),
    min_p=st.sampled_from([0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    logit_bias=st.sampled_from([{}, {7: 3.0}]),
    logprobs=st.sampled_from([None, 0, 4]),
    seed=st.integers(0, 3),
)


@given(st.lists(SAMPLINGS | st.none(), min_size=1, max_size=6), st.integers(0, 10**6), st.sampled_from([300, 3000]))
def test_a_choice_does_not_depend_on_the_neighbours(wanted: list[Sampling | None], seed: int, vocabulary: int) -> None:
    """Three steps, together, in reverse order and alone; a place without a request stays empty."""

    def steps(order: list[int]) -> dict[int, list[Choice | None]]:
        requests = {i: Request(token_ids=PROMPT, sampling=s) for i in order if (s := wanted[i])}
        samplers = [Sampler(requests[i]) if i in requests else None for i in order]
        found = [choose(random_logits(len(wanted), vocabulary, seed + step)[order], samplers) for step in range(3)]
        return {i: [f[place] for f in found] for place, i in enumerate(order)}

    together = steps(list(range(len(wanted))))
    assert steps(list(reversed(range(len(wanted))))) == together
    for i, sampling in enumerate(wanted):
        assert steps([i])[i] == together[i]
        assert all((choice is None) == (sampling is None) for choice in together[i])


def test_a_seed_makes_a_stream_and_another_seed_another() -> None:
    logits = random_logits(1, 500, spread=0.5)

    def tokens(seed: int) -> list[int]:
        stream = sampler(temperature=1.0, seed=seed)
        return [chosen(logits, [stream])[0].token for _ in range(20)]

    assert tokens(5) == tokens(5)
    assert len({tuple(tokens(s)) for s in (5, 6, -1, 2**64 - 2)}) == 4


def test_the_logits_stay_as_they_were() -> None:
    logits = random_logits(3, 400)
    before = logits.clone()
    settings = {"temperature": 1.0, "top_p": 0.5, "presence_penalty": 1.0, "logit_bias": {1: 4.0}, "logprobs": 3}
    for stream in ([sampler(**settings)] * 3, [sampler(temperature=1.0)] * 3, [sampler(**settings), None, sampler()]):
        choose(logits, stream)
        assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 50.0])
def test_extreme_temperatures_and_logits_are_drawn_without_overflow(temperature: float) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-torch.inf, 5.0, -torch.inf], [1e5, 1e5 - 1, -torch.inf]])
    found = chosen(logits, [sampler(temperature=temperature, seed=i) for i in range(3)])
    assert found[0].token == 0
    assert found[1].token == 1
    assert found[2].token in (0, 1)


@pytest.mark.parametrize(
    "settings", [{"temperature": 1.0, "top_p": 0.9}, {}, {"logit_bias": {6: 1.0}}, {"presence_penalty": 1.0}], ids=str
)
def test_a_row_without_finite_logits_fails_alone(settings: dict[str, Any]) -> None:
    logits = random_logits(5, 700)
    alone = chosen(logits[4:], [sampler(logprobs=3, **settings)])
    logits[0], logits[1], logits[2, 300], logits[3, 650] = torch.nan, -torch.inf, torch.nan, torch.inf
    streams = [sampler(logprobs=3, **settings) for _ in range(5)]
    assert chosen(logits, streams)[4:] == alone
    assert [s.error for s in streams] == ["the model's logits are not finite numbers"] * 4 + [None]


# ---------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.4, "top_k": 3}, {"logit_bias": {6: 100.0}}], ids=str)
def test_log_probabilities_are_those_of_the_model_whatever_the_sampling(settings: dict[str, Any]) -> None:
    logits = random_logits(2, 700)
    expected = logits.log_softmax(-1)
    for row, choice in enumerate(chosen(logits, [sampler(logprobs=5, **settings), sampler(logprobs=0, **settings)])):
        found = choice.logprobs
        assert found is not None
        assert found.token == choice.token
        assert found.logprob == pytest.approx(expected[row, choice.token].item(), abs=1e-5)
        best = expected[row].topk(0 if row else 5)
        assert [t for t, _ in found.likeliest] == best.indices.tolist()
        assert [p for _, p in found.likeliest] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert chosen(logits, [sampler(**settings), None])[0].logprobs is None
    (few,) = chosen(logits[:1, :3], [sampler(logprobs=20)])
    assert few.logprobs is not None
    assert len(few.logprobs.likeliest) == 3


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0 but must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0 but must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -2}, "top_k is -2 but must be at least 0"),
        ({"min_p": 1.1}, "min_p is 1.1 but must be at least 0 and at most 1"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5 but must be from -2 to 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty is 5e-324 but must be from 0.01 to 100"),
        ({"logit_bias": {-1: 1.0}}, "a key of logit_bias is -1 but must be the number of a token"),
        ({"logit_bias": {4: 101.0}}, r"logit_bias\[4\] is 101.0 but must be from -100 to 100"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616 but must be a number of 64 bits"),
    ],
    ids=str,
)
def test_sampling_that_makes_no_sense_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampling(**wrong)


def test_tokens_that_the_vocabulary_does_not_have_are_refused() -> None:
    Request(token_ids=[0, 9], sampling=Sampling(logit_bias={9: 1.0})).check_vocabulary(10)
    for token_ids, bias, wrong in (([10], {}, 10), ([1, -1], {}, -1), ([1], {12: 1.0}, 12)):
        request = Request(token_ids=token_ids, sampling=Sampling(logit_bias=bias))
        with pytest.raises(ConfigError, match=f"no token {wrong} in the model's vocabulary, which goes from 0 to 9"):
            request.check_vocabulary(10)


def test_a_completion_has_no_log_probabilities_unless_they_were_asked_for() -> None:
    assert Completion(token_ids=[1], finish_reason="stop").logprobs is None
