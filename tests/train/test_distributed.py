"""Two and four ranks give one process's gradient: same ratio, same direction, to 1e-9 in float64."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from peg.model.cached import accumulate_gradients
from peg.model.distributed import Alone, Group, Workers
from peg.train import loop
from peg.train.batches import draw_batch
from tests.train.small import prepare_small

FLOAT64_TOLERANCE = 1e-9
STEPS = (0, 4)  # a full batch, and the short last one, where some rank holds no query


def batch_gradient(folder: Path, group: Group, *, step: int) -> tuple[float, torch.Tensor]:
    trainer = loop._Trainer(
        folder, loop.read_json(folder / "task.json"), loop_config(folder), group, torch.device("cpu")
    )
    trainer.encoder.double()
    batch = draw_batch(trainer.data.examples, seed=7, epoch=0, step=step, batch_size=5, num_negatives=3)
    settings = trainer._settings(loop.Exponents(negatives=0.4, queries=0.3))
    loss, _ = accumulate_gradients(trainer.encoder, trainer._local_texts(batch), settings, group)
    gradient = [p.grad.reshape(-1) for p in trainer.encoder.parameters() if p.grad is not None]
    return loss, torch.cat(gradient)


def loop_config(folder: Path) -> loop.Train:
    return loop.Train.model_validate(loop.read_json(folder / "task.json")["config"])


def worker(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    for step in STEPS:
        loss, gradient = batch_gradient(folder, Workers(), step=step)
        if rank == world_size - 1:
            torch.save({"loss": loss, "gradient": gradient}, folder / f"step-{step}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks_equal_one(tmp_path: Path, encoder_folder: Path, world_size: int) -> None:
    prepare_small(tmp_path, encoder_folder, dropout=0.0, false_negative_margin=0.05)
    mp.spawn(worker, args=(world_size, tmp_path), nprocs=world_size)
    for step in STEPS:
        expected_loss, expected = batch_gradient(tmp_path, Alone(), step=step)
        found = torch.load(tmp_path / f"step-{step}.pt", weights_only=True)
        assert found["loss"] == pytest.approx(expected_loss, abs=FLOAT64_TOLERANCE)
        assert float(found["gradient"].norm() / expected.norm()) == pytest.approx(1, abs=FLOAT64_TOLERANCE)
        cosine = torch.nn.functional.cosine_similarity(found["gradient"], expected, dim=0)
        assert float(cosine) == pytest.approx(1, abs=FLOAT64_TOLERANCE)
        torch.testing.assert_close(found["gradient"], expected, atol=1e-9, rtol=1e-7)
