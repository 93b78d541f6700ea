"""What the study trains and measures on, and the frozen lower layers' output for every token of it, made once.

A text's "token ids" are, from here on, the rows of its tokens in the table of cached states: TopLayers takes those.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.progressive.shared import complete
from peg.data.tokens import TokenTable, token_table
from peg.errors import InputError
from peg.evaluate.beir import RetrievalSet, read_beir
from peg.model.encoder import Encoder, Prompts
from peg.model.microbatch import pad_ids, token_batches
from peg.workspace import read_json

PROMPTS = Prompts(query="query: ", passage="passage: ")
MAX_TOKENS = 32  # of a query or passage, prompt included
TOP_LAYERS = 1  # trained; the others are frozen
TESTS = ("toyhom-medical", "afqmc-faq", "explaincpe-pharma", "qbqtc-search")
MAX_CORPUS = 4_000  # passages of a test set: every judged one, and others drawn by the seed
TRAIN_PAIRS = {  # short texts of many domains; 10,240 in all
    "toyhom-medical-title": 1340,
    "toyhom-medical": 600,
    "explaincpe-train": 1200,
    "afqmc-train": 2000,
    "atec-train": 700,
    "qbqtc-dev": 1900,
    "epidemic-pairs": 600,
    "ccf2020-beike": 500,
    "lcqmc-dev": 700,
    "jionlp-word": 700,
}
DEV_QUERIES = 150  # of each of these sources
DEV_CORPUS = 600  # passages: their positives, and training positives of the source
DEV_SOURCES = ("toyhom-medical-title", "explaincpe-train", "afqmc-train", "qbqtc-dev", "epidemic-pairs", "jionlp-word")
SEED = 42
_CHUNK = 500
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Pairs:
    """Training pairs as text rows: source (E,) of str, query (E,) and passage (E,) of int64."""

    source: np.ndarray
    query: np.ndarray
    passage: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """All of it. texts: ("query" or "passage", text) by row; a retrieval set's ids are text rows as strings.

    offsets, states_TD: text i has the states of tokens offsets[i] to offsets[i + 1].
    """

    texts: list[tuple[str, str]]
    offsets: np.ndarray
    states_TD: np.ndarray
    pairs: Pairs
    dev: list[RetrievalSet]
    tests: list[RetrievalSet]

    def ids(self, row: int) -> np.ndarray:
        """Rows of a text's tokens in the table of states."""
        return np.arange(self.offsets[row], self.offsets[row + 1])


def prepare(data: Path, encoder: Path, work: Path) -> Prepared:
    """Choose pairs and dev queries, read the test sets, cut all texts into tokens, cache states; once, in `work`."""
    complete({work / "chosen.json": lambda: _choose(data)}, what="choose texts")
    tree = read_json(work / "chosen.json")
    texts = [(kind, text) for kind, text in tree["texts"]]
    complete({work / "tokens.json": lambda: _tokenise(texts, encoder, work)}, what="cut into tokens")
    return Prepared(
        texts=texts,
        offsets=np.asarray(TokenTable.open(work / "tokens").offsets),
        states_TD=_cache_states(encoder, work),
        pairs=Pairs(*(np.array(tree["pairs"][name]) for name in ("source", "query", "passage"))),
        dev=[_retrieval_set(one, texts) for one in tree["dev"]],
        tests=[_retrieval_set(one, texts) for one in tree["tests"]],
    )


def _choose(data: Path) -> dict[str, Any]:
    row_of: dict[tuple[str, str], int] = {}

    def row(kind: str, text: str) -> int:
        return row_of.setdefault((kind, text), len(row_of))

    by_source: dict[str, list[tuple[str, str]]] = defaultdict(list)
    table = pq.read_table(data / "train" / "train_pairs.parquet", columns=["source", "query", "pos"])
    for pair in table.to_pylist():
        if pair["query"] != pair["pos"]:
            by_source[pair["source"]].append((pair["query"], pair["pos"]))
    generator = np.random.default_rng(SEED)
    train: list[tuple[str, int, int]] = []
    dev = []
    held: set[str] = set()  # texts of dev, of any source
    shuffled = {
        source: [by_source[source][i] for i in generator.permutation(len(by_source[source]))] for source in TRAIN_PAIRS
    }
    qrels_of: dict[str, dict[str, dict[str, int]]] = {}
    for source in DEV_SOURCES:
        queries = {query for query, _ in shuffled[source][:DEV_QUERIES]}
        judged = qrels_of[source] = defaultdict(dict)
        for query, passage in shuffled[source]:
            if query in queries:
                judged[str(row("query", query))][str(row("passage", passage))] = 1
                held |= {query, passage}
    for source, number in TRAIN_PAIRS.items():
        rest = [pair for pair in shuffled[source] if not held.intersection(pair)][:number]
        if len(rest) < number:
            raise InputError(f"{source} has {len(rest)} pairs beside the dev set's; {number} are needed")
        train += [(source, row("query", query), row("passage", passage)) for query, passage in rest]
    for source, qrels in qrels_of.items():
        corpus = {passage for judged in qrels.values() for passage in judged}
        others = [str(passage) for name, _, passage in train if name == source]
        corpus |= set(others[: max(0, DEV_CORPUS - len(corpus))])
        dev.append({"name": source, "corpus": sorted(corpus, key=int), "qrels": qrels})
    tests = [_test(read_beir(data / "eval" / name), row) for name in TESTS]
    source, query, passage = (list(column) for column in zip(*train, strict=True))
    pairs = {"source": source, "query": query, "passage": passage}
    return {"texts": list(row_of), "pairs": pairs, "dev": dev, "tests": tests}


