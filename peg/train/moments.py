"""What the weighting does at the start, in the middle and at the end of a training, from a part of a batch."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch

from peg.model.bins import Bin
from peg.model.encoder import Encoder
from peg.model.losses import Columns
from peg.model.microbatch import token_batches
from peg.model.objective import Objective
from peg.model.weighting_table import weighting_table
from peg.train.batches import Batch
from peg.train.data import TrainingData

Moment = Literal["start", "middle", "end"]

COLUMNS = ["step", "progress", "moment", "kind", "bin_low", "bin_high", "share", "weight", "gradient_share"]
_QUERIES = 256  # of a batch; with their own passages, so that the scores fit any machine


def moment_of(step: int, *, num_steps: int) -> Moment | None:
    """Which of the three moments the step (from 0) is; where it is several, start goes before end before middle."""
    moments: dict[int, Moment] = {num_steps // 2: "middle", num_steps - 1: "end", 0: "start"}
    return moments.get(step)


@torch.inference_mode()
def bins_of_batch(
    encoder: Encoder, data: TrainingData, batch: Batch, objective: Objective, *, budget: int
) -> list[Bin]:
    """The weighting of a batch's first queries over their own passages, in bins; one rank does it by itself.

    budget: tokens embedded at once; without dropout. Empty for a batch without a contrastive loss.
    """
    if batch.task != "retrieval":
        return []
    own = batch.own[:_QUERIES]
    passage = np.unique(own[own >= 0])
    masked = (batch.masked_query < len(own)) & np.isin(batch.masked_passage, passage)
    columns = Columns(
        positive_N=_tensor(np.searchsorted(passage, batch.positive[: len(own)]), encoder),
        masked_row_K=_tensor(batch.masked_query[masked], encoder),
        masked_column_K=_tensor(np.searchsorted(passage, batch.masked_passage[masked]), encoder),
    )
    training = encoder.training
    encoder.eval()
    query_ND = _embed(encoder, [data.queries[row] for row in batch.query[: len(own)]], budget=budget)
    passage_MD = _embed(encoder, [data.passages[row] for row in batch.passage[passage]], budget=budget)
    encoder.train(training)
    return weighting_table(
        query_ND,
        passage_MD,
        columns,
        temperature=objective.temperature,
        weights=objective.weights,
        margin=objective.margin,
    )


def table_rows(bins: Sequence[Bin], *, step: int, progress: float, moment: Moment) -> list[dict[str, Any]]:
    """Rows of weighting.csv."""
    rows = []
    for one in bins:
        cells = asdict(one)
        cells["bin_low"], cells["bin_high"] = cells.pop("low"), cells.pop("high")
        rows.append({"step": step, "progress": progress, "moment": moment, **cells})
    return rows


def _embed(encoder: Encoder, ids: list[np.ndarray], *, budget: int) -> torch.Tensor:
    rows_TD = torch.empty(len(ids), encoder.dimension, dtype=encoder.row_dtype, device=encoder.device)
    for batch in token_batches([len(one) for one in ids], budget=budget, padded=not encoder.packed):
        rows_TD[torch.from_numpy(batch)] = encoder.embed([ids[row] for row in batch])
    return rows_TD


def _tensor(array: np.ndarray, encoder: Encoder) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(encoder.device)
