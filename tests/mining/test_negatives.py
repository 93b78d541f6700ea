"""Pools of negatives, against a plain version and by their properties."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peg.mining.negatives import Pool, Rules, fuse, make_pool, score_ceiling

RNG = np.random.default_rng(0)
PASSAGES = RNG.normal(size=(40, 8)).astype(np.float32)
PASSAGES /= np.linalg.norm(PASSAGES, axis=1, keepdims=True)
RULES = Rules(skip_ranks=0, max_score_ratio=100.0, pool_size=5, fill_to=0, seed=0)


def pool_of(rankings: list[list[int]], positives: list[int], query: int = 0, **changes: Any) -> Pool:
    labelled = changes.pop("labelled", [])
    return make_pool(
        [np.array(ranking, dtype=np.int64) for ranking in rankings],
        query_D=PASSAGES[query],
        passages_PD=PASSAGES,
        positives=positives,
        labelled=labelled,
        name="天地玄黄",
        rules=Rules(**{**vars(RULES), **changes}),
    )


def naive_fuse(rankings: list[list[int]]) -> list[int]:
    points: dict[int, float] = {}
    for ranking in rankings:
        for place, row in enumerate(row for row in ranking if row >= 0):
            points[row] = points.get(row, 0) + 1 / (60 + place + 1)
    return sorted(points, key=lambda row: (-round(points[row], 12), row))


def naive_pool(rankings: list[list[int]], positives: list[int], rules: Rules) -> list[int]:
    """The survivors alone, without filling."""
    scores = [float(row @ PASSAGES[0]) for row in PASSAGES]
    best = max(scores[row] for row in positives)
    out = []
    for rank, row in enumerate(naive_fuse(rankings), 1):
        if rank <= rules.skip_ranks or row in positives:
            continue
        if scores[row] > best - (1 - rules.max_score_ratio) * abs(best):
            continue
        out.append(row)
    return out[: rules.pool_size]


RANKING = st.lists(st.integers(0, 39), unique=True, max_size=20)


@settings(deadline=None)
@given(
    rankings=st.lists(RANKING, min_size=1, max_size=2),
    positives=st.lists(st.integers(0, 39), min_size=1, max_size=3, unique=True),
    skip_ranks=st.integers(0, 5),
    ratio=st.sampled_from([0.5, 0.95, 1.0, 1.5]),
    pool_size=st.integers(1, 10),
    fill_to=st.integers(0, 10),
    labelled=RANKING,
)
def test_pools_equal_the_plain_version_and_hold_no_positive(
    *,
    rankings: list[list[int]],
    positives: list[int],
    skip_ranks: int,
    ratio: float,
    pool_size: int,
    fill_to: int,
    labelled: list[int],
) -> None:
    rules = Rules(skip_ranks, ratio, pool_size, min(fill_to, pool_size), seed=1)
    own = [row for row in labelled if row not in positives][:3]
    pool = pool_of(rankings, positives, labelled=own, **vars(rules))
    rows = pool.rows.tolist()
    survivors = naive_pool(rankings, positives, Rules(skip_ranks, ratio, 99, 0, seed=1))
    expected = list(dict.fromkeys(own[:pool_size] + survivors))[:pool_size]
    assert rows[: len(expected)] == expected
    assert pool.filled == len(rows) - len(expected)
    assert len(set(rows)) == len(rows) <= pool_size
    assert not set(rows) & set(positives)
    fused = naive_fuse(rankings)
    assert pool.ranks.tolist() == [fused.index(row) + 1 if row in fused else 0 for row in rows]
    assert np.allclose(pool.scores, PASSAGES[rows] @ PASSAGES[0], atol=1e-6)
    assert [str(one.dtype) for one in (pool.scores, pool.ranks, pool.rows)] == ["float32", "int32", "int64"]
    assert pool.dropped.skipped == min(skip_ranks, len(fused))
    ceiling = score_ceiling(PASSAGES[positives] @ PASSAGES[0], max_score_ratio=ratio)
    found_above = [row for row in rows[len(own) :] if row in fused and PASSAGES[row] @ PASSAGES[0] > ceiling + 1e-6]
    assert found_above == []


@settings(deadline=None)
@given(st.lists(RANKING, min_size=1, max_size=3))
def test_fusing_equals_the_plain_version(rankings: list[list[int]]) -> None:
    assert fuse([np.array([*one, -1, -1], dtype=np.int64) for one in rankings]).tolist() == naive_fuse(rankings)


def test_two_searches_that_agree_come_first() -> None:
    assert fuse([np.array([5, 7, 9]), np.array([9, 3])]).tolist() == [9, 5, 3, 7]


def test_skipped_ranks_count_before_the_filters() -> None:
    pool = pool_of([[1, 2, 3, 4]], [1], skip_ranks=2)
    assert pool.rows.tolist() == [3, 4]
    assert pool.ranks.tolist() == [3, 4]
    assert (pool.dropped.skipped, pool.dropped.positive) == (2, 0)


def test_a_smaller_ratio_is_stricter_on_both_sides_of_zero() -> None:
    for best in (0.8, -0.8):
        ceilings = [score_ceiling(np.array([best, -0.9]), max_score_ratio=ratio) for ratio in (0.9, 1.0, 1.1)]
        assert ceilings[0] < ceilings[1] < ceilings[2]
        assert ceilings[1] == best
    assert score_ceiling(np.array([0.8]), max_score_ratio=0.95) == pytest.approx(0.76)


def test_the_ceiling_drops_what_scores_above_the_positive() -> None:
    scores = PASSAGES @ PASSAGES[0]
    order = np.argsort(-scores).tolist()
    positive = order[10]
    pool = pool_of([order], [positive], max_score_ratio=1.0, pool_size=50)
    assert pool.rows.tolist() == [row for row in order[11:] if scores[row] <= scores[positive]]
    assert pool.dropped.ceiling == 10


def test_a_short_pool_is_filled_from_skipped_ranks_then_by_the_seed() -> None:
    pool = pool_of([[1, 2, 3, 4]], [1], skip_ranks=3, fill_to=5)
    assert pool.rows.tolist()[:3] == [4, 3, 2]
    assert pool.ranks.tolist() == [4, 3, 2, 0, 0]
    assert pool.filled == 4
    assert not {1, 2, 3, 4} & set(pool.rows.tolist()[3:])
    again = pool_of([[1, 2, 3, 4]], [1], skip_ranks=3, fill_to=5)
    assert again.rows.tolist() == pool.rows.tolist()
    other = pool_of([[1, 2, 3, 4]], [1], skip_ranks=3, fill_to=5, seed=9)
    assert other.rows.tolist() != pool.rows.tolist()


def test_filling_ends_where_no_passage_is_left() -> None:
    everything = list(range(40))
    pool = pool_of([[]], everything[:38], pool_size=10, fill_to=10)
    assert sorted(pool.rows.tolist()) == [38, 39]


def test_labelled_negatives_come_first_and_unfiltered() -> None:
    order = np.argsort(-(PASSAGES @ PASSAGES[0])).tolist()
    pool = pool_of([order], [order[5]], labelled=[order[1], order[30]], max_score_ratio=1.0, pool_size=4)
    assert pool.rows.tolist() == [order[1], order[30], order[6], order[7]]
    assert pool.ranks.tolist() == [2, 31, 7, 8]
