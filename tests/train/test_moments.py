from pathlib import Path

import pytest
import torch

from peg.model.encoder import Encoder
from peg.model.losses import Columns
from peg.model.objective import info_nce
from peg.model.weighting import progressive
from peg.model.weighting_table import weighting_table
from peg.train import moments
from peg.train.batches import Plan
from peg.train.data import TrainingData
from peg.train.moments import COLUMNS, bins_of_batch, moment_of, table_rows
from tests.train.small import prepare_small

OBJECTIVE = info_nce(temperature=0.1, weights=progressive(a=0.3, b=0.2, temperature=0.1), score_block=1000)


@pytest.mark.parametrize(
    ("num_steps", "found"),
    [
        (5, ["start", None, "middle", None, "end"]),
        (2, ["start", "end"]),
        (1, ["start"]),
        (3, ["start", "middle", "end"]),
    ],
)
def test_three_moments_of_a_training(num_steps: int, found: list[str | None]) -> None:
    assert [moment_of(step, num_steps=num_steps) for step in range(num_steps)] == found


@pytest.mark.parametrize("queries", [256, 3])
def test_a_batch_s_first_queries_over_their_own_passages(
    queries: int, tmp_path: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "_QUERIES", queries)
    config = prepare_small(tmp_path, encoder_folder, batch_size=8)
    data, encoder = TrainingData.open(tmp_path), Encoder.load(str(encoder_folder)).train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch = Plan.of(data.examples, config, seed=7).batch(0, 0)
    found = bins_of_batch(encoder, data, batch, OBJECTIVE, budget=64)
    assert encoder.training

    encoder.eval()
    count = min(queries, len(batch.query))
    rows = sorted({int(index) for index in batch.own[:count].ravel() if index >= 0})  # into the batch's passages
    known = {(int(q), int(p)) for q, p in zip(batch.masked_query, batch.masked_passage, strict=True)}
    masked = [(q, rows.index(p)) for q, p in sorted(known) if q < count and p in rows]
    with torch.no_grad():
        query_ND = torch.cat([encoder.embed([data.queries[row]]) for row in batch.query[:count]])
        passage_MD = torch.cat([encoder.embed([data.passages[batch.passage[row]]]) for row in rows])
    columns = Columns(
        torch.tensor([rows.index(int(own)) for own in batch.positive[:count]]),
        torch.tensor([row for row, _ in masked], dtype=torch.int64),
        torch.tensor([column for _, column in masked], dtype=torch.int64),
    )
    wanted = weighting_table(
        query_ND, passage_MD, columns, temperature=0.1, weights=OBJECTIVE.weights, margin=OBJECTIVE.margin
    )
    assert len(found) == len(wanted) > 3
    for one, other in zip(found, wanted, strict=True):
        assert (one.kind, one.low, one.share) == (other.kind, other.low, other.share)
        assert (one.weight, one.gradient_share) == pytest.approx((other.weight, other.gradient_share), rel=1e-3)


def test_rows_have_the_table_s_columns(tmp_path: Path, encoder_folder: Path) -> None:
    config = prepare_small(tmp_path, encoder_folder, batch_size=8)
    data, encoder = TrainingData.open(tmp_path), Encoder.load(str(encoder_folder))
    batch = Plan.of(data.examples, config, seed=7).batch(0, 0)
    bins = bins_of_batch(encoder, data, batch, OBJECTIVE, budget=64)
    rows = table_rows(bins, step=3, progress=0.5, moment="middle")
    assert len(rows) == len(bins) and all(sorted(row) == sorted(COLUMNS) for row in rows)
    assert rows[0]["moment"] == "middle" and rows[0]["bin_low"] == bins[0].low
