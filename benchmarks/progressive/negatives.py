"""Pairs as they are or with noise in their positives, and the hard negatives of each."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from benchmarks.progressive.data import SEED, Prepared
from peg.mining.bm25 import BM25Index
from peg.mining.dense import DenseIndex
from peg.mining.negatives import Rules, make_pool
from peg.train.batches import Examples, Ragged, SourceInfo

Condition = Literal["clean", "noisy"]
Embed = Callable[[np.ndarray], np.ndarray]
"""From text rows to their unit vectors by the untrained encoder."""

NOISE = 0.2  # share of positives that change places within their source
_DEPTH, _POOL_SIZE = 30, 8
_NO_CEILING = 1e9


def mine(prepared: Prepared, embed: Embed, condition: Condition) -> dict[str, Any]:
    """Pairs with their pools of negatives among their source's positives, by BM25 and the untrained encoder.

    "noisy": a share of each source's positives has been shuffled among themselves before, and no candidate is filtered
    by its score: the true answers of those queries come back as hard negatives.
    """
    pairs = prepared.pairs
    passage_E = pairs.passage.copy()
    generator = np.random.default_rng(SEED)
    for source in np.unique(pairs.source):
        rows = (pairs.source == source).nonzero()[0]
        moved = generator.permutation(rows)[: round(NOISE * len(rows))]
        if condition == "noisy":
            passage_E[moved] = passage_E[np.roll(moved, 1)]
    known: dict[int, set[int]] = {}
    for query, passage in zip(pairs.query.tolist(), passage_E.tolist(), strict=True):
        known.setdefault(query, set()).add(passage)
    pools: list[list[int]] = [[] for _ in passage_E]
    rules = Rules(
        skip_ranks=0,
        max_score_ratio=1.0 if condition == "clean" else _NO_CEILING,
        pool_size=_POOL_SIZE,
        fill_to=1,
        seed=SEED,
    )
    for source in np.unique(pairs.source):
        example = (pairs.source == source).nonzero()[0]
        corpus = np.unique(passage_E[example])
        query_ED, passages_PD = (embed(rows) for rows in (pairs.query[example], corpus))
        _, dense_EK = DenseIndex.build(passages_PD).search(query_ED, _DEPTH)
        queries = [prepared.texts[row][1] for row in pairs.query[example]]
        _, lexical_EK = BM25Index.build([prepared.texts[row][1] for row in corpus]).search(queries, _DEPTH)
        for i, row in enumerate(example.tolist()):
            positives = sorted(known[int(pairs.query[row])])
            pool = make_pool(
                [lexical_EK[i], dense_EK[i]],
                query_D=query_ED[i],
                passages_PD=passages_PD,
                positives=np.searchsorted(corpus, [one for one in positives if one in corpus]).tolist(),
                labelled=[],
                name=queries[i],
                rules=rules,
            )
            pools[row] = corpus[pool.rows].tolist()
    return {
        "source": pairs.source.tolist(),
        "query": pairs.query.tolist(),
        "passage": passage_E.tolist(),
        "pools": pools,
        "known": [sorted(known.get(row, ())) for row in range(len(prepared.texts))],
    }


def examples(mined: dict[str, Any], *, share: float) -> Examples:
    """The first `share` of every source's mined pairs."""
    names, source = np.unique(mined["source"], return_inverse=True)
    rows = np.concatenate([_first(np.flatnonzero(source == number), share=share) for number in range(len(names))])
    return Examples(
        query=np.array(mined["query"])[rows],
        positives=Ragged.of([[mined["passage"][row]] for row in rows]),
        negatives=Ragged.of([mined["pools"][row] for row in rows]),
        known_positives=Ragged.of(mined["known"]),
        sources=tuple(SourceInfo(name, "retrieval") for name in names.tolist()),
        source=source[rows],
    )


def _first(rows: np.ndarray, *, share: float) -> np.ndarray:
    return rows[: round(share * len(rows))]
