"""Which texts are the same, and which queries are nearly the same.

Same: equal after `normalise`, known by the first 128 bits of sha256. Nearly the same: the Jaccard similarity of the
sets of character bigrams reaches a threshold; a text of one character has that character as its only member.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from scipy import sparse  # type: ignore[import-untyped]

from peg.errors import InputError

_BLOCK_TEXTS = 8192
_CODE_BITS = 21  # a Unicode code point
_EPSILON = 1e-9  # a similarity that equals the threshold reaches it, whatever the division's last bit


def text_id(text: str) -> str:
    """32 hex digits that stand for a normalised text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class TextIndex:
    """Gives each distinct text the next row number. Holds 16 bytes of digest per text, not the text."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, text: str) -> tuple[int, bool]:
        """The text's row number, and whether it is new."""
        key = hashlib.sha256(text.encode()).digest()[:16]
        before = len(self._rows)
        row = self._rows.setdefault(key, before)
        return row, row == before


@dataclass(frozen=True)
class Neighbours:
    """Near-duplicates: text `rows[i]` of the searched ones is nearly `anchors[i]` of the given ones."""

    anchors: np.ndarray
    rows: np.ndarray
    similarity: np.ndarray


def near_duplicates(anchors: Sequence[str], texts: Iterable[str], *, threshold: float) -> Neighbours:
    """All texts whose similarity to an anchor is at least `threshold`, ordered by text, then anchor.

    Texts are read once, a block in memory at a time. Raises InputError for a threshold at which all texts are near.
    """
    if threshold <= 0:
        raise InputError(
            f"data.holdout.near_duplicate is {threshold}, at which every query is near every other; 0.6 is usual"
        )
    table = _BigramTable(anchors)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    start = 0
    for block in _blocks(texts):
        shared_BA, sizes_B = table.shared(block)
        rows, columns = shared_BA.coords
        similarity = shared_BA.data / (sizes_B[rows] + table.sizes[columns] - shared_BA.data)
        near = similarity >= threshold - _EPSILON
        order = np.lexsort((columns[near], rows[near]))
        found.append((columns[near][order], rows[near][order] + start, similarity[near][order]))
        start += len(block)
    if not found:
        return Neighbours(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    anchor_rows, text_rows, similarity = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Neighbours(anchor_rows.astype(np.int64), text_rows.astype(np.int64), similarity)


class _BigramTable:
    """The anchors' bigrams as a sparse matrix (A, V) of zeros and ones."""

    def __init__(self, anchors: Sequence[str]) -> None:
        owners, bigrams = _bigrams(anchors)
        self._vocabulary, columns = np.unique(bigrams, return_inverse=True)
        self._matrix = _ones(owners, columns, shape=(len(anchors), max(len(self._vocabulary), 1)))
        self.sizes = np.bincount(owners, minlength=len(anchors))

    def shared(self, texts: Sequence[str]) -> tuple[sparse.coo_array, np.ndarray]:
        """How many bigrams each text shares with each anchor (B, A), and how many each text has (B,)."""
        owners, bigrams = _bigrams(texts)
        sizes = np.bincount(owners, minlength=len(texts))
        places = np.searchsorted(self._vocabulary, bigrams)
        places[places == len(self._vocabulary)] = 0
        known = self._vocabulary[places] == bigrams if len(self._vocabulary) else np.zeros(len(bigrams), dtype=bool)
        matrix = _ones(owners[known], places[known], shape=(len(texts), self._matrix.shape[1]))
        return (matrix @ self._matrix.T).tocoo(), sizes


def _ones(rows: np.ndarray, columns: np.ndarray, *, shape: tuple[int, int]) -> sparse.csr_array:
    return sparse.csr_array((np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=shape)


def _bigrams(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Each text's distinct bigrams as numbers, with the text's position before them, both (T,) int64."""
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4").astype(np.int64)
    owners = np.repeat(np.arange(len(texts)), lengths)
    is_last = np.zeros(len(codes), dtype=bool)
    is_last[np.cumsum(lengths)[lengths > 0] - 1] = True
    following = np.append(codes[1:], 0)
    following[is_last] = 0
    used = ~is_last | (lengths[owners] == 1)
    combined = (codes[used] << _CODE_BITS) | following[used]
    order = np.lexsort((combined, owners[used]))
    owners, combined = owners[used][order], combined[order]
    first = np.ones(len(owners), dtype=bool)
    first[1:] = (np.diff(owners) != 0) | (np.diff(combined) != 0)
    return owners[first], combined[first]


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while block := list(islice(iterator, _BLOCK_TEXTS)):
        yield block
