"""Losses over a query's own passages: its positive and the K hard negatives drawn for it, not the rest of the batch.

G = 1 + K. The (N, G) scores are few, so that every rank holds them all and autograd gives their gradient; what they
mean for the embeddings goes to the ranks that hold the passages.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from peg.model.distributed import Group

_LOWEST = -1e9  # of a passage that is not there; -inf would give NaN gradients


@dataclass(frozen=True)
class OwnPassages:
    """column_NG: (N, G) int64, this rank's column of each own passage, -1 where another rank holds it or none is there.

    present_NG: (N, G) bool, the same on every rank: which own passages there are. Position 0 is the positive.
    """

    column_NG: Tensor
    present_NG: Tensor


def own_gradients(
    query_ND: Tensor,
    passage_MD: Tensor,
    own: OwnPassages,
    loss: Callable[[Tensor], Tensor],
    group: Group,
) -> tuple[float, Tensor, Tensor]:
    """The loss of own scores, this rank's part of the queries' gradient, and its passages' gradient.

    loss takes the (N, G) cosines, 0 where there is no passage, and returns a scalar; it is the same on every rank.
    """
    row_E, slot_E = (own.column_NG >= 0).nonzero(as_tuple=True)
    column_E = own.column_NG[row_E, slot_E]
    score_NG = query_ND.new_zeros(own.column_NG.shape)
    score_NG[row_E, slot_E] = (query_ND[row_E] * passage_MD[column_E]).sum(1)
    score_NG = group.sum_(score_NG).requires_grad_()
    with torch.enable_grad():
        value = loss(score_NG)
        (grad_NG,) = torch.autograd.grad(value, score_NG)
    grad_E1 = grad_NG[row_E, slot_E].unsqueeze(1)
    grad_query_ND = torch.zeros_like(query_ND).index_add_(0, row_E, grad_E1 * passage_MD[column_E])
    grad_passage_MD = torch.zeros_like(passage_MD).index_add_(0, column_E, grad_E1 * query_ND[row_E])
    return float(value.detach()), grad_query_ND, grad_passage_MD


def classification_loss(score_NG: Tensor, present_NG: Tensor, *, temperature: float) -> Tensor:
    """Mean cross-entropy of the positive among the query's own passages, over queries that have a negative.

    No in-batch negatives: another row's passage may well carry the same label (Piccolo2, arXiv 2405.06932).
    """
    logit_NG = (score_NG / temperature).masked_fill(~present_NG, _LOWEST)
    counted_N = present_NG[:, 1:].any(1)
    loss_N = logit_NG.logsumexp(1) - logit_NG[:, 0]
    return (loss_N * counted_N).sum() / counted_N.sum().clamp(min=1)


def distillation_loss(
    score_NG: Tensor, teacher_NG: Tensor, *, temperature: float, teacher_temperature: float
) -> Tensor:
    """Mean KL divergence of our softmax over own passages from the teacher's, over queries with two scores or more.

    teacher_NG: (N, G) scores of a cross-encoder, NaN where there is none.
    """
    scored_NG = teacher_NG.isfinite()
    counted_N = scored_NG.sum(1) > 1
    teacher_NG = (teacher_NG / teacher_temperature).masked_fill(~scored_NG, _LOWEST).to(score_NG.dtype)
    target_NG = functional.log_softmax(teacher_NG, dim=1)
    found_NG = functional.log_softmax((score_NG / temperature).masked_fill(~scored_NG, _LOWEST), dim=1)
    loss_N = (target_NG.exp() * (target_NG - found_NG)).sum(1)
    return (loss_N * counted_N).sum() / counted_N.sum().clamp(min=1)


def cosent_loss(score_N: Tensor, label_N: Tensor, *, temperature: float) -> Tensor:
    """log(1 + Σ exp((s_i - s_j)/τ)) over all i, j of which i has the lower label (Su 2022, CoSENT).

    score_N: cosines of sentence pairs. label_N: how similar people find them, on any scale. Memory is O(N): pairs are
    sorted by label, and each is held against the log-sum-exp of all below it.
    """
    order = torch.argsort(label_N, stable=True)
    label_N, logit_N = label_N[order], score_N[order] / temperature
    num_lower_N = torch.searchsorted(label_N, label_N)
    above = num_lower_N > 0
    if not bool(above.any()):
        return score_N.sum() * 0
    lower_N = torch.logcumsumexp(logit_N, dim=0)[num_lower_N[above] - 1] - logit_N[above]
    return torch.logaddexp(lower_N.logsumexp(0), torch.zeros_like(lower_N[0]))
