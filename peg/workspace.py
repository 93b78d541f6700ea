"""Where a stage works, and how its outputs come into being.

DVC deletes a stage's outputs before it runs the stage, unfinished work included. So a stage works under
`.peg/work/<stage>/<key>/`, where the key is a hash of its inputs, parameters and code, and its outputs are moved
into place when all are complete. A killed stage goes on in the same folder; another recipe gets another folder.
The stage's inputs and outputs are those that dvc.yaml gives it: the graph is written down once.
"""

import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peg.errors import InputError, StageError

STATE = Path(".peg")
"""All that the project writes beside its outputs, relative to the project's folder."""

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20


def make_state_private() -> None:
    """Make `.peg` a folder that its owner alone can enter: runs, tokens and stores lie there."""
    STATE.mkdir(mode=0o700, exist_ok=True)
    STATE.chmod(0o700)


def write_json(path: Path, value: Any) -> None:
    """Write aside and rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    aside.replace(path)


def read_json(path: Path) -> Any:
    """Parse a JSON file; InputError in one line where it is absent or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is not here; run the stage that writes it (`dvc repro`, `make demo`)") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); remove it and run the stage that writes it again") from error


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def path_digest(path: Path) -> str:
    """Hex digest of a file, or of a folder's relative names and contents.

    A folder with a manifest is known by its manifest, which holds the digest of each shard.
    """
    if path.is_file():
        return file_sha256(path)
    if (path / MANIFEST).is_file():
        return file_sha256(path / MANIFEST)
    if not path.is_dir():
        raise InputError(f"{path} is not here; run the stage before (`dvc repro` runs all in order)")
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(f"{file.relative_to(path).as_posix()}\0{path_digest(file)}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Wiring:
    """What dvc.yaml says of one stage: paths relative to the project's folder."""

    deps: tuple[Path, ...]
    params: tuple[str, ...]
    outs: tuple[Path, ...]


def wiring(stage: str, *, dvc_file: Path = Path("dvc.yaml")) -> Wiring:
    """Read a stage's inputs, parameter sections and outputs from dvc.yaml."""
    try:
        stages = yaml.safe_load(dvc_file.read_text(encoding="utf-8"))["stages"]
    except FileNotFoundError as error:
        raise InputError(f"{dvc_file} is not here; run `peg {stage}` in the project's folder") from error
    if stage not in stages:
        raise InputError(f"{dvc_file} has no stage {stage!r}, only {', '.join(stages)}")
    entry = stages[stage]
    outs = [name for kind in ("outs", "metrics", "plots") for name in _names(entry.get(kind, []))]
    return Wiring(
        deps=tuple(Path(name) for name in _names(entry.get("deps", []))),
        params=tuple(_names(entry.get("params", []))),
        outs=tuple(Path(name) for name in outs),
    )


def _names(entries: list[Any]) -> list[str]:
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def key_of(deps: dict[str, str], params: Any) -> str:
    """The name of a piece of work: 16 hex digits over its inputs' digests and its parameters."""
    text = json.dumps([deps, params], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Work:
    """A stage's folder while it runs: write outputs to `work.out(path)` with the path that dvc.yaml gives."""

    stage: str
    key: str
    folder: Path
    outs: tuple[Path, ...]
    deps: tuple[Path, ...]

    def require_input(self, path: str, *, key: str) -> None:
        """Raise InputError if the parameter `key` names a path that DVC does not watch for this stage."""
        wanted = Path(path).resolve()
        if not any(wanted.is_relative_to(dep.resolve()) for dep in self.deps):
            raise InputError(
                f"{key} is {path}, which is no input of the stage {self.stage}: DVC would not see it change; "
                f"add it to the stage's deps in dvc.yaml"
            )

    def out(self, path: str | Path) -> Path:
        """Where to write the output that will stand at `path`."""
        path = Path(path)
        if path not in self.outs:
            raise AssertionError(f"stage {self.stage} has no output {path} in dvc.yaml")
        aside = self.folder / "out" / path
        aside.parent.mkdir(parents=True, exist_ok=True)
        return aside

    @property
    def scratch(self) -> Path:
        """For what outlives a kill but is no output: checkpoints, caches."""
        folder = self.folder / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@contextmanager
def stage_work(stage: str, *, sections: dict[str, Any]) -> Iterator[Work]:
    """Run a stage: `with stage_work("mine", sections={"mining": config.mining.model_dump(mode="json")}) as work`.

    On success the outputs move into place and the work folder goes. On failure the work is kept, and
    `.peg/status/<stage>.json` says how it ended. Raises StageError if the inputs changed while the stage ran.
    """
    wires = wiring(stage)
    parameters = _parameters(wires.params)
    key = key_of(_digests(wires.deps), sections)
    work = Work(stage=stage, key=key, folder=STATE / "work" / stage / key, outs=wires.outs, deps=wires.deps)
    work.folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    _write_status(stage, state="running", key=key, started=started)
    try:
        yield work
        if key_of(_digests(wires.deps), sections) != key or _parameters(wires.params) != parameters:
            raise StageError(
                f"inputs, parameters or code of stage {stage} changed while it ran; its work is kept in {work.folder}: "
                "undo the change to go on there, or run the stage again to start anew"
            )
        for out in work.outs:
            _move_into_place(work.out(out), out)
        shutil.rmtree(work.folder)
    except BaseException as error:
        _write_status(stage, state="failed", key=key, started=started, error=f"{type(error).__name__}: {error}")
        raise
    _write_status(stage, state="done", key=key, started=started)


def _parameters(names: tuple[str, ...], *, params_file: Path = Path("params.yaml")) -> dict[str, Any]:
    """The values that DVC will record for these dotted keys, as the file has them now."""
    tree = yaml.safe_load(params_file.read_text(encoding="utf-8")) if params_file.is_file() else {}
    values: dict[str, Any] = {}
    for name in names:
        value: Any = tree
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        values[name] = value
    return values


def _digests(paths: tuple[Path, ...]) -> dict[str, str]:
    return {path.as_posix(): path_digest(path) for path in paths}


def _move_into_place(aside: Path, path: Path) -> None:
    if not aside.exists():
        raise StageError(f"the stage ended without writing {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    aside.replace(path)


def _write_status(stage: str, *, state: str, key: str, started: float, error: str | None = None) -> None:
    peak_kib = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    write_json(
        STATE / "status" / f"{stage}.json",
        {
            "stage": stage,
            "state": state,
            "key": key,
            "pid": os.getpid(),
            "started": started,
            "seconds": round(time.time() - started, 3),
            "peak_memory_mb": round(peak_kib / 1024 if sys.platform == "linux" else peak_kib / 2**20, 1),
            "error": error,
        },
    )
