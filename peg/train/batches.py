"""Which texts a step trains on: a pure function of (seed, epoch, step), the same on every rank.

Nothing is saved but two integers, so that a resume is exact. Nothing is as long as the data: a step costs what its
batch costs, however many examples there are. Nothing is dropped: what is left of a source or a task is a short batch.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from peg.config import Train
from peg.errors import InputError
from peg.records import Task
from peg.train.permutation import key_of, mix, permuted

# What a key is for, so that no two draws share one.
_STEPS, _MIXED, _SOURCE, _POSITIVE, _NEGATIVES = range(5)


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

    def index(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in `values` the given lists stand, one after another, and for each place its position in `rows`."""
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        owner = np.repeat(np.arange(len(rows)), lengths)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(starts, lengths) + within, owner

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All values of the given lists, and for each value its position in `rows`."""
        index, owner = self.index(rows)
        return self.values[index].astype(np.int64), owner


@dataclass(frozen=True)
class SourceInfo:
    """A source's name, and what its rows express."""

    name: str
    task: Task


@dataclass(frozen=True)
class Teacher:
    """A cross-encoder's scores of examples' passages, float32, parallel to the passages' `values`; NaN: none."""

    positives: np.ndarray
    negatives: np.ndarray


@dataclass(frozen=True)
class Examples:
    """What can be trained on: one example per row of the mined triples.

    query: (E,) rows of the query table. positives, negatives: passage rows of each example.
    known_positives: by query row, passages that are positives of that query in any source: never its negatives.
    source: (E,) each example's place in `sources`; None where all are of the first.
    label: (E,) float64, how much alike a similarity row's texts are, NaN in other rows; None where all are others.
    """

    query: np.ndarray
    positives: Ragged
    negatives: Ragged
    known_positives: Ragged
    sources: tuple[SourceInfo, ...] = (SourceInfo("all", "retrieval"),)
    source: np.ndarray | None = None
    label: np.ndarray | None = None
    teacher: Teacher | None = None

    def __len__(self) -> int:
        return len(self.query)


@dataclass(frozen=True)
class Batch:
    """One global batch, all of one task. Passages occur once, however many queries hold them.

    query: (N,) query rows. passage: (M,) distinct passage rows, ascending. positive: (N,) index into passage.
    masked_query, masked_passage: (K,) entries (index into query, index into passage) that are no negatives.
    own: (N, 1 + num_negatives) index into passage, -1 where there is none: the positive, then the drawn negatives
    that are no known positive. teacher: float32 scores of `own`, NaN where there is none; None without any.
    label: (N,) float64, of similarity rows. source: its name; None where there are several.
    example: (N,) the examples' rows, for messages.
    """

    example: np.ndarray
    query: np.ndarray
    passage: np.ndarray
    positive: np.ndarray
    masked_query: np.ndarray
    masked_passage: np.ndarray
    own: np.ndarray
    label: np.ndarray | None
    teacher: np.ndarray | None
    task: Task
    source: str | None


@dataclass(frozen=True)
class _Group:
    """Sources whose rows may share a batch. ends: (S,) how many draws of an epoch come from them, summed up."""

    sources: np.ndarray
    ends: np.ndarray

    @property
    def draws(self) -> int:
        return int(self.ends[-1])


