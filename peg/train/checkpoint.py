"""Checkpoints that a crash cannot spoil: written aside, synced, renamed; verified when read.

A checkpoint is a folder `step-00000120/` of safetensors and one JSON, which holds each file's sha256 and its own.
Tensors are named; nothing is pickled.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peg.errors import InputError, StageError
from peg.train.identity import differences
from peg.workspace import file_sha256, write_json

_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")
# What a file that is cut, emptied, changed or gone is met with; JSON of another shape gives the last three.
_UNREADABLE = (OSError, ValueError, SafetensorError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Checkpoint:
    """tensors: by file stem ('model', 'optimizer', …), then by name. state: whatever JSON holds."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    root: Path, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write the checkpoint after `step` optimizer steps, then remove all but the newest `keep`.

    Raises StageError where there is no room for it, or the disk refuses it; those that were there stay.
    """
    root.mkdir(parents=True, exist_ok=True)
    size_bytes = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())
    folder = root / f"step-{step:08d}"
    aside = root / f".step-{step:08d}.partial"
    for unfinished in root.glob(".step-*.partial"):
        shutil.rmtree(unfinished)
    if shutil.disk_usage(root).free < size_bytes:
        raise StageError(_no_room(root, step=step, size_bytes=size_bytes, reason="the disk is full"))
    try:
        _write(aside, step=step, tensors=tensors, state=state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StageError(_no_room(root, step=step, size_bytes=size_bytes, reason=str(error))) from error
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    _sync(root)
    for old in _folders(root)[:-keep]:
        shutil.rmtree(old)
    return folder


def _write(folder: Path, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    folder.mkdir()
    digests = {}
    for stem, named in tensors.items():
        path = folder / f"{stem}.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, path)
        digests[path.name] = file_sha256(path)
    content = {**state, "step": step, "sha256": digests}
    write_json(folder / _STATE, {**content, "state_sha256": _json_sha256(content)})
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _no_room(root: Path, *, step: int, size_bytes: int, reason: str) -> str:
    before = newest(root)
    on = f"training goes on from {before.name}" if before else "there is no checkpoint before it"
    return (
        f"the checkpoint of step {step} could not be written to {root}: {reason}; it takes {_megabytes(size_bytes)}, "
        f"{_megabytes(shutil.disk_usage(root).free)} are free there. Make room and run the same command again; {on}"
    )


def newest(root: Path) -> Path | None:
    """The folder of the newest checkpoint, unread; None where there is none."""
    return folders[-1] if (folders := _folders(root)) else None


def latest(root: Path, *, training: Mapping[str, Any], say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, or None where none was ever written.

    One that is damaged is named through `say` and the one before it taken. Where all are, StageError: starting anew
    would throw away a training without a word. `training` is what must not have changed (identity.Identity.training,
    under state["identity"]); a difference is refused with InputError.
    """
    damaged = []
    for folder in reversed(_folders(root)):
        try:
            checkpoint = _read(folder)
        except _UNREADABLE as error:
            damaged.append(f"{folder.name}: {_reason(error)}")
            say(f"checkpoint {folder} is damaged ({_reason(error)}); going back to the one before")
            continue
        if found := differences(checkpoint.state.get("identity", {}).get("training", {}), training):
            raise InputError(f"{folder} belongs to another run ({found}); remove {root} to start anew")
        return checkpoint
    if damaged:
        raise StageError(
            f"no checkpoint in {root} is whole ({'; '.join(damaged)}); put a copy of one back, or remove {root} to "
            "train anew from the first step"
        )
    return None


def read(root: Path, *, step: int) -> Checkpoint:
    """The checkpoint of that step; InputError where it is damaged or absent."""
    folder = root / f"step-{step:08d}"
    try:
        return _read(folder)
    except _UNREADABLE as error:
        raise InputError(f"{folder} is damaged ({_reason(error)}); remove {root.parent} and train again") from error


def _read(folder: Path) -> Checkpoint:
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if _json_sha256({key: value for key, value in state.items() if key != "state_sha256"}) != state["state_sha256"]:
        raise ValueError(f"{_STATE} does not have the sha256 it was written with")
    tensors = {}
    for name, digest in state["sha256"].items():
        if file_sha256(folder / name) != digest:
            raise ValueError(f"{name} does not have the sha256 it was written with")
        tensors[Path(name).stem] = load_file(folder / name)
    written = {key: value for key, value in state.items() if key not in ("step", "sha256", "state_sha256")}
    return Checkpoint(step=state["step"], tensors=tensors, state=written)


def _reason(error: BaseException) -> str:
    """What is wrong with a checkpoint, with the file's name."""
    if isinstance(error, FileNotFoundError):
        return f"{Path(str(error.filename)).name} is missing"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"{_STATE} is not JSON: {error}"
    if isinstance(error, KeyError | TypeError | AttributeError):
        return f"{_STATE} does not hold what a checkpoint says: {error}"
    return str(error)


def _json_sha256(value: Any) -> str:
    as_read = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if _NAME.fullmatch(path.name)) if root.is_dir() else []


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
