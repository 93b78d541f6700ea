"""Which texts of a batch, or of a held-out set, a rank embeds: dealt by tokens, in a way that every rank works out."""

import numpy as np
import torch
from torch import Tensor

from peg.data.tokens import TokenTable
from peg.evaluate.metrics import ndcg
from peg.model.cached import LocalTexts
from peg.model.distributed import Group
from peg.model.encoder import Encoder
from peg.model.losses import Columns
from peg.model.microbatch import token_batches
from peg.model.objective import Targets
from peg.model.own import OwnPassages
from peg.train.batches import Batch, share_by_tokens
from peg.train.data import DevSet, TrainingData


def local_texts(data: TrainingData, batch: Batch, group: Group, *, device: torch.device) -> tuple[LocalTexts, int]:
    """This rank's part of a batch, and the tokens of the whole."""
    lengths = np.concatenate([data.queries.lengths(batch.query), data.passages.lengths(batch.passage)])
    rank = share_by_tokens(lengths, world_size=group.world_size)
    query_rank = rank[: len(batch.query)]
    mine_query = np.flatnonzero(query_rank == group.rank)
    mine_passage = np.flatnonzero(rank[len(batch.query) :] == group.rank)
    column = np.full(len(batch.passage), -1, dtype=np.int64)
    column[mine_passage] = np.arange(len(mine_passage))
    masked = column[batch.masked_passage] >= 0
    ids = [data.queries[row] for row in batch.query[mine_query]]
    ids += [data.passages[row] for row in batch.passage[mine_passage]]

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    present = batch.own >= 0
    targets = Targets(
        task=batch.task,
        columns=Columns(
            positive_N=tensor(column[batch.positive]),
            masked_row_K=tensor(batch.masked_query[masked]),
            masked_column_K=tensor(column[batch.masked_passage[masked]]),
        ),
        own=OwnPassages(column_NG=tensor(np.where(present, column[batch.own], -1)), present_NG=tensor(present)),
        label_N=None if batch.label is None else tensor(batch.label),
        teacher_NG=None if batch.teacher is None else tensor(batch.teacher),
    )
    return LocalTexts(ids=ids, query_rank=tensor(query_rank), targets=targets), int(lengths.sum())


@torch.inference_mode()
def dev_ndcg(encoder: Encoder, dev: DevSet, group: Group, *, budget: int) -> float:
    """Mean nDCG@10 over the held-out queries; ranks share the encoding, in micro-batches of `budget` tokens."""
    training = encoder.training
    encoder.eval()
    query_QD, passage_PD = (_embed(encoder, table, group, budget=budget) for table in (dev.queries, dev.passages))
    encoder.train(training)
    top = (query_QD @ passage_PD.T).topk(min(10, len(passage_PD)))
    scores = [
        ndcg([str(row) for row in rows], {str(row): grade for row, grade in dev.relevant[query].items()}, k=10)
        for query, rows in enumerate(top.indices.tolist())
    ]
    return float(np.mean(scores))


def _embed(encoder: Encoder, table: TokenTable, group: Group, *, budget: int) -> Tensor:
    lengths = table.lengths(np.arange(len(table)))
    rank = share_by_tokens(lengths, world_size=group.world_size)
    mine = np.flatnonzero(rank == group.rank)
    rows_TD = torch.empty(len(mine), encoder.dimension, dtype=encoder.row_dtype, device=encoder.device)
    for batch in token_batches(lengths[mine], budget=budget, padded=not encoder.packed):
        rows_TD[torch.from_numpy(batch)] = encoder.embed([table[row] for row in mine[batch]])
    return group.gather_rows(rows_TD, torch.from_numpy(rank).to(encoder.device))
