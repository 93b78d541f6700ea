"""The training loop, the same in one process, under torchrun and under Ray: one function that every rank calls.

It reads `task.json` and the training data in its folder, goes on from the newest checkpoint there, and leaves
`final/` (the model), `summary.json`, and `metrics.jsonl` with a row per step.
"""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peg.config import Train
from peg.errors import StageError
from peg.model.cached import StepSettings, accumulate_gradients
from peg.model.distributed import Group
from peg.model.encoder import Encoder
from peg.model.lora import add_adapters, merge_adapters
from peg.model.objective import Objective
from peg.model.schedule import learning_rate
from peg.model.weighting import weights_at
from peg.train import checkpoint
from peg.train.batches import Batch, Plan
from peg.train.budget import micro_batch_tokens
from peg.train.data import TrainingData
from peg.train.dealing import dev_ndcg, local_texts
from peg.train.guard import LossGuard
from peg.train.identity import differences, identity_of
from peg.train.moments import bins_of_batch, moment_of, table_rows
from peg.train.optimizer import Ema, adamw, load_optimizer, optimizer_tensors, set_learning_rate
from peg.workspace import read_json, write_json

METRICS = "metrics.jsonl"
_KEEP_CHECKPOINTS = 2
_MAX_ROWS_NAMED = 10


def write_task(folder: Path, *, config: Train, seed: int, encoder: Path, data_digest: str) -> None:
    """Say what is to be trained in `folder`, where the training data has been written already."""
    write_json(
        folder / "task.json",
        {
            "config": config.model_dump(mode="json"),
            "seed": seed,
            "encoder": str(encoder.resolve()),
            "data_digest": data_digest,
        },
    )


def run(
    folder: Path, group: Group, *, device: torch.device, after_step: Callable[[int], None] = lambda _: None
) -> None:
    """Train to the end; every rank calls this with the same folder.

    after_step(step) is called when a step and its checkpoint, if it has one, are complete.
    Raises StageError at a loss that is not finite or jumps, with the step, the batch and the last checkpoint.
    """
    task = read_json(folder / "task.json")
    config = Train.model_validate(task["config"])
    torch.set_num_threads(config.threads_per_worker)
    trainer = Trainer(folder, task, config, group, device)
    trainer.resume()
    while trainer.step < trainer.num_steps and not trainer.stopped_early:
        trainer.train_step()
        trainer.look_and_save()
        after_step(trainer.step)
    trainer.finish()
    group.barrier()