def _test(data: RetrievalSet, row: Any) -> dict[str, Any]:
    judged = {key for grades in data.qrels.values() for key in grades}
    others = [key for key in data.corpus if key not in judged]
    room = max(0, MAX_CORPUS - len(judged))
    drawn = np.random.default_rng(SEED).permutation(len(others))[:room]
    corpus = judged.union(others[i] for i in drawn)
    number = {key: str(row("passage", data.corpus[key])) for key in data.corpus if key in corpus}
    qrels: dict[str, dict[str, int]] = {}
    for key, grades in data.qrels.items():
        mine = qrels.setdefault(str(row("query", data.queries[key])), {})
        for passage, grade in grades.items():
            mine[number[passage]] = max(grade, mine.get(number[passage], 0))
    return {"name": data.name, "corpus": sorted(set(number.values()), key=int), "qrels": qrels}


def _retrieval_set(tree: dict[str, Any], texts: list[tuple[str, str]]) -> RetrievalSet:
    return RetrievalSet(
        name=tree["name"],
        queries={row: texts[int(row)][1] for row in tree["qrels"]},
        corpus={row: texts[int(row)][1] for row in tree["corpus"]},
        qrels=tree["qrels"],
    )


def _tokenise(texts: list[tuple[str, str]], encoder: Path, work: Path) -> dict[str, int]:
    tokenizer = load_encoder(encoder).tokenizer

    def tokenize(chunk: Sequence[str]) -> list[list[int]]:
        return list(tokenizer(list(chunk), truncation=True, max_length=MAX_TOKENS)["input_ids"])

    prompted = (PROMPTS.of(kind) + text for kind, text in texts)  # type: ignore[arg-type]
    table = token_table(
        prompted,
        num_texts=len(texts),
        tokenize=tokenize,
        vocab_size=len(tokenizer),
        folder=work / "tokens",
        what="cut into tokens",
    )
    return {"texts": len(table), "tokens": int(table.offsets[-1])}


def load_encoder(folder: Path) -> Encoder:
    """The pretrained encoder, mean pooling and E5's prompts."""
    return Encoder.load(str(folder), pooling="mean", prompts=PROMPTS)


def _cache_states(encoder_folder: Path, work: Path) -> np.ndarray:
    """Complete and map the state of every token before the trained layers, (T, D) float16."""
    tokens = TokenTable.open(work / "tokens")
    encoder = load_encoder(encoder_folder)
    encoder.backbone.encoder.layer = encoder.backbone.encoder.layer[:-TOP_LAYERS]
    file = work / "states.bin"
    with file.open("ab") as table:
        table.truncate(int(tokens.offsets[-1]) * encoder.dimension * 2)  # keeps what is there

    @torch.inference_mode()
    def cache(start: int) -> int:
        states_TD = np.memmap(file, np.float16, "r+").reshape(-1, encoder.dimension)
        rows = np.arange(start, min(start + _CHUNK, len(tokens)))
        for batch in token_batches(tokens.lengths(rows), budget=_BATCH_TOKENS):
            ids = [tokens[row] for row in rows[batch]]
            ids_BL, mask_BL = pad_ids(ids, pad_id=encoder.pad_id, device=encoder.device)
            hidden_BLD = encoder.backbone(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state.numpy()
            for row, hidden_LD in zip(rows[batch], hidden_BLD, strict=True):
                first, last = tokens.offsets[row], tokens.offsets[row + 1]
                states_TD[first:last] = hidden_LD[: last - first]
        states_TD.flush()
        return start

    starts = range(0, len(tokens), _CHUNK)
    complete({work / "states" / f"{start}.json": partial(cache, start) for start in starts}, what="cache states")
    return np.memmap(file, np.float16, "r").reshape(-1, encoder.dimension)
