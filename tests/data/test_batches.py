"""Which examples a step sees: all of them, once an epoch, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from twofold.base.batch import Example
from twofold.data.batches import epoch_order, evaluation_batches, micro_batches, step_indices, steps_per_epoch

COUNTS = st.integers(1, 40)
SEEDS = st.integers(0, 2**31)


def examples(*lengths: int) -> list[Example]:
    """Each token says which example it belongs to."""
    return [Example([i] * n, [True] * n) for i, n in enumerate(lengths)]


@given(COUNTS, st.integers(1, 12), SEEDS, st.integers(1, 3))
def test_an_epoch_sees_every_example_once(count: int, batch_size: int, seed: int, epochs: int) -> None:
    steps = steps_per_epoch(count, batch_size)
    for epoch in range(epochs):
        chosen = [step_indices(count, batch_size, seed, epoch * steps + s) for s in range(steps)]
        assert Counter(i for c in chosen for i in c) == Counter(range(count))
        assert [len(c) for c in chosen[:-1]] == [batch_size] * (steps - 1)
        assert 1 <= len(chosen[-1]) <= batch_size
        assert [i for c in chosen for i in c] == epoch_order(count, seed, epoch)


def test_epochs_and_seeds_have_orders_of_their_own_and_always_the_same() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert epoch_order(50, 3, 2) == epoch_order(50, 3, 2)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.none() | st.integers(1, 13))
def test_micro_batches_cover_a_step_in_order(lengths: list[int], size: int | None) -> None:
    batches = micro_batches(examples(*lengths), size)
    assert [n for b in batches for n in b.lengths] == lengths
    assert all(len(b.lengths) <= (size or len(lengths)) for b in batches)
    assert [t for b in batches for t in b.token_ids.tolist()] == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert sum(b.supervised_tokens for b in batches) == sum(n - 1 for n in lengths)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=25), st.integers(1, 60))
def test_evaluation_batches_hold_every_example_once_and_keep_to_the_limit(lengths: list[int], tokens: int) -> None:
    batches = evaluation_batches(examples(*lengths), tokens)
    seen = Counter(t for b in batches for t in b.token_ids.tolist())
    assert seen == Counter(dict(enumerate(lengths)))
    assert all(b.tokens <= tokens or len(b.lengths) == 1 for b in batches)
