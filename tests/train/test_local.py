"""Several processes of this machine: the local launcher and torchrun."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from peg.errors import InputError, StageError
from peg.train import local
from peg.workspace import read_json
from tests.train.ranks import events, same_weights, train_on_plain_ranks, wait_for_step
from tests.train.small import prepare_small


def ranks_of(folder: Path) -> list[psutil.Process]:
    """Processes that train in the folder, in the order of their ranks."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:] == ["-m", "peg.train.local", str(folder)]:
                found.append(process)
    return sorted(found, key=lambda process: process.environ()["RANK"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Path:
    """What two ranks give that no launcher of ours has started."""
    folder = tmp_path_factory.mktemp("plain")
    prepare_small(folder, encoder_folder, num_workers=2, epochs=20)
    train_on_plain_ranks(folder, num_ranks=2)
    return folder


@pytest.mark.slow
def test_two_local_processes_survive_a_kill_and_end_in_the_bits_of_plain_ranks(
    tmp_path: Path, encoder_folder: Path, plain: Path
) -> None:
    config = prepare_small(tmp_path, encoder_folder, num_workers=2, epochs=20)

    def kill() -> None:
        wait_for_step(tmp_path, 20)
        ranks_of(tmp_path)[1].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    local.launch(tmp_path, config)
    killer.join()
    said = events(tmp_path)
    assert any(line.startswith("rank 1 was ended by SIGKILL") and "starting again (1 of 1)" in line for line in said)
    assert any("going on from step" in line for line in said)
    assert same_weights(tmp_path, plain)
    assert read_json(tmp_path / "summary.json") == read_json(plain / "summary.json")


@pytest.mark.slow
def test_torchrun_runs_the_same_worker(tmp_path: Path, encoder_folder: Path, plain: Path) -> None:
    prepare_small(tmp_path, encoder_folder, num_workers=2, epochs=20)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "--local-addr", "localhost", "-m", "peg.train.local", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert same_weights(tmp_path, plain)


def test_what_a_rank_says_is_wrong_is_the_line_that_a_person_sees(tmp_path: Path, encoder_folder: Path) -> None:
    config = prepare_small(tmp_path, encoder_folder, num_workers=2)
    (tmp_path / "task.json").unlink()
    with pytest.raises(InputError, match=r"^\S+task\.json is not here; run the stage that writes it"):
        local.launch(tmp_path, config)
    assert not events(tmp_path), "an error of our own must not be tried again"


@pytest.mark.slow
def test_a_rank_that_fails_again_and_again_is_named_with_its_last_words(tmp_path: Path, encoder_folder: Path) -> None:
    config = prepare_small(tmp_path, encoder_folder, num_workers=2, max_failures=1)
    (tmp_path / "examples" / "query.npy").write_bytes(b"no array")
    with pytest.raises(StageError, match=r"^rank \d failed: \w+.*its output is in .*rank-\d.log.*run the same command"):
        local.launch(tmp_path, config)
    assert len([line for line in events(tmp_path) if "starting again (1 of 1)" in line]) == 1
    assert "Traceback" in next(tmp_path.glob("rank-*.log")).read_text(encoding="utf-8")


def test_more_ranks_than_gpus_are_refused(
    tmp_path: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepare_small(tmp_path, encoder_folder, num_workers=2)
    monkeypatch.setattr(local.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="num_workers is 2, but this machine has 1 GPUs; set it to at most 1"):
        local.launch(tmp_path, config)


@pytest.mark.slow
def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path, encoder_folder: Path, plain: Path) -> None:
    config = prepare_small(tmp_path, encoder_folder, num_workers=2, epochs=20)
    script = (
        "import sys; from pathlib import Path; from peg.config import Train; from peg.train import local;"
        "local.launch(Path(sys.argv[1]), Train.model_validate_json(sys.argv[2]))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), config.model_dump_json()])
    wait_for_step(tmp_path, 7)
    left = ranks_of(tmp_path)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert len(left) == 2
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive
    local.launch(tmp_path, config)
    assert same_weights(tmp_path, plain)
