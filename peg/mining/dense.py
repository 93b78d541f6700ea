"""Exact dense search: inner products of unit vectors, and those vectors made once and kept on disk."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from peg.model.encoder import Encoder, Kind
from peg.progress import Progress

_CHUNK_TEXTS = 4096
_BLOCK_QUERIES = 1024


class DenseIndex:
    """All passages' vectors, compared one by one."""

    def __init__(self, dimension: int) -> None:
        import faiss

        self._index = faiss.IndexFlatIP(dimension)

    @classmethod
    def build(cls, passages_PD: np.ndarray) -> "DenseIndex":
        """Index unit rows; passages are known by their row."""
        index = cls(passages_PD.shape[1])
        index.add(passages_PD)
        return index

    def add(self, passages_PD: np.ndarray) -> None:
        """Append rows."""
        self._index.add(np.ascontiguousarray(passages_PD, dtype=np.float32))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(
        self, queries_QD: np.ndarray, k: int, *, progress: Progress | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best passages of each query, best first, equal scores in the order of rows.

        Returns scores (Q, k) float32 and rows (Q, k) int64, with k at most the number of passages.
        """
        k = min(k, len(self))
        scores_QK = np.empty((len(queries_QD), k), dtype=np.float32)
        rows_QK = np.empty((len(queries_QD), k), dtype=np.int64)
        if k == 0:
            return scores_QK, rows_QK
        for start in range(0, len(queries_QD), _BLOCK_QUERIES):
            block = np.ascontiguousarray(queries_QD[start : start + _BLOCK_QUERIES], dtype=np.float32)
            scores, rows = self._index.search(block, k)
            order = np.lexsort((rows, -scores), axis=1)
            scores_QK[start : start + len(block)] = np.take_along_axis(scores, order, axis=1)
            rows_QK[start : start + len(block)] = np.take_along_axis(rows, order, axis=1)
            if progress:
                progress.advance(len(block))
        return scores_QK, rows_QK


def embed(
    texts: Iterable[str], *, num_texts: int, encoder: Encoder, kind: Kind, batch_tokens: int, folder: Path
) -> np.ndarray:
    """Embed texts chunk by chunk into `folder`, and map the result: (N, D) float32 unit rows.

    Chunks that a former run has finished are taken as they are; the folder has to stand for texts and encoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / f"{kind}.npy"
    if not whole.is_file():
        aside = whole.with_suffix(".partial.npy")
        rows_ND = np.lib.format.open_memmap(aside, "w+", dtype=np.float32, shape=(num_texts, encoder.dimension))
        what = "encode queries" if kind == "query" else "encode passages"
        with Progress(what, total=num_texts, unit="texts") as progress:
            start = 0
            for number, chunk in enumerate(_chunks(texts)):
                part = folder / f"{kind}-{number:06d}.npy"
                if part.is_file():
                    progress.advance(len(chunk))
                else:
                    _save(part, encoder.encode(chunk, kind=kind, batch_tokens=batch_tokens, progress=progress))
                rows_ND[start : start + len(chunk)] = np.load(part)
                start += len(chunk)
        if start != num_texts:
            raise ValueError(f"{start} texts came where {num_texts} were announced")
        rows_ND.flush()
        aside.replace(whole)
        for part in folder.glob(f"{kind}-*.npy"):
            part.unlink()
    return np.load(whole, mmap_mode="r")  # type: ignore[no-any-return]


def _save(path: Path, rows: np.ndarray) -> None:
    aside = path.with_suffix(".partial")
    with aside.open("wb") as file:
        np.save(file, rows)
    aside.replace(path)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while chunk := list(islice(iterator, _CHUNK_TEXTS)):
        yield chunk
