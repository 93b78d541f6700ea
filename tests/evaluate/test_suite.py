import json

import numpy as np
import pytest

from peg.errors import InputError
from peg.evaluate.beir import RetrievalSet
from peg.evaluate.suite import Searched, SystemResult, compare, paired_differences, score_samples, system_result

DATA = RetrievalSet(
    name="small",
    queries={"q1": "甲", "q2": "乙"},
    corpus={"p1": "a", "p2": "b", "p3": "c"},
    qrels={"q1": {"p1": 1, "p2": 0}, "q2": {"p2": 2, "p3": 1}},
)
QUERY = np.array([[1, 0], [0, 1]], dtype=np.float32)
PASSAGE = np.array([[0.6, 0.8], [0.8, 0.6], [1, 0]], dtype=np.float32)


def searched() -> Searched:
    scores = QUERY @ PASSAGE.T
    rankings = {
        q: dict(zip(DATA.corpus, map(float, row), strict=True)) for q, row in zip(DATA.queries, scores, strict=True)
    }
    return Searched(rankings, QUERY, PASSAGE)


def made_up(name: str, gain: float, *, count: int = 60, digest: str = "same") -> SystemResult:
    values = np.clip(np.random.default_rng(7).uniform(0, 0.6, count) + gain, 0, 1)
    rows = {
        f"q{i:02}": dict.fromkeys(("ndcg_at_10", "recall_at_10", "mrr_at_10"), float(v)) for i, v in enumerate(values)
    }
    return SystemResult(name, digest, None, dict.fromkeys(rows["q00"], float(values.mean())), rows, {})


def test_a_search_becomes_a_result() -> None:
    result = system_result(searched(), DATA, system="base", weights_sha256="ab")
    assert result.top["q1"] == [("p3", 1.0), ("p2", 0.8), ("p1", 0.6)]
    assert result.per_query["q1"]["mrr_at_10"] == pytest.approx(1 / 3)
    assert result.per_query["q2"] == {
        "ndcg_at_10": pytest.approx((2 / np.log2(3) + 1 / 2) / (2 + 1 / np.log2(3))),
        "recall_at_10": 1.0,
        "mrr_at_10": 0.5,
    }
    assert result.metrics["mrr_at_10"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_a_result_survives_json() -> None:
    result = system_result(searched(), DATA, system="base", weights_sha256=None)
    assert SystemResult.from_json(json.loads(json.dumps(result.to_json())), origin="x.json") == result
    with pytest.raises(InputError, match=r"x\.json is no evaluation result"):
        SystemResult.from_json({"system": "base"}, origin="x.json")


def test_score_samples_are_of_three_kinds() -> None:
    samples = score_samples(searched(), DATA, seed=1)
    assert samples["relevant"] == pytest.approx([0.6, 0.6, 0.0])
    assert samples["hardest"] == pytest.approx([1.0, 0.8])
    assert samples["random"] and set(samples["random"]) <= {0.8, 1.0}
    assert samples == score_samples(searched(), DATA, seed=1)
    with pytest.raises(ValueError, match="no embeddings"):
        score_samples(Searched(searched().rankings, None, None), DATA, seed=1)


def test_differences_are_left_minus_right_by_query() -> None:
    left, right = made_up("left", 0.2), made_up("right", 0.0)
    found = paired_differences(left, right, "ndcg_at_10")
    assert found == pytest.approx(
        [left.per_query[q]["ndcg_at_10"] - right.per_query[q]["ndcg_at_10"] for q in sorted(left.per_query)]
    )
    with pytest.raises(ValueError, match="only results on the same set"):
        paired_differences(left, made_up("other", 0, digest="other"), "ndcg_at_10")


def test_comparisons_are_corrected_within_a_metric_and_put_in_words() -> None:
    results = {"bm25": made_up("bm25", 0.0), "base": made_up("base", 0.0), "trained": made_up("trained", 0.3)}
    pairs = [("trained", "base"), ("trained", "bm25"), ("base", "bm25")]
    found = compare(results, DATA, pairs=pairs, main_metric="ndcg_at_10", permutations=999, bootstrap=500, seed=0)
    assert found["set"]["queries"] == 2 and found["systems"]["base"] == results["base"].metrics
    assert [(row["left"], row["right"]) for row in found["differences"]] == pairs * 3
    assert [row["verdict"] for row in found["differences"]] == ["better", "better", "cannot tell"] * 3
    first, second, third = found["differences"][:3]
    assert (first["p_value"], first["p_value_holm"]) == (0.001, 0.003)
    assert (second["p_value_holm"], third["p_value_holm"]) == (0.003, 1.0)
    assert first["low"] <= first["difference"] <= first["high"]
