"""Weighted contrastive loss with its gradients in closed form, one block of rows at a time.

Shapes: R rows (queries, or positives where the direction is turned round), C columns that this rank holds, D
dimensions, B rows of a block. Only a (B, C) block of scores, and at most one more of its size, is ever in memory.
Scores have the embeddings' precision, at least fp32. docs/training-step.md derives the formulas used here.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from peg.model.distributed import Alone, Group
from peg.model.weighting import Weights

_LOG_DOWN_WEIGHTED = math.log(0.999)  # a weight of 1 that rounding moved does not count
_ALONE = Alone()


@dataclass(frozen=True)
class Columns:
    """Which of this rank's M passages are what to each of the N queries.

    positive_N: (N,) int64, this rank's column of each query's own positive, or -1 where another rank holds it.
    masked_row_K, masked_column_K: (K,) int64, entries that are no negatives (other known positives), rows ascending.
    """

    positive_N: Tensor
    masked_row_K: Tensor
    masked_column_K: Tensor


@dataclass(frozen=True)
class LossGradients:
    """The global loss, and what this rank knows of its gradients.

    grad_query_ND is this rank's part: the sum over ranks is the gradient. grad_passage_MD is complete.
    """

    loss: float
    grad_query_ND: Tensor
    grad_passage_MD: Tensor
    stats: dict[str, float]


def contrastive_loss(
    query_ND: Tensor,
    passage_MD: Tensor,
    columns: Columns,
    *,
    temperature: float,
    weights: Weights,
    margin: float | None,
    score_block: int,
    group: Group,
) -> LossGradients:
    """Mean weighted InfoNCE of the queries over the passages of all ranks, in nats, and its gradients.

    query_ND: (N, D) unit rows, all queries of the global batch, the same on every rank.
    passage_MD: (M, D) unit rows, the distinct passages that this rank holds.
    margin: passages scoring above the positive by more than this are masked; None masks none.
    score_block: so many scores of a rank are in memory at once.
    A query without any unmasked negative has loss 0 and is left out of the means.
    """
    owned_N = (columns.positive_N >= 0).nonzero().squeeze(1)
    entries = _Entries(owned_N, columns.positive_N[owned_N], columns.masked_row_K, columns.masked_column_K)
    sums = _Sums(query_ND, passage_MD, temperature=temperature, weights=weights, margin=margin)
    sums.add_all(entries, score_block=score_block, group=group)
    sums.divide(sums.log_weight())
    return LossGradients(sums.loss, sums.grad_row_RD, sums.grad_column_CD, sums.counts.stats(group))


def reverse_loss(
    query_ND: Tensor,
    passage_MD: Tensor,
    columns: Columns,
    *,
    temperature: float,
    weights: Weights,
    margin: float | None,
    score_block: int,
    group: Group,
) -> LossGradients:
    """The same loss turned round: each query's positive is to find it among all queries of the batch.

    Every rank scores the positives that it holds, so that nothing but the mean is reduced. A query that has the same
    passage as a known positive is masked.
    """
    owned_R = (columns.positive_N >= 0).nonzero().squeeze(1)
    column_R = columns.positive_N[owned_R]
    # Entries (passage, query) that are positives: drawn for this step, or known.
    passage_E = torch.cat([column_R, columns.masked_column_K])
    query_E = torch.cat([owned_R, columns.masked_row_K])
    order = torch.argsort(passage_E, stable=True)
    first_R = torch.searchsorted(passage_E[order], column_R)
    count_R = torch.searchsorted(passage_E[order], column_R, right=True) - first_R
    row_K = torch.repeat_interleave(torch.arange(len(owned_R), device=owned_R.device), count_R)
    within_K = torch.arange(len(row_K), device=owned_R.device) - (count_R.cumsum(0) - count_R)[row_K]
    query_K = query_E[order][first_R[row_K] + within_K]
    other_K = query_K != owned_R[row_K]
    entries = _Entries(torch.arange(len(owned_R), device=owned_R.device), owned_R, row_K[other_K], query_K[other_K])
    positive_RD = passage_MD[column_R]
    sums = _Sums(positive_RD, query_ND, temperature=temperature, weights=weights, margin=margin)
    sums.add_all(entries, score_block=score_block, group=_ALONE)
    total_weight = query_ND.new_tensor(sums.log_weight(), dtype=torch.float64)
    sums.divide(float(group.logsumexp(total_weight)))
    loss = float(group.sum_(query_ND.new_tensor(sums.loss, dtype=torch.float64)))
    grad_passage_MD = torch.zeros_like(passage_MD).index_add_(0, column_R, sums.grad_row_RD)
    return LossGradients(loss, sums.grad_column_CD, grad_passage_MD, {})


@dataclass(frozen=True)
class _Entries:
    """positive_row, positive_column: entries of rows whose own positive is here. masked_*: rows ascending."""

    positive_row: Tensor
    positive_column: Tensor
    masked_row: Tensor
    masked_column: Tensor

    def block(self, start: int, stop: int) -> "_Entries":
        """Those of rows start to stop, counted from start."""
        edges = torch.tensor([start, stop], device=self.positive_row.device)
        own = slice(*torch.searchsorted(self.positive_row, edges).tolist())
        masked = slice(*torch.searchsorted(self.masked_row, edges).tolist())
        return _Entries(
            self.positive_row[own] - start,
            self.positive_column[own],
            self.masked_row[masked] - start,
            self.masked_column[masked],
        )


class _Sums:
    """Sums over blocks of rows. Row weights are kept relative to the largest so far, and divided out at the end."""

    def __init__(
        self, row_RD: Tensor, column_CD: Tensor, *, temperature: float, weights: Weights, margin: float | None
    ) -> None:
        self.row_RD, self.column_CD = row_RD, column_CD
        self.temperature, self.weights, self.margin = temperature, weights, margin
        self.column_sum_D = column_CD.sum(0, dtype=torch.float64)
        self.grad_row_RD = torch.zeros_like(row_RD)
        self.grad_column_CD = torch.zeros_like(column_CD)
        self.loss = 0.0
        self.weight = 0.0
        self.log_reference = -math.inf
        self.counts = _Counts()

    def log_weight(self) -> float:
        """Log of the sum of row weights."""
        return math.log(self.weight) + self.log_reference if self.weight > 0 else -math.inf

    def add_all(self, entries: _Entries, *, score_block: int, group: Group) -> None:
        """Add all rows, in blocks of as many as score_block scores allow on the rank with most columns."""
        block = max(1, score_block // max(1, group.max(len(self.column_CD))))
        for start in range(0, len(self.row_RD), block):
            stop = min(start + block, len(self.row_RD))
            self._add(slice(start, stop), entries.block(start, stop), group)

    def divide(self, log_total_weight: float) -> None:
        """Turn sums into means over a total weight, which may be that of all ranks."""
        scale = math.exp(self.log_reference - log_total_weight) if self.weight > 0 else 0.0
        self.grad_row_RD *= scale
        self.grad_column_CD *= scale
        self.loss *= scale

    def _add(self, rows: slice, entries: _Entries, group: Group) -> None:
        block = _Block.of(
            self.row_RD[rows],
            self.column_CD,
            entries,
            column_sum_D=self.column_sum_D,
            margin=self.margin,
            group=group,
        )
        slope = self.weights.slope
        counted_B = block.num_negatives_B > 0
        positive_B = block.positive_B.double() / self.temperature
        log_n_B = block.num_negatives_B.clamp(min=1).log()

        def reduced(log_sum_B: Tensor) -> Tensor:
            return torch.where(counted_B, group.logsumexp(log_sum_B.double()), 0.0)

        # log w_ij = slope·s_ij - log_mean_B
        log_mean_B = torch.zeros_like(log_n_B)
        if slope and self.weights.normalised:
            log_mean_B = reduced(block.log_sum_exp(slope)) - log_n_B
        log_plain_B = reduced(block.log_sum_exp(1 / self.temperature)) if slope and self.weights.easiness else None
        down_weighted = block.num_below(slope, (_LOG_DOWN_WEIGHTED + log_mean_B) if slope else None)

        share_BC, peak_B = block.exp_(1 / self.temperature + slope)
        log_weighted_B = reduced(share_BC.sum(1).log() + peak_B)
        log_negatives_B = log_weighted_B - log_mean_B
        log_z_B = torch.logaddexp(positive_B, log_negatives_B)
        loss_B = torch.where(counted_B, log_z_B - positive_B, 0.0)
        difficulty_B = (log_weighted_B if log_plain_B is None else log_plain_B) - positive_B - log_n_B
        log_weight_B = -self.weights.easiness * difficulty_B + self.weights.focus * (log_negatives_B - log_z_B)
        weight_B = self._row_weights(log_weight_B, counted_B)

        # ∂/∂s is p_ij·v_i/τ at negatives, (p_i+ - 1)·v_i/τ at the positive; p_ij is share_BC times a factor of its row
        scale_B = weight_B / self.temperature
        factor_B1 = (scale_B * (peak_B - log_mean_B - log_z_B).exp()).to(share_BC.dtype).unsqueeze(1)
        row_BD, own, own_column = self.row_RD[rows], entries.positive_row, entries.positive_column
        grad_own_E1 = (scale_B * torch.expm1(positive_B - log_z_B))[own].to(share_BC.dtype).unsqueeze(1)
        grad_row_BD = (share_BC @ self.column_CD).mul_(factor_B1)
        self.grad_row_RD[rows] = grad_row_BD.index_add_(0, own, grad_own_E1 * self.column_CD[own_column])
        self.grad_column_CD.addmm_(share_BC.T, row_BD * factor_B1)
        self.grad_column_CD.index_add_(0, own_column, grad_own_E1 * row_BD[own])
        self.loss += float((weight_B * loss_B).sum())
        self.weight += float(weight_B.sum())
        self.counts.add(block, down_weighted=down_weighted)

    def _row_weights(self, log_weight_B: Tensor, counted_B: Tensor) -> Tensor:
        """exp(log weight - reference), in float64; earlier sums are rescaled when the reference rises."""
        if not bool(counted_B.any()):
            return torch.zeros_like(log_weight_B)
        peak = float(log_weight_B[counted_B].max())
        if peak > self.log_reference:
            rescale = math.exp(self.log_reference - peak)
            self.log_reference = peak
            if self.weight:
                self.grad_row_RD *= rescale
                self.grad_column_CD *= rescale
                self.loss *= rescale
                self.weight *= rescale
        return torch.where(counted_B, (log_weight_B - self.log_reference).exp(), 0.0)


@dataclass(frozen=True)
class _Block:
    """Scores of some rows over this rank's columns, -inf at the positive and where masked.

    above_BC: what the margin masks, if there is one. num_unmasked_B entries are left here, num_negatives_B over all
    ranks; score_sum is their sum here.
    """

    score_BC: Tensor
    entries: _Entries
    above_BC: Tensor | None
    lowest_B: Tensor
    positive_B: Tensor
    num_unmasked_B: Tensor
    num_negatives_B: Tensor
    score_sum: float

    @classmethod
    def of(
        cls,
        row_BD: Tensor,
        column_CD: Tensor,
        entries: _Entries,
        *,
        column_sum_D: Tensor,
        margin: float | None,
        group: Group,
    ) -> "_Block":
        own = entries.positive_row, entries.positive_column
        masked = entries.masked_row, entries.masked_column
        score_BC = row_BD @ column_CD.T
        positive_B = score_BC.new_zeros(len(score_BC))
        positive_B[own[0]] = score_BC[own]
        excluded_sum = score_BC[own].sum(dtype=torch.float64) + score_BC[masked].sum(dtype=torch.float64)
        score_sum = float(row_BD.sum(0, dtype=torch.float64) @ column_sum_D - excluded_sum)
        group.sum_(positive_B)
        lowest_B = score_BC.amin(1) if score_BC.shape[1] else torch.zeros_like(positive_B)
        excluded_B = torch.bincount(torch.cat([own[0], masked[0]]), minlength=len(score_BC))
        score_BC[own] = -math.inf
        score_BC[masked] = -math.inf
        above_BC = None
        if margin is not None:
            above_BC = score_BC > (positive_B + margin).unsqueeze(1)
            excluded_B = excluded_B + above_BC.sum(1)
            score_sum -= float(score_BC[above_BC].sum(dtype=torch.float64))
            score_BC.masked_fill_(above_BC, -math.inf)
        num_unmasked_B = (score_BC.shape[1] - excluded_B).double()
        return cls(
            score_BC=score_BC,
            entries=entries,
            above_BC=above_BC,
            lowest_B=lowest_B,
            positive_B=positive_B,
            num_unmasked_B=num_unmasked_B,
            num_negatives_B=group.sum_(num_unmasked_B.clone()),
            score_sum=score_sum,
        )

    @property
    def num_entries(self) -> int:
        """Scores that are no own positive's."""
        return self.score_BC.numel() - len(self.entries.positive_row)

    def log_sum_exp(self, factor: float) -> Tensor:
        """log Σ exp(factor·s) over the unmasked entries of each row, -inf where there is none."""
        if factor > 0:
            peak_B = self._peak(factor)
            return torch.add(-peak_B.unsqueeze(1), self.score_BC, alpha=factor).exp_().sum(1).log() + peak_B
        peak_B = self.lowest_B * factor
        power_BC = torch.add(-peak_B.unsqueeze(1), self.score_BC, alpha=factor)
        # what was masked with -inf is +inf now
        power_BC[self.entries.positive_row, self.entries.positive_column] = -math.inf
        power_BC[self.entries.masked_row, self.entries.masked_column] = -math.inf
        if self.above_BC is not None:
            power_BC.masked_fill_(self.above_BC, -math.inf)
        return power_BC.exp_().sum(1).log() + peak_B

    def exp_(self, factor: float) -> tuple[Tensor, Tensor]:
        """exp(factor·s - peak) in the place of the scores, and the peaks; factor above 0."""
        peak_B = self._peak(factor)
        torch.add(-peak_B.unsqueeze(1), self.score_BC, alpha=factor, out=self.score_BC)
        return self.score_BC.exp_(), peak_B.double()

    def _peak(self, factor: float) -> Tensor:
        if not self.score_BC.shape[1]:
            return torch.zeros_like(self.positive_B)
        highest_B = self.score_BC.amax(1)
        return torch.where(highest_B.isinf(), 0.0, highest_B * factor)

    def num_below(self, slope: float, edge_B: Tensor | None) -> float:
        """How many unmasked entries have slope·s below their row's edge."""
        if edge_B is None:
            return 0.0
        score_edge_B1 = (edge_B / slope).to(self.score_BC.dtype).unsqueeze(1)
        if slope < 0:
            return float((self.score_BC > score_edge_B1).sum())
        num_masked = self.score_BC.numel() - float(self.num_unmasked_B.sum())
        return float((self.score_BC < score_edge_B1).sum()) - num_masked


