"""BM25 against its formula and against bm25s; dense search against a sort."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peg.mining.bm25 import K1, B, BM25Index, top, words
from peg.mining.dense import DenseIndex, embed
from peg.model.encoder import Encoder
from tests.conftest import make_texts

PASSAGES = [
    "阿党比周 相互勾结，结党营私",
    "中华人民共和国成立于一九四九年",
    "今天天气很好，我们去公园散步",
    "结党营私的人相互勾结",
    "The GDP of China, 中国的GDP",
    "，。！",
    "今天天气很好，我们去公园散步",
]
QUERIES = ["相互勾结结党营私", "天气", "gdp", "Ω", "", "中华人民", "天气 天气 公园"]


def naive_bm25(query: str, passages: list[str]) -> list[float]:
    """Lucene's form: idf = ln(1 + (N - n + 0.5) / (n + 0.5)), tf / (tf + k1 (1 - b + b length / mean))."""
    tokens = [words(passage) for passage in passages]
    mean = sum(map(len, tokens)) / len(tokens)
    scores = []
    for found in tokens:
        score = 0.0
        for word in words(query):
            n = sum(word in other for other in tokens)
            tf = Counter(found)[word]
            idf = math.log(1 + (len(tokens) - n + 0.5) / (n + 0.5))
            score += idf * tf / (tf + K1 * (1 - B + B * len(found) / mean))
        scores.append(score)
    return scores


def test_scores_equal_the_formula() -> None:
    scores_QK, rows_QK = BM25Index.build(PASSAGES).search(QUERIES, 4)
    assert scores_QK.shape == rows_QK.shape == (len(QUERIES), 4)
    assert (str(scores_QK.dtype), str(rows_QK.dtype)) == ("float32", "int64")
    for query, scores, rows in zip(QUERIES, scores_QK, rows_QK, strict=True):
        naive = naive_bm25(query, PASSAGES)
        expected = sorted((i for i, score in enumerate(naive) if score > 0), key=lambda i: (-round(naive[i], 6), i))[:4]
        assert rows[rows >= 0].tolist() == expected
        assert scores[: len(expected)] == pytest.approx([naive[i] for i in expected], rel=1e-5)
        assert (scores[len(expected) :] == 0).all()


def test_scores_equal_those_of_bm25s() -> None:
    import bm25s  # type: ignore[import-untyped]

    passages, queries = make_texts(200, seed=0), make_texts(20, seed=1)
    model = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    model.index([words(text) for text in passages], show_progress=False)
    scores_QK, rows_QK = BM25Index.build(passages).search(queries, 200)
    for query, scores, rows in zip(queries, scores_QK, rows_QK, strict=True):
        known = [model.vocab_dict[word] for word in words(query) if word in model.vocab_dict]
        expected = model.get_scores_from_ids(known)
        assert scores[rows >= 0] == pytest.approx(expected[rows[rows >= 0]], rel=1e-5)
        assert (rows >= 0).sum() == (expected > 0).sum()


def test_equal_scores_come_in_the_order_of_rows() -> None:
    _, rows_QK = BM25Index.build(PASSAGES).search(["公园"], 1)
    assert rows_QK.tolist() == [[2]]
    _, rows_QK = BM25Index.build(PASSAGES).search(["公园"], 100)
    assert rows_QK.tolist() == [[2, 6, -1, -1, -1, -1, -1]]


def test_a_corpus_without_words_finds_nothing() -> None:
    scores_QK, rows_QK = BM25Index.build(["，。", "！"]).search(["天气"], 5)
    assert (scores_QK.tolist(), rows_QK.tolist()) == ([[0, 0]], [[-1, -1]])
    assert BM25Index.build([]).search(["天气"], 5)[1].shape == (1, 0)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), max_size=20), st.integers(1, 25))
def test_top_equals_a_sort(scores: list[float], k: int) -> None:
    rows = np.arange(len(scores))[::-1] * 3
    pairs = sorted((-score, int(row)) for score, row in zip(scores, rows, strict=True) if score > 0)[:k]
    found_scores, found_rows = top(np.array(scores), rows, k)
    assert [(-score, row) for score, row in zip(found_scores, found_rows, strict=True)] == pairs


def test_search_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    BM25Index.build(PASSAGES).search(QUERIES, 3)
    assert capfd.readouterr() == ("", "")


def _unit_rows(count: int, seed: int) -> np.ndarray:
    rows: np.ndarray = np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


@pytest.mark.parametrize("k", [1, 7, 50, 80])
def test_dense_search_equals_a_sort(k: int) -> None:
    passages, queries = _unit_rows(50, 0), _unit_rows(30, 1)
    scores_QK, rows_QK = DenseIndex.build(passages).search(queries, k)
    naive = queries.astype(np.float64) @ passages.T.astype(np.float64)
    assert rows_QK.tolist() == np.argsort(-naive, axis=1)[:, :k].tolist()
    assert np.allclose(scores_QK, -np.sort(-naive, axis=1)[:, :k], atol=1e-6)
    assert scores_QK.dtype == np.float32


def test_equal_dense_scores_come_in_the_order_of_rows() -> None:
    passages = np.repeat(_unit_rows(1, 0), 5, axis=0)
    assert DenseIndex.build(passages).search(passages[:1], 9)[1].tolist() == [[0, 1, 2, 3, 4]]


def test_embedding_goes_on_where_it_was_stopped(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peg.mining.dense._CHUNK_TEXTS", 4)
    encoder, texts = Encoder.load(str(encoder_folder)), make_texts(10, seed=3)
    calls: list[int] = []
    whole = encoder.encode

    def encode(chunk: list[str], **kwargs: object) -> np.ndarray:
        calls.append(len(chunk))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(chunk, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder, "encode", encode)

    def run() -> np.ndarray:
        return embed(texts, num_texts=10, encoder=encoder, kind="query", batch_tokens=256, folder=tmp_path)

    with pytest.raises(KeyboardInterrupt):
        run()
    rows_ND = np.array(run())
    assert calls == [4, 4, 4, 2]
    parts = [whole(texts[start : start + 4], kind="query", batch_tokens=256) for start in (0, 4, 8)]
    assert np.array_equal(rows_ND, np.concatenate(parts))
    assert np.array_equal(run(), rows_ND)
    assert len(calls) == 4
