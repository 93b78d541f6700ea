"""What the ranks of a training say to each other; the mathematics above never sees rank or world size.

A `Group` of one is plain arithmetic. `Workers` speaks through torch.distributed, whose process group the launcher
(Ray Train, torchrun) has set up.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Group(Protocol):
    """Ranks that hold parts of one global batch."""

    rank: int
    world_size: int

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place and returned."""

    def logsumexp(self, tensor: Tensor) -> Tensor:
        """log Σ exp over ranks, element by element; -inf where every rank has -inf."""

    def barrier(self) -> None:
        """Wait until every rank is here."""


class Alone:
    """One rank."""

    rank = 0
    world_size = 1

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def logsumexp(self, tensor: Tensor) -> Tensor:
        return tensor

    def barrier(self) -> None:
        return None


class Workers:
    """The ranks of torch.distributed's default process group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def logsumexp(self, tensor: Tensor) -> Tensor:
        peak = tensor.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        shift = torch.where(peak.isinf(), torch.zeros_like(peak), peak)
        return self.sum_((tensor - shift).exp()).log() + shift

    def barrier(self) -> None:
        dist.barrier()


def scatter_rows(local_rows: Tensor, positions: Tensor, *, num_rows: int, group: Group) -> Tensor:
    """The (num_rows, D) matrix whose row positions[i] is local_rows[i], completed by the other ranks' rows."""
    rows = local_rows.new_zeros((num_rows, *local_rows.shape[1:]))
    rows[positions] = local_rows
    return group.sum_(rows)
