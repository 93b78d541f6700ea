"""The training loop, the same in one process, under torchrun and under Ray: one function that every rank calls.

It reads `task.json` and the training data in its folder, goes on from the newest checkpoint there, and leaves
`final/` (the model), `summary.json`, and `metrics.jsonl` with a row per step.
"""

import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peg.config import Train
from peg.errors import StageError
from peg.evaluate.metrics import ndcg
from peg.model.cached import LocalTexts, StepSettings, accumulate_gradients
from peg.model.distributed import Group, scatter_rows
from peg.model.encoder import Encoder
from peg.model.losses import Columns, Exponents
from peg.model.microbatch import pad_ids, token_batches
from peg.model.schedule import learning_rate, ramp
from peg.train import checkpoint
from peg.train.batches import Batch, draw_batch, share_by_tokens, steps_per_epoch
from peg.train.data import DevSet, TrainingData
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
    Raises StageError at a loss or gradient that is not finite, with the step, the batch and the last checkpoint.
    """
    task = read_json(folder / "task.json")
    config = Train.model_validate(task["config"])
    torch.set_num_threads(config.threads_per_worker)
    trainer = _Trainer(folder, task, config, group, device)
    trainer.resume()
    while trainer.step < trainer.num_steps and not trainer.stopped_early:
        trainer.train_step()
        trainer.look_and_save()
        after_step(trainer.step)
    trainer.finish()
    group.barrier()


class _Trainer:
    """The state of a training: weights, optimizer, and a step counter from which all else follows."""

    def __init__(self, folder: Path, task: dict[str, Any], config: Train, group: Group, device: torch.device) -> None:
        self.folder, self.config, self.group, self.device = folder, config, group, device
        self.seed: int = task["seed"]
        self.data = TrainingData.open(folder)
        torch.manual_seed(self.seed)  # weights that the encoder's folder lacks would be drawn
        self.encoder = Encoder.load(task["encoder"]).to(device).train()
        _set_dropout(self.encoder, config.dropout)
        self.optimizer = _adamw(self.encoder, config)
        self.steps_per_epoch = steps_per_epoch(len(self.data.examples), batch_size=config.batch_size)
        self.num_steps = self.steps_per_epoch * config.epochs
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.looks_without_gain = 0
        self.tokens = 0
        # What must be equal for the same bits; the machine itself is named in lineage.
        self.identity = {
            "data": task["data_digest"],
            "config": task["config"],
            "seed": self.seed,
            "world_size": group.world_size,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }

    @property
    def stopped_early(self) -> bool:
        return self.config.patience is not None and self.looks_without_gain >= self.config.patience

    # One step

    def train_step(self) -> None:
        began = time.monotonic()
        config, epoch = self.config, self.step // self.steps_per_epoch
        batch = draw_batch(
            self.data.examples,
            seed=self.seed,
            epoch=epoch,
            step=self.step % self.steps_per_epoch,
            batch_size=config.batch_size,
            num_negatives=config.num_negatives,
        )
        progress = self.step / max(1, self.num_steps - 1)
        weighting = config.weighting
        exponents = Exponents(
            negatives=ramp(progress, **weighting.negatives.model_dump()),
            queries=ramp(progress, **weighting.queries.model_dump()),
        )
        rate = learning_rate(
            self.step,
            num_steps=self.num_steps,
            peak=config.learning_rate,
            warmup=config.warmup,
            schedule=config.schedule,
        )
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        texts = self._local_texts(batch)
        loss, stats = accumulate_gradients(self.encoder, texts, self._settings(exponents), self.group)
        norm = float(nn.utils.clip_grad_norm_(self.encoder.parameters(), config.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise StageError(self._not_finite(batch, loss, norm))
        self.optimizer.step()
        self.step += 1
        self._log(
            step=self.step,
            progress=progress,
            epoch=epoch,
            loss=loss,
            learning_rate=rate,
            negative_exponent=exponents.negatives,
            query_exponent=exponents.queries,
            grad_norm=norm,
            queries=len(batch.query),
            passages=len(batch.passage),
            **stats,
            seconds=time.monotonic() - began,
        )

    def _settings(self, exponents: Exponents) -> StepSettings:
        config = self.config
        return StepSettings(
            temperature=config.temperature,
            exponents=exponents,
            margin=config.false_negative_margin,
            micro_batch_tokens=config.micro_batch_tokens,
            keep_activations_tokens=config.keep_activations_tokens,
            score_block=config.score_block,
            precision=config.precision,
            dropout_seed=(self.seed * 1_000_003 + self.step) * self.group.world_size + self.group.rank,
        )

    def _local_texts(self, batch: Batch) -> LocalTexts:
        """This rank's texts of a batch: dealt by tokens, the same on every rank."""
        lengths = np.concatenate([self.data.queries.lengths(batch.query), self.data.passages.lengths(batch.passage)])
        self.tokens += int(lengths.sum())
        rank = share_by_tokens(lengths, world_size=self.group.world_size)
        num_queries = len(batch.query)
        mine_query = np.flatnonzero(rank[:num_queries] == self.group.rank)
        mine_passage = np.flatnonzero(rank[num_queries:] == self.group.rank)
        column = np.full(len(batch.passage), -1, dtype=np.int64)
        column[mine_passage] = np.arange(len(mine_passage))
        masked = column[batch.masked_passage] >= 0
        ids = [self.data.queries[row] for row in batch.query[mine_query]]
        ids += [self.data.passages[row] for row in batch.passage[mine_passage]]
        return LocalTexts(
            ids=ids,
            query_position=self._tensor(mine_query),
            num_queries=num_queries,
            columns=Columns(
                positive_N=self._tensor(column[batch.positive]),
                masked_row_K=self._tensor(batch.masked_query[masked]),
                masked_column_K=self._tensor(column[batch.masked_passage[masked]]),
            ),
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _not_finite(self, batch: Batch, loss: float, norm: float) -> str:
        rows = ", ".join(map(str, batch.example[:_MAX_ROWS_NAMED]))
        more = f" and {len(batch.example) - _MAX_ROWS_NAMED} more" if len(batch.example) > _MAX_ROWS_NAMED else ""
        return (
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}; the batch held the training rows {rows}{more}. "
            f"The last good checkpoint is the newest in {self.folder / 'checkpoints'}: look at the rows, lower "
            "train.learning_rate, or train in fp32"
        )

    # Looking at dev, checkpoints, the end

    def look_and_save(self) -> None:
        config, last = self.config, self.step == self.num_steps
        look = self.data.dev is not None and (last or (config.eval_every and self.step % config.eval_every == 0))
        if look:
            assert self.data.dev is not None
            value = self.dev_ndcg(self.data.dev)
            self._log(step=self.step, dev_ndcg_at_10=value)
            if self.best is None or value > self.best["dev_ndcg_at_10"]:
                self.best = {"step": self.step, "dev_ndcg_at_10": value}
                self.looks_without_gain = 0
                if config.keep_best and self.group.rank == 0:
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
                "identity": self.identity,
                "best": self.best,
                "looks_without_gain": self.looks_without_gain,
                "tokens": self.tokens,
                "epoch": self.step // self.steps_per_epoch,
                "num_steps": self.num_steps,
            }
            tensors = {"model": self.encoder.state_dict(), "optimizer": _optimizer_tensors(self.optimizer)}
            checkpoint.save(
                self.folder / "checkpoints", step=self.step, tensors=tensors, state=state, keep=_KEEP_CHECKPOINTS
            )
        self.group.barrier()

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one; metrics of steps after it are forgotten."""
        found = checkpoint.latest(self.folder / "checkpoints", identity=self.identity, say=self._say)
        if found:
            self.encoder.load_state_dict(found.tensors["model"])
            _load_optimizer(self.optimizer, found.tensors["optimizer"])
            self.step = found.step
            self.best = found.state["best"]
            self.looks_without_gain = found.state["looks_without_gain"]
            self.tokens = found.state["tokens"]
            self._say(f"going on from step {self.step} of {self.num_steps}")
        if self.group.rank == 0:
            _forget_after(self.folder / METRICS, step=self.step)
        self.group.barrier()

    def finish(self) -> None:
        if self.group.rank != 0:
            return
        if self.config.keep_best and self.best:
            kept = checkpoint.read(self.folder / "best", step=self.best["step"])
            self.encoder.load_state_dict(kept.tensors["model"])
        self.encoder.eval().save(self.folder / "final")
        examples = self.data.examples
        write_json(
            self.folder / "summary.json",
            {
                "steps": self.step,
                "planned_steps": self.num_steps,
                "examples": len(examples),
                "tokens": self.tokens,
                "best_step": self.best["step"] if self.best and self.config.keep_best else self.step,
                "dev_ndcg_at_10": self.best["dev_ndcg_at_10"] if self.best else None,
                "short_pools": int((np.diff(examples.negatives.offsets) < self.config.num_negatives).sum()),
            },
        )

    @torch.inference_mode()
    def dev_ndcg(self, dev: DevSet) -> float:
        """Mean nDCG@10 over the dev queries; ranks share the encoding."""
        self.encoder.eval()
        query_QD, passage_PD = (self._embed(table) for table in (dev.queries, dev.passages))
        self.encoder.train()
        top = (query_QD @ passage_PD.T).topk(min(10, len(passage_PD)))
        scores = [
            ndcg([str(row) for row in rows], {str(row): grade for row, grade in dev.relevant[query].items()}, k=10)
            for query, rows in enumerate(top.indices.tolist())
        ]
        return float(np.mean(scores))

    def _embed(self, table: Any) -> Tensor:
        lengths = table.lengths(np.arange(len(table)))
        mine = np.flatnonzero(share_by_tokens(lengths, world_size=self.group.world_size) == self.group.rank)
        rows_TD = torch.empty(len(mine), self.encoder.dimension, device=self.device)
        for batch in token_batches(lengths[mine], budget=self.config.micro_batch_tokens):
            ids = [table[row] for row in mine[batch]]
            rows_TD[torch.from_numpy(batch)] = self.encoder(
                *pad_ids(ids, pad_id=self.encoder.pad_id, device=self.device)
            )
        return scatter_rows(rows_TD, self._tensor(mine), num_rows=len(table), group=self.group)

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


def _adamw(encoder: Encoder, config: Train) -> torch.optim.AdamW:
    """Weight decay on matrices alone: biases and normalisation have one dimension."""
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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
