"""The stage `prepare`: sources in; tables to train on, test sets to measure on, and counts of both out."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from peg.config import Config, Data
from peg.data.collect import Collected, RowPair, collect
from peg.data.dedup import text_id
from peg.data.split import Links, Split, draw_corpus, split_queries
from peg.data.store import StoreWriter
from peg.errors import InputError
from peg.evaluate.beir import RetrievalSet, write_beir
from peg.records import Reject
from peg.workspace import stage_work, write_json

PREPARED, DEV, TEST, METRICS = "data/prepared", "data/eval/dev", "data/eval/test", "metrics/prepare.json"
_TABLES = ["passages", "queries", "pairs", "rejects"]


def run(config: Config) -> None:
    """Write data/prepared, data/eval/dev, data/eval/test and metrics/prepare.json."""
    sections = {"seed": config.seed, "data": config.data.model_dump(mode="json")}
    with stage_work("prepare", sections=sections) as work:
        for source in config.data.sources:
            if source.path:
                work.require_input(source.path, key=f"data.sources[{source.name}].path")
        metrics = prepare(
            config.data,
            seed=config.seed,
            prepared=work.out(PREPARED),
            dev=work.out(DEV),
            test=work.out(TEST),
            scratch=work.scratch,
        )
        write_json(work.out(METRICS), metrics)


def prepare(data: Data, *, seed: int, prepared: Path, dev: Path, test: Path, scratch: Path) -> dict[str, Any]:
    """Read, clean, split and write; returns the counts."""
    names = [source.name for source in data.sources]
    if len(set(names)) < len(names):
        raise InputError(f"data.sources holds the names {', '.join(names)}; give each source a name of its own")
    with StoreWriter(prepared, tables=_TABLES, shard_rows=data.shard_rows) as writer:

        def reject(one: Reject) -> None:
            writer.add("rejects", **vars(one))

        collected = collect(data.sources, clean=data.clean, seed=seed, scratch=scratch, reject=reject)
        for name, counts in collected.counts.items():
            _say(f"{name}: {counts.rows:,} rows, {counts.pairs:,} pairs, {counts.rejected.total():,} rejected, "
                 f"{counts.not_drawn:,} beyond the limit")  # fmt: skip
        split = _split(collected, data, seed=seed)
        kept, dropped, num_answers = _training_pairs(collected, split)
        leaks = _reject_leaks(collected, dropped, reject)
        lengths = _write_training(writer, collected, kept)
        sides = _write_sides(collected, split, kept, data, seed=seed, folders={"dev": dev, "test": test})
    for name, reasons in leaks.items():
        collected.counts[name].rejected.update(reasons)
    _say(f"{len(kept):,} pairs to train on, {len(split.dev):,} dev and {len(split.test):,} test queries")
    sources = {
        name: {
            "rows": counts.rows,
            "not_drawn": counts.not_drawn,
            "rejected": dict(sorted(counts.rejected.items())),
            "training_pairs": sum(pair.source.name == name for pair in kept),
        }
        for name, counts in collected.counts.items()
    }
    return {"sources": sources, "train": {**lengths, "negatives_held_out": num_answers}, **sides}


def _split(collected: Collected, data: Data, *, seed: int) -> Split:
    holdout = data.holdout
    return split_queries(
        lambda: collected.texts.texts("queries"),
        _links(collected.pairs),
        num_queries=collected.texts.num_rows("queries"),
        num_passages=collected.texts.num_rows("passages"),
        dev_queries=holdout.dev_queries,
        test_queries=holdout.test_queries,
        near_duplicate=holdout.near_duplicate,
        seed=seed,
        has_answer=_mask((pair.query for pair in _answered(collected)), collected.texts.num_rows("queries")),
    )


def _answered(collected: Collected) -> Iterable[RowPair]:
    """The pairs that can be measured: of the other tasks no passage answers the query."""
    return (pair for pair in collected.pairs if pair.source.task == "retrieval")


def _links(pairs: Iterable[RowPair]) -> Links:
    return Links.of((pair.query, passage) for pair in pairs for passage in pair.positives)


def _training_pairs(collected: Collected, split: Split) -> tuple[list[RowPair], list[tuple[RowPair, str]], int]:
    """The pairs to train on, those that leak with the reason, and how many labelled negatives were held-out answers.

    A training pair's negatives lose the held-out answers: what is measured is never seen, as a negative either.
    """
    held_out = split.held_out()
    answers = {passage for pair in collected.pairs if pair.query in held_out for passage in pair.positives}
    kept, dropped, num_answers = [], [], 0
    for pair in collected.pairs:
        if reason := split.dropped.get(pair.query):
            dropped.append((pair, reason))
        elif pair.query not in held_out:
            num_answers += sum(passage in answers for passage in pair.negatives)
            pair.negatives = [passage for passage in pair.negatives if passage not in answers]
            kept.append(pair)
    return kept, dropped, num_answers


def _reject_leaks(
    collected: Collected, dropped: list[tuple[RowPair, str]], reject: Callable[[Reject], None]
) -> dict[str, Counter[str]]:
    queries = collected.texts.texts_at("queries", (pair.query for pair, _ in dropped))
    passages = collected.texts.texts_at("passages", (pair.positives[0] for pair, _ in dropped))
    counts: dict[str, Counter[str]] = {}
    for pair, reason in dropped:
        counts.setdefault(pair.source.name, Counter())[reason] += 1
        reject(Reject(pair.source.name, pair.row, reason, queries[pair.query], passages[pair.positives[0]]))
    return counts


def _write_training(writer: StoreWriter, collected: Collected, kept: list[RowPair]) -> dict[str, Any]:
    """Write passages, queries and pairs with row numbers of their own: held-out texts are in none of them."""
    store = collected.texts
    is_query = _mask((pair.query for pair in kept), store.num_rows("queries"))
    is_passage = _mask((row for pair in kept for row in (*pair.positives, *pair.negatives)), store.num_rows("passages"))
    new_query, new_passage = np.cumsum(is_query) - 1, np.cumsum(is_passage) - 1
    lengths: dict[str, Any] = {}
    for table, key, wanted in (("queries", "query_id", is_query), ("passages", "passage_id", is_passage)):
        chars = []
        for row, (name, text) in enumerate(zip(store.column(table, key), store.texts(table), strict=True)):
            if wanted[row]:
                writer.add(table, **{key: name, "text": text})
                chars.append(len(text))
        lengths[table] = len(chars)
        lengths[f"{table}_chars"] = _length_summary(np.array(chars))
    for pair in kept:
        writer.add(
            "pairs",
            query=int(new_query[pair.query]),
            positives=new_passage[pair.positives].tolist(),
            negatives=new_passage[pair.negatives].tolist() if pair.negatives else [],
            source=pair.source.name,
            domain=pair.source.domain,
            task=pair.source.task,
            score=pair.score,
            teacher_positives=[pair.teacher.get(row) for row in pair.positives] if pair.teacher else None,
            teacher_negatives=[pair.teacher.get(row) for row in pair.negatives] if pair.teacher else None,
        )
    num_positives = sum(len(pair.positives) for pair in kept)
    num_negatives = sum(len(pair.negatives) for pair in kept)
    return {"pairs": len(kept), "positives": num_positives, "labelled_negatives": num_negatives, **lengths}


def _mask(rows: Iterable[int], size: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[np.fromiter(rows, dtype=np.int64)] = True
    return mask


def _length_summary(chars: np.ndarray) -> dict[str, float]:
    return {
        "mean": round(float(chars.mean()), 3),
        "median": float(np.median(chars)),
        "p95": float(np.percentile(chars, 95)),
        "longest": int(chars.max()),
    }


def _write_sides(
    collected: Collected, split: Split, kept: list[RowPair], data: Data, *, seed: int, folders: dict[str, Path]
) -> dict[str, Any]:
    """Write the dev and test sets; their corpora are filled from passages that training pairs use.

    Passages of dropped pairs stay out: they may well answer a held-out query, with no judgement that says so.
    """
    store = collected.texts
    links = _links(_answered(collected))
    is_other = _mask((row for pair in kept for row in (*pair.positives, *pair.negatives)), store.num_rows("passages"))
    out = {}
    for side, rows, size in (
        ("dev", split.dev, data.holdout.dev_passages),
        ("test", split.test, data.holdout.test_passages),
    ):
        is_query = _mask(rows, store.num_rows("queries"))
        is_positive = _mask(links.passages_of(is_query), store.num_rows("passages"))
        corpus = draw_corpus(
            lambda: store.column("passages", "passage_id"),
            is_positive=is_positive,
            is_other=is_other,
            size=size,
            seed=seed,
        )
        found = _retrieval_set(side, collected, links, rows, corpus)
        write_beir(folders[side], found)
        judged = sum(len(passages) for passages in found.qrels.values())
        out[side] = {"queries": len(found.queries), "passages": len(found.corpus), "judgements": judged}
    return out


def _retrieval_set(
    name: str, collected: Collected, links: Links, rows: tuple[int, ...], corpus: list[int]
) -> RetrievalSet:
    store = collected.texts
    query_text, passage_text = store.texts_at("queries", rows), store.texts_at("passages", corpus)
    query_id = {row: text_id(text) for row, text in query_text.items()}
    passage_id = {row: text_id(text) for row, text in passage_text.items()}
    qrels: dict[str, dict[str, int]] = {query_id[row]: {} for row in rows}
    for query, passage in zip(links.queries.tolist(), links.passages.tolist(), strict=True):
        if query in query_text:
            qrels[query_id[query]][passage_id[passage]] = 1
    return RetrievalSet(
        name=name,
        queries={query_id[row]: query_text[row] for row in rows},
        corpus={passage_id[row]: passage_text[row] for row in corpus},
        qrels=qrels,
    )


def _say(line: str) -> None:
    print(f"prepare: {line}", file=sys.stderr, flush=True)
