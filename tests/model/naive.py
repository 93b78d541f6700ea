"""The training loss as one would write it down: whole matrix, autograd, float64. The oracle of the fast one."""

import math

import torch
from torch import Tensor


def naive_loss(
    query: Tensor,
    passage: Tensor,
    positive: Tensor,
    masked: list[tuple[int, int]],
    *,
    temperature: float,
    a: float,
    b: float,
    margin: float | None = None,
) -> Tensor:
    """docs/training-step.md, line by line; weights are constants to the gradient."""
    scores = query @ passage.T
    losses, log_weights = [], []
    for i in range(len(query)):
        own = int(positive[i])
        negatives = [
            j
            for j in range(len(passage))
            if j != own and (i, j) not in masked and (margin is None or scores[i, j] <= scores[i, own] + margin)
        ]
        if not negatives:
            continue
        s = scores[i, negatives] / temperature
        p = scores[i, own] / temperature
        with torch.no_grad():
            w = torch.exp(a * s)
            w = w / w.mean()
            log_weights.append(-b * (torch.logsumexp(s - p, 0) - math.log(len(negatives))))
        losses.append(-torch.log(torch.exp(p) / (torch.exp(p) + (w * torch.exp(s)).sum())))
    v = torch.exp(torch.stack(log_weights))
    return (v / v.mean() * torch.stack(losses)).mean()
