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
    a: float = 0.0,
    b: float = 0.0,
    gamma: float = 0.0,
    alpha: float = 0.0,
    margin: float | None = None,
) -> Tensor:
    """docs/training-step.md, line by line; weights are constants to the gradient."""
    losses, log_weights = [], []
    for i in range(len(query)):
        scores = passage @ query[i]
        own = int(positive[i])
        negatives = [
            j
            for j in range(len(passage))
            if j != own and (i, j) not in masked and (margin is None or scores[j] <= scores[own] + margin)
        ]
        if negatives:
            loss, log_weight = _of_one(
                scores[own], scores[negatives], temperature=temperature, a=a, b=b, gamma=gamma, alpha=alpha
            )
            losses.append(loss)
            log_weights.append(log_weight)
    v = torch.exp(torch.stack(log_weights))
    return (v / v.mean() * torch.stack(losses)).mean()


def naive_reverse(
    query: Tensor, passage: Tensor, positive: Tensor, masked: list[tuple[int, int]], **knobs: float
) -> Tensor:
    """The loss of positives over queries: the same one, with the sides changed."""
    entries = {(i, int(column)) for i, column in enumerate(positive)} | set(masked)
    others = [
        (i, j) for i in range(len(query)) for j in range(len(query)) if j != i and (j, int(positive[i])) in entries
    ]
    return naive_loss(passage[positive], query, torch.arange(len(query)), others, **knobs)  # type: ignore[arg-type]


def _of_one(
    positive: Tensor, negatives: Tensor, *, temperature: float, a: float, b: float, gamma: float, alpha: float
) -> tuple[Tensor, Tensor]:
    s, p = negatives / temperature, positive / temperature
    with torch.no_grad():
        w = torch.exp(a * s)
        w = w / w.mean() * torch.exp(alpha * negatives)
    share = torch.exp(p) / (torch.exp(p) + (w * torch.exp(s)).sum())
    difficulty = torch.logsumexp(s - p, 0) - math.log(len(negatives))
    return -torch.log(share), (-b * difficulty + gamma * torch.log(1 - share)).detach()
