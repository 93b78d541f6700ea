import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from peg.model.distributed import Alone
from peg.model.losses import Columns, LossGradients, contrastive_loss, reverse_loss
from peg.model.weighting import INFO_NCE, Weights, progressive
from tests.model.naive import naive_loss, naive_reverse

N, M, D = 7, 19, 5
TEMPERATURE = 0.1


def unit(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, D, generator=generator, dtype=torch.float64), dim=-1)


def columns(positive: torch.Tensor, masked: list[tuple[int, int]]) -> Columns:
    rows = torch.tensor(sorted(masked), dtype=torch.int64).reshape(-1, 2).T.contiguous()
    return Columns(positive_N=positive, masked_row_K=rows[0], masked_column_K=rows[1])


def fast(
    query: torch.Tensor,
    passage: torch.Tensor,
    cols: Columns,
    *,
    loss: Callable[..., LossGradients] = contrastive_loss,
    **knobs: object,
) -> LossGradients:
    settings = {"temperature": TEMPERATURE, "weights": INFO_NCE, "margin": None, "score_block": 3 * M, **knobs}
    return loss(query, passage, cols, group=Alone(), **settings)


POSITIVE = torch.tensor([3, 0, 5, 3, 11, 18, 7])
MASKED = [(0, 1), (0, 5), (2, 4), (6, 0), (6, 18)]


def check(found: LossGradients, expected: torch.Tensor, query: torch.Tensor, passage: torch.Tensor) -> None:
    """The closed form's loss and gradients are autograd's."""
    expected.backward()
    assert found.loss == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(found.grad_query_ND, query.grad, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found.grad_passage_MD, passage.grad, atol=1e-12, rtol=1e-10)


WEIGHTINGS = {
    "none": (INFO_NCE, {}),
    "progressive": (progressive(a=0.8, b=0.5, temperature=TEMPERATURE), {"a": 0.8, "b": 0.5}),
    "hardest spared": (progressive(a=-0.6, b=0.0, temperature=TEMPERATURE), {"a": -0.6}),
    "hardest spared, easy queries": (progressive(a=-0.6, b=0.5, temperature=TEMPERATURE), {"a": -0.6, "b": 0.5}),
    "queries alone": (progressive(a=0.0, b=0.5, temperature=TEMPERATURE), {"b": 0.5}),
    "focal": (Weights(slope=0, normalised=True, easiness=0, focus=2.0), {"gamma": 2.0}),
    "hardness": (Weights(slope=5.0, normalised=False, easiness=0, focus=0), {"alpha": 5.0}),
}


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("margin", [None, 0.1])
@pytest.mark.parametrize(("fast_loss", "slow_loss"), [(contrastive_loss, naive_loss), (reverse_loss, naive_reverse)])
def test_closed_form_equals_autograd_of_the_naive_loss(
    name: str, margin: float | None, fast_loss: Callable[..., LossGradients], slow_loss: Callable[..., torch.Tensor]
) -> None:
    weights, knobs = WEIGHTINGS[name]
    query, passage = unit(N, 1).requires_grad_(), unit(M, 2).requires_grad_()
    expected = slow_loss(query, passage, POSITIVE, MASKED, temperature=TEMPERATURE, margin=margin, **knobs)
    cols = columns(POSITIVE, MASKED)
    found = fast(query.detach(), passage.detach(), cols, loss=fast_loss, weights=weights, margin=margin)
    check(found, expected, query, passage)


def test_without_weighting_it_is_cross_entropy() -> None:
    query, passage = unit(N, 1), unit(M, 2)
    logits = query @ passage.T / TEMPERATURE
    for row, column in MASKED:
        logits[row, column] = -math.inf
    expected = functional.cross_entropy(logits, POSITIVE)
    assert fast(query, passage, columns(POSITIVE, MASKED)).loss == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("loss", [contrastive_loss, reverse_loss])
@pytest.mark.parametrize("score_block", [1, 2 * M, 5 * M, 10_000])
def test_the_block_size_changes_nothing(score_block: int, loss: Callable[..., LossGradients]) -> None:
    query, passage, cols = unit(N, 1), unit(M, 2), columns(POSITIVE, MASKED)
    knobs = {"weights": progressive(a=0.5, b=0.7, temperature=TEMPERATURE), "margin": 0.2, "loss": loss}
    whole = fast(query, passage, cols, score_block=N * M, **knobs)  # type: ignore[arg-type]
    blocks = fast(query, passage, cols, score_block=score_block, **knobs)  # type: ignore[arg-type]
    assert blocks.loss == pytest.approx(whole.loss, abs=1e-12)
    torch.testing.assert_close(blocks.grad_query_ND, whole.grad_query_ND)
    torch.testing.assert_close(blocks.grad_passage_MD, whole.grad_passage_MD)
    assert blocks.stats == pytest.approx(whole.stats)


