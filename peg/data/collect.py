"""Sources into row numbers: cleaned, drawn, without duplicates, one pair per query and source.

Texts go to disk as they come; in memory are 16 bytes of digest per distinct text, and the row numbers of the pairs.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from peg.config import Clean, Source
from peg.data.clean import clean_pair
from peg.data.dedup import TextIndex, text_id
from peg.data.readers import read_source
from peg.data.store import Store, StoreWriter, open_store
from peg.records import Pair, Reject

_SHARD_ROWS = 1_000_000


@dataclass
class RowPair:
    """A pair as row numbers. row: the source's own number of the first pair that was merged into it.

    teacher: a cross-encoder's scores by passage, where the source has them. score: of a similarity pair.
    """

    source: Source
    row: int
    query: int
    positives: list[int]
    negatives: list[int]
    score: float | None = None
    teacher: dict[int, float] | None = None


@dataclass
class SourceCounts:
    """What became of a source's rows. rejected: reason -> how often; a row may lose several passages."""

    rows: int = 0
    not_drawn: int = 0
    pairs: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Collected:
    """texts: store with the tables queries and passages. pairs: in the order of the sources' rows."""

    texts: Store
    pairs: list[RowPair]
    counts: dict[str, SourceCounts]


def collect(
    sources: tuple[Source, ...], *, clean: Clean, seed: int, scratch: Path, reject: Callable[[Reject], None]
) -> Collected:
    """Read all sources; every dropped row or passage goes to `reject`."""
    counts = {source.name: SourceCounts() for source in sources}
    pairs: list[RowPair] = []
    tables = {"queries": TextIndex(), "passages": TextIndex()}
    known: dict[int, set[int]] = {}  # query row -> its positives, over all sources
    compared: dict[int, set[int]] = {}  # the same of similarity pairs, whose score says whether they are alike
    with StoreWriter(scratch, tables=list(tables), shard_rows=_SHARD_ROWS) as writer:

        def row_of(table: str, text: str) -> int:
            row, is_new = tables[table].row(text)
            if is_new:
                key = "query_id" if table == "queries" else "passage_id"
                writer.add(table, **{key: text_id(text), "text": text})
            return row

        for source in sources:
            merged: dict[tuple[int, int], RowPair] = {}
            for item in _drawn(source, clean=clean, seed=seed, counts=counts[source.name]):
                if isinstance(item, Reject):
                    reject(item)
                    continue
                query = row_of("queries", item.query)
                is_scored = item.task == "similarity"
                positives = (compared if is_scored else known).setdefault(query, set())
                fresh = []
                for text in item.positives:
                    passage = row_of("passages", text)
                    if passage in positives:
                        counts[source.name].rejected["duplicate"] += 1
                        reject(Reject(source.name, item.row, "duplicate", item.query, text))
                    else:
                        positives.add(passage)
                        fresh.append(passage)
                if fresh:
                    key = (query, fresh[0] if is_scored else -1)  # each scored pair stays by itself
                    pair = merged.setdefault(key, RowPair(source, item.row, query, [], [], item.score))
                    pair.positives += fresh
                    pair.negatives += [row_of("passages", text) for text in item.negatives]
                    if item.teacher:
                        rows = [row_of("passages", text) for text in (*item.positives, *item.negatives)]
                        pair.teacher = dict(zip(rows, item.teacher, strict=True)) | (pair.teacher or {})
            pairs += merged.values()
            counts[source.name].pairs = len(merged)
    for pair in pairs:
        distinct = dict.fromkeys(pair.negatives)
        answers = known.get(pair.query, set())
        pair.negatives = [passage for passage in distinct if passage not in answers]
        if dropped := len(distinct) - len(pair.negatives):
            counts[pair.source.name].rejected["negative_is_a_positive"] += dropped
    return Collected(texts=open_store(scratch), pairs=pairs, counts=counts)


def _drawn(source: Source, *, clean: Clean, seed: int, counts: SourceCounts) -> Iterator[Pair | Reject]:
    """Clean pairs and rejects; at most source.limit pairs, drawn by hash, which takes a first reading of the source."""
    last = _last_key(source, clean=clean, seed=seed) if source.limit else None
    for item in _cleaned(source, clean=clean, counts=counts):
        if isinstance(item, Pair) and last is not None and _key(seed, item) > last:
            counts.not_drawn += 1
        else:
            yield item


def _cleaned(source: Source, *, clean: Clean, counts: SourceCounts) -> Iterator[Pair | Reject]:
    for item in read_source(source):
        counts.rows += 1
        if isinstance(item, Reject):
            pair, rejects = None, [item]
        else:
            pair, rejects = clean_pair(item, clean)
        counts.rejected.update(one.reason for one in rejects)
        yield from rejects
        if pair:
            yield pair


def _key(seed: int, pair: Pair) -> tuple[bytes, int]:
    return hashlib.blake2b(f"{seed}\0{pair.source}\0{pair.row}".encode(), digest_size=8).digest(), pair.row


def _last_key(source: Source, *, clean: Clean, seed: int) -> tuple[bytes, int] | None:
    assert source.limit is not None
    pairs = (item for item in _cleaned(source, clean=clean, counts=SourceCounts()) if isinstance(item, Pair))
    smallest = heapq.nsmallest(source.limit, (_key(seed, pair) for pair in pairs))
    return smallest[-1] if smallest else None
