"""What is held out: queries of dev and test, the passages they are searched in, and what training must not see.

    1. The test queries are drawn by the seed.
    2. Every other query that leaks from test is found: a near-duplicate of a test query, or one with a positive that
       is a test query's positive. Such queries are neither trained on nor in dev.
    3. The dev queries are drawn from the rest, and the queries that leak from dev are found in the same way.
    4. What is left is trained on, without those labelled negatives that are a held-out query's positive.

A query is its normalised text, over all sources; drawing it takes all its pairs.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from peg.data.dedup import near_duplicates
from peg.errors import InputError

NEAR_TEST, NEAR_DEV = "near_duplicate_of_a_test_query", "near_duplicate_of_a_dev_query"
SHARES_TEST, SHARES_DEV = "shares_a_positive_with_test", "shares_a_positive_with_dev"


@dataclass(frozen=True)
class Links:
    """Which passages are positives of which queries: pairs of row numbers, sorted and once each, (L,) int64."""

    queries: np.ndarray
    passages: np.ndarray

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> "Links":
        """From (query row, passage row) in any order."""
        rows = np.unique(np.fromiter((n for pair in pairs for n in pair), dtype=np.int64).reshape(-1, 2), axis=0)
        return cls(queries=rows[:, 0], passages=rows[:, 1])

    def passages_of(self, is_query: np.ndarray) -> np.ndarray:
        """Rows of the passages that are a positive of a marked query, ascending."""
        return np.unique(self.passages[is_query[self.queries]])

    def queries_of(self, is_passage: np.ndarray) -> np.ndarray:
        """Rows of the queries that have a marked passage among their positives, ascending."""
        return np.unique(self.queries[is_passage[self.passages]])


@dataclass(frozen=True)
class Split:
    """Every query's side. test, dev: rows in the order drawn. dropped: row of a query that leaks -> reason."""

    test: tuple[int, ...]
    dev: tuple[int, ...]
    dropped: dict[int, str]

    def held_out(self) -> frozenset[int]:
        """Rows of test and dev queries."""
        return frozenset(self.test) | frozenset(self.dev)


def draw(named: Iterable[tuple[int, str]], *, count: int, seed: int, purpose: str) -> list[int]:
    """At most `count` rows out of (row, name), in an order that depends on seed, purpose and the names alone.

    What else there is does not change which of two rows comes first. Holds `count` rows in memory.
    """
    keyed = ((hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest(), row) for row, name in named)
    return [row for _, row in heapq.nsmallest(count, keyed)]


def split_queries(
    texts: Callable[[], Iterator[str]],
    links: Links,
    *,
    num_queries: int,
    num_passages: int,
    dev_queries: int,
    test_queries: int,
    near_duplicate: float,
    seed: int,
    has_answer: np.ndarray | None = None,
) -> Split:
    """Draw dev and test, and find what leaks from them.

    texts(): the queries' texts in row order, read several times. has_answer: (Q,) bool, the queries that can be
    measured; None takes all. Raises InputError where there are too few queries.
    """
    named = ((row, text) for row, text in enumerate(texts()) if has_answer is None or has_answer[row])
    order = draw(named, count=num_queries, seed=seed, purpose="held-out queries")
    test = order[:test_queries]
    dropped: dict[int, str] = {}

    def find_leaks(side: Sequence[int], *, near: str, shares: str) -> None:
        taken = set(dropped) | set(test) | set(side)
        for row, reason in _leaks(
            side,
            texts,
            links,
            num_queries=num_queries,
            num_passages=num_passages,
            near_duplicate=near_duplicate,
            reasons=(near, shares),
        ):
            if row not in taken:
                dropped.setdefault(row, reason)

    find_leaks(test, near=NEAR_TEST, shares=SHARES_TEST)
    free = [row for row in order[test_queries:] if row not in dropped]
    dev = free[:dev_queries]
    find_leaks(dev, near=NEAR_DEV, shares=SHARES_DEV)
    num_left = num_queries - len(test) - len(dev) - len(dropped)
    if len(test) < test_queries or len(dev) < dev_queries or num_left < 1:
        raise InputError(
            f"data.holdout asks for {test_queries} test and {dev_queries} dev queries, but of {num_queries} queries "
            f"{len(dropped)} leak from them and {max(num_left, 0)} are left to train on; hold out fewer, or give more"
        )
    return Split(test=tuple(test), dev=tuple(dev), dropped=dropped)


def _leaks(
    side: Sequence[int],
    texts: Callable[[], Iterator[str]],
    links: Links,
    *,
    num_queries: int,
    num_passages: int,
    near_duplicate: float,
    reasons: tuple[str, str],
) -> Iterator[tuple[int, str]]:
    near, shares = reasons
    wanted = set(side)
    anchors = [text for row, text in enumerate(texts()) if row in wanted]
    for row in np.unique(near_duplicates(anchors, texts(), threshold=near_duplicate).rows).tolist():
        yield row, near
    is_held_out = np.zeros(num_queries, dtype=bool)
    is_held_out[list(side)] = True
    is_answer = np.zeros(num_passages, dtype=bool)
    is_answer[links.passages_of(is_held_out)] = True
    for row in links.queries_of(is_answer).tolist():
        yield row, shares


def draw_corpus(
    names: Callable[[], Iterator[str]], *, is_positive: np.ndarray, is_other: np.ndarray, size: int, seed: int
) -> list[int]:
    """Passage rows of an evaluation corpus: the held-out positives, filled up to `size` from others by the seed.

    names(): the passages' ids in row order; is_positive, is_other: (P,) bool. The order is drawn as well, so that
    nothing can be told from a passage's place. There may be more positives than `size`, or too few others.
    """
    num_others = max(size - int(is_positive.sum()), 0)
    others = ((row, name) for row, name in enumerate(names()) if is_other[row] and not is_positive[row])
    chosen = is_positive.copy()
    chosen[draw(others, count=num_others, seed=seed, purpose="corpus")] = True
    rows = ((row, name) for row, name in enumerate(names()) if chosen[row])
    return draw(rows, count=int(chosen.sum()), seed=seed, purpose="corpus order")
