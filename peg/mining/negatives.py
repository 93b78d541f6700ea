"""From what two searches found to a pool of hard negatives.

For one query, in this order:
    fuse      candidates by reciprocal rank: the sum over the searches of 1 / (60 + rank), equal sums in the order of
              rows; the fused ranks count from 1, before anything is filtered
    skip      the first `skip_ranks` ranks, which are often positives that nobody labelled
    positive  every known positive of the query's text, over all sources
    ceiling   candidates whose dense score is above the ceiling that the query's best positive sets
    keep      the first `pool_size` that are left, behind the negatives that the source itself labelled

A pool that then has fewer than `fill_to` is filled: first with skipped candidates that pass the other filters, the
last of them first, then with passages drawn by the seed that are no known positives (rank 0; a passage drawn at
random is hardly ever an answer, so the ceiling does not count). Passages above the ceiling that a search found are
never used.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

RECIPROCAL_RANK_OFFSET = 60
"""Cormack, Clarke and Buettcher 2009."""


@dataclass(frozen=True)
class Rules:
    """What may become a negative; see the module's text."""

    skip_ranks: int
    max_score_ratio: float
    pool_size: int
    fill_to: int
    seed: int


@dataclass(frozen=True)
class Dropped:
    """Candidates that each filter took, those counted at the first filter that they fail."""

    skipped: int
    positive: int
    ceiling: int


@dataclass(frozen=True)
class Pool:
    """A query's negatives: passage rows, dense scores and fused ranks (0: no search found it), in pool order.

    filled: how many of them are there only because too few candidates passed.
    """

    rows: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    dropped: Dropped
    filled: int


def fuse(rankings: Sequence[np.ndarray]) -> np.ndarray:
    """Fuse rankings of passage rows (best first; -1 ends one early) by reciprocal rank; returns rows, best first."""
    found = [ranking[ranking >= 0] for ranking in rankings]
    rows, places = np.unique(np.concatenate(found), return_inverse=True)
    points = np.concatenate([1 / (RECIPROCAL_RANK_OFFSET + 1 + np.arange(len(one))) for one in found])
    totals = np.bincount(places, weights=points, minlength=len(rows))
    return rows[np.lexsort((rows, -totals.round(12)))]  # sums of the same fractions in another order are equal


def score_ceiling(positive_scores: np.ndarray, *, max_score_ratio: float) -> float:
    """The highest dense score that a negative may have.

    The share `max_score_ratio` of the best positive's score. A score below 0 has no share to take: there the same
    distance, (1 - ratio) * |score|, lies between the two, so that a smaller ratio is stricter on both sides of 0.
    """
    best = float(positive_scores.max())
    return best - (1 - max_score_ratio) * abs(best)


def make_pool(
    rankings: Sequence[np.ndarray],
    *,
    query_D: np.ndarray,
    passages_PD: np.ndarray,
    positives: Sequence[int],
    labelled: Sequence[int],
    name: str,
    rules: Rules,
) -> Pool:
    """The pool of one query.

    rankings: of each search, passage rows, best first. positives: all known ones of the query's text. labelled: the
    source's own negatives, kept first and not filtered. name: what the seed's draw for this query depends on.
    """
    fused = fuse(rankings)
    ranks = np.arange(1, len(fused) + 1)
    scores = passages_PD[fused] @ query_D
    ceiling = score_ceiling(passages_PD[list(positives)] @ query_D, max_score_ratio=rules.max_score_ratio)
    is_skipped = ranks <= rules.skip_ranks
    is_positive = np.isin(fused, np.fromiter(positives, dtype=np.int64))
    is_above = scores > ceiling
    passes = ~is_skipped & ~is_positive & ~is_above
    dropped = Dropped(
        skipped=int(is_skipped.sum()),
        positive=int((~is_skipped & is_positive).sum()),
        ceiling=int((~is_skipped & ~is_positive & is_above).sum()),
    )
    chosen = list(dict.fromkeys(labelled))[: rules.pool_size]
    chosen = list(dict.fromkeys([*chosen, *fused[passes].tolist()]))[: rules.pool_size]
    num_passed = len(chosen)
    if num_passed < rules.fill_to:
        spare = fused[is_skipped & ~is_positive & ~is_above][::-1].tolist()
        chosen = list(dict.fromkeys([*chosen, *spare]))[: rules.fill_to]
        unusable = {*positives, *chosen, *fused[is_above].tolist()}
        chosen += _draw(len(passages_PD), unusable, count=rules.fill_to - len(chosen), name=name, seed=rules.seed)
    rows = np.array(chosen, dtype=np.int64)
    rank_of = dict(zip(fused.tolist(), ranks.tolist(), strict=True))
    return Pool(
        rows=rows,
        scores=(passages_PD[rows] @ query_D).astype(np.float32),
        ranks=np.array([rank_of.get(row, 0) for row in chosen], dtype=np.int32),
        dropped=dropped,
        filled=len(chosen) - num_passed,
    )


def labelled_pool(labelled: Sequence[int], *, query_D: np.ndarray, passages_PD: np.ndarray) -> Pool:
    """The pool of a query for which nothing is searched: its source's own negatives."""
    rows = np.array(list(dict.fromkeys(labelled)), dtype=np.int64)
    return Pool(
        rows=rows,
        scores=(passages_PD[rows] @ query_D).astype(np.float32),
        ranks=np.zeros(len(rows), dtype=np.int32),
        dropped=Dropped(skipped=0, positive=0, ceiling=0),
        filled=0,
    )


def _draw(num_passages: int, unusable: Iterable[int], *, count: int, name: str, seed: int) -> list[int]:
    """At most `count` passage rows that are usable, by the seed and the name."""
    taken = set(unusable)
    count = min(count, num_passages - len(taken))
    key = hashlib.sha256(f"{seed}\0fill\0{name}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(key[:8], "big"))
    drawn: list[int] = []
    while len(drawn) < count:
        row = int(generator.integers(num_passages))
        if row not in taken:
            taken.add(row)
            drawn.append(row)
    return drawn