class Trainer:
    """The state of a training: weights, optimizer, and a step counter from which all else follows."""

    def __init__(self, folder: Path, task: dict[str, Any], config: Train, group: Group, device: torch.device) -> None:
        self.folder, self.config, self.group, self.device = folder, config, group, device
        self.seed: int = task["seed"]
        self.data = TrainingData.open(folder)
        torch.manual_seed(self.seed)  # adapters are drawn, and weights that the encoder's folder lacks
        self.encoder = Encoder.load(task["encoder"]).to(device).train()
        _set_dropout(self.encoder, config.dropout)
        if config.lora:
            add_adapters(self.encoder, rank=config.lora.rank, alpha=config.lora.alpha)
        self.encoder.checkpoint_layers = config.gradient_checkpointing
        if config.compile and device.type == "cuda":
            self.encoder.compile_layers()
        self.optimizer = adamw(
            self.encoder,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )
        self.ema = Ema(self.encoder, decay=config.ema_decay) if config.ema_decay else None
        self.plan = Plan.of(self.data.examples, config, seed=self.seed)
        self.num_steps = self.plan.steps_per_epoch * config.epochs
        self.micro_batch_tokens = micro_batch_tokens(self.encoder, config)
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.looks_without_gain = 0
        self.tokens = 0
        self.identity = identity_of(
            task,
            world_size=group.world_size,
            device=device,
            micro_batch_tokens=self.micro_batch_tokens,
            embedding=self.encoder.path_line,
        )
        self.guard = LossGuard(config.max_loss_ratio)

    @property
    def stopped_early(self) -> bool:
        """Whether dev has not gained for as many looks as the recipe waits."""
        return self.config.patience is not None and self.looks_without_gain >= self.config.patience

    @property
    def epoch(self) -> int:
        """Of the next step, from 0."""
        return self.step // self.plan.steps_per_epoch

    # One step

    def train_step(self) -> None:
        """Draw a batch, add its gradient, clip it, and let the optimizer step."""
        began = time.monotonic()
        config, epoch = self.config, self.epoch
        batch = self.plan.batch(epoch, self.step % self.plan.steps_per_epoch)
        progress = self.step / max(1, self.num_steps - 1)
        rate = learning_rate(
            self.step,
            num_steps=self.num_steps,
            peak=config.learning_rate,
            warmup=config.warmup,
            schedule=config.schedule,
        )
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        texts, num_tokens = local_texts(self.data, batch, self.group, device=self.device)
        objective = self.objective(progress)
        weighting = self._weighting(batch, objective, progress)
        loss, stats = accumulate_gradients(self.encoder, texts, self.settings(objective), self.group)
        norm = float(nn.utils.clip_grad_norm_(self.encoder.parameters(), config.max_grad_norm))
        if fault := self.guard.fault(loss, norm):
            raise StageError(self._stopped(batch, fault))
        self.optimizer.step()
        if self.ema:
            self.ema.update()
        self.guard.passed(loss)
        self.tokens += num_tokens
        self.step += 1
        self._log(
            step=self.step,
            progress=progress,
            epoch=epoch,
            task=batch.task,
            **({"source": batch.source} if batch.source else {}),
            loss=loss,
            learning_rate=rate,
            temperature=objective.temperature,
            **_exponents(config, objective),
            grad_norm=norm,
            queries=len(batch.query),
            passages=len(batch.passage),
            **stats,
            **({"weighting": weighting} if weighting else {}),
            seconds=time.monotonic() - began,
        )

    def objective(self, progress: float) -> Objective:
        """What is trained for at that progress in [0, 1]."""
        config = self.config
        temperature, weights = weights_at(config.weighting, progress=progress, temperature=config.temperature)
        taught = config.distillation
        return Objective(
            temperature=temperature,
            weights=weights,
            margin=config.false_negative_margin,
            passage_to_query=config.passage_to_query,
            distillation=(taught.weight, taught.temperature) if taught else None,
            similarity_temperature=config.similarity_temperature,
            dims=config.matryoshka_dims,
            score_block=config.score_block,
        )

    def settings(self, objective: Objective) -> StepSettings:
        """How the next step is computed on this rank."""
        return StepSettings(
            objective=objective,
            micro_batch_tokens=self.micro_batch_tokens,
            keep_activations_tokens=self.config.keep_activations_tokens,
            precision=self.config.precision,
            dropout_seed=(self.seed * 1_000_003 + self.step) * self.group.world_size + self.group.rank,
        )

    def _weighting(self, batch: Batch, objective: Objective, progress: float) -> list[dict[str, Any]]:
        """At the start, in the middle and at the end of training: what the weighting does to the batch."""
        moment = moment_of(self.step, num_steps=self.num_steps)
        if moment is None or self.group.rank != 0:
            return []
        bins = bins_of_batch(self.encoder, self.data, batch, objective, budget=self.micro_batch_tokens)
        return table_rows(bins, step=self.step + 1, progress=progress, moment=moment)

    def _stopped(self, batch: Batch, fault: str) -> str:
        rows = ", ".join(map(str, batch.example[:_MAX_ROWS_NAMED]))
        more = f" and {len(batch.example) - _MAX_ROWS_NAMED} more" if len(batch.example) > _MAX_ROWS_NAMED else ""
        good = checkpoint.newest(self.folder / "checkpoints")
        return (
            f"step {self.step + 1}: {fault}; the weights were not changed by it. The batch held the training rows "
            f"{rows}{more}. The last good checkpoint is {good or 'none: no step was saved yet'}. Look at the rows, "
            "lower train.learning_rate, or train in fp32"
        )

    # Looking at dev, checkpoints, the end

    def look_and_save(self) -> None:
        """Measure on dev and write a checkpoint, where it is their turn."""
        config, last = self.config, self.step == self.num_steps
        look = self.data.dev is not None and (last or (config.eval_every and self.step % config.eval_every == 0))
        if look:
            assert self.data.dev is not None
            with self._averaged():
                value = dev_ndcg(self.encoder, self.data.dev, self.group, budget=self.micro_batch_tokens)
            self._log(step=self.step, dev_ndcg_at_10=value)
            if self.best is None or value > self.best["dev_ndcg_at_10"]:
                self.best = {"step": self.step, "dev_ndcg_at_10": value}
                self.looks_without_gain = 0
                if config.keep_best and self.group.rank == 0:
                    with self._averaged():
                        checkpoint.save(
                            self.folder / "best",
                            step=self.step,
                            tensors={"model": self.encoder.state_dict()},
                            state=self.best,
                            keep=_KEEP_CHECKPOINTS + 1,
                        )
            else:
                self.looks_without_gain += 1
        if last or look or self.step % config.checkpoint_every == 0:
            self._save()

    def _save(self) -> None:
        if self.group.rank == 0:
            state = {
                "identity": self.identity.state(),
                "guard": self.guard.state(),
                "best": self.best,
                "looks_without_gain": self.looks_without_gain,
                "tokens": self.tokens,
                "epoch": self.epoch,
                "num_steps": self.num_steps,
            }
            tensors = {
                "model": self.encoder.state_dict(),
                "optimizer": optimizer_tensors(self.optimizer, self.encoder),
                **({"ema": self.ema.tensors()} if self.ema else {}),
            }
            checkpoint.save(
                self.folder / "checkpoints", step=self.step, tensors=tensors, state=state, keep=_KEEP_CHECKPOINTS
            )
        self.group.barrier()

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one; metrics of steps after it are forgotten."""
        lines = [f"{self.encoder.path_line}; {self.micro_batch_tokens} tokens in a micro-batch"]
        if self.config.compile and self.device.type != "cuda":
            lines.append("train.compile is for a GPU; layers run as they are")
        found = checkpoint.latest(self.folder / "checkpoints", training=self.identity.training, say=lines.append)
        if found:
            self.encoder.load_state_dict(found.tensors["model"])
            load_optimizer(self.optimizer, self.encoder, found.tensors["optimizer"])
            if self.ema:
                self.ema.load(found.tensors["ema"])
            self.step = found.step
            self.best = found.state["best"]
            self.looks_without_gain = found.state["looks_without_gain"]
            self.tokens = found.state["tokens"]
            self.guard.restore(found.state["guard"])
            lines.append(f"going on from step {self.step} of {self.num_steps}")
            if other := differences(found.state["identity"]["bits"], self.identity.bits):
                masks = "; dropout draws other masks" if self.config.dropout else ""
                lines.append(f"{other}: the result equals an uninterrupted run's to rounding, not bit for bit{masks}")
        furthest = self.group.max(self.step)
        if self.step != furthest:
            raise StageError(
                f"rank {self.group.rank} finds the checkpoint of step {self.step} in {self.folder}, another rank that "
                f"of step {furthest}; put the folder where all nodes see the same files"
            )
        if self.group.rank == 0:
            _forget_after(self.folder / METRICS, step=self.step)
        for line in lines:
            self._say(line)
        self.group.barrier()

    def finish(self) -> None:
        """Write the model that is given out, and the summary."""
        if self.group.rank != 0:
            return
        best = self.best if self.config.keep_best else None
        if best:
            kept = checkpoint.read(self.folder / "best", step=best["step"])
            self.encoder.load_state_dict(kept.tensors["model"])
        with nullcontext() if best else self._averaged():
            if self.config.lora:
                merge_adapters(self.encoder)
            self.encoder.eval().save(self.folder / "final")
        examples = self.data.examples
        write_json(
            self.folder / "summary.json",
            {
                "steps": self.step,
                "planned_steps": self.num_steps,
                "examples": len(examples),
                "examples_per_epoch": self.plan.examples_per_epoch,
                "short_batches": self.plan.short_batches,
                "single_query_batches": self.plan.single_query_batches,
                "tokens": self.tokens,
                "best_step": best["step"] if best else self.step,
                "dev_ndcg_at_10": self.best["dev_ndcg_at_10"] if self.best else None,
                "short_pools": int((np.diff(examples.negatives.offsets) < self.config.num_negatives).sum()),
            },
        )

    def _averaged(self) -> AbstractContextManager[object]:
        """The encoder holds its running mean inside, where the recipe asks for one."""
        return self.ema.swapped() if self.ema else nullcontext()

    def _say(self, line: str) -> None:
        self._log(event=line)

    def _log(self, **row: Any) -> None:
        if self.group.rank == 0:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _set_dropout(encoder: Encoder, probability: float) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in ("attention_dropout", "dropout_prob"):  # where attention takes a number, not a module
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)


def _exponents(config: Train, objective: Objective) -> dict[str, float]:
    """a and b of this step, under the names that curves are drawn by."""
    if config.weighting.kind == "temperature":
        return {"negative_exponent": config.temperature / objective.temperature - 1, "query_exponent": 0.0}
    weights = objective.weights
    return {"negative_exponent": weights.slope * objective.temperature, "query_exponent": weights.easiness}


def _forget_after(path: Path, *, step: int) -> None:
    """Drop the rows of steps that will be run again, and a last line that a kill cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row.get("step", 0) <= step:
            kept.append(line)
    aside = path.with_suffix(".partial")
    aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    aside.replace(path)
