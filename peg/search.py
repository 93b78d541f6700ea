"""Nearest passages of a corpus to a question, with the corpus's embeddings kept between questions."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from peg.errors import InputError
from peg.evaluate.beir import RetrievalSet, digest, read_beir
from peg.model.encoder import Encoder, weights_sha256
from peg.progress import Progress
from peg.workspace import STATE, key_of

BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class Hit:
    """One passage found: rank from 1, cosine, id and text."""

    rank: int
    score: float
    passage_id: str
    text: str


def search(model_folder: Path, corpus: Path, query: str, k: int, *, index: Path = STATE / "index") -> list[Hit]:
    """The k passages of a BEIR folder nearest to the query, best first; fewer if the corpus is smaller.

    Equal scores stand in the order of their ids. Embeddings are kept in `index` by weights and corpus, so that only the
    first question of a pair of them waits for the corpus. Raises InputError for an empty query or k below 1.
    """
    if not query.strip():
        raise InputError('the query is empty; give some words: peg search "..."')
    if k < 1:
        raise InputError(f"{k} passages were asked for; ask for at least 1")
    data = read_beir(corpus)
    encoder = Encoder.load(str(model_folder))
    settings = key_of({}, [encoder.pooling, encoder.prompts.passage, encoder.max_length])
    name = f"{weights_sha256(model_folder)}-{settings}-{digest(data)}.npy"
    passages_ND = _passage_rows(encoder, data, index / name)
    query_D = encoder.encode([query], kind="query", batch_tokens=BATCH_TOKENS)[0]
    scores_N = passages_ND @ query_D
    best = np.argsort(-scores_N, kind="stable")[:k]
    identifiers = sorted(data.corpus)
    return [
        Hit(rank, float(scores_N[row]), identifiers[row], data.corpus[identifiers[row]])
        for rank, row in enumerate(best, 1)
    ]


def _passage_rows(encoder: Encoder, data: RetrievalSet, kept: Path) -> np.ndarray:
    """(N, D) unit rows in the order of the passages' ids, from the file if it is there.

    The corpus's own order would not do: its digest, which names the file, does not depend on that.
    """
    shape = (len(data.corpus), encoder.dimension)
    if kept.is_file():
        rows_ND: np.ndarray = np.load(kept, mmap_mode="r", allow_pickle=False)
        if rows_ND.shape == shape:
            return rows_ND
    with Progress("encode passages", total=shape[0], unit="texts") as progress:
        texts = [data.corpus[identifier] for identifier in sorted(data.corpus)]
        rows_ND = encoder.encode(texts, kind="passage", batch_tokens=BATCH_TOKENS, progress=progress)
    kept.parent.mkdir(parents=True, exist_ok=True)
    aside = kept.with_name(f".{os.getpid()}-{kept.name}")
    np.save(aside, rows_ND, allow_pickle=False)
    aside.replace(kept)
    return rows_ND


def render(hits: list[Hit]) -> Table:
    """A table of rank, cosine and passage for the terminal."""
    table = Table(box=None, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("cosine", justify="right")
    table.add_column("passage", overflow="fold")
    for hit in hits:
        # Text, not str: brackets in a passage are its own, no markup.
        table.add_row(str(hit.rank), f"{hit.score:.3f}", Text(hit.text))
    return table
