"""What the stage `train` reads from the tables of mining."""

from pathlib import Path

import numpy as np

from peg.data.store import Store, StoreWriter, open_store
from peg.stages.train import read_examples
from peg.train.batches import SourceInfo

ROWS = [
    {"query": 1, "positives": [4, 2], "negatives": [0, 3], "source": "law", "task": "retrieval"}
    | {"teacher_positives": [0.5, None], "teacher_negatives": [2.0, -1.0]},
    {"query": 0, "positives": [1], "negatives": [5], "source": "law", "task": "retrieval"},
    {"query": 1, "positives": [5], "negatives": [], "source": "sts", "task": "similarity", "score": 0.75},
    {"query": 2, "positives": [3], "negatives": [1], "source": "news", "task": "classification"}
    | {"teacher_positives": [3.0], "teacher_negatives": [None]},
]


def write(folder: Path, *, with_teacher: bool = True) -> Store:
    with StoreWriter(folder, tables=["triples"], shard_rows=2) as writer:
        for row in ROWS:
            kept = {key: value for key, value in row.items() if with_teacher or not key.startswith("teacher")}
            writer.add("triples", domain="d", scores=[], ranks=[], **kept)
    return open_store(folder)


def test_sources_tasks_and_scores_come_from_the_store(tmp_path: Path) -> None:
    examples, domains = read_examples(write(tmp_path), num_queries=3)
    assert examples.sources == (
        SourceInfo("law", "retrieval"),
        SourceInfo("sts", "similarity"),
        SourceInfo("news", "classification"),
    )
    assert domains == ("d", "d", "d")
    assert examples.source is not None
    assert examples.source.tolist() == [0, 0, 1, 2]
    assert examples.query.tolist() == [1, 0, 1, 2]
    np.testing.assert_array_equal(examples.label, [np.nan, np.nan, 0.75, np.nan])
    assert examples.teacher is not None
    nan = np.nan
    assert examples.positives.values.tolist() == [4, 2, 1, 5, 3]
    np.testing.assert_array_equal(examples.teacher.positives, [0.5, nan, nan, nan, 3.0])
    assert examples.negatives.values.tolist() == [0, 3, 5, 1]
    np.testing.assert_array_equal(examples.teacher.negatives, [2.0, -1.0, nan, nan])
    assert [examples.known_positives[row].tolist() for row in range(3)] == [[1], [2, 4], [3]]


def test_without_a_teacher_there_are_no_scores(tmp_path: Path) -> None:
    examples, _ = read_examples(write(tmp_path, with_teacher=False), num_queries=3)
    assert examples.teacher is None
