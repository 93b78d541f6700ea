"""Training data as ranks read it: token ids and row numbers, memory-mapped.

The driver writes the folder once (`write_training_data`); every rank opens it (`TrainingData.open`) and reads the
rows of its batches.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peg.data.tokens import TokenTable, token_table
from peg.evaluate.beir import RetrievalSet
from peg.model.encoder import Encoder
from peg.train.batches import Examples, Ragged
from peg.workspace import read_json, write_json

_RAGGED = ("positives", "negatives", "known_positives")


@dataclass(frozen=True)
class Texts:
    """What is trained on before it is tokenized: two tables of texts, and examples over their rows."""

    queries: Iterable[str]
    num_queries: int
    passages: Iterable[str]
    num_passages: int
    examples: Examples


@dataclass(frozen=True)
class DevSet:
    """Held-out queries to choose weights on. relevant: query index -> {passage index: grade}."""

    queries: TokenTable
    passages: TokenTable
    relevant: dict[int, dict[int, int]]


@dataclass(frozen=True)
class TrainingData:
    """What a rank reads. dev is None where the recipe holds nothing out."""

    queries: TokenTable
    passages: TokenTable
    examples: Examples
    dev: DevSet | None

    @classmethod
    def open(cls, folder: Path) -> "TrainingData":
        """Map a folder that `write_training_data` has completed."""
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in (folder / "examples").glob("*.npy")}
        ragged = {name: Ragged(arrays[f"{name}_values"], arrays[f"{name}_offsets"]) for name in _RAGGED}
        dev = None
        if (folder / "dev.json").is_file():
            relevant = read_json(folder / "dev.json")
            dev = DevSet(
                queries=TokenTable.open(folder / "dev_queries"),
                passages=TokenTable.open(folder / "dev_passages"),
                relevant={int(query): {int(p): grade for p, grade in row.items()} for query, row in relevant.items()},
            )
        return cls(
            queries=TokenTable.open(folder / "queries"),
            passages=TokenTable.open(folder / "passages"),
            examples=Examples(query=arrays["query"], **ragged),
            dev=dev,
        )


def write_training_data(
    folder: Path,
    texts: Texts,
    dev: RetrievalSet | None,
    *,
    encoder: Encoder,
    query_max_length: int,
    passage_max_length: int,
) -> None:
    """Tokenize and write `folder`; parts that a former run has finished are taken as they are."""
    vocab_size = len(encoder.tokenizer)

    def table(name: str, rows: Iterable[str], count: int) -> None:
        is_query = name.endswith("queries")
        token_table(
            rows,
            num_texts=count,
            tokenize=lambda chunk: encoder.tokenize(
                chunk,
                kind="query" if is_query else "passage",
                max_length=query_max_length if is_query else passage_max_length,
            ),
            vocab_size=vocab_size,
            folder=folder / name,
            what=f"tokenize {name.replace('_', ' ')}",
        )

    table("queries", texts.queries, texts.num_queries)
    table("passages", texts.passages, texts.num_passages)
    (folder / "examples").mkdir(exist_ok=True)
    np.save(folder / "examples" / "query.npy", texts.examples.query)
    for name in _RAGGED:
        ragged: Ragged = getattr(texts.examples, name)
        np.save(folder / "examples" / f"{name}_values.npy", ragged.values)
        np.save(folder / "examples" / f"{name}_offsets.npy", ragged.offsets)
    if dev:
        table("dev_queries", dev.queries.values(), len(dev.queries))
        table("dev_passages", dev.corpus.values(), len(dev.corpus))
        query_index = {key: index for index, key in enumerate(dev.queries)}
        passage_index = {key: index for index, key in enumerate(dev.corpus)}
        relevant = {
            query_index[query]: {passage_index[passage]: grade for passage, grade in judged.items()}
            for query, judged in dev.qrels.items()
        }
        write_json(folder / "dev.json", relevant)


def known_positives(query: np.ndarray, positives: Ragged, *, num_queries: int) -> Ragged:
    """By query row, every passage that is a positive of that query in any example, ascending and once."""
    values, owner = positives.take(np.arange(len(query)))
    rows = np.unique(np.stack([query[owner], values], axis=1), axis=0) if len(values) else np.zeros((0, 2), np.int64)
    offsets = np.searchsorted(rows[:, 0], np.arange(num_queries + 1))
    return Ragged(values=rows[:, 1].copy(), offsets=offsets.astype(np.int64))