class _Counts:
    """What of a batch was masked and weighed down, and how its scores lie."""

    def __init__(self) -> None:
        self.unmasked = self.down_weighted = self.negative_score = self.positive_score = 0.0
        self.entries = self.rows = self.counted_rows = 0

    def add(self, block: _Block, *, down_weighted: float) -> None:
        self.unmasked += float(block.num_unmasked_B.sum())
        self.down_weighted += down_weighted
        self.negative_score += block.score_sum
        self.entries += block.num_entries
        self.positive_score += float(block.positive_B.sum())
        self.rows += len(block.positive_B)
        self.counted_rows += int((block.num_negatives_B > 0).sum())

    def stats(self, group: Group) -> dict[str, float]:
        """Over all ranks; rows are the same on each."""
        local = torch.tensor(
            [self.unmasked, self.down_weighted, self.negative_score, self.entries], dtype=torch.float64
        )
        unmasked, down_weighted, negative_score, entries = group.sum_(local).tolist()
        return {
            "masked_share": 1 - unmasked / entries if entries else 0.0,
            "down_weighted_share": down_weighted / unmasked if unmasked else 0.0,
            "negative_score": negative_score / unmasked if unmasked else 0.0,
            "positive_score": self.positive_score / max(1, self.rows),
            "counted_queries": float(self.counted_rows),
        }
