"""One training and its measurement: the project's own step, batches, mining and metrics on the cached states."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from benchmarks.progressive.data import TOP_LAYERS, Prepared, load_encoder
from benchmarks.progressive.negatives import examples
from benchmarks.progressive.shared import complete
from peg import config
from peg.evaluate.beir import RetrievalSet
from peg.evaluate.metrics import per_query
from peg.mining.dense import DenseIndex
from peg.model.cached import LocalTexts, StepSettings, accumulate_gradients
from peg.model.distributed import Alone
from peg.model.encoder import Encoder
from peg.model.losses import Columns
from peg.model.microbatch import token_batches
from peg.model.objective import Targets, info_nce
from peg.model.schedule import learning_rate
from peg.model.weighting import weights_at
from peg.train.batches import Batch, Plan
from peg.train.optimizer import adamw, set_learning_rate

NUM_NEGATIVES = 1  # mined ones of a query, beside the batch's other passages
_DEPTH = 30  # of a search; 10 count
WARMUP, WEIGHT_DECAY, MAX_GRAD_NORM = 0.1, 0.01, 1.0
_BATCH_TOKENS = 4096
_WEIGHTING: TypeAdapter[config.Weighting] = TypeAdapter(config.Weighting)


@dataclass(frozen=True)
class Setting:
    """What is chosen on dev: everything that differs between runs, but the seed."""

    temperature: float
    learning_rate: float
    weighting: config.Weighting

    def to_json(self) -> dict[str, Any]:
        """As a tree that `from_json` reads."""
        return {**dataclasses.asdict(self), "weighting": self.weighting.model_dump()}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Setting":
        """What `to_json` gave."""
        return cls(tree["temperature"], tree["learning_rate"], _WEIGHTING.validate_python(tree["weighting"]))


@dataclass(frozen=True)
class Part:
    """The part of the encoder that is trained, and how. tune_share: of the pairs, in a run that tunes."""

    name: Literal["layer", "adapter"]
    batch_size: int
    epochs: int
    tune_share: float


class CachedStates(nn.Module):
    """Stands in the place of a backbone's embeddings: the id of a token is its row in a table of states."""

    def __init__(self, states_TD: np.ndarray) -> None:
        super().__init__()
        self._states_TD = states_TD

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        """States of tokens, fp32, one dimension more than their ids."""
        return torch.from_numpy(self._states_TD[input_ids.numpy()].astype(np.float32))


class Adapter(CachedStates):
    """A feed-forward block with a residual over cached states; at first it changes nothing."""

    def __init__(self, states_TD: np.ndarray) -> None:
        super().__init__(states_TD)
        dimension = states_TD.shape[1]
        self.up, self.down = nn.Linear(dimension, 4 * dimension), nn.Linear(4 * dimension, dimension)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        """Adapted states."""
        states = super().forward(input_ids)
        adapted: Tensor = states + self.down(nn.functional.gelu(self.up(states)))
        return adapted


def cut_encoder(folder: Path, part: Part | None, prepared: Prepared, *, seed: int) -> Encoder:
    """What is trained of the pretrained encoder, over cached states; nothing else has parameters.

    part: None gives the top layers, over the states of `prepared` as they are.
    """
    encoder = load_encoder(folder)
    torch.manual_seed(seed)
    adapter = part is not None and part.name == "adapter"
    encoder.backbone.embeddings = Adapter(prepared.states_TD) if adapter else CachedStates(prepared.states_TD)
    layers = encoder.backbone.encoder.layer
    encoder.backbone.encoder.layer = layers[len(layers) if adapter else -TOP_LAYERS :]
    return encoder


def pooled(prepared: Prepared, encoder: Path, work: Path) -> Prepared:
    """The same texts with one state each, for the adapter: the pretrained embedding, of mean square 1; once."""
    file = work / "pooled.npy"

    def compute() -> list[int]:
        rows = np.arange(len(prepared.texts))
        embedding_ND = embed(cut_encoder(encoder, None, prepared, seed=0), prepared, rows)
        np.save(file, embedding_ND * np.sqrt(embedding_ND.shape[1], dtype=np.float32))
        return list(embedding_ND.shape)

    complete({file.with_suffix(".json"): compute}, what="embed all texts")
    return dataclasses.replace(prepared, offsets=np.arange(len(prepared.texts) + 1), states_TD=np.load(file))


