import math

import pytest
import torch
from torch import Tensor

from peg.model.bins import BINS_PER_UNIT, Bin
from peg.model.losses import Columns
from peg.model.weighting import INFO_NCE, Weights, progressive
from peg.model.weighting_table import weighting_table
from tests.model.naive import naive_loss

N, TEMPERATURE = 7, 0.1
KINDS = {
    "plain": (INFO_NCE, {}),
    "progressive": (progressive(a=-0.4, b=0.6, temperature=TEMPERATURE), {"a": -0.4, "b": 0.6}),
    "hardness": (Weights(slope=5.0, normalised=False, easiness=0.0, focus=0.0), {"alpha": 5.0}),
    "focal": (Weights(slope=0.0, normalised=True, easiness=0.0, focus=2.0), {"gamma": 2.0}),
}


def scores(seed: int = 0) -> tuple[Tensor, Tensor, Columns]:
    """Queries over passages that are the axes: a query's scores are its own numbers, and so is their gradient."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.nn.functional.normalize(torch.randn(N, 30, generator=generator, dtype=torch.float64), dim=1)
    columns = Columns(torch.arange(N) * 3, torch.tensor([1, 1, 4]), torch.tensor([0, 8, 2]))
    return query, torch.eye(30, dtype=torch.float64), columns


def masked(columns: Columns) -> list[tuple[int, int]]:
    return list(zip(columns.masked_row_K.tolist(), columns.masked_column_K.tolist(), strict=True))


def of_kind(table: list[Bin], kind: str) -> list[Bin]:
    return [one for one in table if one.kind == kind]


@pytest.mark.parametrize("margin", [None, 0.05])
@pytest.mark.parametrize("name", KINDS)
def test_gradient_shares_are_those_of_the_loss_s_own_gradient(name: str, margin: float | None) -> None:
    weights, knobs = KINDS[name]
    query, passage, columns = scores()
    leaf = query.clone().requires_grad_()
    naive_loss(
        leaf, passage, columns.positive_N, masked(columns), temperature=TEMPERATURE, margin=margin, **knobs
    ).backward()
    assert leaf.grad is not None
    push, pull = leaf.grad.clamp(min=0), leaf.grad.clamp(max=0)  # negatives, positives
    gap = query - query[torch.arange(N), columns.positive_N].unsqueeze(1)
    table = weighting_table(query, passage, columns, temperature=TEMPERATURE, weights=weights, margin=margin)
    found = of_kind(table, "negatives")
    assert len(found) > 20
    for one in found:
        inside = (gap >= one.low) & (gap < one.high)
        assert one.gradient_share == pytest.approx(float(push[inside].sum() / push.sum()), rel=1e-5)
    # a query's negatives are pushed by what its positive is pulled by
    queries = of_kind(table, "queries")
    assert len(queries) == int((pull.sum(1) < 0).sum())  # each in a bin of its own
    wanted = sorted(share for share in (pull.sum(1) / pull.sum()).tolist() if share > 0)
    assert sorted(one.gradient_share for one in queries) == pytest.approx(wanted, rel=1e-5)
    for kind in ("negatives", "queries"):
        assert sum(one.gradient_share for one in of_kind(table, kind)) == pytest.approx(1, abs=1e-4)
        assert sum(one.share for one in of_kind(table, kind)) == pytest.approx(1, abs=1e-4)


def test_weights_and_difficulties_are_those_of_the_formulas() -> None:
    a, b = -0.4, 0.6
    query, passage, columns = scores(seed=1)
    weights, gaps, difficulties = [], [], []
    for i in range(N):
        own = int(columns.positive_N[i])
        s = torch.tensor([float(query[i, j]) for j in range(30) if j != own and (i, j) not in masked(columns)])
        w = torch.exp(a * s / TEMPERATURE)
        weights += (w / w.mean()).tolist()
        gaps += (s - query[i, own]).tolist()
        h = TEMPERATURE * (torch.logsumexp((s - query[i, own]) / TEMPERATURE, 0) - math.log(len(s)))
        difficulties.append(float(h))
    v = torch.exp(-b * torch.tensor(difficulties) / TEMPERATURE)
    v = v / v.mean()
    table = weighting_table(
        query,
        passage,
        columns,
        temperature=TEMPERATURE,
        weights=progressive(a=a, b=b, temperature=TEMPERATURE),
        margin=None,
    )
    for kind, values, given in (("negatives", gaps, weights), ("queries", difficulties, v.tolist())):
        for one in of_kind(table, kind):
            inside = [weight for value, weight in zip(values, given, strict=True) if one.low <= value < one.high]
            assert one.share == pytest.approx(len(inside) / len(values), rel=1e-4)
            assert one.weight == pytest.approx(sum(inside) / len(inside), rel=1e-4)


def test_bins_lie_on_one_grid_in_order() -> None:
    query, passage, columns = scores()
    table = weighting_table(query, passage, columns, temperature=TEMPERATURE, weights=INFO_NCE, margin=None)
    for kind in ("negatives", "queries"):
        lows = [one.low for one in of_kind(table, kind)]
        assert lows == sorted(set(lows)) and all(low == round(low, 2) for low in lows)
        assert all(one.high - one.low == pytest.approx(1 / BINS_PER_UNIT) for one in of_kind(table, kind))
    assert [one.kind for one in table] == sorted(one.kind for one in table)


def test_fp32_scores_at_a_low_temperature_stay_finite() -> None:
    query, passage, columns = (part.float() if isinstance(part, Tensor) else part for part in scores())
    weights = progressive(a=0.9, b=0.9, temperature=0.001)
    table = weighting_table(query, passage, columns, temperature=0.001, weights=weights, margin=None)
    assert table and all(math.isfinite(one.weight) and math.isfinite(one.gradient_share) for one in table)


def test_queries_without_negatives_are_left_out() -> None:
    query, passage, _ = scores()
    row, column = torch.ones(N, 30).nonzero(as_tuple=True)
    others = column != row * 3
    all_masked = Columns(torch.arange(N) * 3, row[others], column[others])
    knobs = {"temperature": TEMPERATURE, "weights": INFO_NCE, "margin": None}
    assert weighting_table(query, passage, all_masked, **knobs) == []
    keep = others & (row > 0)  # the first query keeps its negatives
    some = Columns(torch.arange(N) * 3, row[keep], column[keep])
    table = weighting_table(query, passage, some, **knobs)
    assert [one.share for one in of_kind(table, "queries")] == [1.0]


def test_a_positive_that_is_elsewhere_is_refused() -> None:
    query, passage, columns = scores()
    columns.positive_N[2] = -1
    with pytest.raises(ValueError, match="not among the passages"):
        weighting_table(query, passage, columns, temperature=TEMPERATURE, weights=INFO_NCE, margin=None)
