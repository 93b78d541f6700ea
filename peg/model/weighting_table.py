"""What the weighting does to a batch: negatives and queries in bins of hardness, with each bin's weight and gradient.

Shapes: N queries, M passages, D dimensions. The whole (N, M) matrix is in memory: give a few hundred queries.
"""

import math

import torch
from torch import Tensor

from peg.model.bins import BINS_PER_UNIT, Bin, BinKind
from peg.model.losses import Columns
from peg.model.weighting import Weights

_DIGITS = 6


def weighting_table(
    query_ND: Tensor,
    passage_MD: Tensor,
    columns: Columns,
    *,
    temperature: float,
    weights: Weights,
    margin: float | None,
) -> list[Bin]:
    """All bins that hold something, negatives first, from low to high.

    query_ND, passage_MD: unit rows; the columns' positives are all among the passages. Same formulas as the loss,
    docs/training-step.md. Empty where no query has a negative.
    """
    if bool((columns.positive_N < 0).any()):
        raise ValueError("some positives are not among the passages; give the passages of all queries")
    row_N = torch.arange(len(query_ND), device=query_ND.device)
    score_NM = query_ND @ passage_MD.T
    positive_N1 = score_NM[row_N, columns.positive_N].unsqueeze(1)
    negative_NM = torch.ones_like(score_NM, dtype=torch.bool)
    negative_NM[row_N, columns.positive_N] = False
    negative_NM[columns.masked_row_K, columns.masked_column_K] = False
    if margin is not None:
        negative_NM &= score_NM <= positive_N1 + margin
    counted_N = negative_NM.any(1)
    if not bool(counted_N.any()):
        return []
    score_NM, positive_N1, negative_NM = score_NM[counted_N], positive_N1[counted_N], negative_NM[counted_N]

    gap_NM = (score_NM - positive_N1).double()
    score_NM = score_NM.double().masked_fill(~negative_NM, -math.inf)
    log_n_N = negative_NM.sum(1).double().log()
    weight_NM = torch.where(negative_NM, weights.slope * score_NM.nan_to_num(neginf=0.0), -math.inf)
    if weights.normalised:
        weight_NM -= (weight_NM.logsumexp(1) - log_n_N).unsqueeze(1)
    log_positive_N = positive_N1.squeeze(1).double() / temperature
    logit_NM = score_NM / temperature + weight_NM
    log_negatives_N = logit_NM.logsumexp(1)
    log_z_N = torch.logaddexp(log_positive_N, log_negatives_N)
    difficulty_N = (score_NM / temperature).logsumexp(1) - log_positive_N - log_n_N
    log_v_N = -weights.easiness * difficulty_N + weights.focus * (log_negatives_N - log_z_N)
    v_N = (log_v_N - log_v_N.logsumexp(0)).exp() * len(log_v_N)
    push_NM = v_N.unsqueeze(1) * (logit_NM - log_z_N.unsqueeze(1)).exp()
    return [
        *_bins("negatives", gap_NM[negative_NM], weight_NM[negative_NM].exp(), push_NM[negative_NM]),
        *_bins("queries", difficulty_N * temperature, v_N, push_NM.sum(1)),
    ]


def _bins(kind: BinKind, value_E: Tensor, weight_E: Tensor, push_E: Tensor) -> list[Bin]:
    index_E = torch.floor(value_E * BINS_PER_UNIT).long()
    found_B, bin_E, count_B = index_E.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    zero_B = torch.zeros(len(found_B), dtype=torch.float64, device=value_E.device)
    weight_B = zero_B.index_add(0, bin_E, weight_E) / count_B
    push_B = zero_B.index_add(0, bin_E, push_E) / push_E.sum()
    share_B = count_B.double() / len(value_E)
    return [
        Bin(kind, index / BINS_PER_UNIT, (index + 1) / BINS_PER_UNIT, *(_rounded(number) for number in numbers))
        for index, *numbers in zip(found_B.tolist(), share_B.tolist(), weight_B.tolist(), push_B.tolist(), strict=True)
    ]


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")
