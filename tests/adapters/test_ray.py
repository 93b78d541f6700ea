"""Real Ray Train workers on this machine."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from peg.adapters import ray as adapter
from peg.errors import StageError
from peg.workspace import read_json
from tests.train.ranks import events, same_weights, steps_done, train_on_plain_ranks
from tests.train.small import prepare_small


def listening_addresses() -> set[str]:
    """Addresses on which the processes that this one started wait for connections."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def kill_a_worker(folder: Path, killed: list[int], addresses: set[str]) -> None:
    """Once step 20 is through, note who listens where, and send SIGKILL to one training worker of this Ray."""
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline:
        if steps_done(folder) >= 20:
            addresses |= listening_addresses()
            for process in psutil.Process().children(recursive=True):
                if "RayTrainWorker" in process.name() or "RayTrainWorker" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
        time.sleep(0.05)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One working folder for all of this file: a process of Ray's reads its token once."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield folder


def test_workers_survive_a_kill_and_end_in_the_bits_of_plain_ranks(
    tmp_path: Path, encoder_folder: Path, home: Path
) -> None:
    plain, over_ray = tmp_path / "plain", tmp_path / "ray"
    for folder in (plain, over_ray):
        config = prepare_small(folder, encoder_folder, launcher="ray", num_workers=2, epochs=60)
    train_on_plain_ranks(plain, num_ranks=2)

    killed: list[int] = []
    addresses: set[str] = set()
    killer = threading.Thread(target=kill_a_worker, args=(over_ray, killed, addresses), daemon=True)
    killer.start()
    adapter.launch(over_ray, config)
    killer.join()

    assert killed, "no worker was found to kill"
    assert addresses, "no server of Ray was found to listen"
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert any(line.startswith("workers died (rank ") for line in events(over_ray))
    assert any("going on from step" in line for line in events(over_ray))
    assert read_json(over_ray / "summary.json") == read_json(plain / "summary.json")
    assert same_weights(over_ray, plain)
    assert oct((home / ".peg" / "ray-token").stat().st_mode)[-3:] == "600"


@pytest.mark.slow
def test_what_a_worker_says_is_wrong_is_the_line_that_a_person_sees_and_is_not_tried_again(
    tmp_path: Path, encoder_folder: Path, home: Path
) -> None:
    config = prepare_small(tmp_path / "work", encoder_folder, launcher="ray", num_workers=2, max_failures=5)
    (tmp_path / "work" / "checkpoints" / "step-00000002").mkdir(parents=True)
    with pytest.raises(StageError, match=r"^no checkpoint in \S+ is whole \(step-00000002: state.json is missing\)"):
        adapter.launch(tmp_path / "work", config)
    assert not events(tmp_path / "work")
