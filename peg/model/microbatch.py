"""Cutting texts into micro-batches of similar length, so that padding all but vanishes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def token_batches(lengths: Sequence[int] | np.ndarray, *, budget: int) -> list[np.ndarray]:
    """Index arrays that cover all texts, longest first, each of at most `budget` padded tokens.

    A text longer than the budget is a batch of its own. Equal lengths keep their order, so that the cut is a pure
    function of lengths and budget.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, budget // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


def pad_ids(ids: Sequence[Sequence[int] | np.ndarray], *, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask, both (B, L) int64, L the longest text's length."""
    lengths = np.array([len(one) for one in ids])
    mask_BL = np.arange(lengths.max(initial=0)) < lengths[:, None]
    ids_BL = np.full(mask_BL.shape, pad_id, dtype=np.int64)
    ids_BL[mask_BL] = np.concatenate([np.asarray(one, dtype=np.int64) for one in ids]) if len(ids) else []
    return torch.from_numpy(ids_BL).to(device), torch.from_numpy(mask_BL.astype(np.int64)).to(device)
