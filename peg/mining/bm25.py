"""Lexical search: BM25 (Lucene's form, k1 1.2, b 0.75) over words as jieba cuts them for search engines."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from scipy import sparse  # type: ignore[import-untyped]

from peg.progress import Progress

K1, B = 1.2, 0.75
_WORD = re.compile(r"\w")
_BLOCK_QUERIES = 256


def words(text: str) -> list[str]:
    """The words of a text, lower-case; in search mode a long word's own parts come beside it. No punctuation."""
    return [word for word in _cutter()(text.lower()) if _WORD.search(word)]


@cache
def _cutter() -> Callable[[str], Iterable[str]]:
    import jieba  # type: ignore[import-untyped]

    jieba.setLogLevel(logging.WARNING)  # it logs the loading of its dictionary
    cut: Callable[[str], Iterable[str]] = jieba.cut_for_search
    return cut


class BM25Index:
    """Weights of words in passages, as a sparse matrix."""

    def __init__(self, weights_VN: sparse.csr_array, vocabulary: dict[str, int]) -> None:
        self._weights_VN = weights_VN
        self._vocabulary = vocabulary

    @classmethod
    def build(cls, texts: Sequence[str], *, progress: Progress | None = None) -> "BM25Index":
        """Index passages; they are known by their place in `texts`."""
        import bm25s  # type: ignore[import-untyped]

        vocabulary: dict[str, int] = {}
        ids = []
        for text in texts:
            ids.append([vocabulary.setdefault(word, len(vocabulary)) for word in words(text)])
            if progress:
                progress.advance()
        if not vocabulary:  # bm25s divides by the mean length
            return cls(sparse.csr_array((1, len(texts)), dtype=np.float32), {})
        model = bm25s.BM25(method="lucene", k1=K1, b=B)
        model.index((ids, vocabulary), create_empty_token=False, show_progress=False)
        parts = tuple(model.scores[name] for name in ("data", "indices", "indptr"))
        # Columns of words over rows of passages, read as rows of words over columns of passages.
        return cls(sparse.csr_array(parts, shape=(len(parts[2]) - 1, len(texts))), vocabulary)

    def __len__(self) -> int:
        return int(self._weights_VN.shape[1])

    def search(
        self, queries: Sequence[str], k: int, *, progress: Progress | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best passages of each query, best first, equal scores in the order of rows.

        Returns scores (Q, k) float32 and rows (Q, k) int64, with k at most the number of passages. Passages that
        share no word with the query are not found: the places left over have score 0 and row -1.
        """
        k = min(k, len(self))
        scores_QK = np.zeros((len(queries), k), dtype=np.float32)
        rows_QK = np.full((len(queries), k), -1, dtype=np.int64)
        for start in range(0, len(queries), _BLOCK_QUERIES):
            block = queries[start : start + _BLOCK_QUERIES]
            found_BN = (self._counts(block) @ self._weights_VN).tocsr()
            for i, (low, high) in enumerate(pairwise(found_BN.indptr)):
                scores, rows = top(found_BN.data[low:high], found_BN.indices[low:high].astype(np.int64), k)
                scores_QK[start + i, : len(rows)] = scores
                rows_QK[start + i, : len(rows)] = rows
            if progress:
                progress.advance(len(block))
        return scores_QK, rows_QK

    def _counts(self, queries: Sequence[str]) -> sparse.csr_array:
        """How often each known word stands in each query, (B, V)."""
        owners, columns, counts = [], [], []
        for owner, query in enumerate(queries):
            known = Counter(self._vocabulary[word] for word in words(query) if word in self._vocabulary)
            for column, count in sorted(known.items()):
                owners.append(owner)
                columns.append(column)
                counts.append(count)
        shape = (len(queries), self._weights_VN.shape[0])
        return sparse.csr_array((np.array(counts, dtype=np.float32), (owners, columns)), shape=shape)


def top(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest scores above 0 with their rows, best first, equal scores in the order of rows."""
    if k < len(scores):
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        scores, rows = scores[scores >= least], rows[scores >= least]
    order = np.lexsort((rows, -scores))[:k]
    order = order[scores[order] > 0]
    return scores[order], rows[order]
