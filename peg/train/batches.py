"""Which texts a step trains on: a pure function of (seed, epoch, step), the same on every rank.

Nothing is saved but two integers, so that a resume is exact; nothing is dropped: the last batch of an epoch is short.
"""

from dataclasses import dataclass

import numpy as np

_MASK64 = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths in one flat array: list i is values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, lists: list[list[int]] | list[np.ndarray]) -> "Ragged":
        """From lists in order."""
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in lists], dtype=np.int64)])
        values = np.concatenate([np.asarray(one, dtype=np.int64) for one in lists]) if lists else np.zeros(0, np.int64)
        return cls(values=values, offsets=offsets.astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All values of the given lists, and for each value its position in `rows`."""
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        owner = np.repeat(np.arange(len(rows)), lengths)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self.values[np.repeat(starts, lengths) + within], owner


@dataclass(frozen=True)
class Examples:
    """What can be trained on: one example per row of the mined triples.

    query: (E,) rows of the query table. positives, negatives: passage rows of each example.
    known_positives: by query row, passages that are positives of that query in any source: never its negatives.
    """

    query: np.ndarray
    positives: Ragged
    negatives: Ragged
    known_positives: Ragged

    def __len__(self) -> int:
        return len(self.query)


@dataclass(frozen=True)
class Batch:
    """One global batch. Passages occur once, however many queries hold them.

    query: (N,) query rows. passage: (M,) distinct passage rows, ascending. positive: (N,) index into passage.
    masked_query, masked_passage: (K,) entries (index into query, index into passage) that are no negatives.
    example: (N,) the examples' rows, for messages.
    """

    example: np.ndarray
    query: np.ndarray
    passage: np.ndarray
    positive: np.ndarray
    masked_query: np.ndarray
    masked_passage: np.ndarray


def steps_per_epoch(num_examples: int, *, batch_size: int) -> int:
    """Steps in which every example is seen once."""
    return -(-num_examples // batch_size)


def draw_batch(examples: Examples, *, seed: int, epoch: int, step: int, batch_size: int, num_negatives: int) -> Batch:
    """The global batch of a step (0-based within its epoch).

    Each query brings one of its positives and up to num_negatives of its pool, drawn anew each epoch.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(examples))
    example = order[step * batch_size : (step + 1) * batch_size]
    query = examples.query[example]
    positive_row, _ = _draw(examples.positives, example, seed=seed, epoch=epoch, salt=1, count=1)
    negative_row, _ = _draw(examples.negatives, example, seed=seed, epoch=epoch, salt=2, count=num_negatives)
    passage = np.unique(np.concatenate([positive_row, negative_row]))

    known, owner = examples.known_positives.take(query)
    column = np.searchsorted(passage, known)
    present = column < len(passage)
    present[present] = passage[column[present]] == known[present]
    masked = present & (known != positive_row[owner])
    return Batch(
        example=example,
        query=query,
        passage=passage,
        positive=np.searchsorted(passage, positive_row),
        masked_query=owner[masked],
        masked_passage=column[masked],
    )


def share_by_tokens(lengths: np.ndarray, *, world_size: int) -> np.ndarray:
    """The rank of each text, so that ranks get about the same number of tokens: (N,) int64.

    Longest first, dealt out there and back again (0, 1, 1, 0, 0, …).
    """
    turn = np.arange(len(lengths)) % (2 * world_size)
    rank = np.empty(len(lengths), dtype=np.int64)
    rank[np.argsort(-lengths, kind="stable")] = np.minimum(turn, 2 * world_size - 1 - turn)
    return rank


def _draw(
    lists: Ragged, rows: np.ndarray, *, seed: int, epoch: int, salt: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` values of each list without replacement, and for each the position of its list in `rows`.

    Every slot of a list gets a key from (seed, epoch, row, slot); the lowest keys are drawn.
    """
    values, owner = lists.take(rows)
    slot = np.arange(len(owner)) - np.searchsorted(owner, owner)
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed) * np.uint64(4) + np.uint64(salt))
        key = _mix(key ^ np.uint64(epoch))
        key = _mix(_mix(key ^ rows[owner].astype(np.uint64)) ^ slot.astype(np.uint64))
    order = np.lexsort((key, owner))
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner)  # owner is ascending, and stays so under `order`
    chosen = order[rank < count]
    return values[chosen], owner[chosen]


def _mix(value: np.ndarray | np.uint64) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea & Flood 2014): neighbouring inputs give unrelated outputs."""
    mixed = np.atleast_1d(np.asarray(value, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) & _MASK64
