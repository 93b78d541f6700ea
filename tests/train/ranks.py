"""What tests of several ranks have in common: ranks that no launcher started, and looks at a training that runs."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from peg.model.distributed import Workers
from peg.model.encoder import WEIGHTS
from peg.train import loop
from peg.workspace import file_sha256


def train_on_plain_ranks(folder: Path, *, num_ranks: int) -> None:
    """What a launcher's result is compared with."""
    mp.spawn(_plain_rank, args=(num_ranks, folder), nprocs=num_ranks)


def _plain_rank(rank: int, num_ranks: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/plain", rank=rank, world_size=num_ranks)
    loop.run(folder, Workers(), device=torch.device("cpu"))
    dist.destroy_process_group()


def same_weights(one: Path, other: Path) -> bool:
    return file_sha256(one / "final" / WEIGHTS) == file_sha256(other / "final" / WEIGHTS)


def steps_done(folder: Path) -> int:
    metrics = folder / loop.METRICS
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.is_file() else []
    return max((json.loads(line).get("step", 0) for line in lines), default=0)


def wait_for_step(folder: Path, step: int, *, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while steps_done(folder) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def events(folder: Path) -> list[str]:
    metrics = folder / loop.METRICS
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return [row["event"] for row in map(json.loads, lines) if "event" in row]


def losses(folder: Path) -> list[dict[str, Any]]:
    """The rows of its steps, without their times."""
    rows = [json.loads(line) for line in (folder / loop.METRICS).read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows if "loss" in row]
