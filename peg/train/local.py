"""The local launcher: ranks on this machine, one in this process, or several in processes of their own.

A rank that dies ends the others, and all start again from the newest checkpoint, up to train.max_failures times; one
that says what is wrong (an error of this project's) is not asked twice. The same worker serves under torchrun, in a
folder that holds a training's data and task.json already:

    torchrun --nproc-per-node 2 -m peg.train.local FOLDER
"""

import errno
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from peg.config import Train
from peg.errors import InputError, PegError, StageError
from peg.model.distributed import Alone, Group, Workers
from peg.process import OWNER, die_with_owner, mark
from peg.train import loop

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
MEETING = "rendezvous-"
"""What the file begins with over which ranks meet: torch's own TCP store would listen on every interface."""

_MEETING_FILE = "PEG_RENDEZVOUS"
_COMPLAINT = "peg: "
_TAIL_BYTES = 1 << 16
_POLL_S = 0.05
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _RankDied(Exception):
    """A rank ended without saying what is wrong."""


def launch(folder: Path, config: Train) -> None:
    """Train what `folder` says, to the end, over config.num_workers ranks."""
    if config.num_workers == 1:
        run_rank(folder, Alone(), device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < config.num_workers:
        raise InputError(
            f"train.num_workers is {config.num_workers}, but this machine has {num_gpus} GPUs; set it to at most "
            f"{num_gpus}"
        )
    failures = 0
    while True:
        try:
            _run_ranks(folder, config)
            return
        except _RankDied as error:
            failures += 1
            if failures > config.max_failures:
                raise StageError(f"{error}; run the same command again to go on from the newest checkpoint") from error
            note(folder, f"{error}; starting again ({failures} of {config.max_failures})")


def run_rank(folder: Path, group: Group, *, device: torch.device) -> None:
    """What every rank does, under every launcher: the loop, where a full disk is a StageError of one line."""
    try:
        loop.run(folder, group, device=device)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in _FULL or any(f"os error {number}" in str(error) for number in _FULL)
        if not full:
            raise
        raise StageError(
            f"{error}: no room to go on with the training in {folder}; make room and run the same command again, it "
            "goes on from the newest checkpoint"
        ) from error


def note(folder: Path, line: str) -> None:
    """Say a line in the training's log while no rank writes there; a row that a kill cut off goes."""
    with (folder / loop.METRICS).open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{json.dumps({'event': line}, ensure_ascii=False)}\n".encode())


def forget_meetings(folder: Path) -> None:
    """Remove the files over which the ranks of runs that were killed have met."""
    for old in folder.glob(f"{MEETING}*"):
        old.unlink(missing_ok=True)


class _Rank:
    """One rank's process; what it says on stderr is kept, not shown."""

    def __init__(self, folder: Path, number: int, *, meeting: Path, config: Train) -> None:
        self.number = number
        self.said = b""
        code = str(Path(__file__).parents[2])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peg.train.local", str(folder)],
            env={
                **os.environ,
                OWNER: mark() or "",
                _MEETING_FILE: str(meeting),
                "RANK": str(number),
                "LOCAL_RANK": str(number),
                "WORLD_SIZE": str(config.num_workers),
                "OMP_NUM_THREADS": str(config.threads_per_worker),
                "GLOO_SOCKET_IFNAME": LOOPBACK,
                "NCCL_SOCKET_IFNAME": LOOPBACK,
                # The code that runs here, whatever the working folder holds.
                "PYTHONSAFEPATH": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH", "")])),
            },
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        assert self.process.stderr is not None
        self.stderr = self.process.stderr
        os.set_blocking(self.stderr.fileno(), False)

    def listen(self) -> None:
        while chunk := self.stderr.read(_TAIL_BYTES):
            self.said = (self.said + chunk)[-_TAIL_BYTES:]

    def complaint(self) -> str:
        """What it said was wrong, as one of this project's errors; else ""."""
        lines = self.said.decode(errors="replace").splitlines()
        return "\n".join(line.removeprefix(_COMPLAINT) for line in lines if line.startswith(_COMPLAINT))

    def ending(self) -> str:
        """How it ended, where it made no complaint."""
        status = self.process.returncode
        if status < 0:
            return f"rank {self.number} was ended by {signal.Signals(-status).name}"
        last = (self.said.decode(errors="replace").strip().splitlines() or [f"exit status {status}"])[-1]
        return f"rank {self.number} failed: {last.removeprefix(f'[rank{self.number}]: ')}"


def _run_ranks(folder: Path, config: Train) -> None:
    forget_meetings(folder)
    meeting = folder.resolve() / f"{MEETING}{secrets.token_hex(8)}"
    ranks: list[_Rank] = []
    try:
        for number in range(config.num_workers):
            ranks.append(_Rank(folder, number, meeting=meeting, config=config))  # noqa: PERF401 (started ones must end)
        failed = _wait(ranks)
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.wait()
            rank.listen()
            rank.stderr.close()
    if not failed:
        return
    if complaint := failed.complaint():
        raise (InputError if failed.process.returncode == InputError.exit_code else StageError)(complaint)
    kept = folder / f"rank-{failed.number}.log"
    with suppress(OSError):  # the disk may be what failed
        kept.write_bytes(failed.said)
    raise _RankDied(f"{failed.ending()} (its output is in {kept})")


def _wait(ranks: list[_Rank]) -> _Rank | None:
    """The rank that failed first, or None when all have finished.

    When one dies the others soon fail at a connection that is gone: of several found dead at once, the one that was
    killed, or that says what is wrong, is the cause.
    """
    while True:
        statuses = [rank.process.poll() for rank in ranks]
        for rank in ranks:
            rank.listen()
        if failed := [rank for rank, status in zip(ranks, statuses, strict=True) if status]:
            return min(failed, key=lambda rank: (rank.process.returncode > 0 and not rank.complaint(), rank.number))
        if all(status == 0 for status in statuses):
            return None
        time.sleep(_POLL_S)


def _work(folder: Path) -> None:
    try:
        rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except KeyError as error:
        raise InputError(f"{error} is not set; start this as `torchrun … -m peg.train.local FOLDER`") from error
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    meeting = os.environ.get(_MEETING_FILE)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        # Without a file, torchrun's environment says where they meet.
        store=dist.FileStore(meeting, world_size) if meeting else None,  # type: ignore[attr-defined]
        rank=rank,
        world_size=world_size,
    )
    run_rank(folder, Workers(), device=torch.device("cuda", local_rank) if cuda else torch.device("cpu"))
    dist.destroy_process_group()


def main() -> None:
    """What one rank runs; an error of this project's is a line on stderr and its exit code, as at the command line."""
    die_with_owner()
    try:
        if len(sys.argv) != 2:
            raise InputError(f"{len(sys.argv) - 1} arguments; give the training's folder alone")
        _work(Path(sys.argv[1]))
    except PegError as error:
        for line in str(error).splitlines():
            print(f"{_COMPLAINT}{line}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
