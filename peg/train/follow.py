"""Watching a training from outside: the driver reads the rows that rank 0 appends to metrics.jsonl."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peg.progress import Progress

Row = dict[str, Any]
_POLL_S = 0.5


class Follower:
    """Calls `on_row` with every complete row of a growing JSON-lines file, from a thread of its own.

    with Follower(folder / "metrics.jsonl", print): ...
    Rows that are there already are passed too; on leaving, what remains is passed before it returns. A file that is
    replaced by another (a training that goes on from a checkpoint) is read from its start again.
    """

    def __init__(self, path: Path, on_row: Callable[[Row], None]) -> None:
        self._path, self._on_row = path, on_row
        self._offset, self._inode = 0, -1
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"follow {path.name}", daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.wait(_POLL_S):
            self._read()
        self._read()

    def _read(self) -> None:
        if not self._path.is_file():
            return
        stat = self._path.stat()
        if stat.st_ino != self._inode or stat.st_size < self._offset:
            self._offset, self._inode = 0, stat.st_ino
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                self._on_row(json.loads(line))


class TrainingProgress:
    """Prints a training's rows as progress lines; steps that are passed again are not counted twice."""

    def __init__(self, num_steps: int) -> None:
        self._progress = Progress("train", total=num_steps, unit="steps")
        self._step = 0
        self._dev = ""

    def __call__(self, row: Row) -> None:
        """Print what the row says, if it is time."""
        if "event" in row:
            self._progress.say(row["event"])
        elif "dev_ndcg_at_10" in row:
            self._dev = f"  dev nDCG@10 {row['dev_ndcg_at_10']:.4f}"
            self._progress.say(f"step {row['step']}:{self._dev}")
        elif row["step"] > self._step:
            note = (
                f"loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  a {row['negative_exponent']:+.2f}{self._dev}"
            )
            self._progress.advance(row["step"] - self._step, note=note)
            self._step = row["step"]
