import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peg.train.batches import Batch, Examples, Ragged, draw_batch, share_by_tokens, steps_per_epoch
from peg.train.data import known_positives
from tests.train.small import small_examples

EXAMPLES = small_examples()


def batch(step: int = 0, *, epoch: int = 0, seed: int = 1, size: int = 5, negatives: int = 3) -> Batch:
    return draw_batch(EXAMPLES, seed=seed, epoch=epoch, step=step, batch_size=size, num_negatives=negatives)


def test_an_epoch_sees_every_example_once_and_drops_none() -> None:
    steps = steps_per_epoch(len(EXAMPLES), batch_size=5)
    seen = np.concatenate([batch(step).example for step in range(steps)])
    assert sorted(seen) == list(range(len(EXAMPLES)))
    assert len(batch(steps - 1).example) == len(EXAMPLES) % 5


def test_a_batch_is_a_function_of_seed_epoch_and_step() -> None:
    assert np.array_equal(batch(2).passage, batch(2).passage)
    assert not np.array_equal(batch(2).example, batch(2, seed=2).example)
    assert not np.array_equal(batch(2).example, batch(2, epoch=1).example)


@given(step=st.integers(0, 4), epoch=st.integers(0, 50), negatives=st.integers(0, 6))
def test_masks_are_the_other_known_positives_of_the_batch(step: int, epoch: int, negatives: int) -> None:
    found = batch(step, epoch=epoch, negatives=negatives)
    expected = {
        (i, j)
        for i, query in enumerate(found.query)
        for j, passage in enumerate(found.passage)
        if passage in EXAMPLES.known_positives[query] and j != found.positive[i]
    }
    assert set(zip(found.masked_query.tolist(), found.masked_passage.tolist(), strict=True)) == expected
    assert np.all(np.diff(found.masked_query) >= 0)
    assert np.all(np.diff(found.passage) > 0)
    for i, example in enumerate(found.example):
        assert found.passage[found.positive[i]] in EXAMPLES.positives[example]


@given(epoch=st.integers(0, 20))
def test_negatives_come_from_the_pools_and_as_many_as_there_are(epoch: int) -> None:
    for row in range(len(EXAMPLES)):
        one = Examples(
            EXAMPLES.query[[row]],
            Ragged.of([EXAMPLES.positives[row]]),
            Ragged.of([EXAMPLES.negatives[row]]),
            EXAMPLES.known_positives,
        )
        found = draw_batch(one, seed=1, epoch=epoch, step=0, batch_size=1, num_negatives=3)
        drawn = np.delete(found.passage, found.positive)
        assert set(drawn) <= set(EXAMPLES.negatives[row])
        assert len(drawn) == min(3, len(EXAMPLES.negatives[row]))


def test_negatives_are_drawn_anew_each_epoch_and_evenly() -> None:
    one = Examples(np.array([0]), Ragged.of([[0]]), Ragged.of([list(range(1, 11))]), Ragged.of([[0]]))
    counts = np.zeros(11)
    for epoch in range(2000):
        counts[draw_batch(one, seed=3, epoch=epoch, step=0, batch_size=1, num_negatives=3).passage] += 1
    assert counts[0] == 2000
    assert np.all(np.abs(counts[1:] - 600) < 100)  # five standard deviations


def test_known_positives_are_joined_over_examples() -> None:
    found = known_positives(np.array([1, 0, 1]), Ragged.of([[5, 3], [9], [3, 7]]), num_queries=3)
    assert [found[row].tolist() for row in range(3)] == [[9], [3, 5, 7], []]


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=200), world_size=st.integers(1, 8))
@pytest.mark.filterwarnings("error")
def test_ranks_get_about_the_same_tokens(lengths: list[int], world_size: int) -> None:
    rank = share_by_tokens(np.array(lengths), world_size=world_size)
    tokens = np.bincount(rank, weights=lengths, minlength=world_size)
    assert tokens.max() - tokens.min() <= 2 * max(lengths)
