"""Work shared by processes that are started side by side: each takes what nobody has finished or is at.

A result is a file, written aside and renamed; who computes it holds a lock that ends with the process. So a kill at any
moment loses only what was running, and the same command goes on from there.
"""

import fcntl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peg.workspace import write_json

_WAIT_S = 2.0


def complete(tasks: Mapping[Path, Callable[[], Any]], *, what: str) -> None:
    """Write every missing result file, in order; print how far all processes are, and the time left."""
    began, at_start = time.monotonic(), _missing(tasks)
    while missing := _missing(tasks):
        if not any(_compute(path, tasks[path]) for path in missing):
            time.sleep(_WAIT_S)  # all that is left is being computed elsewhere
            continue
        left, spent = len(_missing(tasks)), time.monotonic() - began
        remaining = spent / max(1, len(at_start) - left) * left
        print(f"{what}: {len(tasks) - left}/{len(tasks)}, {spent:.0f} s, about {remaining:.0f} s left", flush=True)


def _missing(tasks: Mapping[Path, Callable[[], Any]]) -> list[Path]:
    return [path for path in tasks if not path.is_file()]


def _compute(path: Path, compute: Callable[[], Any]) -> bool:
    """Whether this process had it to compute; False where another one is at it, or has done it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if path.is_file():
            return False
        write_json(path, compute())
        return True
