"""Progressive contrastive loss with its gradients in closed form, one block of queries at a time.

Shapes: N queries of the global batch, M passages that this rank holds (its columns), D dimensions, B queries of a
block. Only a (B, M) block of scores is ever in memory. Scores have the embeddings' precision, at least fp32.
docs/training-step.md derives the formulas used here.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from peg.model.distributed import Group

_DOWN_WEIGHTED = math.log(0.999)  # a weight of 1 that rounding moved does not count


@dataclass(frozen=True)
class Columns:
    """Which of this rank's passages are what to whom.

    positive_N: (N,) int64, this rank's column of each query's own positive, or -1 where another rank holds it.
    masked_row_K, masked_column_K: (K,) int64, entries that are no negatives (other known positives), rows ascending.
    """

    positive_N: Tensor
    masked_row_K: Tensor
    masked_column_K: Tensor


@dataclass(frozen=True)
class Exponents:
    """The weighting at one moment of training; a = b = 0 is InfoNCE."""

    negatives: float
    """a: a negative of score s weighs exp(a·s/τ), mean 1 over the query's negatives; above -1."""
    queries: float
    """b: a query of difficulty h weighs exp(-b·h/τ), mean 1 over the batch."""


@dataclass(frozen=True)
class LossGradients:
    """The global loss, and what this rank knows of its gradients.

    grad_query_ND is this rank's part: the sum over ranks is the gradient. grad_passage_MD is complete.
    """

    loss: float
    grad_query_ND: Tensor
    grad_passage_MD: Tensor
    stats: dict[str, float]


def progressive_loss(
    query_ND: Tensor,
    passage_MD: Tensor,
    columns: Columns,
    *,
    temperature: float,
    exponents: Exponents,
    margin: float | None,
    block: int,
    group: Group,
) -> LossGradients:
    """Mean weighted InfoNCE over the global batch, in nats, and its gradients.

    query_ND: (N, D) unit rows, all queries of the global batch, the same on every rank.
    passage_MD: (M, D) unit rows, the distinct passages that this rank holds.
    margin: passages scoring above the positive by more than this are masked; None masks none.
    A query without any unmasked negative has loss 0 and is left out of the means.
    """
    totals = _Totals(query_ND, passage_MD)
    for start in range(0, len(query_ND), block):
        rows = slice(start, min(start + block, len(query_ND)))
        scores = _block_scores(query_ND[rows], passage_MD, columns, rows=rows, margin=margin, group=group)
        _add_block(totals, scores, query_ND, passage_MD, rows=rows, temperature=temperature, exponents=exponents)
    return totals.result()


@dataclass
class _BlockScores:
    score_BM: Tensor
    negative_BM: Tensor
    positive_B: Tensor
    num_negatives_B: Tensor
    owned_B: Tensor
    owned_column_B: Tensor
    group: Group


def _block_scores(
    query_BD: Tensor, passage_MD: Tensor, columns: Columns, *, rows: slice, margin: float | None, group: Group
) -> _BlockScores:
    score_BM = query_BD @ passage_MD.T
    positive_column_B = columns.positive_N[rows]
    owned_B = (positive_column_B >= 0).nonzero().squeeze(1)
    owned_column_B = positive_column_B[owned_B]
    positive_B = score_BM.new_zeros(len(query_BD))
    positive_B[owned_B] = score_BM[owned_B, owned_column_B]
    group.sum_(positive_B)

    negative_BM = torch.ones_like(score_BM, dtype=torch.bool)
    negative_BM[owned_B, owned_column_B] = False
    edges = torch.tensor([rows.start, rows.stop], device=columns.masked_row_K.device)
    first, last = torch.searchsorted(columns.masked_row_K, edges).tolist()
    negative_BM[columns.masked_row_K[first:last] - rows.start, columns.masked_column_K[first:last]] = False
    if margin is not None:
        negative_BM &= score_BM <= (positive_B + margin).unsqueeze(1)
    num_negatives_B = group.sum_(negative_BM.sum(1).to(torch.float64))
    return _BlockScores(score_BM, negative_BM, positive_B, num_negatives_B, owned_B, owned_column_B, group)


