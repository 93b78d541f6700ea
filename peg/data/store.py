"""Tables on disk: Parquet shards, and a manifest that says what they are.

    manifest.json                 {"tables": {name: [{"path", "rows", "bytes", "sha256"}, ...]}}
    <table>/part-00000.parquet    row numbers count over a table's shards in their order

The same rows give the same bytes (with the same pyarrow).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from peg.errors import InputError
from peg.workspace import MANIFEST, file_sha256, read_json, write_json

_GROUP_ROWS = 10_000
_LABELS = [("source", pa.string()), ("domain", pa.string()), ("task", pa.string())]
# Of a similarity pair its score; a cross-encoder's scores, parallel to positives and negatives. Null where none.
_SCORES = [
    ("score", pa.float64()),
    ("teacher_positives", pa.list_(pa.float32())),
    ("teacher_negatives", pa.list_(pa.float32())),
]

SCHEMAS = {
    "passages": pa.schema([("passage_id", pa.string()), ("text", pa.string())]),
    "queries": pa.schema([("query_id", pa.string()), ("text", pa.string())]),
    "pairs": pa.schema(
        [
            ("query", pa.int64()),
            ("positives", pa.list_(pa.int64())),
            ("negatives", pa.list_(pa.int64())),
            *_LABELS,
            *_SCORES,
        ]
    ),
    "rejects": pa.schema(
        [
            ("source", pa.string()),
            ("row", pa.int64()),
            ("reason", pa.string()),
            ("query", pa.string()),
            ("passage", pa.string()),
        ]
    ),
    "triples": pa.schema(
        [
            ("query", pa.int64()),
            ("positives", pa.list_(pa.int64())),
            ("negatives", pa.list_(pa.int64())),
            ("scores", pa.list_(pa.float32())),
            ("ranks", pa.list_(pa.int32())),
            *_LABELS,
            *_SCORES,
        ]
    ),
}


class StoreWriter:
    """Writes tables row by row; what is in memory is one row group of each.

    with StoreWriter(folder, tables=["passages"], shard_rows=100_000) as writer:
        writer.add("passages", passage_id="...", text="...")

    The manifest is written at the end, and only if nothing failed: a folder without it is not a store.
    """

    def __init__(self, folder: Path, *, tables: Sequence[str], shard_rows: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        self._folder = folder
        self._tables = {name: _TableWriter(folder, name, shard_rows=shard_rows) for name in tables}

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            shards = {name: table.close() for name, table in self._tables.items()}
            write_json(self._folder / MANIFEST, {"tables": shards})
        else:
            for table in self._tables.values():
                table.abandon()

    def add(self, table: str, **row: Any) -> int:
        """Append a row, and return its number."""
        return self._tables[table].add(row)


class _TableWriter:
    def __init__(self, folder: Path, name: str, *, shard_rows: int) -> None:
        self._folder, self._name, self._shard_rows = folder, name, shard_rows
        self._schema = SCHEMAS[name]
        self._buffer: list[dict[str, Any]] = []
        self._file: pq.ParquetWriter | None = None
        self._shards: list[dict[str, Any]] = []
        self._num_rows = self._rows_in_shard = 0
        (folder / name).mkdir(exist_ok=True)
        for stale in (folder / name).glob("part-*.parquet"):
            stale.unlink()

    def add(self, row: dict[str, Any]) -> int:
        self._buffer.append(row)
        self._num_rows += 1
        full = self._rows_in_shard + len(self._buffer) == self._shard_rows
        if full or len(self._buffer) == _GROUP_ROWS:
            self._flush()
        if full:
            self._end_shard()
        return self._num_rows - 1

    def close(self) -> list[dict[str, Any]]:
        """End the last shard; a table without rows has one empty shard, which keeps its columns."""
        if self._buffer or not self._shards:
            self._flush()
        self._end_shard()
        return self._shards

    def abandon(self) -> None:
        """Let go of the file; what it holds is of no use."""
        if self._file is not None:
            self._file.close()

    @property
    def _path(self) -> Path:
        return Path(self._name) / f"part-{len(self._shards):05d}.parquet"

    def _flush(self) -> None:
        if self._file is None:
            self._file = pq.ParquetWriter(self._folder / self._path, self._schema, compression="zstd")
        self._file.write_table(pa.Table.from_pylist(self._buffer, schema=self._schema))
        self._rows_in_shard += len(self._buffer)
        self._buffer = []

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        path = self._folder / self._path
        self._shards.append(
            {
                "path": self._path.as_posix(),
                "rows": self._rows_in_shard,
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
        )
        self._file, self._rows_in_shard = None, 0


@dataclass(frozen=True)
class Store:
    """Tables that a StoreWriter has completed."""

    folder: Path
    shards: dict[str, list[dict[str, Any]]]

    def num_rows(self, table: str) -> int:
        """Rows of a table, over its shards."""
        return sum(shard["rows"] for shard in self._of(table))

    def columns(self, table: str, names: Sequence[str]) -> dict[str, list[Any]]:
        """Whole columns as lists of Python values."""
        out: dict[str, list[Any]] = {name: [] for name in names}
        for batch in self._batches(table, names):
            for name in names:
                out[name] += batch.column(name).to_pylist()
        return out

    def array(self, table: str, name: str) -> np.ndarray:
        """A column of numbers; float64 NaN where a floating column has null."""
        found = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self._batches(table, [name])]
        return np.concatenate(found) if found else np.zeros(0)

    def groups(self, table: str, names: Sequence[str]) -> tuple[list[tuple[str, ...]], np.ndarray]:
        """The distinct rows of columns of strings, in the order in which they first occur, and (N,) each row's place.

        What is in memory is a number per row, int32.
        """
        place: dict[tuple[str, ...], int] = {}
        found = []
        for batch in self._batches(table, names):
            columns = [batch.column(name).dictionary_encode() for name in names]
            codes = np.stack([column.indices.to_numpy() for column in columns], axis=1)
            distinct, first, which = np.unique(codes, axis=0, return_index=True, return_inverse=True)
            numbers = np.zeros(len(distinct), dtype=np.int32)
            for one in np.argsort(first):
                words = (column.dictionary[int(code)] for column, code in zip(columns, distinct[one], strict=True))
                numbers[one] = place.setdefault(tuple(word.as_py() for word in words), len(place))
            found.append(numbers[which.reshape(-1)])
        return list(place), np.concatenate(found) if found else np.zeros(0, np.int32)

    def ragged(self, table: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column of lists as flat values and (N + 1,) int64 offsets: list i is values[offsets[i]:offsets[i + 1]].

        Whole numbers come as uint32 where they fit.
        """
        values, lengths = [], [np.zeros(1, dtype=np.int64)]
        for batch in self._batches(table, [name]):
            lists = batch.column(name)
            flat = lists.flatten().to_numpy(zero_copy_only=False)
            values.append(narrow(flat) if flat.dtype == np.int64 else flat)
            lengths.append(np.diff(lists.offsets.to_numpy()).astype(np.int64))
        return (np.concatenate(values) if values else np.zeros(0, np.int64)), np.cumsum(np.concatenate(lengths))

    def column(self, table: str, name: str) -> Iterator[Any]:
        """One column's values in row order, a row group in memory at a time."""
        for batch in self._batches(table, [name]):
            yield from batch.column(name).to_pylist()

    def texts(self, table: str) -> Iterator[str]:
        """The texts of passages or queries, in row order, a row group in memory at a time."""
        return self.column(table, "text")

    def texts_at(self, table: str, rows: Iterable[int]) -> dict[int, str]:
        """The texts of some rows, by row number."""
        wanted = set(rows)
        return {row: text for row, text in enumerate(self.texts(table)) if row in wanted}

    def rows(self, table: str) -> Iterator[dict[str, Any]]:
        """All rows as dictionaries, a row group in memory at a time."""
        for batch in self._batches(table, SCHEMAS[table].names):
            yield from batch.to_pylist()

    def verify(self) -> None:
        """Compare every shard with the manifest's sha256. Raises InputError at the first that differs."""
        for shards in self.shards.values():
            for shard in shards:
                found = file_sha256(self.folder / shard["path"])
                if found != shard["sha256"]:
                    raise InputError(
                        f"{self.folder / shard['path']} has sha256 {found}, the manifest says {shard['sha256']}; "
                        "remove the folder and run the stage that writes it again"
                    )

    def _of(self, table: str) -> list[dict[str, Any]]:
        if table not in self.shards:
            raise InputError(f"{self.folder} has no table {table!r}, only {', '.join(self.shards)}")
        return self.shards[table]

    def _batches(self, table: str, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for shard in self._of(table):
            path = self.folder / shard["path"]
            try:
                with pq.ParquetFile(path) as file:
                    yield from file.iter_batches(batch_size=_GROUP_ROWS, columns=list(names))
            except (pa.ArrowInvalid, OSError) as error:
                raise InputError(
                    f"{path} cannot be read as Parquet ({' '.join(str(error).split())[:160]}); "
                    "remove the folder and run the stage that writes it again"
                ) from error


def narrow(rows: np.ndarray) -> np.ndarray:
    """Row numbers as uint32 where they fit: half of what a hundred million examples take."""
    return rows.astype(np.uint32 if not len(rows) or rows.max() < 2**32 else np.int64, copy=False)


def open_store(folder: Path) -> Store:
    """Open a store. Raises InputError if it is absent or unfinished, or a shard is missing or of another length."""
    manifest = read_json(folder / MANIFEST)
    try:
        shards = {str(table): [dict(shard) for shard in listed] for table, listed in manifest["tables"].items()}
        expected = {shard["path"]: (shard["bytes"], shard["rows"]) for listed in shards.values() for shard in listed}
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / MANIFEST} is no manifest of tables; run the stage that writes it again") from error
    for name, (size_bytes, _) in expected.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size_bytes:
            what = "is not here" if found is None else f"has {found} bytes"
            raise InputError(
                f"{path} {what}, the manifest says {size_bytes}; run the stage that writes it again, or `dvc checkout`"
            )
    return Store(folder=folder, shards=shards)
