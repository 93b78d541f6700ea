"""How long a command takes and how much memory it and all its children hold at once, at the peak.

    python benchmarks/demo.py make demo

Memory is the sum of proportional set sizes (shared pages counted once, by share) of the command's process tree,
sampled every two seconds; Linux only. Processes that leave the tree while they run (daemons) are counted too: they are
found by the environment variable that the command was started with.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

_MARK = "PEG_MEASURED_BY"
_EVERY_S = 2.0


def main() -> int:
    """Run the command line's arguments as a command; return its exit status."""
    mark = f"{_MARK}={os.getpid()}"
    began = time.monotonic()
    process = subprocess.Popen(sys.argv[1:], env={**os.environ, _MARK: str(os.getpid())})
    peak_bytes, largest = 0, ""
    while process.poll() is None:
        held = _held_bytes(mark)
        if sum(held.values()) > peak_bytes:
            peak_bytes = sum(held.values())
            order = sorted(held, key=held.__getitem__, reverse=True)
            largest = ", ".join(f"{name} {held[name] / 1e6:.0f}" for name in order[:6])
        time.sleep(_EVERY_S)
    print(f"\nwall {time.monotonic() - began:.1f} s, peak memory {peak_bytes / 1e9:.2f} GB (MB at the peak: {largest})")
    return process.returncode


def _held_bytes(mark: str) -> dict[str, int]:
    """Proportional set size of every marked process, by command name."""
    held: dict[str, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if mark.encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            line = next(line for line in (folder / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
            name = (folder / "comm").read_text().strip()
        except (OSError, StopIteration):
            continue  # it has ended meanwhile
        held[name] = held.get(name, 0) + int(line.split()[1]) * 1024
    return held


if __name__ == "__main__":
    sys.exit(main())