def test_a_query_without_negatives_is_left_out() -> None:
    query, passage = unit(2, 1), unit(3, 2)
    alone = columns(torch.tensor([0, 1]), [(0, 1), (0, 2)])
    found = fast(query, passage, alone, weights=progressive(a=0.3, b=0.5, temperature=TEMPERATURE))
    expected = naive_loss(query[1:], passage, torch.tensor([1]), [], temperature=TEMPERATURE, a=0.3, b=0.5)
    assert found.loss == pytest.approx(expected.item(), abs=1e-12)
    assert found.grad_query_ND[0].abs().max() == 0
    assert found.stats["counted_queries"] == 1


def test_no_query_with_negatives_gives_zero_and_no_nan() -> None:
    found = fast(unit(1, 1), unit(1, 2), columns(torch.tensor([0]), []))
    assert found.loss == 0
    assert found.grad_passage_MD.abs().max() == 0


def test_extreme_difficulties_do_not_overflow_fp32() -> None:
    query = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    passage = torch.tensor([[1.0, 0], [-1, 0], [0, -1]])
    cols = columns(torch.tensor([0, 1, 2]), [])
    found = fast(
        query, passage, cols, temperature=0.005, weights=progressive(a=0.5, b=1.0, temperature=0.005), score_block=1
    )
    assert math.isfinite(found.loss)
    assert bool(found.grad_passage_MD.isfinite().all())


def test_shares_count_what_they_say() -> None:
    found = fast(
        unit(N, 1), unit(M, 2), columns(POSITIVE, MASKED), weights=progressive(a=0.5, b=0, temperature=TEMPERATURE)
    )
    assert found.stats["masked_share"] == pytest.approx(len(MASKED) / (N * (M - 1)))
    assert 0.4 < found.stats["down_weighted_share"] < 1
    none = fast(unit(N, 1), unit(M, 2), columns(POSITIVE, MASKED))
    assert none.stats["down_weighted_share"] == 0


@pytest.mark.parametrize(("weights", "share"), [(5.0, 1.0), (-5.0, 1.0)])
def test_down_weighted_negatives_are_counted_beside_the_margins_mask(weights: float, share: float) -> None:
    query, passage = unit(N, 1), unit(M, 2)
    made = Weights(slope=weights, normalised=True, easiness=0, focus=0)
    found = fast(query, passage, columns(POSITIVE, MASKED), weights=made, margin=0.05)
    scores = query @ passage.T
    count = total = 0
    for row in range(N):
        own = scores[row, POSITIVE[row]]
        kept = [
            scores[row, column]
            for column in range(M)
            if column != POSITIVE[row] and (row, column) not in MASKED and scores[row, column] <= own + 0.05
        ]
        if kept:
            w = torch.exp(weights * torch.stack(kept))
            count += int((w / w.mean() < 0.999).sum())
            total += len(kept)
    assert 0 < count < total
    assert found.stats["down_weighted_share"] == pytest.approx(share * count / total)


def test_constant_hardness_is_that_of_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.losses")
    query, passage = unit(N, 1).requires_grad_(), unit(3 * N, 2).requires_grad_()
    rival = losses.MultipleNegativesRankingLoss(
        torch.nn.Identity(), scale=1 / TEMPERATURE, hardness_mode="all_negatives", hardness_strength=5.0
    )
    expected = rival.compute_loss_from_embeddings([query, *passage.split(N)], None)
    expected.backward()
    weights = Weights(slope=5.0, normalised=False, easiness=0, focus=0)
    found = fast(query.detach(), passage.detach(), columns(torch.arange(N), []), weights=weights)
    assert found.loss == pytest.approx(expected.item(), abs=1e-12)
    for ours, rows in ((found.grad_query_ND, query), (found.grad_passage_MD, passage)):
        across = ours - (ours * rows).sum(1, keepdim=True) * rows  # the rival normalises its rows once more
        torch.testing.assert_close(across.detach(), rows.grad, atol=1e-12, rtol=1e-10)
