from collections.abc import Callable

import numpy as np
import pytest
import torch

from peg.errors import StageError
from peg.model.microbatch import auto_token_budget, token_batches

LENGTHS = np.random.default_rng(0).integers(1, 60, 300)


def naive_batches(lengths: np.ndarray, budget: int, padded: bool) -> list[list[int]]:
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        grown = [*batches[-1], row] if batches else []
        tokens = len(grown) * lengths[grown[0]] if padded and grown else sum(lengths[i] for i in grown)
        if grown and tokens <= budget:
            batches[-1] = grown
        else:
            batches.append([row])
    return batches


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("budget", [10, 64, 500, 10**6])
def test_batches_are_filled_longest_first_up_to_the_budget(padded: bool, budget: int) -> None:
    found = [batch.tolist() for batch in token_batches(LENGTHS, budget=budget, padded=padded)]
    assert found == naive_batches(LENGTHS, budget, padded)


@pytest.mark.parametrize("padded", [True, False])
def test_no_texts_make_no_batches(padded: bool) -> None:
    assert token_batches([], budget=10, padded=padded) == []


def gpu_that_holds(tokens: int, tried: list[int]) -> Callable[[int], None]:
    def step(asked: int) -> None:
        tried.append(asked)
        if asked > tokens:
            raise torch.cuda.OutOfMemoryError

    return step


@pytest.mark.parametrize(("holds", "expected"), [(5000, 4000), (4999, 2000), (1250, 1000), (10**9, 16_000)])
def test_the_budget_is_the_largest_that_leaves_a_quarter_to_spare(holds: int, expected: int) -> None:
    tried: list[int] = []
    assert auto_token_budget(gpu_that_holds(holds, tried), start=1000, limit=16_000) == expected
    assert tried == sorted(set(tried))
    assert max(tried) <= 20_000


def test_the_limit_is_tried_where_no_doubling_meets_it() -> None:
    assert auto_token_budget(gpu_that_holds(10**9, []), start=1000, limit=3000) == 3000


def test_a_gpu_that_does_not_hold_the_first_budget_is_named() -> None:
    with pytest.raises(StageError, match="1000 tokens does not fit"):
        auto_token_budget(gpu_that_holds(1249, []), start=1000, limit=16_000)


def test_other_errors_of_a_step_are_not_taken_for_a_lack_of_memory() -> None:
    def step(tokens: int) -> None:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        auto_token_budget(step, start=1000, limit=16_000)
