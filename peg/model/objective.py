"""What a batch is trained for: from its embeddings to one loss and the embeddings' gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from peg.model.distributed import Group
from peg.model.losses import Columns, LossGradients, contrastive_loss, reverse_loss
from peg.model.own import OwnPassages, classification_loss, cosent_loss, distillation_loss, own_gradients
from peg.model.weighting import Weights
from peg.records import Task


@dataclass(frozen=True)
class Objective:
    """Which losses, with which knobs; config.Train says what each means. Nothing here depends on the batch."""

    temperature: float
    weights: Weights
    margin: float | None
    passage_to_query: float
    distillation: tuple[float, float] | None
    """Weight, and the teacher's temperature."""
    similarity_temperature: float
    dims: tuple[int, ...]
    score_block: int


@dataclass(frozen=True)
class Targets:
    """What a global batch of N queries should learn, as this rank sees it.

    label_N: (N,) float64, of similarity pairs. teacher_NG: (N, G), NaN where there is no score.
    """

    task: Task
    columns: Columns
    own: OwnPassages | None
    label_N: Tensor | None
    teacher_NG: Tensor | None


def info_nce(*, temperature: float, weights: Weights, score_block: int) -> Objective:
    """The contrastive loss from queries to passages, and nothing beside it."""
    return Objective(
        temperature=temperature,
        weights=weights,
        margin=None,
        passage_to_query=0.0,
        distillation=None,
        similarity_temperature=temperature,
        dims=(),
        score_block=score_block,
    )


def embedding_gradients(
    query_ND: Tensor, passage_MD: Tensor, targets: Targets, objective: Objective, group: Group
) -> LossGradients:
    """The batch's loss and what this rank knows of its embeddings' gradients.

    query_ND: (N, D) unit rows, the same on every rank. passage_MD: (M, D) unit rows that this rank holds.
    With dims, the loss is the mean over embeddings cut to each length and normalised again (Kusupati et al. 2022).
    """
    if not objective.dims:
        return _whole(query_ND, passage_MD, targets, objective, group)
    total: LossGradients | None = None
    share = 1 / len(objective.dims)
    for dim in objective.dims:
        query_Nd, passage_Md = (functional.normalize(rows[:, :dim], dim=1) for rows in (query_ND, passage_MD))
        cut = _whole(query_Nd, passage_Md, targets, objective, group)
        grads = [
            _through_cut(rows_RD, unit_Rd, grad_Rd * share)
            for rows_RD, unit_Rd, grad_Rd in (
                (query_ND, query_Nd, cut.grad_query_ND),
                (passage_MD, passage_Md, cut.grad_passage_MD),
            )
        ]
        part = LossGradients(cut.loss * share, grads[0], grads[1], cut.stats)
        total = _sum(total, part) if total else part
    assert total is not None
    return total


def _whole(query_ND: Tensor, passage_MD: Tensor, targets: Targets, objective: Objective, group: Group) -> LossGradients:
    temperature = objective.temperature
    own = targets.own
    if targets.task == "similarity":
        label_N = targets.label_N
        assert own is not None and label_N is not None
        value = own_gradients(
            query_ND,
            passage_MD,
            own,
            lambda score_NG: cosent_loss(score_NG[:, 0], label_N, temperature=objective.similarity_temperature),
            group,
        )
        return LossGradients(*value, {})
    if targets.task == "classification":
        assert own is not None
        value = own_gradients(
            query_ND,
            passage_MD,
            own,
            lambda score_NG: classification_loss(score_NG, own.present_NG, temperature=temperature),
            group,
        )
        return LossGradients(*value, {})
    knobs = {
        "temperature": temperature,
        "weights": objective.weights,
        "margin": objective.margin,
        "score_block": objective.score_block,
        "group": group,
    }
    total = contrastive_loss(query_ND, passage_MD, targets.columns, **knobs)  # type: ignore[arg-type]
    if objective.passage_to_query:
        turned = reverse_loss(query_ND, passage_MD, targets.columns, **knobs)  # type: ignore[arg-type]
        total = _sum(total, turned, weight=objective.passage_to_query, name="reverse_loss")
    if objective.distillation and targets.teacher_NG is not None:
        assert own is not None
        weight, teacher_temperature = objective.distillation
        teacher_NG = targets.teacher_NG
        value = own_gradients(
            query_ND,
            passage_MD,
            own,
            lambda score_NG: distillation_loss(
                score_NG, teacher_NG, temperature=temperature, teacher_temperature=teacher_temperature
            ),
            group,
        )
        total = _sum(total, LossGradients(*value, {}), weight=weight, name="distillation_loss")
    return total


def _sum(total: LossGradients, part: LossGradients, *, weight: float = 1.0, name: str | None = None) -> LossGradients:
    total.grad_query_ND.add_(part.grad_query_ND, alpha=weight)
    total.grad_passage_MD.add_(part.grad_passage_MD, alpha=weight)
    stats = {**part.stats, **total.stats} | ({name: part.loss} if name else {})
    return LossGradients(total.loss + weight * part.loss, total.grad_query_ND, total.grad_passage_MD, stats)


def _through_cut(rows_RD: Tensor, unit_Rd: Tensor, grad_Rd: Tensor) -> Tensor:
    """Gradient of the whole rows from that of their first d numbers, normalised."""
    dim = unit_Rd.shape[1]
    grad_RD = torch.zeros_like(rows_RD)
    along_R1 = (grad_Rd * unit_Rd).sum(1, keepdim=True)
    grad_RD[:, :dim] = (grad_Rd - along_R1 * unit_Rd) / rows_RD[:, :dim].norm(dim=1, keepdim=True)
    return grad_RD
