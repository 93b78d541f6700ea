"""The records that pass through preparation, before they become rows of tables."""

from dataclasses import dataclass, replace
from typing import Literal

Task = Literal["retrieval", "similarity", "classification"]
"""What a pair expresses, and so which loss it is trained with."""


@dataclass(frozen=True)
class Pair:
    """A query with the passages that answer it, as a source gives them.

    row: the source's own number of it, a line number where the source is a file of lines.
    negatives: passages that the source itself labels as no answer.
    score: how much alike the query and its one positive are, where the task is similarity; None elsewhere.
    teacher: a cross-encoder's score of each of the positives, then of the negatives; None where it gave none.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    source: str
    domain: str
    task: Task
    row: int
    score: float | None = None
    teacher: tuple[float, ...] | None = None

    def with_texts(
        self,
        query: str,
        positives: tuple[str, ...],
        negatives: tuple[str, ...],
        *,
        teacher: tuple[float, ...] | None,
    ) -> "Pair":
        """The same pair with other texts, and the teacher's scores of those."""
        return replace(self, query=query, positives=positives, negatives=negatives, teacher=teacher)


@dataclass(frozen=True)
class Reject:
    """What was dropped, and why. reason is one of few words, so that it can be counted; passage may be empty."""

    source: str
    row: int
    reason: str
    query: str
    passage: str
