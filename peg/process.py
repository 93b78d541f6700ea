"""Child processes that end with their parent, and with the run before.

A process is known by its pid and its start time together, written "pid:start": a pid alone is used again by the
system. A parent puts its own mark into PEG_OWNER; a child that calls `die_with_owner` ends when that process is gone,
kill -9 included. What a killed parent left behind nevertheless is found in its records by `end_stale`.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from peg.workspace import read_json, write_json

OWNER = "PEG_OWNER"
_POLL_S = 0.05


def mark(pid: int | None = None) -> str | None:
    """The "pid:start" of a process (this one by default), or None if there is no such process (a zombie is none)."""
    pid = os.getpid() if pid is None else pid
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return _mark_by_ps(pid) if not Path("/proc/self/stat").exists() else None
    except ProcessLookupError:
        return None
    # The second field is the program's name in brackets, which may itself hold blanks and brackets.
    fields = stat.rpartition(")")[2].split()
    state, start_ticks = fields[0], fields[19]
    return None if state in "ZX" else f"{pid}:{start_ticks}"


def _mark_by_ps(pid: int) -> str | None:
    listed = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, start = listed.stdout.strip().partition(" ")
    return f"{pid}:{'-'.join(start.split())}" if start and not state.startswith("Z") else None


def alive(process: str) -> bool:
    """Whether the process that once had this mark still runs."""
    pid = process.partition(":")[0]
    return pid.isdigit() and mark(int(pid)) == process


def die_with_owner(*, every_s: float = 0.5, grace_s: float = 15.0) -> bool:
    """Watch the process named in PEG_OWNER from a daemon thread; when it is gone, end this one.

    SIGTERM comes first, SIGKILL after grace_s. Returns False, and watches nothing, where no owner is named.
    """
    owner = os.environ.get(OWNER, "")
    if not owner:
        return False

    def watch() -> None:
        while alive(owner):
            time.sleep(every_s)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-owner", daemon=True).start()
    return True


def run_streaming(
    command: Sequence[str],
    on_line: Callable[[str], None],
    *,
    records: Path,
    cwd: Path,
    env: Mapping[str, str],
    grace_s: float = 5.0,
) -> int:
    """Run a command, hand over each line of its output and errors as it comes, and return its exit status.

    The command gets a process group of its own, a record under `records`, and this process as its PEG_OWNER.
    Whatever ends this call early (Ctrl-C, a signal's exception) ends the whole group first.
    """
    child = subprocess.Popen(
        command,
        cwd=cwd,
        env={**env, OWNER: mark() or ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    record = records / f"{child.pid}.json"
    try:
        write_json(record, {"process": mark(child.pid), "owner": mark(), "command": list(command)})
        assert child.stdout is not None
        for line in child.stdout:
            on_line(line.rstrip())
        return child.wait()
    finally:
        if child.poll() is None:
            end_group(child.pid, grace_s=grace_s, reap=child.poll)
        record.unlink(missing_ok=True)


def end_group(leader: int, *, grace_s: float, reap: Callable[[], object] = lambda: None) -> None:
    """End a process group: SIGINT, then SIGTERM, then SIGKILL, with grace_s after each of the first two."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(leader, number)
        except (ProcessLookupError, PermissionError):
            return
        until = time.monotonic() + grace_s
        while time.monotonic() < until:
            reap()
            if not _group_runs(leader):
                return
            time.sleep(_POLL_S)


def _group_runs(leader: int) -> bool:
    """Whether any member of the group is more than a zombie."""
    if not Path("/proc/self/stat").exists():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, 0)
            return True
        return False
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                if fields[2] == str(leader) and fields[0] not in "ZX":
                    return True
    return False


def end_stale(records: Path, *, grace_s: float = 5.0) -> list[str]:
    """End what earlier runs started and left behind: recorded, still running, its owner gone.

    Returns the commands that were ended. A live owner's children are left alone.
    """
    ended = []
    for path in sorted(records.glob("*.json")):
        record = read_json(path)
        process, owner = record["process"] or "", record["owner"] or ""
        if alive(owner):
            continue
        if alive(process):
            end_group(int(process.partition(":")[0]), grace_s=grace_s)
            ended.append(" ".join(record["command"]))
        path.unlink(missing_ok=True)
    return ended
