"""What a training and its evaluations leave in an MLflow run, from the files of the stages alone.

Every function can be called again: what the run holds already is not logged twice.
"""

import csv
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peg.adapters.mlflow_live import TRAIN_KEY_TAG, WEIGHTS_TAG, last_steps, log_new_points, points
from peg.adapters.mlflow_store import Store
from peg.config import Config
from peg.errors import InputError
from peg.lineage import lineage_document, without_credentials
from peg.model.encoder import weights_sha256
from peg.workspace import STATE, path_digest, read_json

MODEL = Path("models/trained")
BASE_MODEL = Path("models/base")
REPORTS = Path("reports")
PREPARED = Path("data/prepared")
_COUNTS = ("prepare", "mine", "train")
_DIGEST_CHARS = 32  # MLflow takes at most 36
_MAX_PARAM_CHARS = 6000
_PARAMS_BATCH = 100


@dataclass(frozen=True)
class Made:
    """What the stages made, read and found to fit together.

    weights: sha256 of the trained model; results: reports/results/<system>.json for "base" and "trained";
    evaluation: a hash of the whole comparison; data_digest: of the training data.
    """

    weights: str
    results: dict[str, Any]
    comparison: dict[str, Any]
    evaluation: str
    set_digest: str
    data_digest: str
    train_key: str | None
    lineage: dict[str, Any]

    @classmethod
    def read(cls, config: Config) -> "Made":
        """Read the project's folder. InputError if a stage is missing, or if results are of other weights or data."""
        weights = weights_sha256(MODEL)
        results = {name: read_json(REPORTS / "results" / f"{name}.json") for name in ("base", "trained")}
        comparison = read_json(REPORTS / "comparison.json")
        expected = {"base": weights_sha256(BASE_MODEL), "trained": weights}
        for name, result in results.items():
            if result["weights_sha256"] != expected[name]:
                raise InputError(
                    f"{REPORTS}/results/{name}.json is of the weights {str(result['weights_sha256'])[:12]}, "
                    f"models/{name} has {expected[name][:12]}; run `dvc repro evaluate`"
                )
            if result["set_digest"] != comparison["set"]["digest"]:
                raise InputError(
                    f"{REPORTS}/results/{name}.json and {REPORTS}/comparison.json are of different test sets; "
                    "run `dvc repro evaluate`"
                )
        data = Path(config.train.data) if config.train.data else PREPARED
        return cls(
            weights=weights,
            results=results,
            comparison=comparison,
            evaluation=hashlib.sha256(json.dumps(comparison, sort_keys=True).encode()).hexdigest()[:16],
            set_digest=str(comparison["set"]["digest"]),
            data_digest=path_digest(data) if data.exists() else "",
            train_key=_finished_train_key(),
            lineage=lineage_document(config),
        )

    def scores(self, system: str, metric: str) -> dict[str, float]:
        """The metric's value for each query."""
        return {query: float(values[metric]) for query, values in self.results[system]["per_query"].items()}


def _finished_train_key() -> str | None:
    """The key of the last training here, if it got to its end."""
    path = STATE / "status" / "train.json"
    status = read_json(path) if path.is_file() else {}
    return str(status["key"]) if status.get("state") == "done" else None


def find_or_start_run(store: Store, config: Config, made: Made) -> str:
    """The run of these weights: by their hash, else the live run of the training that made them, else a new one."""
    experiment = store.experiment_id(config.registry.experiment)
    found = store.client.search_runs([experiment], f"tags.`{WEIGHTS_TAG}` = '{made.weights}'", max_results=1)
    if not found and made.train_key:
        by_key = f"tags.`{TRAIN_KEY_TAG}` = '{made.train_key}'"
        # A live run that ended well already names its weights: under the same key with others, it is not ours.
        live = store.client.search_runs([experiment], by_key, max_results=10)
        found = [run for run in live if WEIGHTS_TAG not in run.data.tags]
    if found:
        run_id = str(found[0].info.run_id)
    else:
        tags = {TRAIN_KEY_TAG: made.train_key} if made.train_key else {}
        run_id = str(store.client.create_run(experiment, tags=tags, run_name=f"train {made.weights[:8]}").info.run_id)
    store.client.set_tag(run_id, WEIGHTS_TAG, made.weights)
    return run_id


