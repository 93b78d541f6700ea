import hashlib
import json
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from peg.errors import StageError
from peg.evaluate import metrics
from peg.evaluate.beir import RetrievalSet, digest


class FakeEncoder:
    """Character counts in hashed places, so that texts with characters in common are near; it counts what it reads."""

    def __init__(self, salt: str = "") -> None:
        self.salt = salt
        self.read: dict[str, list[str]] = {"query": [], "passage": []}

    def encode(self, texts: Sequence[str], *, kind: str, batch_tokens: int, progress: Any = None) -> np.ndarray:
        assert batch_tokens == 512
        self.read[kind] += texts
        rows = np.full((len(texts), 32), 0.01, dtype=np.float32)
        for row, text in enumerate(texts):
            for character in text:
                rows[row, hashlib.sha256((self.salt + character).encode()).digest()[0] % 32] += 1
            progress.advance(1)
        unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit


@pytest.fixture(scope="module")
def adapter() -> ModuleType:
    """mteb takes seconds to import."""
    module: ModuleType = pytest.importorskip("peg.adapters.mteb")
    return module


@pytest.fixture
def data() -> RetrievalSet:
    generator = np.random.default_rng(0)
    texts = ["".join(chr(0x4E00 + int(c)) for c in generator.integers(0, 80, size=12)) for _ in range(60)]
    corpus = {f"p{i}": text for i, text in enumerate(texts)} | {"twin": texts[3]}
    queries = {f"q{i}": "".join(generator.choice(list(texts[i]), size=3)) for i in range(20)}
    qrels = {f"q{i}": {f"p{i}": 2, f"p{i + 1}": 1, f"p{i + 2}": 0} for i in range(20)}
    return RetrievalSet("small set", queries, corpus, qrels)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the evaluation reached for a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def run(adapter: ModuleType, data: RetrievalSet, encoder: Any, **changes: Any) -> Any:
    wanted = {"system": "fake", "revision": "0" * 64, "batch_tokens": 512, "cache": None}
    return adapter.measure(encoder, data, **(wanted | changes))


def test_rankings_equal_a_naive_search(adapter: ModuleType, data: RetrievalSet) -> None:
    found = run(adapter, data, FakeEncoder())
    query = FakeEncoder().encode(list(data.queries.values()), kind="query", batch_tokens=512, progress=Nothing())
    passage = FakeEncoder().encode(list(data.corpus.values()), kind="passage", batch_tokens=512, progress=Nothing())
    np.testing.assert_array_equal(found.query_QD, query)
    np.testing.assert_array_equal(found.passage_PD, passage)
    for row, query_id in zip(query @ passage.T, data.queries, strict=True):
        assert found.rankings[query_id] == pytest.approx(dict(zip(data.corpus, row, strict=True)), abs=1e-6)


def test_means_per_query_are_those_in_mteb_s_own_file(adapter: ModuleType, data: RetrievalSet, tmp_path: Path) -> None:
    found = run(adapter, data, FakeEncoder(), cache=tmp_path)
    file = next(tmp_path.rglob("small-set-*.json"))
    theirs = json.loads(file.read_text(encoding="utf-8"))["scores"]["test"][0]
    ours = metrics.means(metrics.per_query(found.rankings, data.qrels))
    assert 0 < ours["ndcg_at_10"] < 1
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], abs=1.1e-5)
    assert theirs["main_score"] == pytest.approx(ours["ndcg_at_10"], abs=1.1e-5)
    assert digest(data)[:12] in file.name


def test_each_text_is_encoded_once_with_its_own_kind(adapter: ModuleType, data: RetrievalSet) -> None:
    encoder = FakeEncoder()
    run(adapter, data, encoder)
    assert encoder.read == {"query": list(data.queries.values()), "passage": list(data.corpus.values())}


def test_two_models_share_no_place_in_the_cache(adapter: ModuleType, data: RetrievalSet, tmp_path: Path) -> None:
    first = run(adapter, data, FakeEncoder(), cache=tmp_path, revision="a" * 64)
    second = run(adapter, data, FakeEncoder("other"), cache=tmp_path, revision="b" * 64)
    assert first.rankings != second.rankings
    assert len(list(tmp_path.rglob("small-set-*.json"))) == 2
    # The same place again: what is there is never taken for a new result.
    assert run(adapter, data, FakeEncoder("third"), cache=tmp_path, revision="b" * 64).rankings != second.rankings


def test_means_that_disagree_stop_the_evaluation(
    adapter: ModuleType, data: RetrievalSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = metrics.means
    monkeypatch.setattr(metrics, "means", lambda rows: honest(rows) | {"mrr_at_10": honest(rows)["mrr_at_10"] + 2e-5})
    with pytest.raises(StageError, match=r"differ \(mrr_at_10 0\.\d+ and 0\.\d+\)"):
        run(adapter, data, FakeEncoder())


def test_the_evaluation_is_quiet_and_leaves_loggers_alone(
    adapter: ModuleType, data: RetrievalSet, capfd: pytest.CaptureFixture[str]
) -> None:
    level = logging.getLogger("mteb").level
    run(adapter, data, FakeEncoder())
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == [
        "encode queries with peg/fake",
        "encode passages with peg/fake",
    ]
    assert logging.getLogger("mteb").level == level


def test_bm25_goes_the_same_way(adapter: ModuleType, data: RetrievalSet) -> None:
    corpus = {"p1": "画蛇添足是多此一举", "p2": "守株待兔是不劳而获", "p3": "刻舟求剑是不知变通"}
    small = RetrievalSet("idioms", {"q1": "画蛇添足", "q2": "喀喀"}, corpus, {"q1": {"p1": 1}, "q2": {"p2": 1}})
    found = run(adapter, small, None, system="bm25", revision="1")
    assert found.query_QD is None and found.passage_PD is None
    assert next(iter(found.rankings["q1"])) == "p1"
    assert found.rankings["q2"] == {}
    assert metrics.means(metrics.per_query(found.rankings, small.qrels))["recall_at_10"] == 0.5


class Nothing:
    def advance(self, count: int) -> None:
        assert count == 1
