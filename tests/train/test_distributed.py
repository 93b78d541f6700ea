"""Two and four ranks give one process's gradient: same ratio, same direction, to 1e-9 in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from peg.model.cached import accumulate_gradients
from peg.model.distributed import Alone, Group, Workers
from peg.train import loop
from peg.train.dealing import local_texts
from tests.train.small import prepare_small, taught_examples

FLOAT64_TOLERANCE = 1e-9
RECIPES: dict[str, dict[str, Any]] = {
    # 22 queries in batches of 5: the last has 2, and with four ranks some hold no query
    "progressive": {"false_negative_margin": 0.05},
    "focal": {"weighting": {"kind": "focal", "gamma": 2.0}},
    "hardness": {"weighting": {"kind": "hardness", "alpha": 5.0}},
    "both directions, cut, all tasks, a teacher": {
        "examples": taught_examples(),
        "false_negative_margin": 0.3,
        "passage_to_query": 0.5,
        "distillation": {"weight": 0.7, "temperature": 1.5},
        "matryoshka_dims": (8, 16),
    },
}


def gradients(folder: Path, group: Group) -> dict[str, torch.Tensor]:
    """Of every batch of the first epoch, with its loss; keys name the batch's task."""
    config = loop.Train.model_validate(loop.read_json(folder / "task.json")["config"])
    trainer = loop.Trainer(folder, loop.read_json(folder / "task.json"), config, group, torch.device("cpu"))
    trainer.encoder.double()
    found = {}
    for step in range(trainer.plan.steps_per_epoch):
        batch = trainer.plan.batch(0, step)
        texts, _ = local_texts(trainer.data, batch, group, device=torch.device("cpu"))
        trainer.encoder.zero_grad()
        loss, _ = accumulate_gradients(trainer.encoder, texts, trainer.settings(trainer.objective(0.3)), group)
        gradient = [p.grad.reshape(-1) for p in trainer.encoder.parameters() if p.grad is not None]
        found[f"{step}-{batch.task}"] = torch.cat([torch.tensor([loss], dtype=torch.float64), *gradient])
    return found


def worker(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    for number in range(len(RECIPES)):
        found = gradients(folder / str(number), Workers())
        if rank == world_size - 1:
            torch.save(found, folder / f"{number}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks_equal_one(tmp_path: Path, encoder_folder: Path, world_size: int) -> None:
    for number, changes in enumerate(RECIPES.values()):
        prepare_small(tmp_path / str(number), encoder_folder, dropout=0.0, **changes)
    mp.spawn(worker, args=(world_size, tmp_path), nprocs=world_size)
    tasks = set()
    for number, name in enumerate(RECIPES):
        expected, found = gradients(tmp_path / str(number), Alone()), torch.load(tmp_path / f"{number}.pt")
        assert found.keys() == expected.keys()
        for batch, one in expected.items():
            tasks.add(batch.split("-")[1])
            told = f"{name}, batch {batch}"
            torch.testing.assert_close(found[batch], one, atol=1e-9, rtol=1e-7, msg=lambda m, told=told: f"{told}: {m}")
            if one.norm() == 0:
                continue
            assert float(found[batch].norm() / one.norm()) == pytest.approx(1, abs=FLOAT64_TOLERANCE), told
            cosine = torch.nn.functional.cosine_similarity(found[batch], one, dim=0)
            assert float(cosine) == pytest.approx(1, abs=FLOAT64_TOLERANCE), told
    assert tasks == {"retrieval", "similarity", "classification"}
