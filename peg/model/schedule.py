"""Values that move over training progress t in [0, 1]: weighting exponents and the learning rate."""

import math
from typing import Literal

Shape = Literal["constant", "linear", "cosine", "step"]


def ramp(progress: float, *, shape: Shape, start: float, end: float) -> float:
    """Value of a ramp from start (t = 0) to end (t = 1); 'step' jumps half-way, 'constant' stays at start."""
    if not 0 <= progress <= 1:
        raise ValueError(f"progress is {progress}; it runs from 0 to 1")
    share = {
        "constant": 0.0,
        "linear": progress,
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
        "step": float(progress >= 0.5),
    }[shape]
    return start + (end - start) * share


def learning_rate(
    step: int, *, num_steps: int, peak: float, warmup: float, schedule: Literal["linear", "cosine", "constant"]
) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up over `warmup` of the steps, then towards 0.

    The first step already learns, and so does the last.
    """
    num_warmup = math.ceil(warmup * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    left = (num_steps - step) / max(1, num_steps - num_warmup)
    if schedule == "constant":
        return peak
    return peak * (left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)
