"""The five settings, how each is chosen on dev, and the final runs."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from benchmarks.progressive.data import Prepared
from benchmarks.progressive.negatives import Condition, mine
from benchmarks.progressive.runs import Part, Setting, cut_encoder, embed, run
from benchmarks.progressive.shared import complete
from peg import config
from peg.workspace import read_json

CONDITIONS: tuple[Condition, ...] = get_args(Condition)
SETTINGS = ("none", "temperature", "progressive", "focal", "hardness")  # config.Weighting's kinds; controls first
SEEDS = (1, 2, 3)
TUNE_SEED = 0  # none of the final ones
PARTS = {
    "layer": Part("layer", batch_size=128, epochs=1, tune_share=0.2),
    "adapter": Part("adapter", batch_size=256, epochs=3, tune_share=1.0),
}
TEMPERATURES = (0.005, 0.01, 0.02, 0.03, 0.05)
RATES = (2e-4, 5e-4, 1e-3)
START = (0.02, 5e-4)  # temperature while rates are compared, rate while temperatures are
SCHEDULES = ((-0.5, 0.5, 0.2), (-0.25, 1.0, 0.1), (0.0, 0.5, 0.2), (-0.5, 0.5, 0.5))  # a from, a to, b from; b to 0
GAMMAS = (0.5, 2.0)
ALPHAS = (5.0, 20.0)


def label(setting: Setting) -> str:
    """A setting in words."""
    match setting.weighting:
        case config.ProgressiveWeighting(negatives=a, queries=b):
            words = f"a {a.start:g} to {a.end:g}, b {b.start:g} to {b.end:g}"
        case config.TemperatureSchedule(exponent=a):
            words = f"a {a.start:g} to {a.end:g}"
        case config.FocalWeighting(gamma=gamma):
            words = f"gamma {gamma:g}"
        case config.HardnessWeighting(alpha=alpha):
            words = f"alpha {alpha:g}"
        case _:
            words = "no weights"
    return f"{words}; temperature {setting.temperature:g}, rate {setting.learning_rate:g}"


@dataclass(frozen=True)
class Study:
    """What all runs share. folder: where their results are."""

    prepared: Prepared
    encoder: Path
    mined: dict[Condition, Any]
    part: Part
    folder: Path

    def run(self, condition: Condition, setting: Setting | None, **how: Any) -> Callable[[], dict[str, Any]]:
        """A run that has not begun."""
        return partial(run, self.prepared, self.encoder, self.mined[condition], setting, part=self.part, **how)


def mined_pairs(prepared: Prepared, encoder: Path, work: Path) -> dict[Condition, Any]:
    """Each condition's pairs with their pools of negatives; once, in `work`."""
    path_of = {condition: work / f"mined-{condition}.json" for condition in CONDITIONS}
    untrained = partial(embed, cut_encoder(encoder, None, prepared, seed=0), prepared)
    complete(
        {path: partial(mine, prepared, untrained, condition) for condition, path in path_of.items()},
        what="mine negatives",
    )
    return {condition: read_json(path) for condition, path in path_of.items()}


def tune(study: Study) -> dict[str, Any]:
    """Choose every setting on dev, under each condition: condition -> kind -> setting and all candidates' means.

    First the rate (clean pairs only) and the temperature without weights; the others are tried at both.
    """
    rate = START[1]
    chosen: dict[str, Any] = {}
    for condition in CONDITIONS:

        def scored(settings: list[Setting], condition: Condition = condition) -> dict[Setting, float]:
            how = {"seed": TUNE_SEED, "share": study.part.tune_share, "sets": study.prepared.dev}
            path_of = {one: study.folder / "tune" / condition / f"{_digest(one)}.json" for one in settings}
            runs = {path: study.run(condition, one, **how) for one, path in path_of.items()}
            complete(runs, what=f"{study.part.name}, tune, {condition}")
            return {one: mean_of_means(read_json(path)["scores"]) for one, path in path_of.items()}

        none = config.NoWeighting(kind="none")
        tried = scored([Setting(temperature, rate, none) for temperature in TEMPERATURES])
        temperature = _best(tried).temperature
        if condition == "clean":
            rates = scored([Setting(START[0], one, none) for one in RATES])
            rate = _best(rates).learning_rate
            tried |= rates | scored([Setting(temperature, rate, none)])
            temperature, rate = _best(tried).temperature, _best(tried).learning_rate
        tried |= scored([Setting(temperature, rate, one) for one in candidates()])
        chosen[condition] = {}
        for kind in SETTINGS:
            means = {one: mean for one, mean in tried.items() if one.weighting.kind == kind}
            named = {label(one): mean for one, mean in means.items()}
            chosen[condition][kind] = {"setting": _best(means).to_json(), "tried": named}
    return chosen


def candidates() -> list[config.Weighting]:
    """What is tried beside no weights."""

    def line(start: float, end: float) -> config.Ramp:
        return config.Ramp(shape="linear", start=start, end=end)

    exponents = dict.fromkeys((start, end) for start, end, _ in SCHEDULES)
    return [
        *(config.TemperatureSchedule(kind="temperature", exponent=line(*a)) for a in exponents),
        *(
            config.ProgressiveWeighting(kind="progressive", negatives=line(start, end), queries=line(b, 0.0))
            for start, end, b in SCHEDULES
        ),
        *(config.FocalWeighting(kind="focal", gamma=gamma) for gamma in GAMMAS),
        *(config.HardnessWeighting(kind="hardness", alpha=alpha) for alpha in ALPHAS),
    ]


def final(study: Study, chosen: dict[str, Any], *, kinds: Sequence[str]) -> None:
    """The final runs, seed by seed, so that whatever is finished is balanced; each reads the test sets once."""
    runs = {}
    sets = study.prepared.tests
    for seed in SEEDS:
        for condition in CONDITIONS:
            for kind in kinds:
                setting = Setting.from_json(chosen[condition][kind]["setting"])
                path = final_path(study.folder, condition, kind, seed)
                runs[path] = study.run(condition, setting, seed=seed, share=1.0, sets=sets)
    runs[study.folder / "final" / "untrained.json"] = study.run("clean", None, seed=0, share=1.0, sets=sets)
    complete(runs, what=f"{study.part.name}, final")


def final_path(folder: Path, condition: str, kind: str, seed: int) -> Path:
    """Where a final run's result is."""
    return folder / "final" / condition / f"{kind}-{seed}.json"


def mean_of_means(scores: dict[str, dict[str, float]]) -> float:
    """Mean over sets of the mean over a set's queries."""
    return sum(sum(queries.values()) / len(queries) for queries in scores.values()) / len(scores)


def _best(means: dict[Setting, float]) -> Setting:
    return max(means, key=lambda one: means[one])


def _digest(setting: Setting) -> str:
    return hashlib.sha256(json.dumps(setting.to_json(), sort_keys=True).encode()).hexdigest()[:16]
