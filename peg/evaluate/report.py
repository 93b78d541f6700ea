"""The report of a training: one HTML file that needs nothing else, the same bytes for the same results.

Texts of the test set are strangers' texts: the template escapes all of them, and the page forbids scripts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peg.evaluate.beir import RetrievalSet
from peg.evaluate.charts import Series, change_bars, histogram_lines, line_chart, points_per_mark
from peg.evaluate.significance import LEVEL
from peg.evaluate.suite import SystemResult
from peg.evaluate.weighting import Tables, figures

SYSTEM_NAMES = {"bm25": "BM25", "base": "base encoder", "trained": "trained model"}
METRIC_NAMES = {"ndcg_at_10": "nDCG@10", "recall_at_10": "Recall@10", "mrr_at_10": "MRR@10"}

_TEMPLATE = "report.html.j2"
_SHOWN = 5  # passages of an example, on each side
_CLIP = 160  # characters of a text
_BINS = 40  # of the score distributions
_SAMPLE_NAMES = {
    "relevant": "relevant passages",
    "hardest": "best-scoring other passage",
    "random": "random other passages",
}

Curve = Mapping[str, Sequence[float]]
"""Columns of a CSV file of numbers; cells that were empty are NaN."""


@dataclass(frozen=True)
class Findings:
    """All that the report says.

    results: by system, bm25, base and trained; comparison: as in reports/comparison.json.
    samples: of base and trained, from suite.score_samples. train_curve, dev_curve: columns of the two CSV files.
    weighting: from weighting.read_weighting; empty where training wrote none.
    counts: stage -> its metrics, as deep as they are. params: the recipe's sections. examples: queries to show.
    """

    results: Mapping[str, SystemResult]
    comparison: Mapping[str, Any]
    samples: Mapping[str, Mapping[str, Sequence[float]]]
    data: RetrievalSet
    train_curve: Curve
    dev_curve: Curve
    weighting: Mapping[str, Tables]
    counts: Mapping[str, Mapping[str, Any]]
    params: Mapping[str, Any]
    examples: int


def render(found: Findings) -> str:
    """Return the page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = _signed
    return environment.get_template(_TEMPLATE).render(
        headline=headline(found.comparison),
        summary=_summary(found),
        systems=[(SYSTEM_NAMES[name], found.results[name].metrics) for name in SYSTEM_NAMES],
        best={key: max(result.metrics[key] for result in found.results.values()) for key in METRIC_NAMES},
        metric_names=METRIC_NAMES,
        comparisons=_comparisons(found.comparison),
        level=LEVEL,
        charts=[*_training_charts(found), _change_chart(found), *_score_charts(found.samples)],
        weighting=[_chart(one.title, one.caption, one.svg) for one in figures(found.weighting)],
        examples=_examples(found),
        counts={stage: _flat(tree) for stage, tree in found.counts.items()},
        params={
            name: _flat(section) if isinstance(section, Mapping) else [("", section)]
            for name, section in found.params.items()
        },
        digest=found.comparison["set"]["digest"],
        weights={
            SYSTEM_NAMES[name]: result.weights_sha256 for name, result in found.results.items() if result.weights_sha256
        },
    )


def headline(comparison: Mapping[str, Any]) -> str:
    """Say in a sentence how the trained model did in the main metric against the base encoder and against BM25."""
    words = {
        row["right"]: row["verdict"]
        for row in comparison["differences"]
        if row["left"] == "trained" and row["metric"] == comparison["main_metric"]
    }
    names = {other: f"the {SYSTEM_NAMES[other]}" if other != "bm25" else "BM25" for other in words}
    if set(words.values()) == {"cannot tell"}:
        return f"We cannot tell the trained model from {' or '.join(names.values())}"
    clauses = []
    for verdict in ("better", "worse"):
        others = [names[other] for other, word in words.items() if word == verdict]
        if others:
            clauses.append(f"{verdict} than {' and '.join(others)}")
    unclear = [names[other] for other, word in words.items() if word == "cannot tell"]
    ending = f"; against {' and '.join(unclear)} we cannot tell" if unclear else ""
    return f"The trained model is {', but '.join(clauses)}{ending}"


