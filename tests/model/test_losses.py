import math

import pytest
import torch
from torch.nn import functional

from peg.model.distributed import Alone
from peg.model.losses import Columns, Exponents, LossGradients, progressive_loss
from tests.model.naive import naive_loss

N, M, D = 7, 19, 5
TEMPERATURE = 0.1


def unit(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, D, generator=generator, dtype=torch.float64), dim=-1)


def columns(positive: torch.Tensor, masked: list[tuple[int, int]]) -> Columns:
    rows = torch.tensor(sorted(masked), dtype=torch.int64).reshape(-1, 2).T.contiguous()
    return Columns(positive_N=positive, masked_row_K=rows[0], masked_column_K=rows[1])


def fast(query: torch.Tensor, passage: torch.Tensor, cols: Columns, **knobs: object) -> LossGradients:
    settings = {"temperature": TEMPERATURE, "exponents": Exponents(0, 0), "margin": None, "block": 3, **knobs}
    return progressive_loss(query, passage, cols, group=Alone(), **settings)  # type: ignore[arg-type]


POSITIVE = torch.tensor([3, 0, 5, 3, 11, 18, 7])
MASKED = [(0, 1), (0, 5), (2, 4), (6, 0), (6, 18)]


@pytest.mark.parametrize("a", [-0.6, 0.0, 0.8])
@pytest.mark.parametrize("b", [0.0, 0.5])
@pytest.mark.parametrize("margin", [None, 0.1])
def test_closed_form_equals_autograd_of_the_naive_loss(a: float, b: float, margin: float | None) -> None:
    query, passage = unit(N, 1).requires_grad_(), unit(M, 2).requires_grad_()
    expected = naive_loss(query, passage, POSITIVE, MASKED, temperature=TEMPERATURE, a=a, b=b, margin=margin)
    expected.backward()
    found = fast(query.detach(), passage.detach(), columns(POSITIVE, MASKED), exponents=Exponents(a, b), margin=margin)
    assert found.loss == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(found.grad_query_ND, query.grad, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found.grad_passage_MD, passage.grad, atol=1e-12, rtol=1e-10)


def test_without_weighting_it_is_cross_entropy() -> None:
    query, passage = unit(N, 1), unit(M, 2)
    logits = query @ passage.T / TEMPERATURE
    for row, column in MASKED:
        logits[row, column] = -math.inf
    expected = functional.cross_entropy(logits, POSITIVE)
    assert fast(query, passage, columns(POSITIVE, MASKED)).loss == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("block", [1, 2, 7, 100])
def test_the_block_size_changes_nothing(block: int) -> None:
    query, passage, cols = unit(N, 1), unit(M, 2), columns(POSITIVE, MASKED)
    knobs = {"exponents": Exponents(0.5, 0.7), "margin": 0.2}
    whole, blocks = fast(query, passage, cols, block=N, **knobs), fast(query, passage, cols, block=block, **knobs)
    assert blocks.loss == pytest.approx(whole.loss, abs=1e-12)
    torch.testing.assert_close(blocks.grad_query_ND, whole.grad_query_ND)
    torch.testing.assert_close(blocks.grad_passage_MD, whole.grad_passage_MD)
    assert blocks.stats == pytest.approx(whole.stats)


def test_a_query_without_negatives_is_left_out() -> None:
    query, passage = unit(2, 1), unit(3, 2)
    alone = columns(torch.tensor([0, 1]), [(0, 1), (0, 2)])
    found = fast(query, passage, alone, exponents=Exponents(0.3, 0.5))
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
    found = fast(query, passage, cols, temperature=0.005, exponents=Exponents(0.5, 1.0), block=1)
    assert math.isfinite(found.loss)
    assert bool(found.grad_passage_MD.isfinite().all())


def test_shares_count_what_they_say() -> None:
    found = fast(unit(N, 1), unit(M, 2), columns(POSITIVE, MASKED), exponents=Exponents(0.5, 0))
    assert found.stats["masked_share"] == pytest.approx(len(MASKED) / (N * (M - 1)))
    assert 0.4 < found.stats["down_weighted_share"] < 1
    none = fast(unit(N, 1), unit(M, 2), columns(POSITIVE, MASKED))
    assert none.stats["down_weighted_share"] == 0
