"""Whether a candidate becomes champion: a gain over base and champion that is large enough and no chance."""

from dataclasses import dataclass

import numpy as np

from peg.evaluate.significance import randomisation_p_value


@dataclass(frozen=True)
class Scores:
    """One model's main metric on one test set, query by query.

    name: as it stands in a sentence ("the base encoder", "version 3"). set_digest: of the test set's content.
    """

    name: str
    weights_sha256: str
    set_digest: str
    per_query: dict[str, float]

    @property
    def mean(self) -> float:
        """The main metric of the whole set."""
        return float(np.mean(list(self.per_query.values())))


@dataclass(frozen=True)
class Rules:
    """metric: its name in sentences; a gain counts from min_gain on, with a p-value of at most max_p_value."""

    metric: str
    min_gain: float
    max_p_value: float
    permutations: int
    seed: int


@dataclass(frozen=True)
class Decision:
    """passed: the candidate is to be champion; reasons: full sentences with figures, one per comparison."""

    passed: bool
    reasons: tuple[str, ...]


def decide(candidate: Scores, base: Scores, champion: Scores | None, rules: Rules) -> Decision:
    """Compare a candidate with the base encoder and, if there is one, with the champion.

    It passes if it beats both. The champion's own weights pass without another test. A champion that was measured on
    other data cannot be compared, and the candidate does not pass. Raises ValueError if candidate and base were
    measured on different sets, or on different queries of one set.
    """
    if candidate.set_digest != base.set_digest:
        raise ValueError(
            f"{candidate.name} was measured on set {candidate.set_digest[:12]}, {base.name} on {base.set_digest[:12]}; "
            "evaluate both on one set"
        )
    if champion is not None and champion.weights_sha256 == candidate.weights_sha256:
        return Decision(True, (f"The candidate has the weights of the champion, {champion.name}: it stays champion.",))
    verdicts = [_beats(candidate, base, rules)]
    if champion is None:
        verdicts.append((True, "There is no champion yet, so none had to be beaten."))
    elif champion.set_digest != candidate.set_digest:
        verdicts.append(
            (
                False,
                f"The champion, {champion.name}, was measured on other data (set {champion.set_digest[:12]}, "
                f"the candidate on {candidate.set_digest[:12]}), so the two cannot be compared.",
            )
        )
    else:
        verdicts.append(_beats(candidate, champion, rules))
    return Decision(all(good for good, _ in verdicts), tuple(reason for _, reason in verdicts))


def _beats(candidate: Scores, other: Scores, rules: Rules) -> tuple[bool, str]:
    if candidate.per_query.keys() != other.per_query.keys():
        apart = len(candidate.per_query.keys() ^ other.per_query.keys())
        raise ValueError(
            f"{candidate.name} and {other.name} differ in {apart} of their queries though the set is the same; "
            "evaluate both again"
        )
    queries = sorted(candidate.per_query)
    differences = np.array([candidate.per_query[query] - other.per_query[query] for query in queries], dtype=np.float64)
    gain = float(np.mean(differences))
    p_value = randomisation_p_value(differences, permutations=rules.permutations, seed=rules.seed)
    figures = (
        f"{rules.metric} is {candidate.mean:.4f} against {other.mean:.4f} of {other.name} "
        f"on {len(queries)} queries: {gain:+.4f}, p = {p_value:.2g}"
    )
    if gain <= 0 or gain < rules.min_gain:
        needed = f"a gain of at least {rules.min_gain:g}" if rules.min_gain > 0 else "a gain"
        return False, f"{figures}; {needed} is needed."
    if p_value > rules.max_p_value:
        return False, f"{figures}; the gain may be chance, p of at most {rules.max_p_value:g} is needed."
    return True, f"{figures}; that is enough."