def choose_examples(before: SystemResult, after: SystemResult, *, count: int) -> list[tuple[str, str]]:
    """Choose queries to show: (query id, "gained", "unchanged" or "lost").

    Two in five are the largest gains in nDCG@10, three in ten the largest losses, the rest unchanged ones; where a
    kind runs out, gains, then unchanged ones, then losses fill up. Equal changes go by query id.
    """
    change = {key: row["ndcg_at_10"] - before.per_query[key]["ndcg_at_10"] for key, row in after.per_query.items()}
    kinds = {
        "gained": sorted((key for key in change if change[key] > 0), key=lambda key: (-change[key], key)),
        "unchanged": sorted(key for key in change if change[key] == 0),
        "lost": sorted((key for key in change if change[key] < 0), key=lambda key: (change[key], key)),
    }
    gained, lost = -(-count * 2 // 5), count * 3 // 10
    wanted = {"gained": gained, "unchanged": count - gained - lost, "lost": lost}
    taken = {kind: min(wanted[kind], len(kinds[kind])) for kind in kinds}
    for kind, keys in kinds.items():
        taken[kind] += min(count - sum(taken.values()), len(keys) - taken[kind])
    return [(key, kind) for kind, keys in kinds.items() for key in keys[: taken[kind]]]


def _summary(found: Findings) -> dict[str, Any]:
    sources = found.params["data"]["sources"]
    return {
        "sources": ", ".join(f"{source['name']} ({source['domain']})" for source in sources),
        "examples": found.counts.get("train", {}).get("examples"),
        "steps": found.counts.get("train", {}).get("steps"),
        "base": found.params["base"]["source"],
        "test": found.params["evaluate"]["test"],
        "queries": found.comparison["set"]["queries"],
        "passages": found.comparison["set"]["passages"],
        "metric": METRIC_NAMES[found.comparison["main_metric"]],
        "values": {
            SYSTEM_NAMES[name]: result.metrics[found.comparison["main_metric"]]
            for name, result in found.results.items()
        },
    }


def _comparisons(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in comparison["differences"]:
        groups.setdefault((row["left"], row["right"]), []).append(row)
    return [
        {"left": SYSTEM_NAMES[left], "right": SYSTEM_NAMES[right], "rows": rows}
        for (left, right), rows in groups.items()
    ]


def _chart(title: str, caption: str, svg: str, legend: Sequence[str] = ()) -> dict[str, Any]:
    from markupsafe import Markup

    # Markup: the drawing is ours, and escapes what it is given.
    return {"title": title, "caption": caption, "svg": Markup(svg), "legend": list(legend)}  # noqa: S704


def _training_charts(found: Findings) -> list[dict[str, Any]]:
    plans = (
        ("Loss", "Weighted contrastive loss of each step, in nats.", {"loss": "loss"}, "loss", False),
        ("Learning rate", "AdamW's rate at each step.", {"learning_rate": "learning rate"}, "rate", True),
        (
            "Progressive weighting",
            "Negatives weigh more with their similarity where a is above 0; hard queries weigh less where b is.",
            {"negative_exponent": "a, of negatives", "query_exponent": "b, of queries"},
            "exponent",
            False,
        ),
        (
            "Scores in training",
            "Mean cosine of the queries in a step with their positives and with their negatives.",
            {"positive_score": "positives", "negative_score": "negatives"},
            "cosine",
            False,
        ),
    )
    charts = []
    for title, caption, columns, y_label, from_zero in plans:
        series = [_series(found.train_curve, "step", column, label) for column, label in columns.items()]
        charts += _line(title, caption, series, x_label="step", y_label=y_label, marks=False, from_zero=from_zero)
    dev = [_series(found.dev_curve, "step", "ndcg_at_10", "nDCG@10")]
    caption = "On the dev set; the figures above are of the test set."
    return charts + _line(
        "nDCG@10 while training", caption, dev, x_label="step", y_label="nDCG@10", marks=True, from_zero=True
    )


def _line(title: str, caption: str, series: list[Series], **how: Any) -> list[dict[str, Any]]:
    drawn = [one for one in series if one.xs]
    if not drawn:
        return []
    if (size := points_per_mark(max(len(one.xs) for one in drawn))) > 1:
        caption += f" Drawn as means of {size} steps."
    told = "; ".join(f"{one.label} from {one.ys[0]:.4g} to {one.ys[-1]:.4g}" for one in drawn)
    svg = line_chart(drawn, title=title, description=f"{caption} {told}.", **how)
    return [_chart(title, caption, svg, [one.label for one in drawn] if len(drawn) > 1 else ())]


def _series(curve: Curve, x: str, y: str, label: str) -> Series:
    points = [(a, b) for a, b in zip(curve.get(x, ()), curve.get(y, ()), strict=False) if np.isfinite(b)]
    return Series(label, [a for a, _ in points], [b for _, b in points])


def _score_charts(samples: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """Draw the cosines before and after, on axes of their own: a base encoder's lie close together."""
    charts = []
    for system, when in (("base", "before"), ("trained", "after")):
        kinds = {label: samples[system][key] for key, label in _SAMPLE_NAMES.items()}
        values = [value for sample in kinds.values() for value in sample]
        low, high = min(values), max(values)
        edges = [float(edge) for edge in np.linspace(low, high if high > low else low + 1e-3, _BINS + 1)]
        medians = "; ".join(
            f"median of {label} {np.median(sample):.3f}" for label, sample in kinds.items() if len(sample)
        )
        title = f"Scores {when} training"
        svg = line_chart(
            histogram_lines(kinds, edges=edges),
            title=title,
            description=medians,
            x_label="cosine of query and passage",
            y_label="share",
            marks=False,
            from_zero=True,
        )
        caption = f"{SYSTEM_NAMES[system][0].upper()}{SYSTEM_NAMES[system][1:]}, test set: {medians}."
        charts.append(_chart(title, caption, svg, list(kinds)))
    return charts


def _change_chart(found: Findings) -> dict[str, Any]:
    before, after = found.results["base"], found.results["trained"]
    changes = [row["ndcg_at_10"] - before.per_query[key]["ndcg_at_10"] for key, row in after.per_query.items()]
    edges = [*np.linspace(-1.05, -0.05, 11), *np.linspace(0.05, 1.05, 11)]
    # What is below 0.05 but not 0 belongs to the bin beside the middle one, so that the middle is "no change".
    placed = [float(np.sign(value) * max(abs(value), 0.0501)) for value in changes]
    counts = [int(count) for count in np.histogram(placed, bins=np.asarray(edges))[0]]
    gained, lost = sum(value > 0 for value in changes), sum(value < 0 for value in changes)
    caption = f"{gained} queries gained, {lost} lost, {len(changes) - gained - lost} stayed as they were."
    title = "Change of single queries"
    svg = change_bars(
        [float(edge) for edge in edges],
        counts,
        title=title,
        description=caption,
        x_label="nDCG@10 of the trained model minus the base encoder's",
        y_label="queries",
    )
    return _chart(title, caption, svg)


def _examples(found: Findings) -> list[dict[str, Any]]:
    before, after, data = found.results["base"], found.results["trained"], found.data
    shown = []
    for query_id, kind in choose_examples(before, after, count=found.examples):
        relevant = [passage_id for passage_id, grade in data.qrels[query_id].items() if grade > 0]
        sides = []
        for result in (before, after):
            ids = [passage_id for passage_id, _ in result.top[query_id]]
            rows = [
                {"text": _clipped(data.corpus[passage_id]), "score": score, "relevant": passage_id in relevant}
                for passage_id, score in result.top[query_id][:_SHOWN]
            ]
            rank = next((rank for rank, passage_id in enumerate(ids, 1) if passage_id in relevant), None)
            value = result.per_query[query_id]["ndcg_at_10"]
            sides.append(
                {"name": SYSTEM_NAMES[result.system], "rows": rows, "rank": rank, "depth": len(ids), "value": value}
            )
        wanted = [_clipped(data.corpus[passage_id]) for passage_id in relevant]
        shown.append({"kind": kind, "query": _clipped(data.queries[query_id]), "wanted": wanted, "sides": sides})
    return shown


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _clipped(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _CLIP else f"{line[: _CLIP - 1]}…"


def _flat(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """List a tree's leaves as ("a / b", value), keys in order; lists of trees count from 1."""
    if isinstance(tree, list | tuple) and any(isinstance(item, Mapping) for item in tree):
        tree = {str(number): item for number, item in enumerate(tree, 1)}
    if not isinstance(tree, Mapping):
        return [(path, "–" if tree is None else tree)]
    return [leaf for key in tree for leaf in _flat(tree[key], f"{path} / {key}" if path else str(key))]