@dataclass(frozen=True)
class Plan:
    """The order of training.

    An epoch sees round(weight * E) rows of a source that has E: every row so often as the weight's whole part says,
    each time in another order, and for the rest some that are drawn anew in each epoch. weights: one per source.
    A batch is of one source with one_source, else of one task. Raises InputError if there is nothing to see.
    """

    examples: Examples
    seed: int
    batch_size: int
    num_negatives: int
    weights: tuple[float, ...]
    one_source: bool

    @classmethod
    def of(cls, examples: Examples, train: Train, *, seed: int) -> "Plan":
        """As the recipe says; sources that it does not name have weight 1."""
        weights = tuple(
            train.sources[one.name].weight if one.name in train.sources else 1.0 for one in examples.sources
        )
        return cls(examples, seed, train.batch_size, train.num_negatives, weights, train.one_source_batches)

    @property
    def steps_per_epoch(self) -> int:
        """The same in all epochs."""
        return int(self._last_steps[-1])

    @property
    def examples_per_epoch(self) -> int:
        """Rows that an epoch sees, repetitions counted."""
        return sum(group.draws for group in self._groups)

    @property
    def short_batches(self) -> int:
        """Batches of an epoch that have fewer than batch_size queries."""
        return sum(group.draws % self.batch_size != 0 for group in self._groups)

    @property
    def single_query_batches(self) -> int:
        """Batches of an epoch that have one query, so no other's passages for negatives."""
        return sum(group.draws % self.batch_size == 1 for group in self._groups)

    def batch(self, epoch: int, step: int) -> Batch:
        """The global batch of a step (0-based within its epoch).

        Each query brings one of its positives and up to num_negatives of its pool, drawn anew each time.
        """
        assert 0 <= step < self.steps_per_epoch
        if len(self._groups) > 1:  # so that sources and tasks alternate
            key = key_of(self.seed, epoch, _STEPS)
            step = int(permuted(np.array([step]), size=self.steps_per_epoch, key=key)[0])
        number = int(np.searchsorted(self._last_steps, step, side="right"))
        group = self._groups[number]
        first = (step - int(self._last_steps[number - 1] if number else 0)) * self.batch_size
        draw = np.arange(first, min(first + self.batch_size, group.draws))
        if len(group.sources) > 1:
            draw = permuted(draw, size=group.draws, key=key_of(self.seed, epoch, _MIXED, number))
        place = np.searchsorted(group.ends, draw, side="right")
        source = group.sources[place]
        draw = draw - np.concatenate([[0], group.ends])[place]
        size = self._sizes[source]
        repetition = draw // size
        row = permuted(draw % size, size=size, key=key_of(self.seed, epoch, _SOURCE, source, repetition))
        example = self._starts[source] + row
        if self._order is not None:
            example = self._order[example].astype(np.int64)
        info = self.examples.sources[group.sources[0]]
        name = info.name if len(group.sources) == 1 else None
        return self._batch(example, key_of(self.seed, epoch, example, repetition), task=info.task, source=name)

    def _batch(self, example: np.ndarray, key: np.ndarray, *, task: Task, source: str | None) -> Batch:
        examples, num_queries = self.examples, len(example)
        query = examples.query[example].astype(np.int64)
        positive_at, _, _ = _draw(examples.positives, example, mix(key + np.uint64(_POSITIVE)), count=1)
        negative_at, negative_owner, turn = _draw(
            examples.negatives,
            example,
            mix(key + np.uint64(_NEGATIVES)),
            count=0 if task == "similarity" else self.num_negatives,
        )
        positive_row = examples.positives.values[positive_at].astype(np.int64)
        negative_row = examples.negatives.values[negative_at].astype(np.int64)
        passage = distinct(np.concatenate([positive_row, negative_row]))
        positive = np.searchsorted(passage, positive_row)

        known, owner = examples.known_positives.take(query)
        column = np.searchsorted(passage, known)
        present = column < len(passage)
        present[present] = passage[column[present]] == known[present]
        owner, column = owner[present], column[present]
        masked = column != positive[owner]

        own = np.full((num_queries, 1 + self.num_negatives), -1, dtype=np.int64)
        own[:, 0] = positive
        negative = np.searchsorted(passage, negative_row)
        is_known = np.isin(negative_owner * len(passage) + negative, owner * len(passage) + column)
        own[negative_owner, 1 + turn] = np.where(is_known, -1, negative)
        teacher = None
        if examples.teacher:
            teacher = np.full(own.shape, np.nan, dtype=np.float32)
            teacher[:, 0] = examples.teacher.positives[positive_at]
            teacher[negative_owner, 1 + turn] = examples.teacher.negatives[negative_at]
            teacher[own < 0] = np.nan
        label = examples.label
        return Batch(
            example=example,
            query=query,
            passage=passage,
            positive=positive,
            masked_query=owner[masked],
            masked_passage=column[masked],
            own=own,
            label=label[example].astype(np.float64) if label is not None and task == "similarity" else None,
            teacher=teacher,
            task=task,
            source=source,
        )

    @cached_property
    def _groups(self) -> tuple[_Group, ...]:
        draws = np.array([round(weight * int(size)) for weight, size in zip(self.weights, self._sizes, strict=True)])
        if not draws.any():
            raise InputError(
                f"an epoch would see 0 of {len(self.examples)} examples; give rows, or larger weights in train.sources"
            )
        seen = np.flatnonzero(draws)
        if self.one_source:
            members = [np.array([source]) for source in seen]
        else:
            task = np.array([self.examples.sources[source].task for source in seen])
            members = [seen[task == one] for one in dict.fromkeys(task)]
        return tuple(_Group(sources, np.cumsum(draws[sources])) for sources in members)

    @cached_property
    def _last_steps(self) -> np.ndarray:
        return np.cumsum([-(-group.draws // self.batch_size) for group in self._groups])

    @cached_property
    def _order(self) -> np.ndarray | None:
        """Rows by source; None where they stand so already, as the stages write them."""
        source = self.examples.source
        if source is None or bool(np.all(source[1:] >= source[:-1])):
            return None
        return np.argsort(source, kind="stable").astype(np.uint32 if len(source) < 2**32 else np.int64)

    @cached_property
    def _sizes(self) -> np.ndarray:
        """(S,) rows of each source."""
        source, num_sources = self.examples.source, len(self.examples.sources)
        if source is None:
            return np.array([len(self.examples), *[0] * (num_sources - 1)])
        return np.array([np.count_nonzero(source == number) for number in range(num_sources)])

    @cached_property
    def _starts(self) -> np.ndarray:
        starts: np.ndarray = np.cumsum(self._sizes) - self._sizes
        return starts


def distinct(rows: np.ndarray) -> np.ndarray:
    """Each value once, ascending. np.unique hashes: 17 s instead of 0.3 s for ten million (NumPy 2.4)."""
    ordered = np.sort(rows)
    is_first = np.concatenate([np.ones(min(1, len(rows)), dtype=bool), ordered[1:] != ordered[:-1]])
    once: np.ndarray = ordered[is_first]
    return once


def share_by_tokens(lengths: np.ndarray, *, world_size: int) -> np.ndarray:
    """The rank of each text, so that ranks get about the same number of tokens: (N,) int64.

    Longest first, dealt out there and back again (0, 1, 1, 0, 0, …).
    """
    turn = np.arange(len(lengths)) % (2 * world_size)
    rank = np.empty(len(lengths), dtype=np.int64)
    rank[np.argsort(-lengths, kind="stable")] = np.minimum(turn, 2 * world_size - 1 - turn)
    return rank


def _draw(lists: Ragged, rows: np.ndarray, key: np.ndarray, *, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to `count` of each list without replacement: where they stand in `lists.values`, whose list, which turn.

    key: (N,) of each list. Every slot of a list gets a key of its own; the lowest are drawn, in their order.
    """
    index, owner = lists.index(rows)
    first = np.searchsorted(owner, owner)  # owner is ascending, and stays so under `order`
    slot = np.arange(len(owner)) - first
    order = np.lexsort((mix(key[owner] ^ slot.astype(np.uint64)), owner))
    chosen = slot < count
    return index[order[chosen]], owner[chosen], slot[chosen]
