"""Bins of hardness: what the weighting of a batch is told in, by training to the report."""

from dataclasses import dataclass
from typing import Literal

BINS_PER_UNIT = 100  # of cosine; one grid for all tables, so that they can be laid side by side, and merged

BinKind = Literal["negatives", "queries"]


@dataclass(frozen=True)
class Bin:
    """Some negatives, or some queries.

    low, high: of s - s+ for negatives, of the difficulty h for queries, in cosine. share: of all of their kind.
    weight: their mean. gradient_share: of Σ v·p, the push away from negatives.
    """

    kind: BinKind
    low: float
    high: float
    share: float
    weight: float
    gradient_share: float