@torch.inference_mode()
def embed(encoder: Encoder, prepared: Prepared, rows: np.ndarray) -> np.ndarray:
    """Unit vectors of texts, (N, D) float32."""
    out_ND = np.empty((len(rows), encoder.dimension), dtype=np.float32)
    lengths = prepared.offsets[rows + 1] - prepared.offsets[rows]
    for batch in token_batches(lengths, budget=_BATCH_TOKENS):
        out_ND[batch] = encoder.embed([prepared.ids(row) for row in rows[batch]]).numpy()
    return out_ND


def train(encoder: Encoder, prepared: Prepared, plan: Plan, setting: Setting, *, epochs: int) -> list[float]:
    """Train; returns the losses."""
    optimizer = adamw(encoder, learning_rate=setting.learning_rate, weight_decay=WEIGHT_DECAY, layer_decay=1.0)
    steps = [(epoch, step) for epoch in range(epochs) for step in range(plan.steps_per_epoch)]
    losses = []
    for number, (epoch, step) in enumerate(steps):
        progress = number / max(1, len(steps) - 1)
        temperature, weights = weights_at(setting.weighting, progress=progress, temperature=setting.temperature)
        settings = StepSettings(
            objective=info_nce(temperature=temperature, weights=weights, score_block=1 << 24),
            micro_batch_tokens=_BATCH_TOKENS,
            keep_activations_tokens=1 << 30,
            precision="fp32",
            dropout_seed=0,
        )
        rate = learning_rate(number, num_steps=len(steps), peak=setting.learning_rate, warmup=WARMUP, schedule="cosine")
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad()
        loss, _ = accumulate_gradients(encoder, _texts(prepared, plan.batch(epoch, step)), settings, Alone())
        nn.utils.clip_grad_norm_(encoder.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        losses.append(loss)
    return losses


def _texts(prepared: Prepared, batch: Batch) -> LocalTexts:
    columns = Columns(*map(torch.from_numpy, (batch.positive, batch.masked_query, batch.masked_passage)))
    return LocalTexts(
        ids=[prepared.ids(row) for row in np.concatenate([batch.query, batch.passage])],
        query_rank=torch.zeros(len(batch.query), dtype=torch.int64),
        targets=Targets(task="retrieval", columns=columns, own=None, label_N=None, teacher_NG=None),
    )


def measure(encoder: Encoder, prepared: Prepared, sets: list[RetrievalSet]) -> dict[str, dict[str, float]]:
    """nDCG@10 of every query of every set."""
    found = {}
    for data in sets:
        passages, queries = (np.array(list(map(int, rows))) for rows in (data.corpus, data.queries))
        index = DenseIndex.build(embed(encoder, prepared, passages))
        scores_QK, rows_QK = index.search(embed(encoder, prepared, queries), _DEPTH)
        rankings = {
            str(query): dict(zip(map(str, passages[rows]), scores.tolist(), strict=True))
            for query, rows, scores in zip(queries, rows_QK, scores_QK, strict=True)
        }
        found[data.name] = {key: row["ndcg_at_10"] for key, row in per_query(rankings, data.qrels).items()}
    return found


def run(
    prepared: Prepared,
    encoder_folder: Path,
    mined: dict[str, Any],
    setting: Setting | None,
    *,
    part: Part,
    seed: int,
    share: float,
    sets: list[RetrievalSet],
) -> dict[str, Any]:
    """Train with a setting (None: not at all) and measure."""
    began = time.monotonic()
    encoder = cut_encoder(encoder_folder, part, prepared, seed=seed)
    pairs = examples(mined, share=share)
    weights = (1.0,) * len(pairs.sources)
    plan = Plan(pairs, seed, part.batch_size, NUM_NEGATIVES, weights, one_source=True)
    losses = train(encoder, prepared, plan, setting, epochs=part.epochs) if setting else []
    trained = time.monotonic()
    scores = measure(encoder, prepared, sets)
    return {
        "setting": setting.to_json() if setting else None,
        "seed": seed,
        "pairs": len(pairs),
        "losses": losses,
        "train_s": trained - began,
        "measure_s": time.monotonic() - trained,
        "scores": scores,
    }
