"""Stops a training whose loss is no number, or jumps; the weights of that step are never written."""

import math
from typing import Any

_STEPS_REMEMBERED = 50
"""Time constant of the running mean. A schedule's own change of the loss over so few steps is small beside a jump."""
_WARM_UP_STEPS = 10
"""A mean of fewer steps judges nothing."""


class LossGuard:
    """Compares each step's loss with the exponential mean of the steps before it.

    guard = LossGuard(max_ratio=3.0)
    fault = guard.fault(loss, grad_norm)    # a sentence, or None
    guard.passed(loss)                      # once the step is taken
    """

    def __init__(self, max_ratio: float | None) -> None:
        self._max_ratio = max_ratio
        self._sum = self._weight = 0.0
        self._steps = 0

    def fault(self, loss: float, norm: float) -> str | None:
        """Why this step must not be taken, or None. loss and norm are the global batch's, equal on all ranks."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss}, gradient norm {norm}"
        if self._max_ratio is None or self._steps < _WARM_UP_STEPS:
            return None
        mean = self._sum / self._weight
        if loss <= self._max_ratio * mean:
            return None
        return (
            f"loss {loss:.4g} is {loss / mean if mean else math.inf:.1f} times its running mean {mean:.4g}, "
            f"train.max_loss_ratio allows {self._max_ratio:g}"
        )

    def passed(self, loss: float) -> None:
        """Take a step's loss into the mean."""
        decay = 1 - 1 / _STEPS_REMEMBERED
        self._sum = decay * self._sum + loss
        self._weight = decay * self._weight + 1
        self._steps += 1

    def state(self) -> dict[str, Any]:
        """For a checkpoint's JSON, which keeps every bit of a float."""
        return {"sum": self._sum, "weight": self._weight, "steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on as the guard that gave this state."""
        self._sum, self._weight, self._steps = state["sum"], state["weight"], state["steps"]
