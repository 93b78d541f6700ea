"""Texts as token ids, made once and memory-mapped: host memory stays flat however many texts there are."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from peg.progress import Progress

_CHUNK_TEXTS = 2048


@dataclass(frozen=True)
class TokenTable:
    """Token ids of many texts in one flat array.

    ids: (T,) uint16 or uint32, all texts after each other. offsets: (N + 1,) int64, text i is
    ids[offsets[i]:offsets[i + 1]].
    """

    ids: np.ndarray
    offsets: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "TokenTable":
        """Map the table that `token_table` has completed in `folder`."""
        dtype = np.load(folder / "dtype.npy").dtype
        offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        if offsets[-1] == 0:  # an empty file cannot be mapped
            return cls(ids=np.zeros(0, dtype=dtype), offsets=offsets)
        return cls(ids=np.memmap(folder / "ids.bin", dtype=dtype, mode="r"), offsets=offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each of the given texts."""
        lengths: np.ndarray = self.offsets[rows + 1] - self.offsets[rows]
        return lengths


Tokenize = Callable[[Sequence[str]], list[list[int]]]


def token_table(
    texts: Iterable[str], *, num_texts: int, tokenize: Tokenize, vocab_size: int, folder: Path, what: str
) -> TokenTable:
    """Tokenize into `folder`, or take what a former run has finished there.

    The folder's name has to stand for tokenizer and texts: it is trusted as it is. It comes into being by rename.
    """
    if not folder.is_dir():
        aside = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        lengths = np.zeros(num_texts + 1, dtype=np.int64)
        row = 0
        with (aside / "ids.bin").open("wb") as file, Progress(what, total=num_texts, unit="texts") as progress:
            for chunk in _chunks(texts):
                for ids in tokenize(chunk):
                    np.asarray(ids, dtype=dtype).tofile(file)
                    row += 1
                    lengths[row] = len(ids)
                progress.advance(len(chunk))
        np.save(aside / "offsets.npy", np.cumsum(lengths[: row + 1]))
        np.save(aside / "dtype.npy", np.zeros(0, dtype=dtype))
        aside.rename(folder)
    return TokenTable.open(folder)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while chunk := list(islice(iterator, _CHUNK_TEXTS)):
        yield chunk
