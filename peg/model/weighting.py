"""What weighs how much, at one moment of training.

All variants are four numbers: a negative of cosine s weighs exp(slope·s), a query of difficulty h whose positive has
the softmax share p weighs exp(-easiness·h/τ)·(1 - p)^focus. Weights are constants to the gradient.
docs/training-step.md has the formulas and their sources.
"""

from dataclasses import dataclass
from typing import assert_never

from peg import config
from peg.model.schedule import ramp


@dataclass(frozen=True)
class Weights:
    """slope: per unit of cosine. normalised: a query's negatives weigh 1 in the mean; query weights always do."""

    slope: float
    normalised: bool
    easiness: float
    focus: float


INFO_NCE = Weights(slope=0.0, normalised=True, easiness=0.0, focus=0.0)


def progressive(*, a: float, b: float, temperature: float) -> Weights:
    """Negatives weigh exp(a·s/τ), queries exp(-b·h/τ), both mean 1; a = b = 0 is InfoNCE."""
    return Weights(slope=a / temperature, normalised=True, easiness=b, focus=0.0)


def weights_at(weighting: config.Weighting, *, progress: float, temperature: float) -> tuple[float, Weights]:
    """The temperature and the weights at training progress t in [0, 1]."""
    match weighting:
        case config.NoWeighting():
            return temperature, INFO_NCE
        case config.ProgressiveWeighting():
            a, b = (ramp(progress, **one.model_dump()) for one in (weighting.negatives, weighting.queries))
            return temperature, progressive(a=a, b=b, temperature=temperature)
        case config.TemperatureSchedule():
            return temperature / (1 + ramp(progress, **weighting.exponent.model_dump())), INFO_NCE
        case config.FocalWeighting():
            return temperature, Weights(slope=0.0, normalised=True, easiness=0.0, focus=weighting.gamma)
        case config.HardnessWeighting():
            return temperature, Weights(slope=weighting.alpha, normalised=False, easiness=0.0, focus=0.0)
        case _:
            assert_never(weighting)
