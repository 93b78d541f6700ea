import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peg.evaluate import significance
from peg.evaluate.significance import bootstrap_interval, holm, randomisation_p_value, verdict


def exact_p_value(differences: list[float]) -> float:
    observed = abs(math.fsum(differences))
    sums = [math.fsum(s * d for s, d in zip(signs, differences, strict=True)) for signs in flips(len(differences))]
    return sum(abs(total) >= observed - 1e-9 for total in sums) / len(sums)


def flips(count: int) -> list[tuple[int, ...]]:
    return list(itertools.product((1, -1), repeat=count))


@pytest.mark.parametrize(
    "differences",
    [
        [0.5, 0.3, 0.2, 0.1, -0.1, 0.0, 0.4, 0.25],
        [0.1, -0.2, 0.15, -0.05, 0.3, 0.0],
        [1.0] * 9,
        [0.0] * 5,
        [-0.4, -0.1, 0.2, -0.6, -0.3, -0.2, 0.05],
    ],
)
def test_random_flips_come_near_all_flips(differences: list[float]) -> None:
    permutations = 40_000
    exact = exact_p_value(differences)
    found = randomisation_p_value(np.array(differences), permutations=permutations, seed=3)
    sigma = math.sqrt(exact * (1 - exact) / permutations)
    assert abs(found - exact) <= 4 * sigma + 2 / permutations


def test_the_p_value_counts_the_observed_signs_as_a_draw() -> None:
    gains = np.full(200, 0.1)
    assert randomisation_p_value(gains, permutations=999, seed=0) == 1 / 1000
    assert randomisation_p_value(np.zeros(7), permutations=999, seed=0) == 1.0


def test_blocks_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(0).normal(0.05, 0.3, size=64)
    whole = randomisation_p_value(differences, permutations=1000, seed=5)
    interval = bootstrap_interval(differences, resamples=1000, seed=5)
    monkeypatch.setattr(significance, "_BLOCK", 64 * 10)
    assert randomisation_p_value(differences, permutations=1000, seed=5) == pytest.approx(whole, abs=0.04)
    assert bootstrap_interval(differences, resamples=1000, seed=5) == pytest.approx(interval, abs=1e-12)
    assert randomisation_p_value(differences, permutations=1000, seed=5) == randomisation_p_value(
        differences, permutations=1000, seed=5
    )


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_the_test_is_two_sided_and_symmetric(differences: list[float]) -> None:
    values = np.array(differences)
    found = randomisation_p_value(values, permutations=200, seed=1)
    assert found == randomisation_p_value(-values, permutations=200, seed=1)
    assert 1 / 201 <= found <= 1


def test_p_values_are_uniform_where_nothing_differs() -> None:
    generator = np.random.default_rng(11)
    found = [randomisation_p_value(generator.normal(size=40), permutations=199, seed=i) for i in range(400)]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.035)
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)


def test_the_interval_agrees_with_the_normal_one_on_many_queries() -> None:
    differences = np.random.default_rng(2).normal(0.1, 0.4, size=2000)
    error = differences.std() / math.sqrt(len(differences))
    low, high = bootstrap_interval(differences, resamples=4000, seed=0)
    assert low == pytest.approx(differences.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(differences.mean() + 1.96 * error, abs=0.1 * error)


def test_the_interval_equals_a_naive_one() -> None:
    differences = np.array([0.2, -0.1, 0.4, 0.0, 0.3])
    generator = np.random.default_rng(9)
    means = sorted(np.mean([differences[i] for i in generator.integers(0, 5, size=5)]) for _ in range(500))
    wanted = (float(np.quantile(means, 0.05)), float(np.quantile(means, 0.95)))
    assert bootstrap_interval(differences, resamples=500, seed=9, coverage=0.9) == pytest.approx(wanted, abs=1e-12)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_stays_between_no_correction_and_bonferroni(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for p_value, found in zip(p_values, corrected, strict=True):
        assert p_value <= found <= min(1.0, p_value * len(p_values))
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [corrected[i] for i in order] == sorted(corrected)


def test_verdicts() -> None:
    assert verdict(0.1, 0.049) == "better"
    assert verdict(-0.1, 0.049) == "worse"
    assert verdict(0.1, 0.05) == "cannot tell"
    assert verdict(0.0, 0.001) == "cannot tell"


def test_what_cannot_be_tested_is_refused() -> None:
    for bad in (np.array([]), np.array([0.1, math.nan]), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="cannot be tested"):
            randomisation_p_value(bad, permutations=100, seed=0)
