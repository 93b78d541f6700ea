"""What goes wrong in a long training, done to a real one: the run that goes on ends where an unharmed one does."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from peg.errors import StageError
from peg.model.distributed import Alone, Group, Workers
from peg.model.encoder import WEIGHTS, Encoder
from peg.train import local, loop
from peg.train.follow import Follower, TrainingProgress
from tests.train.ranks import events, losses, same_weights, wait_for_step
from tests.train.small import prepare_small

CPU = torch.device("cpu")
CHECKPOINTED = 10  # of 20 steps: every second, so the newest are 8 and 10


class Killed(BaseException):
    """Stands for the moment a process ends."""


def train(folder: Path, group: Group | None = None, *, kill_at: int | None = None) -> None:
    def after_step(step: int) -> None:
        if step == kill_at:
            raise Killed

    loop.run(folder, group or Alone(), device=CPU, after_step=after_step)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("unharmed")
    prepare_small(folder, encoder_folder, epochs=4, max_loss_ratio=4.0)
    train(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, encoder_folder: Path) -> Path:
    """The same training before its first step, dropout on."""
    prepare_small(tmp_path / "work", encoder_folder, epochs=4, max_loss_ratio=4.0)
    return tmp_path / "work"


@pytest.mark.slow
def test_a_driver_killed_in_the_middle_of_an_epoch_goes_on_to_the_same_bits(folder: Path, unharmed: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import torch; from peg.model.distributed import Alone;"
        "from peg.train import loop; loop.run(Path(sys.argv[1]), Alone(), device=torch.device('cpu'))"
    )
    driver = subprocess.Popen([sys.executable, "-c", script, str(folder)])
    wait_for_step(folder, 8)  # an epoch has 5
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (folder / "final").exists()
    train(folder)
    assert any("going on from step" in line for line in events(folder))
    assert same_weights(folder, unharmed)
    assert losses(folder) == losses(unharmed)


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def small_disk(tmp_path: Path, folder: Path, unharmed: Path) -> Iterator[Path]:
    """A disk that holds the training and two and a half checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size_bytes = disk_bytes(folder) + 2.5 * disk_bytes(unharmed / "checkpoints") / 2
    command = ["mount", "-t", "tmpfs", "-o", f"size={int(size_bytes)}", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # arrays are mapped from it


def test_a_training_that_fills_its_disk_goes_on_when_there_is_room(
    small_disk: Path, folder: Path, unharmed: Path
) -> None:
    full = small_disk / "work"
    shutil.copytree(folder, full)
    config = loop.Train.model_validate(loop.read_json(full / "task.json")["config"])
    with pytest.raises(StageError) as caught:
        local.launch(full, config)
    line = str(caught.value)
    assert line.startswith(f"the checkpoint of step 6 could not be written to {full / 'checkpoints'}: the disk is full")
    assert line.endswith("Make room and run the same command again; training goes on from step-00000004")
    assert "\n" not in line
    # Now nothing at all can be written, not even a line of the log.
    (small_disk / "filler").write_bytes(b"0" * shutil.disk_usage(small_disk).free)
    with pytest.raises(StageError, match=r"No space left on device.*no room to go on with the training in"):
        local.launch(full, config)
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    local.launch(full, config)
    assert "going on from step 4 of 20" in events(full)
    assert same_weights(full, unharmed)
    assert losses(full) == losses(unharmed)


def test_a_damaged_checkpoint_is_told_on_the_terminal_and_in_the_log(
    folder: Path, unharmed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Killed):
        train(folder, kill_at=CHECKPOINTED + 1)
    damaged = folder / "checkpoints" / f"step-{CHECKPOINTED:08d}"
    (damaged / "optimizer.safetensors").write_bytes(b"")
    with Follower(folder / loop.METRICS, TrainingProgress(20)):
        train(folder)
    line = f"checkpoint {damaged} is damaged (optimizer.safetensors does not have the sha256 it was written with); "
    assert any(event.startswith(line) for event in events(folder))
    assert f"train: {line}going back to the one before" in capsys.readouterr().err
    assert same_weights(folder, unharmed)


def test_two_damaged_checkpoints_stop_the_run_in_one_line(folder: Path) -> None:
    with pytest.raises(Killed):
        train(folder, kill_at=CHECKPOINTED)
    for state in folder.glob("checkpoints/*/state.json"):
        state.write_text("")
    with pytest.raises(StageError, match=r"no checkpoint in \S+ is whole \(step-00000010: state.json is not JSON: "):
        train(folder)


@pytest.mark.parametrize(
    ("factor", "found"),
    [
        (float("nan"), r"step 12: loss nan, gradient norm [\d.]+; "),
        (5.0, r"step 12: loss [\d.]+ is [\d.]+ times its running mean [\d.]+, train.max_loss_ratio allows 4; "),
    ],
    ids=["nan", "exploding"],
)
def test_a_loss_that_breaks_names_step_rows_and_a_checkpoint_that_is_there(
    folder: Path, unharmed: Path, monkeypatch: pytest.MonkeyPatch, factor: float, found: str
) -> None:
    real, calls = loop.accumulate_gradients, 0

    def break_at_12(*args: Any, **knobs: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, *rest = real(*args, **knobs)
        return (loss * factor if calls == 12 else loss, *rest)

    monkeypatch.setattr(loop, "accumulate_gradients", break_at_12)
    with pytest.raises(StageError, match=found) as caught:
        train(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert "the weights were not changed by it. The batch held the training rows " in line
    named = Path(line.partition("The last good checkpoint is ")[2].partition(". Look")[0])
    assert named == folder / "checkpoints" / "step-00000010"
    assert (named / "model.safetensors").is_file()
    monkeypatch.setattr(loop, "accumulate_gradients", real)
    train(folder)
    assert same_weights(folder, unharmed)


# Another number of workers


class InFloat64:
    """Stands for Encoder where the loop loads one."""

    @staticmethod
    def load(name: str) -> Encoder:
        return Encoder.load(name).double()


def rank_in_float64(rank: int, world_size: int, folder: Path, kill_at: int | None) -> None:
    loop.Encoder = InFloat64  # type: ignore[assignment,misc]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met-{kill_at}", rank=rank, world_size=world_size)
    try:
        train(folder, Workers(), kill_at=kill_at)
    except Killed:
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("first", "then"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)], ids=["two-to-one", "one-to-two"]
)
def test_another_number_of_workers_goes_on_with_the_same_training(
    tmp_path: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch, first: int, then: int
) -> None:
    """Same batches, same schedule; losses and weights equal to 1e-9 in float64, and a line that says what differs."""
    monkeypatch.setattr(loop, "Encoder", SimpleNamespace(load=InFloat64.load))
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    for folder in (whole, changed):
        prepare_small(folder, encoder_folder, dropout=0.0)

    def run(world_size: int, kill_at: int | None) -> None:
        if world_size > 1:
            mp.spawn(rank_in_float64, args=(world_size, changed, kill_at), nprocs=world_size)
        elif kill_at:
            with pytest.raises(Killed):
                train(changed, kill_at=kill_at)
        else:
            train(changed)

    train(whole)
    run(first, 5)
    run(then, None)
    assert events(changed)[-2:] == [
        "going on from step 4 of 10",
        f"world size was {first}, is {then}: the result equals an uninterrupted run's to rounding, not bit for bit",
    ]
    expected, found = losses(whole), losses(changed)
    assert [row["step"] for row in found] == list(range(1, 11))
    for one, other in zip(found, expected, strict=True):
        for key in ("queries", "passages", "learning_rate", "progress"):
            assert one[key] == other[key]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-9)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-9)
    weights = [load_file(folder / "final" / WEIGHTS) for folder in (whole, changed)]
    assert next(iter(weights[0].values())).dtype == torch.float64
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-9, rtol=0)
