"""Parquet tables: what is written is read, the same rows give the same bytes, damage is named."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from peg.data.store import Store, StoreWriter, open_store
from peg.errors import InputError
from peg.workspace import read_json

NO_SCORES = {"score": None, "teacher_positives": None, "teacher_negatives": None}
PAIRS = [
    {"query": i, "positives": list(range(i % 3 + 1)), "negatives": [], "source": "s", "domain": "d", "task": "t"}
    for i in range(25)
]


def write(folder: Path, *, num_texts: int = 25, shard_rows: int = 10) -> Store:
    with StoreWriter(folder, tables=["passages", "pairs"], shard_rows=shard_rows) as writer:
        for i in range(num_texts):
            assert writer.add("passages", passage_id=f"{i:032x}", text=f"文{i}") == i
        for pair in PAIRS:
            writer.add("pairs", **pair)
    return open_store(folder)


def test_what_is_written_is_read_over_shards(tmp_path: Path) -> None:
    store = write(tmp_path)
    assert [shard["rows"] for shard in store.shards["passages"]] == [10, 10, 5]
    assert store.num_rows("passages") == 25
    assert list(store.texts("passages")) == [f"文{i}" for i in range(25)]
    assert store.texts_at("passages", [24, 3]) == {3: "文3", 24: "文24"}
    assert list(store.rows("pairs")) == [pair | NO_SCORES for pair in PAIRS]
    assert store.columns("pairs", ["query", "positives"]) == {
        "query": [pair["query"] for pair in PAIRS],
        "positives": [pair["positives"] for pair in PAIRS],
    }
    values, offsets = store.ragged("pairs", "positives")
    assert [values[low:high].tolist() for low, high in pairwise(offsets)] == [pair["positives"] for pair in PAIRS]
    store.verify()


def test_columns_of_numbers_come_as_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peg.data.store._GROUP_ROWS", 4)
    with StoreWriter(tmp_path, tables=["pairs"], shard_rows=10) as writer:
        for i, pair in enumerate(PAIRS):
            scores = {"score": i / 2, "teacher_positives": [i + j / 4 for j in range(i % 3 + 1)]} if i % 4 else {}
            writer.add("pairs", **{**pair, "source": "ab"[i % 5 == 0], "task": "xy"[i > 20]}, **scores)
    store = open_store(tmp_path)
    assert store.array("pairs", "query").tolist() == list(range(25))
    np.testing.assert_array_equal(store.array("pairs", "score"), [i / 2 if i % 4 else np.nan for i in range(25)])
    names, place = store.groups("pairs", ["source", "task"])
    assert names == [("b", "x"), ("a", "x"), ("a", "y")]
    assert [names[one] for one in place] == [("ab"[i % 5 == 0], "xy"[i > 20]) for i in range(25)]
    values, offsets = store.ragged("pairs", "teacher_positives")
    found = [values[low:high].tolist() for low, high in pairwise(offsets)]
    assert found == [[i + j / 4 for j in range(i % 3 + 1)] if i % 4 else [] for i in range(25)]
    assert store.ragged("pairs", "positives")[0].dtype == np.uint32


def test_row_groups_smaller_than_shards_change_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peg.data.store._GROUP_ROWS", 4)
    store = write(tmp_path)
    assert [shard["rows"] for shard in store.shards["passages"]] == [10, 10, 5]
    assert list(store.texts("passages")) == [f"文{i}" for i in range(25)]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    assert one.shards == two.shards
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


def test_a_table_without_rows_keeps_its_columns(tmp_path: Path) -> None:
    store = write(tmp_path, num_texts=0)
    assert (store.num_rows("passages"), list(store.texts("passages"))) == (0, [])
    assert store.columns("passages", ["text"]) == {"text": []}


def test_a_shorter_second_writing_leaves_no_stale_shards(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, num_texts=5)
    assert [path.name for path in (tmp_path / "passages").iterdir()] == ["part-00000.parquet"]


def test_a_failed_writing_leaves_no_store(tmp_path: Path) -> None:
    write(tmp_path)
    with (
        pytest.raises(RuntimeError, match="stop"),
        StoreWriter(tmp_path, tables=["passages"], shard_rows=10) as writer,
    ):
        writer.add("passages", passage_id="0", text="文")
        raise RuntimeError("stop")
    with pytest.raises(InputError, match=r"manifest\.json is not here"):
        open_store(tmp_path)


def test_damage_is_named_in_one_line(tmp_path: Path) -> None:
    store = write(tmp_path)
    shard = tmp_path / "passages/part-00001.parquet"
    good = shard.read_bytes()
    shard.write_bytes(bytes(len(good)))
    for use in (store.verify, lambda: list(store.texts("passages"))):
        with pytest.raises(InputError, match=r"part-00001\.parquet") as caught:
            use()
        assert "\n" not in str(caught.value)
    shard.write_bytes(good[:-7])
    with pytest.raises(InputError, match=rf"part-00001.*has {len(good) - 7} bytes, the manifest says {len(good)}"):
        open_store(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match=r"part-00001.*is not here"):
        open_store(tmp_path)


def test_another_manifest_and_another_table_are_named(tmp_path: Path) -> None:
    store = write(tmp_path)
    with pytest.raises(InputError, match="no table 'triples', only pairs, passages"):
        store.num_rows("triples")
    (tmp_path / "manifest.json").write_text('{"tables": [1]}')
    assert read_json(tmp_path / "manifest.json")
    with pytest.raises(InputError, match="no manifest of tables"):
        open_store(tmp_path)
