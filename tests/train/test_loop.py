import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peg.errors import InputError, StageError
from peg.evaluate.beir import read_beir
from peg.model.distributed import Alone
from peg.model.encoder import WEIGHTS, Encoder
from peg.train import loop
from peg.workspace import file_sha256, read_json
from tests.train.small import prepare_small, taught_examples, write_small_dev

CPU = torch.device("cpu")


class Killed(BaseException):
    """Stands for the moment a process ends."""


def train(folder: Path, *, kill_at: int | None = None) -> None:
    def after_step(step: int) -> None:
        if step == kill_at:
            raise Killed

    loop.run(folder, Alone(), device=CPU, after_step=after_step)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    dev = read_beir(write_small_dev(tmp_path_factory.mktemp("dev")))
    prepare_small(folder, encoder_folder, dev=dev)
    train(folder)
    return folder


def same_start(tmp_path: Path, uninterrupted: Path) -> Path:
    """The uninterrupted training's folder as it was before its first step."""
    folder = tmp_path / "again"
    shutil.copytree(
        uninterrupted, folder, ignore=shutil.ignore_patterns("checkpoints", "best", "final", "metrics.jsonl")
    )
    return folder


def rows(folder: Path) -> list[dict[str, float]]:
    lines = (folder / loop.METRICS).read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found if "event" not in row]


@pytest.mark.parametrize("kill_at", [1, 4, 5, 9])
def test_a_run_killed_anywhere_ends_in_the_same_bits(tmp_path: Path, uninterrupted: Path, kill_at: int) -> None:
    folder = same_start(tmp_path, uninterrupted)
    with pytest.raises(Killed):
        train(folder, kill_at=kill_at)
    train(folder)
    assert file_sha256(folder / "final" / WEIGHTS) == file_sha256(uninterrupted / "final" / WEIGHTS)
    assert rows(folder) == rows(uninterrupted)
    assert read_json(folder / "summary.json") == read_json(uninterrupted / "summary.json")


RICH = {
    "ema_decay": 0.9,
    "layer_decay": 0.7,
    "lora": {"rank": 2, "alpha": 4.0},
    "gradient_checkpointing": True,
    "one_source_batches": True,
    "passage_to_query": 0.5,
    "distillation": {"weight": 0.5, "temperature": 1.0},
    "matryoshka_dims": (8, 16),
    "max_loss_ratio": 50.0,
    "keep_best": False,
}


def test_a_run_with_every_recipe_on_ends_in_the_same_bits_and_an_ordinary_model(
    tmp_path: Path, encoder_folder: Path
) -> None:
    pytest.importorskip("peft", reason="LoRA needs the extra `lora`: pip install 'peg-pipeline[lora]'")
    whole, again = tmp_path / "whole", tmp_path / "again"
    for folder in (whole, again):
        prepare_small(folder, encoder_folder, examples=taught_examples(), **RICH)
    train(whole)
    with pytest.raises(Killed):
        train(again, kill_at=7)
    train(again)
    assert file_sha256(again / "final" / WEIGHTS) == file_sha256(whole / "final" / WEIGHTS)
    assert rows(again) == rows(whole)
    assert {row["task"] for row in rows(whole)} == {"retrieval", "similarity", "classification"}
    before, after = (Encoder.load(str(folder)).state_dict() for folder in (encoder_folder, whole / "final"))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all(name.endswith("weight") for name in changed)


def test_every_example_is_trained_on_in_every_epoch(uninterrupted: Path) -> None:
    steps = [row for row in rows(uninterrupted) if "loss" in row]
    assert len(steps) == 10
    assert sum(row["queries"] for row in steps) == 2 * 22


def test_training_changes_the_weights_and_lowers_the_loss(tmp_path: Path, encoder_folder: Path) -> None:
    flat = {"shape": "constant", "start": 0.0, "end": 0.0}
    prepare_small(
        tmp_path,
        encoder_folder,
        epochs=20,
        dropout=0.0,
        weighting={"kind": "progressive", "negatives": flat, "queries": flat},
        warmup=0.0,
    )
    train(tmp_path)
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_damaged_checkpoint_is_refused_and_the_one_before_taken(tmp_path: Path, uninterrupted: Path) -> None:
    folder = same_start(tmp_path, uninterrupted)
    with pytest.raises(Killed):
        train(folder, kill_at=5)
    newest = folder / "checkpoints" / "step-00000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    train(folder)
    events = [json.loads(line)["event"] for line in (folder / loop.METRICS).read_text().splitlines() if "event" in line]
    assert any("step-00000004 is damaged" in event for event in events)
    assert any("going on from step 3" in event for event in events)
    assert file_sha256(folder / "final" / WEIGHTS) == file_sha256(uninterrupted / "final" / WEIGHTS)


def test_resuming_on_other_data_is_refused(tmp_path: Path, uninterrupted: Path) -> None:
    folder = same_start(tmp_path, uninterrupted)
    with pytest.raises(Killed):
        train(folder, kill_at=4)
    task = read_json(folder / "task.json")
    (folder / "task.json").write_text(json.dumps({**task, "data_digest": "other"}))
    with pytest.raises(InputError, match="data was 'small', is 'other'"):
        train(folder)


def test_a_loss_that_is_not_finite_names_step_rows_and_checkpoint(tmp_path: Path, encoder_folder: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(encoder_folder, broken)
    weights = load_file(broken / WEIGHTS)
    weights["encoder.layer.0.attention.self.query.weight"][0, 0] = float("nan")
    save_file(weights, broken / WEIGHTS, metadata={"format": "pt"})
    prepare_small(tmp_path / "work", broken)
    with pytest.raises(StageError, match=r"step 1: loss nan.*training rows \d+.*no step was saved"):
        train(tmp_path / "work")


def test_the_best_weights_on_dev_are_given_out(uninterrupted: Path) -> None:
    looks = {row["step"]: row["dev_ndcg_at_10"] for row in rows(uninterrupted) if "dev_ndcg_at_10" in row}
    assert sorted(looks) == [3, 6, 9, 10]
    summary = read_json(uninterrupted / "summary.json")
    assert summary["dev_ndcg_at_10"] == max(looks.values()) == looks[summary["best_step"]]
    best = load_file(uninterrupted / "best" / f"step-{summary['best_step']:08d}" / "model.safetensors")
    given = Encoder.load(str(uninterrupted / "final")).state_dict()
    assert all(torch.equal(given[name], tensor) for name, tensor in best.items())


def test_early_stopping_counts_looks_without_gain(tmp_path: Path, encoder_folder: Path) -> None:
    dev = read_beir(write_small_dev(tmp_path / "dev"))
    prepare_small(tmp_path / "work", encoder_folder, dev=dev, learning_rate=1e-12, eval_every=1, patience=2)
    train(tmp_path / "work")
    assert read_json(tmp_path / "work" / "summary.json")["steps"] == 3
