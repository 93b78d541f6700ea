import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peg.train.guard import LossGuard


def after(losses: list[float], *, max_ratio: float | None = 3.0) -> LossGuard:
    guard = LossGuard(max_ratio)
    for loss in losses:
        assert guard.fault(loss, 1.0) is None
        guard.passed(loss)
    return guard


@given(st.lists(st.floats(0.5, 1.0), min_size=10, max_size=200))
def test_the_mean_is_the_exponential_one_of_all_steps_before(losses: list[float]) -> None:
    weights = [(1 - 1 / 50) ** age for age in range(len(losses))][::-1]
    mean = math.fsum(w * x for w, x in zip(weights, losses, strict=True)) / math.fsum(weights)
    guard = after(losses)
    assert guard.fault(2.999 * mean, 1.0) is None
    fault = guard.fault(3.001 * mean, 1.0)
    assert fault is not None
    assert f"3.0 times its running mean {mean:.4g}, train.max_loss_ratio allows 3" in fault


def test_a_schedule_that_moves_the_loss_twentyfold_is_no_jump() -> None:
    after([0.2 * 20 ** (step / 1000) for step in range(1000)], max_ratio=1.5)
    after([4.0 * 20 ** (-step / 1000) for step in range(1000)], max_ratio=1.5)


def test_the_first_steps_and_no_ratio_judge_nothing_but_numbers() -> None:
    assert after([1.0] * 9).fault(100.0, 1.0) is None
    assert after([1.0] * 10).fault(100.0, 1.0) is not None
    assert after([1.0] * 50, max_ratio=None).fault(1e9, 1.0) is None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_a_fault_from_the_first_step(loss: float, norm: float) -> None:
    assert LossGuard(None).fault(loss, norm) == f"loss {loss}, gradient norm {norm}"


def test_a_guard_goes_on_from_a_checkpoint_as_if_nothing_had_been() -> None:
    losses = [1 / (3 + step) for step in range(37)]
    whole, restored = after(losses), LossGuard(3.0)
    restored.restore(json.loads(json.dumps(after(losses[:20]).state())))
    for loss in losses[20:]:
        restored.passed(loss)
    assert restored.state() == whole.state()
