"""The records that pass through preparation, before they become rows of tables."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Pair:
    """A query with the passages that answer it, as a source gives them.

    row: the source's own number of it, a line number where the source is a file of lines.
    negatives: passages that the source itself labels as no answer.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    source: str
    domain: str
    task: str
    row: int

    def with_texts(self, query: str, positives: tuple[str, ...], negatives: tuple[str, ...]) -> "Pair":
        """The same pair with other texts."""
        return replace(self, query=query, positives=positives, negatives=negatives)


@dataclass(frozen=True)
class Reject:
    """What was dropped, and why. reason is one of few words, so that it can be counted; passage may be empty."""

    source: str
    row: int
    reason: str
    query: str
    passage: str
