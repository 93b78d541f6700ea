"""The stage `mine` on a small store with the tiny encoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peg.config import Mining
from peg.data.store import Store, StoreWriter, open_store
from peg.model.encoder import Encoder
from peg.stages.mine import mine
from tests.conftest import make_texts

LABELS = {"source": "s", "domain": "d", "task": "retrieval"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("prepared")
    with StoreWriter(folder, tables=["passages", "queries", "pairs"], shard_rows=8) as writer:
        for i, text in enumerate(make_texts(60, seed=1)):
            writer.add("passages", passage_id=str(i), text=text)
        for i, text in enumerate(make_texts(20, seed=2)):
            writer.add("queries", query_id=str(i), text=text)
        for i in range(20):
            writer.add("pairs", query=i, positives=[i], negatives=[59] if i == 3 else [], **LABELS)
        writer.add("pairs", query=0, positives=[40, 41], negatives=[], **(LABELS | {"source": "other"}))
    return open_store(folder)


def run(prepared: Store, encoder_folder: Path, folder: Path, **changes: Any) -> tuple[list[dict[str, Any]], Any]:
    values = {"bm25_depth": 20, "dense_depth": 20, "skip_ranks": 0, "max_score_ratio": 1.0, "pool_size": 6} | changes
    num_negatives = values.pop("num_negatives", 3)
    metrics = mine(
        prepared,
        Encoder.load(str(encoder_folder)),
        Mining.model_validate(values),
        seed=0,
        num_negatives=num_negatives,
        batch_tokens=512,
        out=folder / "mined",
        scratch=folder / "scratch",
    )
    return list(open_store(folder / "mined").rows("triples")), metrics


def test_a_row_per_pair_with_negatives_that_are_no_positive_of_the_query(
    prepared: Store, encoder_folder: Path, tmp_path: Path
) -> None:
    triples, metrics = run(prepared, encoder_folder, tmp_path)
    pairs = list(prepared.rows("pairs"))
    assert [(one["query"], one["positives"], one["source"]) for one in triples] == [
        (one["query"], one["positives"], one["source"]) for one in pairs
    ]
    encoder = Encoder.load(str(encoder_folder))
    queries = encoder.encode(list(prepared.texts("queries")), kind="query", batch_tokens=512)
    passages = encoder.encode(list(prepared.texts("passages")), kind="passage", batch_tokens=512)
    for one in triples:
        known = {0, 40, 41} if one["query"] == 0 else {one["query"]}
        assert not known & set(one["negatives"])
        assert 3 <= len(one["negatives"]) == len(set(one["negatives"])) == len(one["scores"]) == len(one["ranks"]) <= 6
        scores = passages[one["negatives"]] @ queries[one["query"]]
        assert np.allclose(one["scores"], scores, atol=1e-5)
        found = [
            score for score, rank, row in zip(scores, one["ranks"], one["negatives"], strict=True) if rank and row != 59
        ]
        assert all(score <= max(passages[list(known)] @ queries[one["query"]]) + 1e-5 for score in found)
    assert triples[3]["negatives"][0] == 59
    assert metrics["pairs"] == 21
    assert metrics["queries"] == 20
    assert metrics["pool"]["mean"] == round(np.mean([len(one["negatives"]) for one in triples]), 3)
    assert metrics["dropped"]["ceiling"] > 0 < metrics["dropped"]["positive"]


def test_mining_again_gives_the_same_bytes(prepared: Store, encoder_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(prepared, encoder_folder, tmp_path / name)
    manifests = [(tmp_path / name / "mined/manifest.json").read_bytes() for name in ("one", "two")]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("off", ["bm25_depth", "dense_depth"])
def test_either_search_may_be_off(prepared: Store, encoder_folder: Path, tmp_path: Path, off: str) -> None:
    triples, _ = run(prepared, encoder_folder, tmp_path, **{off: 0}, max_score_ratio=100.0)
    both, _ = run(prepared, encoder_folder, tmp_path, max_score_ratio=100.0)
    assert all(len(one["negatives"]) >= 3 for one in triples)
    assert [one["negatives"] for one in triples] != [one["negatives"] for one in both]


def test_skipped_ranks_are_in_no_full_pool(prepared: Store, encoder_folder: Path, tmp_path: Path) -> None:
    triples, metrics = run(
        prepared, encoder_folder, tmp_path, skip_ranks=4, max_score_ratio=100.0, pool_size=5, num_negatives=0
    )
    assert metrics["dropped"]["skipped"] == 21 * 4
    assert all(rank > 4 for i, one in enumerate(triples) if i != 3 for rank in one["ranks"])
    assert metrics["pool"]["filled"] == 0


def test_pairs_of_other_tasks_keep_to_the_negatives_of_their_source(encoder_folder: Path, tmp_path: Path) -> None:
    labels = {"source": "s", "domain": "d"}
    with StoreWriter(tmp_path / "prepared", tables=["passages", "queries", "pairs"], shard_rows=8) as writer:
        for i, text in enumerate(make_texts(20, seed=1)):
            writer.add("passages", passage_id=str(i), text=text)
        for i, text in enumerate(make_texts(3, seed=2)):
            writer.add("queries", query_id=str(i), text=text)
        writer.add("pairs", query=0, positives=[0], negatives=[5], teacher_negatives=[0.5], teacher_positives=[2.5],
                   task="retrieval", **labels)  # fmt: skip
        writer.add("pairs", query=1, positives=[1], negatives=[7, 6], task="classification", **labels)
        writer.add("pairs", query=0, positives=[2], negatives=[], score=0.25, task="similarity", **labels)
        writer.add("pairs", query=2, positives=[3], negatives=[], task="retrieval", **labels)
    prepared = open_store(tmp_path / "prepared")
    triples, metrics = run(prepared, encoder_folder, tmp_path, max_score_ratio=100.0, pool_size=20)
    assert [one["task"] for one in triples] == ["retrieval", "classification", "similarity", "retrieval"]
    assert [one["negatives"] for one in triples[1:3]] == [[7, 6], []]
    assert [len(one["scores"]) for one in triples[1:3]] == [2, 0]
    assert [one["score"] for one in triples] == [None, None, 0.25, None]
    assert triples[0]["negatives"][0] == 5
    assert set(triples[0]["negatives"]) == set(range(1, 20))  # 2 too: compared with the query, not its answer
    assert triples[0]["teacher_positives"] == [2.5]
    assert triples[0]["teacher_negatives"] == [0.5] + [None] * (len(triples[0]["negatives"]) - 1)
    assert triples[3]["teacher_negatives"] is None
    assert (metrics["pairs"], metrics["not_mined"]) == (2, 2)
    assert metrics["pool"]["mean"] == np.mean([len(triples[0]["negatives"]), len(triples[3]["negatives"])])
