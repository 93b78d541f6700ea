import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peg.gate import Rules, Scores, decide

RULES = Rules(metric="ndcg_at_10", min_gain=0.01, max_p_value=0.05, permutations=500, seed=3)


def scores(name, mean, *, spread=0.05, queries=80, digest="d1", weights=None):
    values = np.random.default_rng(7).normal(mean, spread, queries)
    return Scores(name, weights or name, digest, {f"q{row}": float(value) for row, value in enumerate(values)})


def shifted(scores_, name, noise, *, seed=0):
    """The same queries with noise of mean 0 added: a difference that is chance."""
    extra = np.random.default_rng(seed).normal(0, noise, len(scores_.per_query))
    extra -= extra.mean()
    moved = {query: value + float(more) for (query, value), more in zip(scores_.per_query.items(), extra, strict=True)}
    return Scores(name, name, scores_.set_digest, moved)


BASE = scores("the base encoder", 0.2)


def test_a_clear_gain_over_base_passes_where_there_is_no_champion():
    decision = decide(scores("the candidate", 0.4), BASE, None, RULES)
    assert decision.passed
    assert "+0.2000" in decision.reasons[0]
    assert "80 queries" in decision.reasons[0]
    assert all(reason.endswith(".") for reason in decision.reasons)


@pytest.mark.parametrize(
    ("candidate", "champion", "passed", "word"),
    [
        (0.5, 0.4, True, "that is enough"),
        (0.4, 0.5, False, "a gain of at least 0.01 is needed"),
        (0.405, 0.4, False, "a gain of at least 0.01 is needed"),
    ],
)
def test_the_champion_must_be_beaten_by_the_least_gain(candidate, champion, passed, word):
    decision = decide(scores("the candidate", candidate), BASE, scores("version 3", champion), RULES)
    assert decision.passed is passed
    assert word in decision.reasons[1]
    assert "version 3" in decision.reasons[1]


def test_a_gain_that_may_be_chance_does_not_pass():
    champion = scores("version 3", 0.4)
    noisy = shifted(champion, "the candidate", 0.5)
    candidate = Scores("the candidate", "w", "d1", {query: value + 0.02 for query, value in noisy.per_query.items()})
    decision = decide(candidate, BASE, champion, RULES)
    assert not decision.passed
    assert "may be chance" in decision.reasons[1]


def test_a_candidate_must_beat_base_even_where_it_beats_the_champion():
    decision = decide(scores("the candidate", 0.3), scores("the base encoder", 0.35), scores("version 1", 0.2), RULES)
    assert not decision.passed
    assert "needed" in decision.reasons[0]
    assert "enough" in decision.reasons[1]


def test_a_champion_on_other_data_cannot_be_compared():
    champion = scores("version 3", 0.1, digest="another set")
    decision = decide(scores("the candidate", 0.9), BASE, champion, RULES)
    assert not decision.passed
    assert "other data" in decision.reasons[1]


def test_the_champion_s_own_weights_stay_champion():
    candidate = scores("the candidate", 0.1, weights="same")
    decision = decide(candidate, BASE, scores("version 3", 0.4, weights="same"), RULES)
    assert decision.passed
    assert "stays champion" in decision.reasons[0]


def test_no_gain_never_passes_even_where_none_is_asked_for():
    rules = Rules(metric="ndcg_at_10", min_gain=0.0, max_p_value=1.0, permutations=100, seed=0)
    same = Scores("the candidate", "other weights", "d1", BASE.per_query)
    assert not decide(same, BASE, None, rules).passed


def test_results_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="evaluate both on one set"):
        decide(scores("the candidate", 0.4, digest="d2"), BASE, None, RULES)
    with pytest.raises(ValueError, match="differ in 1 of their queries"):
        decide(scores("the candidate", 0.4, queries=81), BASE, None, RULES)


@given(st.floats(0, 1), st.floats(0, 1), st.randoms(use_true_random=False))
def test_the_order_of_queries_does_not_matter(left, right, random):
    candidate, base = scores("the candidate", left), scores("the base encoder", right)
    shuffled = list(base.per_query.items())
    random.shuffle(shuffled)
    other = Scores(base.name, base.weights_sha256, base.set_digest, dict(shuffled))
    assert decide(candidate, base, None, RULES) == decide(candidate, other, None, RULES)
