"""Cutting texts into micro-batches: how many tokens at once, and which texts go together."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from peg.errors import StageError


def token_batches(lengths: Sequence[int] | np.ndarray, *, budget: int, padded: bool = True) -> list[np.ndarray]:
    """Index arrays that cover all texts, longest first, each of at most `budget` tokens.

    padded: count a batch as a rectangle of its longest text's length, instead of as the sum of its lengths. A text
    longer than the budget is a batch of its own. Equal lengths keep their order, so that the cut is a pure function.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    end_of = lengths[order].cumsum()
    batches, start = [], 0
    while start < len(order):
        if padded:
            stop = start + budget // max(1, int(lengths[order[start]]))
        else:
            before = int(end_of[start - 1]) if start else 0
            stop = int(np.searchsorted(end_of, before + budget, side="right"))
        stop = max(start + 1, stop)
        batches.append(order[start:stop])
        start = stop
    return batches


def auto_token_budget(step: Callable[[int], None], *, start: int, limit: int) -> int:
    """The largest of start, 2·start, 4·start, …, limit whose micro-batch the GPU holds with a quarter to spare.

    step(tokens) computes one micro-batch of so many tokens, forward and backward, the longest texts among them. The
    reserve is in what is tried: a budget counts as held if a step of 5/4 of it was, since a training's own texts make
    other shapes than the trial's, and its memory is more fragmented.
    Raises StageError if the GPU does not hold even the first.
    """
    held, budget = 0, start
    while budget != held and _fits(step, budget + budget // 4):
        held, budget = budget, min(2 * budget, limit)
    if not held:
        raise StageError(
            f"a micro-batch of {start} tokens does not fit into the GPU's memory with a quarter to spare; set "
            "train.micro_batch_tokens to less, train.gradient_checkpointing to true, or take a smaller encoder"
        )
    return held


def _fits(step: Callable[[int], None], tokens: int) -> bool:
    try:
        step(tokens)
    except torch.cuda.OutOfMemoryError:
        fits = False
    else:
        fits = True
    torch.cuda.empty_cache()  # behind `except`, whose traceback holds the step's tensors
    return fits


def pad_ids(ids: Sequence[Sequence[int] | np.ndarray], *, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask, both (B, L) int64, L the longest text's length."""
    lengths = np.array([len(one) for one in ids])
    mask_BL = np.arange(lengths.max(initial=0)) < lengths[:, None]
    ids_BL = np.full(mask_BL.shape, pad_id, dtype=np.int64)
    ids_BL[mask_BL] = np.concatenate([np.asarray(one, dtype=np.int64) for one in ids]) if len(ids) else []
    return torch.from_numpy(ids_BL).to(device), torch.from_numpy(mask_BL.astype(np.int64)).to(device)
