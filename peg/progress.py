"""Progress of long work, the same on a terminal and in a log file: what, how far, how fast, how long yet."""

import sys
import time
from typing import TextIO


class Progress:
    """Prints a line at most every `every_s` seconds, and one at the end.

    with Progress("encode passages", total=3300, unit="texts") as progress:
        progress.advance(64)
    """

    def __init__(
        self, what: str, *, total: int, unit: str, start: int = 0, every_s: float = 5.0, stream: TextIO | None = None
    ) -> None:
        self._what, self._total, self._unit, self._every_s = what, total, unit, every_s
        self._stream = stream or sys.stderr
        self._start = self._done = start
        self._shown = -1
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._shown < self._done:
            self._print()

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count finished units; `note` goes to the end of a line that happens to be printed."""
        self._done += count
        if time.monotonic() - self._printed >= self._every_s or self._done >= self._total > self._shown:
            self._print(note)

    def say(self, line: str) -> None:
        """Print a line of one's own among the progress lines."""
        print(f"{self._what}: {line}", file=self._stream, flush=True)

    def _print(self, note: str = "") -> None:
        self._printed, self._shown = time.monotonic(), self._done
        elapsed = max(self._printed - self._began, 1e-9)
        rate = (self._done - self._start) / elapsed
        left_s = (self._total - self._done) / rate if rate > 0 else float("inf")
        share = self._done / self._total if self._total else 1.0
        ending = f"{_span(elapsed)} in all" if self._done >= self._total else f"{_span(left_s)} left"
        line = f"{self._what}: {self._done:,}/{self._total:,} {self._unit} ({share:.0%}), {rate:,.1f}/s, {ending}"
        print(f"{line}  {note}".rstrip(), file=self._stream, flush=True)


def _span(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
