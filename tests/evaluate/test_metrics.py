import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peg.evaluate import metrics

IDS = st.sampled_from(["a", "b", "c", "d", "e", "f", "甲", "乙", "10", "9", "p11", "p2", "Z", "z"])
# Few distinct scores, so that ties are common.
RANKINGS = st.dictionaries(IDS, st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75]), max_size=14)
JUDGED = st.dictionaries(IDS, st.integers(0, 3), max_size=8)


def naive(ranking: dict[str, float], judged: dict[str, int], k: int) -> tuple[float, float, float]:
    order = sorted(sorted(ranking, reverse=True), key=lambda i: -ranking[i])[:k]
    dcg = ideal = found = first = 0.0
    for position, passage in enumerate(order):
        dcg += judged.get(passage, 0) / math.log2(position + 2)
        found += judged.get(passage, 0) > 0
        first = first or (1 / (position + 1) if judged.get(passage, 0) > 0 else 0.0)
    for position, grade in enumerate(sorted(judged.values())[::-1][:k]):
        ideal += grade / math.log2(position + 2)
    relevant = sum(grade > 0 for grade in judged.values())
    return dcg / (ideal or 1), found / (relevant or 1), first


@given(ranking=RANKINGS, judged=JUDGED, k=st.integers(1, 12))
def test_metrics_equal_a_naive_version(ranking: dict[str, float], judged: dict[str, int], k: int) -> None:
    ranked = [passage for passage, _ in metrics.top(ranking, k)]
    found = [f(ranked, judged, k=k) for f in (metrics.ndcg, metrics.recall, metrics.reciprocal_rank)]
    np.testing.assert_allclose(found, naive(ranking, judged, k), rtol=0, atol=1e-12)


def test_values_computed_by_hand() -> None:
    ranked, judged = ["x", "a", "b"], {"a": 2, "b": 1, "c": 1, "x": 0}
    ideal = 2 / 1 + 1 / math.log2(3) + 1 / 2
    assert metrics.ndcg(ranked, judged, k=10) == pytest.approx((2 / math.log2(3) + 1 / 2) / ideal, abs=1e-15)
    assert metrics.ndcg(ranked, judged, k=1) == 0
    assert metrics.recall(ranked, judged, k=10) == pytest.approx(2 / 3, abs=1e-15)
    assert metrics.recall(ranked, judged, k=2) == pytest.approx(1 / 3, abs=1e-15)
    assert metrics.reciprocal_rank(ranked, judged, k=10) == 0.5
    assert metrics.reciprocal_rank(ranked, judged, k=1) == 0


def test_equal_scores_stand_by_descending_id() -> None:
    assert metrics.top({"a": 1.0, "c": 1.0, "b": 1.0, "d": 2.0}, 3) == [("d", 2.0), ("c", 1.0), ("b", 1.0)]


def test_scores_that_differ_in_float64_alone_are_equal() -> None:
    assert [i for i, _ in metrics.top({"a": 1.0 + 1e-12, "b": 1.0}, 2)] == ["b", "a"]


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="'b' is nan"):
        metrics.top({"a": 1.0, "b": math.nan}, 2)


def test_a_query_without_an_answer_counts_zero() -> None:
    measured = metrics.per_query({"q1": {"a": 1.0}}, {"q1": {"a": 1}, "q2": {"a": 1}})
    assert metrics.means(measured) == {"ndcg_at_10": 0.5, "recall_at_10": 0.5, "mrr_at_10": 0.5}
    with pytest.raises(ValueError, match="no queries"):
        metrics.means({})


@given(
    rankings=st.dictionaries(st.sampled_from(["q1", "q2", "q3"]), RANKINGS.filter(bool), min_size=1),
    judged=st.fixed_dictionaries({q: JUDGED.filter(lambda j: any(j.values())) for q in ("q1", "q2", "q3")}),
)
def test_metrics_equal_pytrec_eval(rankings: dict[str, dict[str, float]], judged: dict[str, dict[str, int]]) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    wanted = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.10", "recip_rank"}).evaluate(rankings)
    found = metrics.per_query(rankings, judged)
    assert found.keys() == judged.keys()
    for query_id, row in wanted.items():
        assert found[query_id]["ndcg_at_10"] == pytest.approx(row["ndcg_cut_10"], abs=1e-12)
        assert found[query_id]["recall_at_10"] == pytest.approx(row["recall_10"], abs=1e-12)
        # pytrec_eval has no cut-off for the reciprocal rank: ranks below 10 count there.
        assert found[query_id]["mrr_at_10"] == pytest.approx(row["recip_rank"] * (row["recip_rank"] >= 0.1), abs=1e-12)


@settings(deadline=None, max_examples=20)  # mteb takes seconds to import
@given(rankings=st.dictionaries(st.sampled_from(["q1", "q2"]), RANKINGS.filter(bool), min_size=2), judged=JUDGED)
def test_means_equal_mteb(rankings: dict[str, dict[str, float]], judged: dict[str, int]) -> None:
    module = pytest.importorskip("mteb._evaluators.retrieval_metrics")
    if not any(judged.values()):
        judged = {"a": 2}
    qrels = {"q1": judged, "q2": {"a": 1, "b": 2}}
    wanted = module.calculate_retrieval_scores(rankings, qrels, [1, 3, 5, 10])
    found = metrics.means(metrics.per_query(rankings, qrels))
    assert found["ndcg_at_10"] == pytest.approx(wanted.ndcg["NDCG@10"], abs=1e-5)
    assert found["recall_at_10"] == pytest.approx(wanted.recall["Recall@10"], abs=1e-5)
    assert found["mrr_at_10"] == pytest.approx(wanted.mrr["MRR@10"], abs=1e-5)
