"""Real Ray Train workers on this machine."""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from peg.adapters import ray as adapter
from peg.model.distributed import Workers
from peg.model.encoder import WEIGHTS
from peg.train import loop
from peg.workspace import file_sha256, read_json
from tests.train.small import prepare_small


def plain_worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    loop.run(folder, Workers(), device=torch.device("cpu"))
    dist.destroy_process_group()


def listening_addresses() -> set[str]:
    """Addresses on which the processes that this one started wait for connections."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def kill_a_worker(metrics: Path, killed: list[int], addresses: set[str]) -> None:
    """Once step 20 is through, note who listens where, and send SIGKILL to one training worker of this Ray."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        steps = (
            [json.loads(line).get("step", 0) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        )
        if max(steps, default=0) >= 20:
            addresses |= listening_addresses()
            for process in psutil.Process().children(recursive=True):
                if "RayTrainWorker" in process.name() or "RayTrainWorker" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
        time.sleep(0.05)


def test_workers_survive_a_kill_and_end_in_the_bits_of_plain_ranks(
    tmp_path: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, over_ray = tmp_path / "plain", tmp_path / "ray"
    for folder in (plain, over_ray):
        config = prepare_small(folder, encoder_folder, launcher="ray", num_workers=2, epochs=60)
    mp.spawn(plain_worker, args=(plain,), nprocs=2)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    killed: list[int] = []
    addresses: set[str] = set()
    killer = threading.Thread(target=kill_a_worker, args=(over_ray / loop.METRICS, killed, addresses), daemon=True)
    killer.start()
    adapter.launch(over_ray, config)
    killer.join()

    assert killed, "no worker was found to kill"
    assert addresses, "no server of Ray was found to listen"
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    events = [json.loads(line).get("event", "") for line in (over_ray / loop.METRICS).read_text().splitlines()]
    assert any("going on from step" in event for event in events)
    assert read_json(over_ray / "summary.json") == read_json(plain / "summary.json")
    assert file_sha256(over_ray / "final" / WEIGHTS) == file_sha256(plain / "final" / WEIGHTS)
    assert oct((tmp_path / ".peg" / "ray-token").stat().st_mode)[-3:] == "600"
