"""Permutations that are computed by index."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from peg.train.permutation import key_of, permuted

SIZES = [*range(1, 20), 31, 32, 33, 63, 64, 65, 97, 1000, 1024, 1025, 10_007, 65_536]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.filterwarnings("error")
def test_every_index_has_a_place_of_its_own(size: int) -> None:
    found = permuted(np.arange(size), size=size, key=key_of(1, 2))
    assert sorted(found.tolist()) == list(range(size))


def test_a_place_is_the_same_alone_as_among_others() -> None:
    together = permuted(np.arange(1000), size=1000, key=key_of(5))
    assert [int(permuted(np.array([i]), size=1000, key=key_of(5))[0]) for i in (0, 1, 500, 999)] == [
        int(together[i]) for i in (0, 1, 500, 999)
    ]


def test_sizes_and_keys_may_differ_by_index() -> None:
    index, size, part = np.array([0, 3, 5, 3]), np.array([1, 4, 9, 4]), np.array([7, 7, 8, 9])
    found = permuted(index, size=size, key=key_of(1, part))
    for i in range(len(index)):
        alone = permuted(index[[i]], size=int(size[i]), key=key_of(1, int(part[i])))
        assert found[i] == alone[0]


def test_every_order_of_few_is_about_as_frequent() -> None:
    for size, draws in ((2, 2000), (3, 3000), (4, 9600)):
        keys = key_of(np.repeat(np.arange(draws), size))
        rows = permuted(np.tile(np.arange(size), draws), size=size, key=keys).reshape(draws, size)
        counts = Counter(map(tuple, rows.tolist()))
        expected = draws / len(list(permutations(range(size))))
        assert set(counts) == set(permutations(range(size)))
        assert all(abs(count - expected) < 6 * expected**0.5 for count in counts.values())


def test_every_place_is_about_as_frequent_for_every_index() -> None:
    size, draws = 17, 6800
    keys = key_of(np.repeat(np.arange(draws), size), 3)
    rows = permuted(np.tile(np.arange(size), draws), size=size, key=keys).reshape(draws, size)
    for index in range(size):
        counts = np.bincount(rows[:, index], minlength=size)
        assert np.all(np.abs(counts - draws / size) < 6 * (draws / size) ** 0.5)


def test_an_order_is_unlike_the_plain_one_and_unlike_those_of_other_keys() -> None:
    size = 5003
    orders = [np.arange(size)]
    orders += [permuted(np.arange(size), size=size, key=key_of(*key)) for key in [(1, 0), (1, 1), (2, 0), (0, 1)]]
    limit = 5 / size**0.5  # five standard deviations of a random order's correlation
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < limit
            assert np.sum(one == other) < 12  # about 1 in a random order
    for one in orders[1:]:
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < limit
        assert abs(np.mean(one[1:] > one[:-1]) - 0.5) < limit
        assert len(np.unique(np.diff(one) % size)) > 0.6 * size  # 1 - 1/e of them in a random order


def test_a_key_depends_on_every_part_and_on_their_order() -> None:
    keys = [key_of(1, 2, 3), key_of(1, 2, 4), key_of(1, 3, 3), key_of(2, 2, 3), key_of(3, 2, 1), key_of(1, 2)]
    assert len({int(key[0]) for key in keys}) == len(keys)


def test_a_hundred_million_cost_no_more_than_the_indexes_asked_for() -> None:
    size = 110_000_000
    index = np.random.default_rng(0).integers(0, size, 2000)
    found = permuted(index, size=size, key=key_of(1))
    assert len(np.unique(found)) == len(np.unique(index))
    assert abs(found.mean() / size - 0.5) < 0.05
    assert found.min() >= 0
    assert found.max() < size
