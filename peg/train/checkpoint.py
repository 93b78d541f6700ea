"""Checkpoints that a crash cannot spoil: written aside, synced, renamed; verified when read.

A checkpoint is a folder `step-00000120/` of safetensors and one JSON, which holds each file's sha256. Tensors are
named; nothing is pickled.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from peg.errors import InputError
from peg.workspace import file_sha256, read_json, write_json

_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """tensors: by file stem ('model', 'optimizer', …), then by name. state: whatever JSON holds."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    root: Path, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write the checkpoint after `step` optimizer steps, then remove all but the newest `keep`."""
    folder = root / f"step-{step:08d}"
    aside = root / f".step-{step:08d}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    digests = {}
    for stem, named in tensors.items():
        path = aside / f"{stem}.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, path)
        digests[path.name] = file_sha256(path)
    write_json(aside / _STATE, {**state, "step": step, "sha256": digests})
    for path in (*aside.iterdir(), aside):
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    _sync(root)
    for old in _folders(root)[:-keep]:
        shutil.rmtree(old)
    return folder


def latest(root: Path, *, identity: Mapping[str, Any], say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, or None where there is none.

    One that is damaged is named through `say` and the one before it taken. `identity` is what must not have changed
    (data, configuration, number of ranks); a difference is refused with InputError.
    """
    for folder in reversed(_folders(root)):
        try:
            checkpoint = _read(folder)
        except (InputError, OSError, ValueError) as error:
            say(f"checkpoint {folder} is damaged ({error}); going back to the one before")
            continue
        differing = {
            key: (checkpoint.state.get("identity", {}).get(key), value)
            for key, value in identity.items()
            if checkpoint.state.get("identity", {}).get(key) != value
        }
        if differing:
            found = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in differing.items())
            raise InputError(f"{folder} belongs to another run ({found}); remove {root} to start anew")
        return checkpoint
    return None


def read(root: Path, *, step: int) -> Checkpoint:
    """The checkpoint of that step; InputError where it is damaged or absent."""
    folder = root / f"step-{step:08d}"
    try:
        return _read(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is damaged ({error}); remove {root.parent} and train again") from error


def _read(folder: Path) -> Checkpoint:
    state = read_json(folder / _STATE)
    tensors = {}
    for name, digest in state.pop("sha256").items():
        if file_sha256(folder / name) != digest:
            raise ValueError(f"{name} does not have the sha256 it was written with")
        tensors[Path(name).stem] = load_file(folder / name)
    return Checkpoint(step=state.pop("step"), tensors=tensors, state=state)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if _NAME.fullmatch(path.name)) if root.is_dir() else []


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
