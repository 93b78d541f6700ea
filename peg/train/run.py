"""One training from texts to a model folder: what the DVC stage and `finetune` have in common."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peg.config import Train
from peg.errors import InputError
from peg.evaluate.beir import read_beir
from peg.model.encoder import Encoder
from peg.model.lora import check_installed
from peg.train import moments
from peg.train.batches import Plan
from peg.train.data import Texts, write_training_data
from peg.train.follow import Follower, Row, TrainingProgress
from peg.train.loop import METRICS, write_task
from peg.workspace import read_json

Launch = Callable[[Path, Train], None]
"""Runs peg.train.loop.run on every rank: launch(folder, config)."""

_OURS = "config_sentence_transformers.json"
_CURVE = [
    "step",
    "progress",
    "loss",
    "learning_rate",
    "temperature",
    "negative_exponent",
    "query_exponent",
    "grad_norm",
    "masked_share",
    "down_weighted_share",
    "positive_score",
    "negative_score",
]


def train_model(
    folder: Path,
    texts: Texts,
    *,
    config: Train,
    seed: int,
    encoder: Encoder,
    data_digest: str,
    launch: Launch,
    on_row: Callable[[Row], None] = lambda _: None,
) -> dict[str, Any]:
    """Train in `folder`, going on from a former run that was killed there; return the summary.

    Leaves folder/final (the model) and folder/metrics.jsonl. on_row is called with every row of the latter.
    """
    if config.lora:
        check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    dev = read_beir(Path(config.dev)) if config.dev else None
    write_training_data(
        folder,
        texts,
        dev,
        encoder=encoder,
        query_max_length=config.query_max_length,
        passage_max_length=config.passage_max_length,
    )
    write_task(folder, config=config, seed=seed, encoder=Path(config.encoder), data_digest=data_digest)
    num_steps = Plan.of(texts.examples, config, seed=seed).steps_per_epoch * config.epochs
    show = TrainingProgress(num_steps)

    def pass_on(row: Row) -> None:
        show(row)
        on_row(row)

    with Follower(folder / METRICS, pass_on):
        launch(folder, config)
    summary: dict[str, Any] = read_json(folder / "summary.json")
    return summary


def write_curves(metrics: Path, *, train_csv: Path, dev_csv: Path, weighting_csv: Path) -> None:
    """Turn a training's rows into the tables that reports and `dvc plots` read; no times in them."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    _write_csv(train_csv, _CURVE, [row for row in rows if "loss" in row])
    dev = [{"step": row["step"], "ndcg_at_10": row["dev_ndcg_at_10"]} for row in rows if "dev_ndcg_at_10" in row]
    _write_csv(dev_csv, ["step", "ndcg_at_10"], dev)
    _write_csv(weighting_csv, moments.COLUMNS, [one for row in rows for one in row.get("weighting", [])])


def check_target(target: Path) -> None:
    """Raise InputError unless a model may be written to `target`: it is absent, empty, or a model made here."""
    if target.is_dir() and (not any(target.iterdir()) or (target / _OURS).is_file()):
        return
    if target.exists():
        raise InputError(f"{target} holds something else than a model made here; give a folder that is new or empty")


def publish_model(final: Path, target: Path, *, card: str) -> None:
    """Copy a finished model to where it is given out, with its card; it comes into being by rename."""
    check_target(target)
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(final, aside)
    (aside / "README.md").write_text(card, encoding="utf-8")
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)


def _write_csv(path: Path, columns: list[str], rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
