"""What the ranks of a training say to each other; the mathematics above never sees rank or world size.

A `Group` of one is plain arithmetic. `Workers` speaks through torch.distributed, whose process group the launcher
(Ray Train, torchrun, processes of this machine) has set up.
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

    def max(self, number: int) -> int:
        """The largest of the ranks' numbers."""

    def logsumexp(self, tensor: Tensor) -> Tensor:
        """log Σ exp over ranks, element by element; -inf where every rank has -inf."""

    def gather_rows(self, rows_LD: Tensor, rank_N: Tensor) -> Tensor:
        """(N, D) from each rank's rows: row i is the next one of rank rank_N[i], on every rank."""

    def sum_rows(self, rows_ND: Tensor, rank_N: Tensor) -> Tensor:
        """The sum over ranks of those rows of (N, D) that belong to this rank: gather_rows turned round."""

    def barrier(self) -> None:
        """Wait until every rank is here."""


class Alone:
    """One rank."""

    rank = 0
    world_size = 1

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def max(self, number: int) -> int:
        return number

    def logsumexp(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_rows(self, rows_LD: Tensor, rank_N: Tensor) -> Tensor:  # noqa: ARG002 (all are its own)
        return rows_LD

    def sum_rows(self, rows_ND: Tensor, rank_N: Tensor) -> Tensor:  # noqa: ARG002
        return rows_ND

    def barrier(self) -> None:
        return None


class Workers:
    """The ranks of torch.distributed's default process group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def sum_(self, tensor: Tensor) -> Tensor:
        shared = tensor.to(self._device)
        dist.all_reduce(shared)
        return tensor if shared is tensor else tensor.copy_(shared)

    def max(self, number: int) -> int:
        shared = torch.tensor(number, device=self._device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared)

    def logsumexp(self, tensor: Tensor) -> Tensor:
        peak = tensor.to(self._device, copy=True)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        peak = peak.to(tensor.device)
        shift = torch.where(peak.isinf(), torch.zeros_like(peak), peak)
        return self.sum_((tensor - shift).exp()).log() + shift

    def gather_rows(self, rows_LD: Tensor, rank_N: Tensor) -> Tensor:
        count_W = torch.bincount(rank_N, minlength=self.world_size)
        padded = rows_LD.new_zeros((int(count_W.max()), *rows_LD.shape[1:]))
        padded[: len(rows_LD)] = rows_LD
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        rows_ND = rows_LD.new_empty((len(rank_N), *rows_LD.shape[1:]))
        for rank, part in enumerate(parts):
            rows_ND[rank_N == rank] = part[: int(count_W[rank])]
        return rows_ND

    def sum_rows(self, rows_ND: Tensor, rank_N: Tensor) -> Tensor:
        count_W = torch.bincount(rank_N, minlength=self.world_size)
        parts = []
        for rank in range(self.world_size):
            part = rows_ND.new_zeros((int(count_W.max()), *rows_ND.shape[1:]))
            part[: int(count_W[rank])] = rows_ND[rank_N == rank]
            parts.append(part)
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts)
        return mine[: int(count_W[self.rank])]

    def barrier(self) -> None:
        dist.barrier()
