"""What is kept of a system measured on a test set, and how systems are compared on it.

A system is BM25, or an encoder. Searching and the metrics' means come from outside (`Measure`: mteb's own retrieval
evaluation, in peg/adapters/mteb.py), so that this module needs numpy alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from peg.errors import InputError
from peg.evaluate import metrics, significance
from peg.evaluate.beir import RetrievalSet, digest
from peg.progress import Progress

TOP = 10
"""Passages of a query that are kept with their scores."""

_RANDOM_PASSAGES = 8  # per query, drawn for the score distribution of passages that have nothing to do with it
_SCORE_DIGITS = 6


class TextEncoder(Protocol):
    """What is asked of an encoder here: peg.model.encoder.Encoder has it."""

    def encode(
        self,
        texts: Sequence[str],
        *,
        kind: Literal["query", "passage"],
        batch_tokens: int,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """Embed texts: (N, D) unit rows in their order."""
        ...


@dataclass(frozen=True)
class Searched:
    """A whole test set, searched.

    rankings: query id -> {passage id: score}, deep enough for every metric.
    query_QD, passage_PD: unit embeddings in the order of the set's queries and corpus; None from BM25.
    """

    rankings: dict[str, dict[str, float]]
    query_QD: NDArray[np.float32] | None
    passage_PD: NDArray[np.float32] | None


class Measure(Protocol):
    """Search a set with an encoder, or with BM25 where it is None.

    `revision` is the identity of the weights; `cache` a folder for the searcher's own result files, or None.
    """

    def __call__(
        self,
        encoder: TextEncoder | None,
        data: RetrievalSet,
        *,
        system: str,
        revision: str,
        batch_tokens: int,
        cache: Path | None,
    ) -> Searched:
        """Search the whole set."""
        ...


@dataclass(frozen=True)
class SystemResult:
    """One system on one set: means, values per query, the first passages of each query."""

    system: str
    set_digest: str
    weights_sha256: str | None
    metrics: dict[str, float]
    per_query: dict[str, dict[str, float]]
    top: dict[str, list[tuple[str, float]]]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Any, *, origin: str) -> "SystemResult":
        """Take what `to_json` gave; InputError names `origin` where fields are absent."""
        try:
            fields = {name: tree[name] for name in cls.__dataclass_fields__}
            fields["top"] = {key: [(p, float(s)) for p, s in rows] for key, rows in tree["top"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{origin} is no evaluation result ({error!r}); write it again with `peg evaluate`"
            ) from error
        return cls(**fields)


def system_result(searched: Searched, data: RetrievalSet, *, system: str, weights_sha256: str | None) -> SystemResult:
    """Measure a searched set."""
    measured = metrics.per_query(searched.rankings, data.qrels)
    first = {query_id: metrics.top(searched.rankings.get(query_id, {}), TOP) for query_id in data.queries}
    return SystemResult(
        system=system,
        set_digest=digest(data),
        weights_sha256=weights_sha256,
        metrics=metrics.means(measured),
        per_query=measured,
        top={key: [(passage, round(score, _SCORE_DIGITS)) for passage, score in rows] for key, rows in first.items()},
    )


def score_samples(searched: Searched, data: RetrievalSet, *, seed: int) -> dict[str, list[float]]:
    """Cosines of queries with three kinds of passages, for their distributions.

    "relevant": every relevant passage; "hardest": the best-scoring passage that is not known to be relevant;
    "random": a few drawn passages that are not known to be. Raises ValueError where there are no embeddings.
    """
    if searched.query_QD is None or searched.passage_PD is None:
        raise ValueError("BM25 has no embeddings; score distributions need an encoder's search")
    rows = {passage_id: row for row, passage_id in enumerate(data.corpus)}
    generator = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {"relevant": [], "hardest": [], "random": []}
    for vector_D, query_id in zip(searched.query_QD, data.queries, strict=True):
        relevant = [rows[passage_id] for passage_id, grade in data.qrels[query_id].items() if grade > 0]
        drawn = np.setdiff1d(generator.integers(0, len(rows), size=_RANDOM_PASSAGES), relevant)
        samples["relevant"] += _cosines(vector_D, searched.passage_PD[relevant])
        samples["random"] += _cosines(vector_D, searched.passage_PD[drawn])
        judged = data.qrels[query_id]
        ranked = metrics.top(searched.rankings[query_id], len(relevant) + 1)
        samples["hardest"] += [round(score, _SCORE_DIGITS) for key, score in ranked if judged.get(key, 0) == 0][:1]
    return samples


def paired_differences(left: SystemResult, right: SystemResult, metric: str) -> NDArray[np.float64]:
    """Left minus right per query, in the order of query ids. ValueError if they were measured on different sets."""
    if left.set_digest != right.set_digest:
        raise ValueError(
            f"{left.system} was measured on the set {left.set_digest[:12]}, {right.system} on {right.set_digest[:12]}; "
            "only results on the same set can be compared"
        )
    return np.array([left.per_query[key][metric] - right.per_query[key][metric] for key in sorted(left.per_query)])


def compare(
    results: Mapping[str, SystemResult],
    data: RetrievalSet,
    *,
    pairs: Sequence[tuple[str, str]],
    main_metric: str,
    permutations: int,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Test each pair (left, right) in every metric; p-values are corrected over the pairs of one metric.

    Returns what reports/comparison.json holds.
    """
    differences = []
    for metric in metrics.METRICS:
        rows = []
        for left, right in pairs:
            values_Q = paired_differences(results[left], results[right], metric)
            low, high = significance.bootstrap_interval(values_Q, resamples=bootstrap, seed=seed)
            p_value = significance.randomisation_p_value(values_Q, permutations=permutations, seed=seed)
            row: dict[str, Any] = {"left": left, "right": right, "metric": metric, "difference": float(values_Q.mean())}
            rows.append(row | {"p_value": p_value, "low": low, "high": high})
        for row, corrected in zip(rows, significance.holm([row["p_value"] for row in rows]), strict=True):
            row["p_value_holm"] = corrected
            row["verdict"] = significance.verdict(row["difference"], corrected)
        differences += rows
    return {
        "main_metric": main_metric,
        "set": {"digest": digest(data), "queries": len(data.queries), "passages": len(data.corpus)},
        "systems": {name: result.metrics for name, result in results.items()},
        "differences": differences,
    }


def _cosines(vector_D: NDArray[np.float32], rows_ND: NDArray[np.float32]) -> list[float]:
    return [round(float(score), _SCORE_DIGITS) for score in rows_ND @ vector_D]
