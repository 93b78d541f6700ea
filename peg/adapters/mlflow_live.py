"""Metrics of a training, in MLflow while it runs. A help for the person who looks on: it never harms the training."""

import atexit
import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from peg.adapters.mlflow_store import Store, connect
from peg.config import Config
from peg.model.encoder import weights_sha256
from peg.workspace import STATE, read_json

TRAIN_KEY_TAG = "peg.train_key"
WEIGHTS_TAG = "weights_sha256"
TRAINED = Path("models/trained")
_BATCH = 1000
_NOT_METRICS = {"step", "epoch"}


def metric_name(column: str) -> str:
    """The MLflow name of a value of the trainer's rows."""
    return f"dev/{column.removeprefix('dev_')}" if column.startswith("dev_") else f"train/{column}"


def live_run(config: Config) -> Callable[[str, Path], "LiveRun"]:
    """What the train stage takes as its `watch`: told the work's key, it starts a live run, which takes the rows.

    The run is closed when this process ends, by what the stage's status file says then.
    """

    def watch(key: str, _: Path) -> LiveRun:
        run = LiveRun(config.registry.experiment, key=key)
        atexit.register(_close_by_status, run, key)
        return run

    return watch


def _close_by_status(run: "LiveRun", key: str) -> None:
    path = STATE / "status" / "train.json"
    status = read_json(path) if path.is_file() else {}
    done = status.get("key") == key and status.get("state") == "done"
    run.close(weights=weights_sha256(TRAINED) if done and TRAINED.is_dir() else None)


class LiveRun:
    """Takes the trainer's rows, and logs them to an MLflow run from a daemon thread.

    live = LiveRun(experiment, key=work.key); live({"step": 1, "loss": 2.0}); ...; live.close(weights=sha256)

    The run is found again by the key, so that a training that goes on after a kill goes on in its run too.
    """

    def __init__(self, experiment: str, *, key: str, every_s: float = 2.0, close_s: float = 60.0) -> None:
        self._experiment, self._key = experiment, key
        self._every_s, self._close_s = every_s, close_s
        self._rows: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._ended = threading.Event()
        self._failed = False
        self._weights: str | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-live", daemon=True)
        self._thread.start()

    def __call__(self, row: dict[str, Any]) -> None:
        """Take a row, and return at once."""
        if not self._failed:
            self._rows.put(row)

    def close(self, *, weights: str | None) -> None:
        """Log what is left, end the run: finished and tagged with the weights' sha256, or failed where that is None.

        Waits close_s at most. `peg register` finds the run by its weights, or by its key where this never happened.
        """
        self._weights = weights
        self._ended.set()
        self._thread.join(self._close_s)
        if self._thread.is_alive():
            self._warn(f"MLflow did not answer within {self._close_s:g} s")

    def _run(self) -> None:
        try:
            store = connect()
            run_id = self._find_or_start(store)
            last_step = last_steps(store, run_id)
            while not self._ended.wait(self._every_s):
                self._send(store, run_id, last_step)
            self._send(store, run_id, last_step)
            if self._weights:
                store.client.set_tag(run_id, WEIGHTS_TAG, self._weights)
            store.client.set_terminated(run_id, status="FINISHED" if self._weights else "FAILED")
        except Exception as error:  # whatever a store, a network or a driver raises: the training goes on
            self._failed = True
            self._warn(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")

    def _warn(self, what: str) -> None:
        print(f"live metrics stop here, the training goes on ({what})", file=sys.stderr, flush=True)

    def _find_or_start(self, store: Store) -> str:
        experiment_id = store.experiment_id(self._experiment)
        client = store.client
        found = client.search_runs([experiment_id], f"tags.`{TRAIN_KEY_TAG}` = '{self._key}'", max_results=1)
        if not found:
            tags = {TRAIN_KEY_TAG: self._key}
            return str(client.create_run(experiment_id, tags=tags, run_name=f"train {self._key[:8]}").info.run_id)
        run_id = str(found[0].info.run_id)
        client.update_run(run_id, status="RUNNING")
        return run_id

    def _send(self, store: Store, run_id: str, last_step: dict[str, int]) -> None:
        rows = []
        with contextlib.suppress(Empty):
            while True:
                rows.append(self._rows.get_nowait())
        log_new_points(store, run_id, (point for row in rows for point in points(row)), last_step)


def last_steps(store: Store, run_id: str) -> dict[str, int]:
    """The last step that a run holds of each curve."""
    names = [name for name in store.client.get_run(run_id).data.metrics if name.startswith(("train/", "dev/"))]
    histories = {name: store.client.get_metric_history(run_id, name) for name in names}
    return {name: max(point.step for point in history) for name, history in histories.items()}


def log_new_points(
    store: Store, run_id: str, curve: Iterable[tuple[str, int, float]], last_step: dict[str, int]
) -> None:
    """Log what lies beyond last_step, and move that on: steps that are told twice, as after a resume, count once."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    fresh = []
    for name, step, value in curve:
        if step > last_step.get(name, -1):
            last_step[name] = step
            fresh.append(Metric(name, value, now, step))
    for start in range(0, len(fresh), _BATCH):
        store.client.log_batch(run_id, metrics=fresh[start : start + _BATCH])


def points(row: dict[str, Any]) -> Iterator[tuple[str, int, float]]:
    """(metric, step, value) of each finite number in one of the trainer's rows; none from a row without a step."""
    step = row.get("step")
    if not isinstance(step, int):
        return
    for key, value in row.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key not in _NOT_METRICS and is_number and math.isfinite(value):
            yield metric_name(key), step, float(value)