def record_training(store: Store, run_id: str, config: Config, made: Made) -> None:
    """Parameters, counts, curves, datasets and lineage."""
    from mlflow.entities import Metric, Param, RunTag

    run = store.client.get_run(run_id)
    if run.info.lifecycle_stage != "active":
        raise InputError(f"MLflow run {run_id} of these weights was deleted; restore it in the UI")
    parameters = flatten(without_credentials(config.model_dump(mode="json")))
    # A parameter cannot change in a run; a later evaluation may have other ones, which stand in its params.yaml.
    absent = [Param(name, str(value)[:_MAX_PARAM_CHARS]) for name, value in parameters if name not in run.data.params]
    for start in range(0, len(absent), _PARAMS_BATCH):
        store.client.log_batch(run_id, params=absent[start : start + _PARAMS_BATCH])
    now = int(time.time() * 1000)
    counts = [
        Metric(f"{stage}/{name}", float(value), now, 0)
        for stage in _COUNTS
        if (path := Path("metrics") / f"{stage}.json").is_file()
        for name, value in flatten(read_json(path))
        if isinstance(value, int | float) and f"{stage}/{name}" not in run.data.metrics
    ]
    if counts:
        store.client.log_batch(run_id, metrics=counts)
    log_new_points(store, run_id, _curves(), last_steps(store, run_id))
    _log_datasets(store, run_id, config, made)
    git = made.lineage["git"]
    tags = {"git_commit": git["commit"] or "", "git_dirty": str(git["dirty"]), "data_digest": made.data_digest}
    store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def _curves() -> Iterator[tuple[str, int, float]]:
    for name, prefix in (("train_curve", ""), ("dev_curve", "dev_")):
        path = REPORTS / f"{name}.csv"
        if not path.is_file():
            continue
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                yield from points({"step": step, **{prefix + key: float(value) for key, value in row.items() if value}})


def flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested dicts and lists, named by their path with dots: data.sources.0.name."""
    if isinstance(tree, dict):
        items: list[tuple[str, Any]] = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return [(prefix, tree)]
    return [leaf for key, value in items for leaf in flatten(value, f"{prefix}.{key}" if prefix else key)]


def _log_datasets(store: Store, run_id: str, config: Config, made: Made) -> None:
    import mlflow.data.sources
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    sources: Any = mlflow.data.sources  # its classes are made when it is imported
    sets = [
        ("prepared pairs", PREPARED, "training", None),
        ("mined negatives", Path("data/mined"), "training", None),
        ("own pairs", Path(config.train.data) if config.train.data else None, "training", None),
        ("dev set", Path("data/eval/dev"), "validation", None),
        ("test set", Path(config.evaluate.test), "testing", made.set_digest),
    ]
    inputs = []
    for name, path, context, digest in sets:
        if path is None or not path.exists():
            continue
        dataset = MetaDataset(  # type: ignore[abstract]
            sources.LocalArtifactDatasetSource(path.resolve().as_uri()),
            name=name,
            digest=(digest or path_digest(path))[:_DIGEST_CHARS],
        )
        inputs.append(DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", context)]))
    # The store takes one name with one digest once.
    store.client.log_inputs(run_id, datasets=inputs)


def record_evaluation(store: Store, run_id: str, model_id: str, made: Made) -> bool:
    """Append an evaluation to its model's run; False if the run had it already."""
    from mlflow.entities import Metric

    done_tag = f"peg.evaluation.{made.evaluation}"
    tags = store.client.get_run(run_id).data.tags
    if done_tag in tags:
        return False
    now = int(time.time() * 1000)
    step = sum(tag.startswith("peg.evaluation.") for tag in tags)
    values = {
        f"test/{system}/{metric}": value
        for system, metrics in made.comparison["systems"].items()
        for metric, value in metrics.items()
    }
    for row in made.comparison["differences"]:
        stem = f"test/{row['left']} - {row['right']}/{row['metric']}"
        values |= {stem: row["difference"], f"{stem} p": row["p_value"]}
    dataset = {"dataset_name": "test set", "dataset_digest": made.set_digest[:_DIGEST_CHARS]}
    metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
    # Named again with the model and the set, the trained model's values stand on the model's own page.
    metrics += [
        Metric(name, float(value), now, step, model_id=model_id, run_id=run_id, **dataset)
        for name, value in made.results["trained"]["metrics"].items()
    ]
    store.client.log_batch(run_id, metrics=metrics)
    client = store.client
    for path in (REPORTS / "report.html", REPORTS / "comparison.json", Path("params.yaml"), Path("dvc.yaml")):
        if path.is_file():
            client.log_artifact(run_id, str(path))
    if Path("dvc.lock").is_file():
        client.log_artifact(run_id, "dvc.lock")
    client.log_artifacts(run_id, str(REPORTS / "results"), "results")
    client.log_artifact(run_id, str(REPORTS / "results" / "trained.json"), results_folder(made.set_digest))
    client.log_dict(run_id, made.lineage, "lineage.json")
    client.set_tag(run_id, done_tag, str(step))
    return True


def results_folder(set_digest: str) -> str:
    """Where a run keeps its per-query results on one test set: what a later candidate is compared with."""
    return f"evaluations/{set_digest[:16]}"
