"""Is one system better than another on the same queries? A paired test, an interval, a correction, a word."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["better", "worse", "cannot tell"]

LEVEL = 0.05
"""Corrected p-values from here on mean that we cannot tell."""

_BLOCK = 1 << 22  # random numbers held at once
_TIE = 1e-12  # sums that differ by less are equal but for rounding


def randomisation_p_value(differences: NDArray[np.float64], *, permutations: int, seed: int) -> float:
    """Two-sided p-value of the mean of paired differences, by random flips of their signs.

    differences: (N,) left minus right, a query each. Returns (1 + as extreme) / (1 + permutations): the observed
    signs count as one of the draws, so that the value is never 0. Source: Smucker, Allan and Carterette 2007.
    """
    values_N = _checked(differences)
    generator = np.random.default_rng(seed)
    observed = abs(values_N.sum())
    tolerance = _TIE * np.abs(values_N).sum()
    extreme = 0
    for rows in _blocks(permutations, width=len(values_N)):
        flips_RN = generator.integers(0, 2, size=(rows, len(values_N)), dtype=np.int8)
        sums_R = values_N.sum() - 2 * (flips_RN @ values_N)
        extreme += int(np.count_nonzero(np.abs(sums_R) >= observed - tolerance))
    return (1 + extreme) / (1 + permutations)


def bootstrap_interval(
    differences: NDArray[np.float64], *, resamples: int, seed: int, coverage: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of paired differences over resampled queries.

    differences: (N,). Returns (low, high), which hold the mean in `coverage` of the resamples. Source: Efron 1979.
    """
    values_N = _checked(differences)
    generator = np.random.default_rng(seed)
    means = [
        values_N[generator.integers(0, len(values_N), size=(rows, len(values_N)))].mean(axis=1)
        for rows in _blocks(resamples, width=len(values_N))
    ]
    tail = (1 - coverage) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for the number of comparisons, in their order. Source: Holm 1979."""
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = highest
    return corrected


def verdict(difference: float, p_value: float, *, level: float = LEVEL) -> Verdict:
    """Say in words what a difference (left minus right) and its corrected p-value allow to say of left."""
    if p_value >= level or difference == 0:
        return "cannot tell"
    return "better" if difference > 0 else "worse"


def _checked(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"differences of shape {values.shape} cannot be tested; one finite number a query is needed")
    return values


def _blocks(total: int, *, width: int) -> list[int]:
    size = max(1, _BLOCK // width)
    return [min(size, total - start) for start in range(0, total, size)]
