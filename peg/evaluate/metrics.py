"""Retrieval metrics of single queries, by trec_eval's definitions.

A ranking is {passage id: score}. Passages stand by descending score, and equal scores by descending id: the order of
trec_eval, of pytrec_eval and of mteb, which takes nDCG and recall from pytrec_eval and sorts by (score, id) for its
MRR. Scores are compared as float32, in which trec_eval stores them: two that differ in float64 alone are equal.
mteb's MRR compares them as they come, so a search that feeds both should hand over float32.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np

METRICS = ("ndcg_at_10", "recall_at_10", "mrr_at_10")
"""The three that every report has, in its order."""

Ranking = Mapping[str, float]
Judgements = Mapping[str, int]


def top(ranking: Ranking, k: int) -> list[tuple[str, float]]:
    """Return the first k passages with their scores, in trec_eval's order. ValueError if a score is not finite."""
    scored = [(float(np.float32(score)), passage_id) for passage_id, score in ranking.items()]
    for score, passage_id in scored:
        if not math.isfinite(score):
            raise ValueError(f"the score of passage {passage_id!r} is {score}; finite ones are needed to rank by")
    return [(passage_id, score) for score, passage_id in sorted(scored, reverse=True)[:k]]


def ndcg(ranked: list[str], judged: Judgements, *, k: int) -> float:
    """nDCG@k with linear gains: the grade over log2(rank + 1), as a share of the best order's sum.

    ranked: passage ids, best first. Source: Järvelin and Kekäläinen 2002; trec_eval's ndcg_cut.
    """
    ideal = _dcg(sorted(judged.values(), reverse=True)[:k])
    return _dcg(judged.get(passage_id, 0) for passage_id in ranked[:k]) / ideal if ideal else 0.0


def recall(ranked: list[str], judged: Judgements, *, k: int) -> float:
    """Share of all relevant passages (grade 1 or more) that stand among the first k."""
    relevant = {passage_id for passage_id, grade in judged.items() if grade > 0}
    return len(relevant.intersection(ranked[:k])) / len(relevant) if relevant else 0.0


def reciprocal_rank(ranked: list[str], judged: Judgements, *, k: int) -> float:
    """One over the rank of the first relevant passage, 0 if it is not among the first k."""
    return next((1 / rank for rank, passage_id in enumerate(ranked[:k], 1) if judged.get(passage_id, 0) > 0), 0.0)


def per_query(rankings: Mapping[str, Ranking], qrels: Mapping[str, Judgements]) -> dict[str, dict[str, float]]:
    """Measure every judged query by METRICS; one that was not answered counts 0, as with `trec_eval -c`."""
    measured = {}
    for query_id, judged in qrels.items():
        ranked = [passage_id for passage_id, _ in top(rankings.get(query_id, {}), 10)]
        measured[query_id] = {
            "ndcg_at_10": ndcg(ranked, judged, k=10),
            "recall_at_10": recall(ranked, judged, k=10),
            "mrr_at_10": reciprocal_rank(ranked, judged, k=10),
        }
    return measured


def means(measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Average each of METRICS over the queries. ValueError if there are none."""
    if not measured:
        raise ValueError("there are no queries to average over; at least one is needed")
    return {name: math.fsum(row[name] for row in measured.values()) / len(measured) for name in METRICS}


def _dcg(grades: Iterable[int]) -> float:
    return math.fsum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades, 1))
