"""Training data as ranks read it: token ids and row numbers, memory-mapped.

The driver writes the folder once (`write_training_data`); every rank opens it (`TrainingData.open`) and reads the
rows of its batches.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from peg.data.store import narrow
from peg.data.tokens import TokenTable, token_table
from peg.evaluate.beir import RetrievalSet
from peg.model.encoder import Encoder
from peg.train.batches import Examples, Ragged, SourceInfo, Teacher, distinct
from peg.workspace import read_json, write_json

_RAGGED = ("positives", "negatives", "known_positives")
_OPTIONAL = ("source", "label")
_TEACHER = ("positives", "negatives")


@dataclass(frozen=True)
class Texts:
    """What is trained on before it is tokenized: two tables of texts, and examples over their rows.

    has_prompts: prompts stand before the texts already; else the encoder's own are put there.
    """

    queries: Iterable[str]
    num_queries: int
    passages: Iterable[str]
    num_passages: int
    examples: Examples
    has_prompts: bool = False


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
        positives, negatives, known = (Ragged(arrays[f"{name}_values"], arrays[f"{name}_offsets"]) for name in _RAGGED)
        teacher = None
        if "teacher_positives" in arrays:
            teacher = Teacher(**{name: arrays[f"teacher_{name}"] for name in _TEACHER})
        examples = Examples(
            arrays["query"],
            positives,
            negatives,
            known,
            sources=tuple(SourceInfo(**one) for one in read_json(folder / "examples" / "sources.json")),
            source=arrays.get("source"),
            label=arrays.get("label"),
            teacher=teacher,
        )
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
            examples=examples,
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

    def table(name: str, rows: Iterable[str], count: int, *, has_prompts: bool = False) -> None:
        is_query = name.endswith("queries")
        token_table(
            rows,
            num_texts=count,
            tokenize=lambda chunk: encoder.tokenize(
                chunk,
                kind="query" if is_query else "passage",
                max_length=query_max_length if is_query else passage_max_length,
                prompt="" if has_prompts else None,
            ),
            vocab_size=vocab_size,
            folder=folder / name,
            what=f"tokenize {name.replace('_', ' ')}",
        )

    table("queries", texts.queries, texts.num_queries, has_prompts=texts.has_prompts)
    table("passages", texts.passages, texts.num_passages, has_prompts=texts.has_prompts)
    _write_examples(folder / "examples", texts.examples)
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


def _write_examples(folder: Path, examples: Examples) -> None:
    folder.mkdir(exist_ok=True)
    arrays = {"query": examples.query, **{name: getattr(examples, name) for name in _OPTIONAL}}
    for name in _RAGGED:
        ragged: Ragged = getattr(examples, name)
        arrays |= {f"{name}_values": ragged.values, f"{name}_offsets": ragged.offsets}
    if examples.teacher:
        arrays |= {f"teacher_{name}": getattr(examples.teacher, name) for name in _TEACHER}
    for name, array in arrays.items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)
    write_json(folder / "sources.json", [asdict(one) for one in examples.sources])


def make_examples(
    query: np.ndarray,
    positives: Ragged,
    negatives: Ragged,
    *,
    num_queries: int,
    sources: tuple[SourceInfo, ...],
    source: np.ndarray,
    label: np.ndarray,
    teacher: Teacher | None,
) -> Examples:
    """Examples with their known positives, in arrays no wider than needed.

    A similarity row's second text is no known positive: the row says how much alike the two are, not that they are.
    """
    is_alike = np.array([one.task == "similarity" for one in sources])
    return Examples(
        narrow(query),
        Ragged(narrow(positives.values), positives.offsets),
        Ragged(narrow(negatives.values), negatives.offsets),
        known_positives(
            query, positives, num_queries=num_queries, is_answer=~is_alike[source] if is_alike.any() else None
        ),
        sources=sources,
        source=source.astype(np.min_scalar_type(len(sources))) if len(sources) > 1 else None,
        label=label if is_alike.any() else None,
        teacher=teacher,
    )


def known_positives(
    query: np.ndarray, positives: Ragged, *, num_queries: int, is_answer: np.ndarray | None = None
) -> Ragged:
    """By query row, every passage that is a positive of that query in any example, ascending and once.

    is_answer: (E,) bool, the examples that count; None counts all.
    """
    lengths = np.diff(positives.offsets)
    owner, values = np.repeat(query, lengths).astype(np.uint64), positives.values.astype(np.uint64)
    if is_answer is not None:
        counts = np.repeat(is_answer, lengths)
        owner, values = owner[counts], values[counts]
    width = np.uint64(values.max() + 1) if len(values) else np.uint64(1)
    pairs = distinct(owner * width + values)
    offsets = np.searchsorted(pairs, np.arange(num_queries + 1, dtype=np.uint64) * width)
    return Ragged(values=narrow(pairs % width), offsets=offsets.astype(np.int64))