def _add_block(
    totals: "_Totals",
    scores: _BlockScores,
    query_ND: Tensor,
    passage_MD: Tensor,
    *,
    rows: slice,
    temperature: float,
    exponents: Exponents,
) -> None:
    a = exponents.negatives
    minus_inf = -math.inf
    logit_BM = scores.score_BM / temperature
    positive_B = scores.positive_B / temperature
    counted_B = scores.num_negatives_B > 0
    log_n_B = scores.num_negatives_B.clamp(min=1).log().to(logit_BM.dtype)

    negative_BM = scores.negative_BM
    tilt_BM = (a * logit_BM).masked_fill_(~negative_BM, minus_inf)
    weighted_BM = tilt_BM + logit_BM
    statistics_3B = scores.group.logsumexp(
        torch.stack(
            [
                weighted_BM.logsumexp(1),
                tilt_BM.logsumexp(1),
                logit_BM.masked_fill(~negative_BM, minus_inf).logsumexp(1),
            ]
        )
    )
    log_weighted_B, log_tilt_B, log_plain_B = torch.where(counted_B, statistics_3B, torch.zeros_like(statistics_3B))
    # log Σ_j w_ij·e^{s_ij/τ}, with w of mean 1
    log_negatives_B = log_weighted_B + log_n_B - log_tilt_B
    log_z_B = torch.logaddexp(positive_B, log_negatives_B)
    loss_B = torch.where(counted_B, log_z_B - positive_B, torch.zeros_like(log_z_B))
    difficulty_B = log_plain_B - positive_B - log_n_B  # h/τ
    weight_B = totals.query_weights((-exponents.queries * difficulty_B).double(), counted_B)

    log_weight_BM = tilt_BM + (log_n_B - log_tilt_B).unsqueeze(1)
    down_weighted = float((log_weight_BM < _DOWN_WEIGHTED).logical_and_(negative_BM).sum())
    share_BM = weighted_BM.add_((log_n_B - log_tilt_B - log_z_B).unsqueeze(1)).exp_()  # p_ij
    scale_B = (weight_B / temperature).to(share_BM.dtype)
    gradient_BM = share_BM.mul_(scale_B.unsqueeze(1))
    positive_share_B = (positive_B - log_z_B).exp()
    owned_B = scores.owned_B
    gradient_BM[owned_B, scores.owned_column_B] = (-scale_B * (1 - positive_share_B))[owned_B]

    totals.grad_query_ND[rows] = gradient_BM @ passage_MD
    totals.grad_passage_MD.addmm_(gradient_BM.T, query_ND[rows])
    totals.loss += float((weight_B * loss_B.double()).sum())
    totals.weight += float(weight_B.sum())
    totals.count(scores, down_weighted=down_weighted)


class _Totals:
    """Sums over blocks. Query weights are kept relative to the largest so far, and divided out at the end."""

    def __init__(self, query_ND: Tensor, passage_MD: Tensor) -> None:
        self.grad_query_ND = torch.zeros_like(query_ND)
        self.grad_passage_MD = torch.zeros_like(passage_MD)
        self.loss = 0.0
        self.weight = 0.0
        self._log_reference = -math.inf
        self._num_queries = len(query_ND)
        # local: unmasked, down-weighted, sum of their scores; global: sum of positive scores, queries that count
        self._local = torch.zeros(4, dtype=torch.float64, device=query_ND.device)
        self._positive_score = 0.0
        self._counted = 0
        self._group: Group | None = None

    def query_weights(self, log_weight_B: Tensor, counted_B: Tensor) -> Tensor:
        """exp(log weight - reference), in float64; earlier sums are rescaled when the reference rises."""
        if not bool(counted_B.any()):
            return torch.zeros_like(log_weight_B)
        peak = float(log_weight_B[counted_B].max())
        if peak > self._log_reference:
            rescale = math.exp(self._log_reference - peak)
            self.grad_query_ND *= rescale
            self.grad_passage_MD *= rescale
            self.loss *= rescale
            self.weight *= rescale
            self._log_reference = peak
        return torch.where(counted_B, (log_weight_B - self._log_reference).exp(), torch.zeros_like(log_weight_B))

    def count(self, scores: _BlockScores, *, down_weighted: float) -> None:
        self._group = scores.group
        unmasked = scores.negative_BM
        negative_score = float((scores.score_BM * unmasked).sum(dtype=torch.float64))
        entries = unmasked.numel() - len(scores.owned_B)
        self._local += self._local.new_tensor([float(unmasked.sum()), down_weighted, negative_score, entries])
        self._positive_score += float(scores.positive_B.sum())
        self._counted += int((scores.num_negatives_B > 0).sum())

    def result(self) -> LossGradients:
        scale = 1 / self.weight if self.weight > 0 else 0.0
        self.grad_query_ND *= scale
        self.grad_passage_MD *= scale
        local = self._group.sum_(self._local) if self._group else self._local
        unmasked, down_weighted, negative_score, entries = local.tolist()
        return LossGradients(
            loss=self.loss * scale,
            grad_query_ND=self.grad_query_ND,
            grad_passage_MD=self.grad_passage_MD,
            stats={
                "masked_share": 1 - unmasked / entries if entries else 0.0,
                "down_weighted_share": down_weighted / unmasked if unmasked else 0.0,
                "negative_score": negative_score / unmasked if unmasked else 0.0,
                "positive_score": self._positive_score / max(1, self._num_queries),
                "counted_queries": float(self._counted),
            },
        )
