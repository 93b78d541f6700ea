"""Which MLflow store is used, and models out of its registry.

The demo's own store is SQLite with artifacts beside it, under `.peg/mlflow`, by absolute path: MLflow's default would
follow the working folder. While `make ui` runs, its server is asked instead, so that one process owns the database.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from peg.errors import InputError, PegError
from peg.process import alive
from peg.workspace import STATE, read_json

UI_FILE = STATE / "ui.json"
_QUIET_LOGGERS = ("alembic", "mlflow.store.db.utils", "mlflow.sentence_transformers", "mlflow.tracking.fluent")
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A server that has gone is to be reported within seconds.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class Store:
    """An open tracking store and its registry; `client` is an MlflowClient."""

    uri: str
    client: Any

    def experiment_id(self, name: str) -> str:
        """Find the experiment, or make it, with its artifacts in the demo's folder where the store is the demo's."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "active":
            return str(found.experiment_id)
        if found is not None:
            raise InputError(
                f"the MLflow experiment {name!r} was deleted; restore it in the UI, or set registry.experiment anew"
            )
        location = artifact_root().as_uri() if self.uri == own_uri() or self.uri == _ui_uri() else None
        try:
            return str(self.client.create_experiment(name, artifact_location=location))
        except MlflowException:
            # Another process made it in between.
            found = self.client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def run_url(self, experiment_id: str, run_id: str) -> str:
        """The run's page; with the demo's own store that is where `make ui` shows it by default."""
        server = self.uri if self.uri.startswith("http") else "http://127.0.0.1:5000"
        return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


def own_folder() -> Path:
    """Where the demo's store lies."""
    return (STATE / "mlflow").resolve()


def own_uri() -> str:
    """The demo's SQLite."""
    return f"sqlite:///{own_folder() / 'mlflow.db'}"


def artifact_root() -> Path:
    """The folder of the demo's artifacts."""
    return own_folder() / "artifacts"


def _ui_uri() -> str | None:
    if not UI_FILE.is_file():
        return None
    running = read_json(UI_FILE)
    return str(running["mlflow"]) if alive(running.get("owner", "")) else None


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI where it is set, else the server of a running `make ui`, else the demo's SQLite."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _ui_uri() or own_uri()


def connect() -> Store:
    """Open the store. Importing mlflow and making a new SQLite store takes seconds."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        import mlflow
    except ImportError as error:
        raise InputError("mlflow is not installed; pip install 'peg-pipeline[pipeline]' brings it") from error
    uri = tracking_uri()
    if uri == own_uri():
        artifact_root().mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(os.environ.get("MLFLOW_REGISTRY_URI") or uri)
    return Store(uri, mlflow.MlflowClient())


@contextmanager
def registry_lock() -> Iterator[None]:
    """One registration at a time on this machine: aliases have no compare-and-swap."""
    import fcntl

    path = own_folder() / "register.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def champion_path(model_name: str) -> Path:
    """Local folder of the champion: `models:/<name>@champion`."""
    return resolve(f"models:/{model_name}@champion")


def resolve(uri: str) -> Path:
    """Local sentence-transformers folder of `models:/name@alias`, `models:/name/version` or `models:/m-id`.

    A model in a remote store is downloaded once to `.peg/models`. Raises InputError if the registry has no such model.
    """
    store = connect()
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        source = _logged_model_id(store, uri)
        kept = (STATE / "models" / source).resolve()
        if (kept / "MLmodel").is_file():
            folder = kept
        else:
            location = store.client.get_logged_model(source).artifact_location
            folder = _local(location) or _download(mlflow, source, kept)
    except MlflowException as error:
        raise InputError(
            f"the registry at {_shown(store.uri)} has no {uri} ({_first_line(error)}); `peg register` fills it"
        ) from error
    inner = folder / "model.sentence_transformer"
    if not inner.is_dir():
        raise InputError(f"{uri} is no sentence-transformers model ({folder}); choose another, or give a model folder")
    return inner


def _logged_model_id(store: Store, uri: str) -> str:
    rest = uri.removeprefix("models:/")
    if rest == uri or not rest:
        raise InputError(f"{uri!r} is no registry address; give models:/name@champion or models:/name/3")
    if "@" in rest:
        version = store.client.get_model_version_by_alias(*rest.split("@", 1))
    elif "/" in rest:
        version = store.client.get_model_version(*rest.split("/", 1))
    else:
        return rest
    model_id = version.tags.get("model_id") or version.model_id or ""
    if not model_id:
        raise PegError(f"version {version.version} of {version.name} was not registered by this project: no model_id")
    return str(model_id)


def _local(location: str) -> Path | None:
    if not location.startswith(("file:", "/")):
        return None
    folder = Path(url2pathname(urlsplit(location).path) if location.startswith("file:") else location)
    return folder if folder.is_dir() else None


def _download(mlflow: Any, model_id: str, kept: Path) -> Path:
    aside = kept.with_name(f".{os.getpid()}-{kept.name}")
    aside.mkdir(parents=True, exist_ok=True)
    mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{model_id}", dst_path=str(aside))
    try:
        aside.replace(kept)
    except OSError:
        # Another process was faster.
        if not (kept / "MLmodel").is_file():
            raise
    return kept


def _shown(uri: str) -> str:
    from peg.lineage import without_credentials

    return str(without_credentials(uri))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
