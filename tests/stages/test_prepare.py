"""The stage `prepare` on a few hundred made-up rows."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from peg.config import Data
from peg.data.clean import normalise
from peg.data.dedup import text_id
from peg.data.store import Store, open_store
from peg.errors import InputError
from peg.evaluate.beir import RetrievalSet, read_beir
from peg.stages.prepare import prepare
from tests.data.test_dedup import naive_near_duplicates

CLEAN = {
    "min_query_chars": 4,
    "max_query_chars": 100,
    "min_passage_chars": 4,
    "max_passage_chars": 100,
    "min_chinese_share": 0.5,
}
HOLDOUT = {"dev_queries": 10, "test_queries": 15, "dev_passages": 40, "test_passages": 60, "near_duplicate": 0.6}


def sentence(rng: random.Random, length: int) -> str:
    return "".join(chr(rng.randrange(0x4E00, 0x5200)) for _ in range(length))


def make_rows(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Rows with duplicates, near-duplicates, shared answers, labelled negatives and faults among them."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        row: dict[str, Any] = {"query": sentence(rng, 12), "pos": [sentence(rng, 20)], "neg": []}
        if i and i % 5 == 0:
            row["query"] = rng.choice(rows)["query"]  # another answer to a known question
        if i and i % 7 == 0:
            row["query"] = rng.choice(rows)["query"][:-1] + "尾"  # a near-duplicate
        if i and i % 6 == 0:
            row["pos"] = [rng.choice(rows)["pos"][0]]  # a known answer
        if i and i % 3 == 0:
            row["neg"] = [rng.choice(rows)["pos"][0], sentence(rng, 20)]
        if i % 50 == 49:
            row = {"query": "短", "pos": [sentence(rng, 20)], "neg": []}
        rows.append(row)
    return [*rows, *rows[:20]]


def make_data(path: Path, *, limit: int | None = None, **changes: Any) -> Data:
    one = {"name": "one", "format": "jsonl", "path": str(path), "domain": "d", "task": "retrieval", "limit": limit}
    tree = {"sources": (one,), "clean": CLEAN, "holdout": HOLDOUT, "shard_rows": 50}
    return Data.model_validate(tree | changes)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join([*(json.dumps(row) for row in rows), "{"]))
    return path


def run(data: Data, folder: Path, *, seed: int = 1) -> tuple[Store, RetrievalSet, RetrievalSet, dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    paths = {name: folder / name for name in ("prepared", "dev", "test", "scratch")}
    metrics = prepare(data, seed=seed, **paths)
    return open_store(folder / "prepared"), read_beir(folder / "dev"), read_beir(folder / "test"), metrics


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("source") / "pairs.jsonl", make_rows(300, seed=0))


def test_tables_hold_the_sources_pairs_and_nothing_else(source: Path, tmp_path: Path) -> None:
    store, dev, test, _ = run(make_data(source), tmp_path)
    known: dict[str, set[str]] = {}
    for line in source.read_text().splitlines()[:-1]:
        row = json.loads(line)
        known.setdefault(row["query"], set()).update(row["pos"])
    queries, passages = list(store.texts("queries")), list(store.texts("passages"))
    pairs = list(store.rows("pairs"))
    assert len(pairs) > 100
    assert len({pair["query"] for pair in pairs}) == len(pairs) == len(queries) == len(set(queries))
    assert len(passages) == len(set(passages))
    used = set()
    for pair in pairs:
        assert {passages[row] for row in pair["positives"]} == known[queries[pair["query"]]]
        assert not set(pair["positives"]) & set(pair["negatives"])
        used |= {*pair["positives"], *pair["negatives"]}
    assert used == set(range(len(passages)))
    assert any(pair["negatives"] for pair in pairs)
    assert list(store.column("passages", "passage_id")) == [text_id(text) for text in passages]
    assert all(normalise(text) == text for text in queries + passages)
    for side in (dev, test):
        assert all(side.queries[name] not in queries for name in side.queries)
        for name, judged in side.qrels.items():
            assert {side.corpus[passage] for passage in judged} == known[side.queries[name]]


def test_nothing_leaks_between_the_sides(source: Path, tmp_path: Path) -> None:
    store, dev, test, _ = run(make_data(source), tmp_path)
    train = list(store.texts("queries"))
    held_dev, held_test = list(dev.queries.values()), list(test.queries.values())
    assert naive_near_duplicates(held_dev + held_test, train, 0.6) == []
    assert naive_near_duplicates(held_test, held_dev, 0.6) == []
    dev_answers = {passage for judged in dev.qrels.values() for passage in judged}
    test_answers = {passage for judged in test.qrels.values() for passage in judged}
    trained = set(store.column("passages", "passage_id"))
    assert not dev_answers & test_answers
    assert not trained & (dev_answers | test_answers)
    assert set(dev.corpus) - dev_answers <= trained
    assert set(test.corpus) - test_answers <= trained


def test_sizes_and_counts_add_up(source: Path, tmp_path: Path) -> None:
    store, dev, test, metrics = run(make_data(source), tmp_path)
    assert (len(dev.queries), len(dev.corpus), len(test.queries), len(test.corpus)) == (10, 40, 15, 60)
    rejects = list(store.rows("rejects"))
    counts = metrics["sources"]["one"]
    assert counts["rows"] == 321
    reasons = [one["reason"] for one in rejects]
    assert counts["rejected"]["query_too_short"] == reasons.count("query_too_short") == 6
    assert counts["rejected"]["not_json"] == reasons.count("not_json") == 1
    assert counts["rejected"]["duplicate"] == reasons.count("duplicate") >= 19
    assert reasons.count("near_duplicate_of_a_test_query") == counts["rejected"]["near_duplicate_of_a_test_query"] > 0
    assert counts["training_pairs"] == store.num_rows("pairs") == metrics["train"]["pairs"]
    assert metrics["test"]["judgements"] == sum(len(judged) for judged in test.qrels.values())
    assert metrics["train"]["queries_chars"]["median"] == 12
    assert [shard["rows"] for shard in store.shards["pairs"]][:-1] == [50] * (len(store.shards["pairs"]) - 1)


def test_the_same_inputs_give_the_same_bytes_and_another_seed_does_not(source: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        run(make_data(source), tmp_path / name, seed=seed)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    other = (tmp_path / "three" / "test" / "queries.jsonl").read_bytes()
    assert other != (tmp_path / "one" / "test" / "queries.jsonl").read_bytes()


def test_preparing_what_was_prepared_drops_nothing_more(source: Path, tmp_path: Path) -> None:
    store, *_ = run(make_data(source), tmp_path / "once")
    queries, passages = list(store.texts("queries")), list(store.texts("passages"))
    rows = [
        {"query": queries[pair["query"]], "pos": [passages[row] for row in pair["positives"]]}
        for pair in store.rows("pairs")
    ]
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(map(json.dumps, rows)))
    twice, _, _, metrics = run(make_data(again), tmp_path / "twice")
    dropped = set(metrics["sources"]["one"]["rejected"])
    assert dropped <= {
        f"{kind}_{side}"
        for kind, side in [
            ("near_duplicate_of_a", "test_query"),
            ("near_duplicate_of_a", "dev_query"),
            ("shares_a_positive_with", "test"),
            ("shares_a_positive_with", "dev"),
        ]
    }
    assert set(twice.texts("queries")) < set(queries)


def test_a_limit_draws_so_many_and_a_larger_limit_keeps_them(source: Path, tmp_path: Path) -> None:
    def drawn(limit: int) -> tuple[set[str], dict[str, Any]]:
        store, dev, test, metrics = run(make_data(source, limit=limit), tmp_path / str(limit))
        rejected = {one["query"] for one in store.rows("rejects") if "_a_" in one["reason"]}
        texts = {*store.texts("queries"), *dev.queries.values(), *test.queries.values(), *rejected}
        return texts, metrics["sources"]["one"]

    small, counts = drawn(100)
    large, _ = drawn(200)
    assert small < large
    assert counts["rows"] == 321
    assert counts["not_drawn"] == 321 - 1 - 6 - 100


def test_two_sources_keep_their_pairs_apart_and_share_their_texts(source: Path, tmp_path: Path) -> None:
    rows = [
        {"query": "天地玄黄宇宙洪荒", "pos": ["日月盈昃辰宿列张"]},
        {"query": "寒来暑往秋收冬藏", "pos": ["闰余成岁"]},
    ]
    more = [{"query": "天地玄黄宇宙洪荒", "pos": ["律吕调阳云腾致雨", "日月盈昃辰宿列张"], "neg": ["露结为霜"]}]
    names = {"first": rows, "second": more}
    sources = []
    for name, listed in names.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, listed)))
        sources.append(
            {"name": name, "format": "jsonl", "path": str(path), "domain": name, "task": "retrieval", "limit": None}
        )
    data = make_data(source, sources=tuple(sources), holdout=HOLDOUT | {"dev_queries": 0, "test_queries": 0})
    paths = {name: tmp_path / name for name in ("prepared", "dev", "test", "scratch")}
    metrics = prepare(data, seed=0, **paths)
    store = open_store(tmp_path / "prepared")
    assert store.num_rows("queries") == 2
    passages = list(store.texts("passages"))
    found = [
        (pair["query"], [passages[row] for row in pair["positives"]], pair["source"]) for pair in store.rows("pairs")
    ]
    assert found == [
        (0, ["日月盈昃辰宿列张"], "first"),
        (1, ["闰余成岁"], "first"),
        (0, ["律吕调阳云腾致雨"], "second"),
    ]
    assert metrics["sources"]["second"]["rejected"] == {"duplicate": 1}


def test_two_sources_of_one_name_are_refused(source: Path, tmp_path: Path) -> None:
    data = make_data(source)
    twice = Data.model_validate(data.model_dump() | {"sources": data.sources * 2})
    with pytest.raises(InputError, match="one, one; give each source a name"):
        run(twice, tmp_path)


def write_source(path: Path, rows: list[dict[str, Any]], task: str) -> dict[str, Any]:
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"name": path.stem, "format": "jsonl", "path": str(path), "domain": "d", "task": task, "limit": None}


def test_scored_pairs_are_rows_of_their_own_and_never_held_out(tmp_path: Path) -> None:
    rng = random.Random(4)
    asked = [{"query": sentence(rng, 12), "pos": [sentence(rng, 20)]} for _ in range(40)]
    query, other = asked[0]["query"], asked[0]["pos"][0]
    alike = [{"query": sentence(rng, 12), "pos": [sentence(rng, 12)], "score": i / 40} for i in range(40)]
    alike[1] |= {"query": alike[0]["query"]}  # one sentence with two others
    alike[2] |= {"query": query, "pos": [other]}  # an answer, compared with its question
    sources = (
        write_source(tmp_path / "asked.jsonl", asked, "retrieval"),
        write_source(tmp_path / "alike.jsonl", [*alike, alike[5]], "similarity"),
    )
    data = make_data(tmp_path, sources=sources, holdout=HOLDOUT | {"dev_queries": 3, "test_queries": 3})
    store, dev, test, metrics = run(data, tmp_path / "out")
    queries, passages = list(store.texts("queries")), list(store.texts("passages"))
    found = {
        (queries[pair["query"]], passages[pair["positives"][0]]): pair["score"]
        for pair in store.rows("pairs")
        if pair["task"] == "similarity"
    }
    expected = {(row["query"], row["pos"][0]): row["score"] for row in alike}
    held_out = {*dev.queries.values(), *test.queries.values()}
    if query in held_out:
        del expected[query, other]
    assert found == expected
    assert all(pair["score"] is None for pair in store.rows("pairs") if pair["task"] == "retrieval")
    assert metrics["sources"]["alike"]["rejected"] == {"duplicate": 1}
    assert held_out <= {row["query"] for row in asked}
    assert {test.corpus[row] for judged in test.qrels.values() for row in judged} <= {row["pos"][0] for row in asked}


def test_a_teachers_scores_stay_with_their_passages(tmp_path: Path) -> None:
    rng = random.Random(5)
    texts = [sentence(rng, 12) for _ in range(9)]
    rows = [
        {"query": texts[0], "pos": [texts[1], "短"], "neg": [texts[2]], "pos_scores": [1, 9], "neg_scores": [2]},
        {"query": texts[0], "pos": [texts[3]], "neg": [texts[2], texts[4]], "pos_scores": [3], "neg_scores": [9, 4]},
        {"query": texts[0], "pos": [texts[5]]},  # merged with the two above, and never scored
        {"query": texts[6], "pos": [texts[7]], "neg": [texts[8]]},
    ]
    sources = (write_source(tmp_path / "one.jsonl", rows, "retrieval"),)
    data = make_data(tmp_path, sources=sources, holdout=HOLDOUT | {"dev_queries": 0, "test_queries": 0})
    paths = {name: tmp_path / name for name in ("prepared", "dev", "test", "scratch")}
    prepare(data, seed=0, **paths)
    store = open_store(tmp_path / "prepared")
    passages = list(store.texts("passages"))
    merged, plain = store.rows("pairs")
    assert [passages[row] for row in merged["positives"]] == [texts[1], texts[3], texts[5]]
    assert merged["teacher_positives"] == [1, 3, None]
    assert [passages[row] for row in merged["negatives"]] == [texts[2], texts[4]]
    assert merged["teacher_negatives"] == [2, 4]
    assert plain["teacher_positives"] is plain["teacher_negatives"] is None
