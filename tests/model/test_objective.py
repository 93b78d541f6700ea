import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from peg.model.distributed import Alone
from peg.model.losses import Columns
from peg.model.objective import Objective, Targets, embedding_gradients
from peg.model.own import OwnPassages, cosent_loss
from peg.model.weighting import progressive
from tests.model.naive import naive_loss, naive_reverse

N, M, D = 5, 12, 6
TAU = 0.1
POSITIVE = torch.tensor([0, 3, 5, 3, 11])
MASKED = [(0, 1), (2, 4)]
OWN = torch.tensor([[0, 2, 4], [3, 1, -1], [5, 6, 7], [3, -1, -1], [11, 8, 2]])
TEACHER = torch.tensor(
    [[5.0, 1.0, -2.0], [3.0, 3.5, math.nan], [math.nan] * 3, [4.0, math.nan, math.nan], [9.0, 1.0, 8.0]]
)
LABELS = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0], dtype=torch.float64)


def unit(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows_RD = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    return functional.normalize(rows_RD, dim=-1).requires_grad_()


def objective(**changes: Any) -> Objective:
    values: dict[str, Any] = {
        "temperature": TAU,
        "weights": progressive(a=0.4, b=0.3, temperature=TAU),
        "margin": None,
        "passage_to_query": 0.0,
        "distillation": None,
        "similarity_temperature": 0.05,
        "dims": (),
        "score_block": 3 * M,
    }
    return Objective(**{**values, **changes})


def targets(task: str = "retrieval", **changes: Any) -> Targets:
    rows = torch.tensor(MASKED).T.contiguous()
    values: dict[str, Any] = {
        "task": task,
        "columns": Columns(POSITIVE, rows[0], rows[1]),
        "own": OwnPassages(column_NG=OWN, present_NG=OWN >= 0),
        "label_N": None,
        "teacher_NG": None,
    }
    return Targets(**{**values, **changes})


def check(expected: torch.Tensor, query: torch.Tensor, passage: torch.Tensor, *what: Any) -> None:
    expected.backward()
    found = embedding_gradients(query.detach(), passage.detach(), *what, Alone())
    assert found.loss == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(found.grad_query_ND, query.grad, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found.grad_passage_MD, passage.grad, atol=1e-12, rtol=1e-9)


def naive_distillation(query: torch.Tensor, passage: torch.Tensor, *, teacher_temperature: float) -> torch.Tensor:
    parts = []
    for i in range(N):
        scored = [g for g in range(3) if OWN[i, g] >= 0 and not math.isnan(TEACHER[i, g])]
        if len(scored) > 1:
            target = torch.softmax(TEACHER[i, scored].double() / teacher_temperature, 0)
            found = torch.log_softmax(passage[OWN[i, scored]] @ query[i] / TAU, 0)
            parts.append((target * (target.log() - found)).sum())
    return torch.stack(parts).mean()


def test_both_directions_and_the_teacher_add_up() -> None:
    query, passage = unit(N, 1), unit(M, 2)
    knobs = {"temperature": TAU, "a": 0.4, "b": 0.3}
    expected = (
        naive_loss(query, passage, POSITIVE, MASKED, **knobs)
        + 0.7 * naive_reverse(query, passage, POSITIVE, MASKED, **knobs)
        + 0.5 * naive_distillation(query, passage, teacher_temperature=2.0)
    )
    made = objective(passage_to_query=0.7, distillation=(0.5, 2.0))
    check(expected, query, passage, targets(teacher_NG=TEACHER), made)


def test_cut_embeddings_are_each_trained_on() -> None:
    query, passage = unit(N, 1), unit(M, 2)
    parts = [
        naive_loss(
            functional.normalize(query[:, :dim], dim=1),
            functional.normalize(passage[:, :dim], dim=1),
            POSITIVE,
            MASKED,
            temperature=TAU,
            a=0.4,
            b=0.3,
        )
        for dim in (2, 4, D)
    ]
    check(torch.stack(parts).mean(), query, passage, targets(), objective(dims=(2, 4, D)))


def test_classification_takes_a_rows_own_negatives_alone() -> None:
    query, passage = unit(N, 1), unit(M, 2)
    parts = []
    for i in range(N):
        own = [int(column) for column in OWN[i] if column >= 0]
        if len(own) > 1:
            parts.append(-torch.log_softmax(passage[own] @ query[i] / TAU, 0)[0])
    check(torch.stack(parts).mean(), query, passage, targets("classification"), objective())


def test_cosent_compares_every_pair_of_unlike_labels() -> None:
    query, passage = unit(N, 1), unit(M, 2)
    cosine = (query * passage[POSITIVE]).sum(1)
    terms = [(cosine[i] - cosine[j]) / 0.05 for i in range(N) for j in range(N) if float(LABELS[i]) < float(LABELS[j])]
    expected = torch.log(1 + torch.stack(terms).exp().sum())
    pairs = targets(
        "similarity", own=OwnPassages(POSITIVE[:, None], torch.ones(N, 1, dtype=torch.bool)), label_N=LABELS
    )
    check(expected, query, passage, pairs, objective())


def test_cosent_of_equal_labels_is_zero() -> None:
    score = torch.randn(4, dtype=torch.float64, requires_grad=True)
    loss = cosent_loss(score, torch.ones(4), temperature=0.05)
    loss.backward()
    assert loss.item() == 0
    assert score.grad is not None and score.grad.abs().max() == 0
