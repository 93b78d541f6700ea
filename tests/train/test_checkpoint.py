"""Checkpoints on real disks: full, cut, emptied, gone."""

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peg.errors import InputError, StageError
from peg.train import checkpoint
from peg.train.identity import NO_INFLUENCE, ROUNDING, Identity, differences, identity_of
from tests.train.small import small_config

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
TRAINING = {"seed": 7, "train.epochs": 2}
STATE = {"identity": {"training": TRAINING, "bits": {}}, "best": None, "floats": [0.1, 1e-300, 2 / 3]}


def save(root: Path, step: int, *, kilobytes: int = 4, **state: Any) -> Path:
    tensors = {"model": {"w": torch.full((256 * kilobytes,), float(step))}, "optimizer": {"0.step": torch.tensor(step)}}
    return checkpoint.save(root, step=step, tensors=tensors, state={**STATE, **state}, keep=2)


def latest(root: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    found = checkpoint.latest(root, training=TRAINING, say=said.append)
    if found:
        assert float(found.tensors["model"]["w"][0]) == found.step
    return (found.step if found else None), said


def test_what_was_saved_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") == (None, [])
    for step in (2, 4, 6):
        save(tmp_path, step)
    found = checkpoint.read(tmp_path, step=6)
    assert (found.step, found.state) == (6, STATE)
    assert torch.equal(found.tensors["optimizer"]["0.step"], torch.tensor(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(path.read_bytes()[:-3] + bytes([path.read_bytes()[-3] ^ 1]) + b"}\n"),
        lambda path: path.write_bytes(path.read_bytes().replace(b"6", b"5")),
        lambda path: path.unlink(),
    ],
    ids=["empty", "cut", "flipped", "changed", "gone"],
)
def test_any_damage_to_any_file_is_named_and_the_checkpoint_before_taken(
    tmp_path: Path, name: str, damage: Any
) -> None:
    save(tmp_path, 4)
    folder = save(tmp_path, 6)
    before = (folder / name).read_bytes()
    damage(folder / name)
    if (folder / name).exists() and (folder / name).read_bytes() == before:
        pytest.skip("this file holds nothing that this damage changes")
    step, (line,) = latest(tmp_path)
    assert step == 4
    assert line.startswith(f"checkpoint {folder} is damaged (")
    assert name in line
    assert "going back to the one before" in line


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"step": 6, "sha256": {}}'])
def test_json_of_another_shape_is_damage_too(tmp_path: Path, content: str) -> None:
    save(tmp_path, 4)
    (save(tmp_path, 6) / "state.json").write_text(content)
    assert latest(tmp_path)[0] == 4


def test_where_all_are_damaged_nothing_starts_anew_without_a_word(tmp_path: Path) -> None:
    for step in (4, 6):
        (save(tmp_path, step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(StageError) as caught:
        latest(tmp_path)
    line = str(caught.value)
    assert line.startswith(f"no checkpoint in {tmp_path} is whole (step-00000006: model.safetensors does not have")
    assert "step-00000004: " in line
    assert "put a copy of one back, or remove" in line
    assert "\n" not in line


def test_another_training_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 4)
    with pytest.raises(InputError, match=r"another run \(seed was 7, is 8; train\.epochs was 2, is None\)"):
        checkpoint.latest(tmp_path, training={"seed": 8}, say=print)


def test_every_parameter_is_sorted_by_what_it_changes() -> None:
    config = small_config(Path("model")).model_dump(mode="json")
    assert set(config) >= NO_INFLUENCE | ROUNDING
    assert not NO_INFLUENCE & ROUNDING
    cpu = torch.device("cpu")

    def of(config: dict[str, Any], world_size: int = 2) -> Identity:
        task = {"config": config, "seed": 7, "data_digest": "d"}
        tokens = config["micro_batch_tokens"]
        return identity_of(task, world_size=world_size, device=cpu, micro_batch_tokens=tokens, embedding="padded")

    def changed(key: str, value: Any) -> tuple[bool, bool]:
        before, now = of(config), of({**config, key: value})
        return bool(differences(before.training, now.training)), bool(differences(before.bits, now.bits))

    assert changed("temperature", 0.05) == (True, False)
    assert changed("batch_size", 6) == (True, False)
    assert changed("score_block", 61) == (False, True)
    assert changed("checkpoint_every", 9) == (False, False)
    assert changed("micro_batch_tokens", 64) == (False, True)
    one, two = (of(config, world_size) for world_size in (1, 2))
    assert differences(one.training, two.training) == ""
    assert differences(one.bits, two.bits) == "world size was 1, is 2"
    assert json.loads(json.dumps(two.state())) == two.state()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB; it can be made larger by the name that it is mounted under."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here, the file limit's test stands in: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    save(root, 4, kilobytes=20)
    with pytest.raises(StageError) as caught:
        save(root, 6, kilobytes=60)
    line = str(caught.value)
    assert line.startswith(
        f"the checkpoint of step 6 could not be written to {root}: the disk is full; it takes 0.1 MB"
    )
    assert "are free there. Make room and run the same command again; training goes on from step-00000004" in line
    assert "\n" not in line
    assert latest(root) == (4, [])
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    save(root, 6, kilobytes=60)
    assert latest(root) == (6, [])


def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_no_half_of_it(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, filler = small_disk / "checkpoints", small_disk / "filler"
    save(root, 4, kilobytes=4)
    free = shutil.disk_usage(small_disk).free
    # The look at the free space sees enough; then somebody else writes: at a later page each time.
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1 << 30))
    for pages_left in range(free // 4096):
        filler.write_bytes(b"0" * (free - pages_left * 4096))
        try:
            save(root, 6, kilobytes=16)
        except StageError as error:
            assert "step 6 could not be written to" in str(error)
            assert "No space left on device" in str(error)
            assert "training goes on from step-00000004" in str(error)
            assert [path.name for path in root.iterdir()] == ["step-00000004"]
            assert latest(root) == (4, [])
        else:
            break
    assert pages_left > 5, "weights, optimizer and state were to run out of space one after the other"
    assert latest(root) == (6, [])


def test_a_limit_on_a_files_size_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    """What any user can really have: the system refuses to write on in the middle of a file."""
    save(tmp_path, 4)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save(tmp_path, 6, kilobytes=100)
        except StageError as error:
            os._exit(0 if "File too large" in str(error) and "step-00000004" in str(error) else 2)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert latest(tmp_path) == (4, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
