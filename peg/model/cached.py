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
from peg.model.distributed import Group
from peg.model.encoder import Encoder
from peg.model.microbatch import token_batches
from peg.model.objective import Objective, Targets, embedding_gradients

# Twice the same work in the same order differs by nothing on CPU; GPU kernels may add in another order.
_SEEDS = 1 << 63
_REPLAY_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class LocalTexts:
    """This rank's part of a global batch of N queries.

    ids: token ids of this rank's queries, in the order of the batch, then of its M passages.
    query_rank: (N,) int64, the rank that embeds each query. targets: over its passages, for all N queries.
    """

    ids: Sequence[np.ndarray]
    query_rank: Tensor
    targets: Targets


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed; see config.Train for what each means."""

    objective: Objective
    micro_batch_tokens: int
    keep_activations_tokens: int
    precision: str
    dropout_seed: int


def accumulate_gradients(
    encoder: Encoder, texts: LocalTexts, settings: StepSettings, group: Group
) -> tuple[float, dict[str, float]]:
    """Add the global batch's gradient to the parameters' .grad; return its loss and statistics.

    Raises StageError where the second pass does not repeat the first, which would give garbage without an error.
    """
    micro_batches = token_batches(
        [len(ids) for ids in texts.ids], budget=settings.micro_batch_tokens, padded=not encoder.packed
    )
    device = encoder.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        embedding_TD, kept = _embed(encoder, texts, micro_batches, settings)
        num_local = int((texts.query_rank == group.rank).sum())
        query_ND = group.gather_rows(embedding_TD[:num_local], texts.query_rank)
        loss = embedding_gradients(query_ND, embedding_TD[num_local:], texts.targets, settings.objective, group)
        del query_ND
        grads = (group.sum_rows(loss.grad_query_ND, texts.query_rank), loss.grad_passage_MD)
        _backpropagate(
            encoder, texts, micro_batches, kept=kept, embedding_TD=embedding_TD, grads=grads, settings=settings
        )
    _sum_parameter_gradients(encoder, group)
    return loss.loss, loss.stats


def _embed(
    encoder: Encoder, texts: LocalTexts, micro_batches: list[np.ndarray], settings: StepSettings
) -> tuple[Tensor, dict[int, Tensor]]:
    embedding_TD = torch.empty(len(texts.ids), encoder.dimension, dtype=encoder.row_dtype, device=encoder.device)
    kept: dict[int, Tensor] = {}
    kept_tokens = 0
    for index, rows in enumerate(micro_batches):
        lengths = [len(texts.ids[row]) for row in rows]
        kept_tokens += sum(lengths) if encoder.packed else len(lengths) * max(lengths)
        with torch.set_grad_enabled(kept_tokens <= settings.keep_activations_tokens):
            rows_BD = _embed_one(encoder, texts, rows, index, settings)
        embedding_TD[torch.from_numpy(rows)] = rows_BD.detach()
        if rows_BD.requires_grad:
            kept[index] = rows_BD
    return embedding_TD, kept


def _embed_one(encoder: Encoder, texts: LocalTexts, rows: np.ndarray, index: int, settings: StepSettings) -> Tensor:
    torch.manual_seed(((settings.dropout_seed << 20) + index) % _SEEDS)
    with autocast(settings.precision, encoder.device):
        return encoder.embed([texts.ids[row] for row in rows])


def _backpropagate(
    encoder: Encoder,
    texts: LocalTexts,
    micro_batches: list[np.ndarray],
    *,
    kept: dict[int, Tensor],
    embedding_TD: Tensor,
    grads: tuple[Tensor, Tensor],
    settings: StepSettings,
) -> None:
    grad_query_LD, grad_passage_MD = grads
    num_queries = len(grad_query_LD)
    for index, rows in enumerate(micro_batches):
        at = torch.from_numpy(rows).to(embedding_TD.device)
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
        grad_BD = torch.empty_like(rows_BD)
        is_query = at < num_queries
        grad_BD[is_query] = grad_query_LD[at[is_query]]
        grad_BD[~is_query] = grad_passage_MD[at[~is_query] - num_queries]
        torch.autograd.backward([rows_BD], [grad_BD])


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


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which an encoder computes at that precision."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
