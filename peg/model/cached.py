"""The training step whose memory does not grow with the batch: encode, differentiate the loss, encode again.

1. Every text of this rank is embedded in micro-batches; the graph is kept for as many tokens as the budget allows.
2. Queries are gathered; loss and ∂loss/∂embedding come in closed form (peg.model.losses).
3. Each micro-batch is backpropagated from its embeddings' gradients, after being embedded again with the same dropout
   where its graph was not kept.
4. Parameter gradients are summed over ranks, once.

The gradient is that of the mean over the global batch, on any number of ranks.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peg.errors import StageError
from peg.model.distributed import Group, scatter_rows
from peg.model.encoder import Encoder
from peg.model.losses import Columns, Exponents, progressive_loss
from peg.model.microbatch import pad_ids, token_batches

# Twice the same work in the same order differs by nothing on CPU; GPU kernels may add in another order.
_SEEDS = 1 << 63
_REPLAY_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class LocalTexts:
    """This rank's part of a global batch of N queries.

    ids: token ids of this rank's queries, then of its M passages. query_position: index of each of its queries in
    the global batch. columns: over its passages, for all N queries.
    """

    ids: Sequence[np.ndarray]
    query_position: Tensor
    num_queries: int
    columns: Columns


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed; see config.Train for what each means."""

    temperature: float
    exponents: Exponents
    margin: float | None
    micro_batch_tokens: int
    keep_activations_tokens: int
    score_block: int
    precision: str
    dropout_seed: int


def accumulate_gradients(
    encoder: Encoder, texts: LocalTexts, settings: StepSettings, group: Group
) -> tuple[float, dict[str, float]]:
    """Add the global batch's gradient to the parameters' .grad; return its loss and statistics.

    Raises StageError where the second pass does not repeat the first, which would give garbage without an error.
    """
    micro_batches = token_batches([len(ids) for ids in texts.ids], budget=settings.micro_batch_tokens)
    device = encoder.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        embedding_TD, kept = _embed(encoder, texts, micro_batches, settings)
        num_local = len(texts.query_position)
        query_ND = scatter_rows(embedding_TD[:num_local], texts.query_position, num_rows=texts.num_queries, group=group)
        loss = progressive_loss(
            query_ND,
            embedding_TD[num_local:],
            texts.columns,
            temperature=settings.temperature,
            exponents=settings.exponents,
            margin=settings.margin,
            block=settings.score_block,
            group=group,
        )
        grad_query_ND = group.sum_(loss.grad_query_ND)
        grad_TD = torch.cat([grad_query_ND[texts.query_position], loss.grad_passage_MD])
        _backpropagate(
            encoder, texts, micro_batches, kept=kept, embedding_TD=embedding_TD, grad_TD=grad_TD, settings=settings
        )
    _sum_parameter_gradients(encoder, group)
    return loss.loss, loss.stats


def _embed(
    encoder: Encoder, texts: LocalTexts, micro_batches: list[np.ndarray], settings: StepSettings
) -> tuple[Tensor, dict[int, Tensor]]:
    dtype = torch.promote_types(next(encoder.parameters()).dtype, torch.float32)
    embedding_TD = torch.empty(len(texts.ids), encoder.dimension, dtype=dtype, device=encoder.device)
    kept: dict[int, Tensor] = {}
    kept_tokens = 0
    for index, rows in enumerate(micro_batches):
        kept_tokens += len(rows) * len(texts.ids[rows[0]])
        with torch.set_grad_enabled(kept_tokens <= settings.keep_activations_tokens):
            rows_BD = _embed_one(encoder, texts, rows, index, settings)
        embedding_TD[torch.from_numpy(rows)] = rows_BD.detach()
        if rows_BD.requires_grad:
            kept[index] = rows_BD
    return embedding_TD, kept


def _embed_one(encoder: Encoder, texts: LocalTexts, rows: np.ndarray, index: int, settings: StepSettings) -> Tensor:
    torch.manual_seed(((settings.dropout_seed << 20) + index) % _SEEDS)
    ids_BL, mask_BL = pad_ids([texts.ids[row] for row in rows], pad_id=encoder.pad_id, device=encoder.device)
    with _autocast(settings.precision, encoder.device):
        rows_BD: Tensor = encoder(ids_BL, mask_BL)
    return rows_BD


def _backpropagate(
    encoder: Encoder,
    texts: LocalTexts,
    micro_batches: list[np.ndarray],
    *,
    kept: dict[int, Tensor],
    embedding_TD: Tensor,
    grad_TD: Tensor,
    settings: StepSettings,
) -> None:
    for index, rows in enumerate(micro_batches):
        at = torch.from_numpy(rows)
        rows_BD = kept.pop(index, None)
        if rows_BD is None:
            rows_BD = _embed_one(encoder, texts, rows, index, settings)
            drift = float((rows_BD.detach() - embedding_TD[at]).abs().max())
            # `not <=` stops at NaN too, unless the first pass was NaN already: the loop reports that one
            if not drift <= _REPLAY_TOLERANCE[settings.precision] and bool(embedding_TD[at].isfinite().all()):
                raise StageError(
                    f"the second pass differs from the first by {drift:.2g} in micro-batch {index}; its dropout was "
                    "not replayed, and the gradient would be wrong: set train.dropout to 0 and report this encoder"
                )
        torch.autograd.backward([rows_BD], [grad_TD[at]])


def _sum_parameter_gradients(encoder: Encoder, group: Group) -> None:
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    if group.world_size == 1 or not parameters:
        return
    # A rank may have had no text: its parameters have no gradient yet.
    flat = torch.cat(
        [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1)
            for parameter in parameters
        ]
    )
    group.sum_(flat)
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
