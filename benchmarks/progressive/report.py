"""The final runs as Markdown: means, differences to both controls, intervals and corrected p-values."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.progressive.data import SEED, TESTS
from benchmarks.progressive.study import CONDITIONS, SEEDS, Setting, final_path, label, mean_of_means
from peg.evaluate.significance import bootstrap_interval, holm, randomisation_p_value, verdict
from peg.workspace import read_json

CONTROLS = ("none", "temperature")
ALL = "mean of sets"
_DRAWS = 10_000


def render(folder: Path, chosen: dict[str, Any], *, kinds: Sequence[str]) -> str:
    """All tables. Seeds that are not finished under both conditions for all settings are left out, and named."""
    whole = [
        seed
        for seed in SEEDS
        if all(final_path(folder, condition, kind, seed).is_file() for condition in CONDITIONS for kind in kinds)
    ]
    lines = [f"Seeds {whole} of {list(SEEDS)}. A query's nDCG@10 is its mean over the seeds before anything is tested."]
    for condition in CONDITIONS:
        lines += ["", f"## {condition}", "", *_choices({kind: chosen[condition][kind] for kind in kinds})]
        if whole:
            lines += ["", *_tables(folder, condition, kinds, whole)]
    return "\n".join(lines) + "\n"


def _choices(chosen: dict[str, dict[str, Any]]) -> Iterable[str]:
    rows = []
    for kind, found in chosen.items():
        tried = found["tried"]
        best = label(Setting.from_json(found["setting"]))
        rows.append([kind, best, f"{tried[best]:.4f}", f"{len(tried)}", f"{min(tried.values()):.4f}"])
    return _table(["setting", "chosen on dev", "dev nDCG@10", "candidates", "worst of them"], rows)


def _tables(folder: Path, condition: str, kinds: Sequence[str], seeds: list[int]) -> Iterable[str]:
    runs = {kind: [read_json(final_path(folder, condition, kind, seed))["scores"] for seed in seeds] for kind in kinds}
    untrained = folder / "final" / "untrained.json"
    if untrained.is_file():
        runs = {"untrained": [read_json(untrained)["scores"]], **runs}
    rows = []
    for kind, scores in runs.items():
        means = [float(_per_query(scores, name).mean()) for name in (*TESTS, ALL)]
        spread = f"{np.std([mean_of_means(one) for one in scores], ddof=1):.4f}" if len(scores) > 1 else "one run"
        rows.append([kind, *(f"{mean:.4f}" for mean in means), spread])
    yield from _table(["nDCG@10", *TESTS, ALL, "sd over seeds"], rows)
    yield ""
    compared = [
        (kind, control, name)
        for control in CONTROLS
        if control in kinds
        for kind in kinds
        if kind != control and (kind, control) != CONTROLS
        for name in (*TESTS, ALL)
    ]
    gains = [_per_query(runs[kind], name) - _per_query(runs[control], name) for kind, control, name in compared]
    p_values = [randomisation_p_value(gain, permutations=_DRAWS, seed=SEED) for gain in gains]
    corrected = holm(p_values)
    rows = []
    for (kind, control, name), gain, raw, p_value in zip(compared, gains, p_values, corrected, strict=True):
        low, high = bootstrap_interval(gain, resamples=_DRAWS, seed=SEED)
        of_seeds = zip(runs[kind], runs[control], strict=True)
        above = sum(bool((_per_query([a], name) - _per_query([b], name)).mean() > 0) for a, b in of_seeds)
        mean = float(gain.mean())
        numbers = [
            f"{mean:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
            f"{above}/{len(seeds)}",
            f"{raw:.4f}",
            f"{p_value:.4f}",
        ]
        rows.append([f"{kind} - {control}", name, *numbers, verdict(mean, p_value)])
    header = ["difference", "set", "nDCG@10", "95% interval", "seeds above", "p", f"p (Holm, {len(rows)})", ""]
    yield from _table(header, rows)


def _per_query(scores: list[dict[str, dict[str, float]]], name: str) -> NDArray[np.float64]:
    """A set's queries in order, each the mean over seeds; for ALL, scaled so that their mean is the mean over sets."""
    if name != ALL:
        return np.mean([[one[name][query] for query in sorted(one[name])] for one in scores], axis=0)
    parts = [_per_query(scores, each) for each in TESTS]
    total = sum(map(len, parts))
    return np.concatenate([part * total / (len(parts) * len(part)) for part in parts])


def _table(header: list[str], rows: list[list[str]]) -> Iterable[str]:
    yield from (f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))
