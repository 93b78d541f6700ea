"""The stage `mine`: tables and base encoder in; a pool of hard negatives for every pair, and counts, out."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peg.config import Config, Mining
from peg.data.store import Store, StoreWriter, open_store
from peg.mining.bm25 import BM25Index
from peg.mining.dense import DenseIndex, embed
from peg.mining.negatives import Pool, Rules, labelled_pool, make_pool
from peg.model.encoder import Encoder, Kind
from peg.progress import Progress
from peg.workspace import stage_work, write_json

PREPARED, BASE, MINED, METRICS = Path("data/prepared"), Path("models/base"), "data/mined", "metrics/mine.json"
_BLOCK_PAIRS = 1024


def run(config: Config) -> None:
    """Write data/mined and metrics/mine.json."""
    sections = {
        "seed": config.seed,
        "mining": config.mining.model_dump(mode="json"),
        "num_negatives": config.train.num_negatives,
        "encode_batch_tokens": config.evaluate.encode_batch_tokens,
    }
    with stage_work("mine", sections=sections) as work:
        metrics = mine(
            open_store(PREPARED),
            Encoder.load(str(BASE)),
            config.mining,
            seed=config.seed,
            num_negatives=config.train.num_negatives,
            batch_tokens=config.evaluate.encode_batch_tokens,
            out=work.out(MINED),
            scratch=work.scratch,
        )
        write_json(work.out(METRICS), metrics)


def mine(
    prepared: Store,
    encoder: Encoder,
    mining: Mining,
    *,
    seed: int,
    num_negatives: int,
    batch_tokens: int,
    out: Path,
    scratch: Path,
) -> dict[str, Any]:
    """Search, fuse, filter and write a row of triples per row of pairs; returns the counts."""

    def vectors(table: str, kind: Kind) -> np.ndarray:
        return embed(
            prepared.texts(table),
            num_texts=prepared.num_rows(table),
            encoder=encoder,
            kind=kind,
            batch_tokens=batch_tokens,
            folder=scratch / "embeddings",
        )

    queries_QD, passages_PD = vectors("queries", "query"), vectors("passages", "passage")
    searches = _Searches.over(prepared, queries_QD, passages_PD, mining)
    rules = Rules(
        skip_ranks=mining.skip_ranks,
        max_score_ratio=mining.max_score_ratio,
        pool_size=mining.pool_size,
        fill_to=num_negatives,
        seed=seed,
    )
    known = _known_positives(prepared)
    counts = _Counts()
    num_pairs = prepared.num_rows("pairs")
    shard_rows = max((shard["rows"] for shard in prepared.shards["pairs"]), default=0) or 1
    with (
        StoreWriter(out, tables=["triples"], shard_rows=shard_rows) as writer,
        Progress("mine", total=num_pairs, unit="pairs") as progress,
    ):
        for pairs in _blocks(prepared.rows("pairs")):
            searched = [pair["query"] for pair in pairs if pair["task"] == "retrieval"]
            rankings = iter(searches.rankings(searched) if searched else [])
            for pair in pairs:
                query = pair["query"]
                if pair["task"] == "retrieval":
                    pool = make_pool(
                        next(rankings),
                        query_D=queries_QD[query],
                        passages_PD=passages_PD,
                        positives=known[query],
                        labelled=pair["negatives"],
                        name=searches.query_texts[query],
                        rules=rules,
                    )
                    counts.add(pool, passages_PD[pair["positives"]] @ queries_QD[query], pool_size=mining.pool_size)
                else:
                    pool = labelled_pool(pair["negatives"], query_D=queries_QD[query], passages_PD=passages_PD)
                    counts.num_not_mined += 1
                writer.add("triples", **(pair | _columns(pool, pair)))
                progress.advance()
    return counts.summary(num_queries=len(known))


def _columns(pool: Pool, pair: dict[str, Any]) -> dict[str, Any]:
    """What mining adds to a pair. A teacher has scored labelled negatives alone."""
    scores = pair["teacher_negatives"]
    given = dict(zip(pair["negatives"], scores, strict=True)) if scores else {}
    rows = pool.rows.tolist()
    return {
        "negatives": rows,
        "scores": pool.scores.tolist(),
        "ranks": pool.ranks.tolist(),
        "teacher_negatives": [given.get(row) for row in rows] if scores is not None else None,
    }


@dataclass(frozen=True)
class _Searches:
    """The searches that the recipe switches on."""

    query_texts: list[str]
    queries_QD: np.ndarray
    bm25: BM25Index | None
    dense: DenseIndex | None
    mining: Mining

    @classmethod
    def over(cls, prepared: Store, queries_QD: np.ndarray, passages_PD: np.ndarray, mining: Mining) -> "_Searches":
        bm25 = None
        if mining.bm25_depth:
            with Progress("index words", total=len(passages_PD), unit="passages") as progress:
                bm25 = BM25Index.build(list(prepared.texts("passages")), progress=progress)
        dense = DenseIndex.build(passages_PD) if mining.dense_depth else None
        return cls(list(prepared.texts("queries")), queries_QD, bm25, dense, mining)

    def rankings(self, queries: list[int]) -> list[list[np.ndarray]]:
        """For each query, what each search found."""
        found = []
        if self.bm25:
            found.append(self.bm25.search([self.query_texts[row] for row in queries], self.mining.bm25_depth)[1])
        if self.dense:
            found.append(self.dense.search(self.queries_QD[queries], self.mining.dense_depth)[1])
        return [list(rows) for rows in zip(*found, strict=True)]


@dataclass
class _Counts:
    """num_not_mined: pairs of tasks that need no negatives beyond their own; they are in no other count."""

    pool_sizes: list[int] = field(default_factory=list)
    num_not_mined: int = 0
    num_short: int = 0
    num_filled: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: {"skipped": 0, "positive": 0, "ceiling": 0})
    positive_scores: list[float] = field(default_factory=list)
    negative_scores: list[float] = field(default_factory=list)

    def add(self, pool: Pool, positive_scores: np.ndarray, *, pool_size: int) -> None:
        self.pool_sizes.append(len(pool.rows))
        self.num_short += len(pool.rows) - pool.filled < pool_size
        self.num_filled += pool.filled
        for name, count in asdict(pool.dropped).items():
            self.dropped[name] += count
        self.positive_scores.append(float(positive_scores.mean()))
        if len(pool.scores):
            self.negative_scores.append(float(pool.scores.mean()))

    def summary(self, *, num_queries: int) -> dict[str, Any]:
        num_pairs = len(self.pool_sizes)
        return {
            "pairs": num_pairs,
            "not_mined": self.num_not_mined,
            "queries": num_queries,
            "pool": {
                "mean": round(sum(self.pool_sizes) / max(num_pairs, 1), 3),
                "smallest": min(self.pool_sizes, default=0),
                "share_short": round(self.num_short / max(num_pairs, 1), 4),
                "filled": self.num_filled,
            },
            "dropped": self.dropped,
            "mean_score": {
                "positives": round(float(np.mean(self.positive_scores)), 4) if self.positive_scores else 0.0,
                "negatives": round(float(np.mean(self.negative_scores)), 4) if self.negative_scores else 0.0,
            },
        }


def _known_positives(prepared: Store) -> dict[int, list[int]]:
    """By query row, the positives of all its pairs but those that are only compared with it."""
    known: dict[int, dict[int, None]] = {}
    columns = prepared.columns("pairs", ["query", "positives", "task"])
    for query, positives, task in zip(*columns.values(), strict=True):
        if task != "similarity":
            known.setdefault(query, {}).update(dict.fromkeys(positives))
    return {query: list(positives) for query, positives in known.items()}


def _blocks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    block: list[dict[str, Any]] = []
    for row in rows:
        block.append(row)
        if len(block) == _BLOCK_PAIRS:
            yield block
            block = []
    if block:
        yield block
