"""Which texts a step trains on: against a plan in plain Python, and by what must hold of any."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peg.config import TrainSource
from peg.errors import InputError
from peg.train.batches import Batch, Examples, Plan, Ragged, SourceInfo, Teacher, share_by_tokens
from peg.train.data import known_positives, make_examples
from tests.train.small import small_config, small_examples

EXAMPLES = small_examples()
TASKS = ("retrieval", "similarity", "classification")


def make_plan(examples: Examples = EXAMPLES, *, weights: tuple[float, ...] | None = None, **changes: object) -> Plan:
    values = {"seed": 1, "batch_size": 5, "num_negatives": 3, "one_source": False} | changes
    return Plan(examples, weights=weights or (1.0,) * len(examples.sources), **values)  # type: ignore[arg-type]


def epoch_of(plan: Plan, epoch: int = 0) -> list[Batch]:
    return [plan.batch(epoch, step) for step in range(plan.steps_per_epoch)]


def several_sources(sizes: list[int], tasks: list[str], *, shuffled: bool = False, seed: int = 0) -> Examples:
    """A source of each size: one or two positives, up to six negatives, and scores that tell the passage's row."""
    rng = random.Random(seed)
    source = [number for number, size in enumerate(sizes) for _ in range(size)]
    if shuffled:
        rng.shuffle(source)
    num_passages = 30
    positives, negatives = [], []
    for number in source:
        drawn = rng.sample(range(num_passages), rng.randint(1, 2) + rng.randint(0, 6))
        positives.append(drawn[:1] if tasks[number] == "similarity" or len(drawn) < 3 else drawn[:2])
        negatives.append(drawn[len(positives[-1]) :])
    good, bad = Ragged.of(positives), Ragged.of(negatives)
    return make_examples(
        np.array([rng.randrange(12) for _ in source], dtype=np.int64),
        good,
        bad,
        num_queries=12,
        sources=tuple(SourceInfo(f"s{number}", task) for number, task in enumerate(tasks)),  # type: ignore[arg-type]
        source=np.array(source, dtype=np.int64),
        label=np.array([row / 7 if tasks[number] == "similarity" else np.nan for row, number in enumerate(source)]),
        teacher=Teacher(good.values.astype(np.float32) + 0.5, np.where(bad.values % 5, bad.values + 0.5, np.nan)),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    sizes = draw(st.lists(st.integers(0, 14), min_size=1, max_size=4).filter(any))
    tasks = [draw(st.sampled_from(TASKS)) for _ in sizes]
    weights = tuple(draw(st.sampled_from([0.5, 1.0, 1.3, 2.0, 2.5])) for _ in sizes)
    assume(any(round(weight * size) for weight, size in zip(weights, sizes, strict=True)))
    examples = several_sources(sizes, tasks, shuffled=draw(st.booleans()), seed=draw(st.integers(0, 99)))
    return make_plan(
        examples,
        weights=weights,
        seed=draw(st.integers(0, 2**31 - 1)),
        batch_size=draw(st.integers(2, 9)),
        num_negatives=draw(st.integers(0, 4)),
        one_source=draw(st.booleans()),
    )


def sources_of(plan: Plan) -> list[int]:
    source = plan.examples.source
    return [0] * len(plan.examples) if source is None else source.tolist()


# The order


def test_an_epoch_sees_every_example_once_and_drops_none() -> None:
    batches = epoch_of(make_plan())
    assert sorted(np.concatenate([one.example for one in batches])) == list(range(len(EXAMPLES)))
    assert [len(one.example) for one in batches] == [5, 5, 5, 5, 2]


def test_a_batch_is_a_function_of_seed_epoch_and_step() -> None:
    plan = make_plan()
    assert np.array_equal(plan.batch(0, 2).passage, make_plan().batch(0, 2).passage)
    assert not np.array_equal(plan.batch(0, 2).example, make_plan(seed=2).batch(0, 2).example)
    assert not np.array_equal(plan.batch(0, 2).example, plan.batch(1, 2).example)


@settings(deadline=None, max_examples=30)
@given(plans(), st.integers(0, 5))
def test_an_epoch_sees_each_source_as_often_as_its_weight_says(plan: Plan, epoch: int) -> None:
    source = sources_of(plan)
    seen = Counter(np.concatenate([one.example for one in epoch_of(plan, epoch)]).tolist())
    assert seen.total() == plan.examples_per_epoch
    for number, weight in enumerate(plan.weights):
        rows = [row for row in range(len(source)) if source[row] == number]
        assert sum(seen[row] for row in rows) == round(weight * len(rows))
        if rows:
            whole = round(weight * len(rows)) // len(rows)
            assert {seen[row] for row in rows} <= {whole, whole + 1}


@settings(deadline=None, max_examples=30)
@given(plans(), st.integers(0, 5))
def test_batches_are_cut_as_a_plain_plan_cuts_them(plan: Plan, epoch: int) -> None:
    source, infos = sources_of(plan), plan.examples.sources
    draws: Counter[object] = Counter()
    for number, weight in enumerate(plan.weights):
        draws[number if plan.one_source else infos[number].task] += round(weight * source.count(number))
    expected: Counter[tuple[object, int]] = Counter()
    for group, count in draws.items():
        sizes = [plan.batch_size] * (count // plan.batch_size) + [count % plan.batch_size]
        expected.update((group, size) for size in sizes if size)
    batches = epoch_of(plan, epoch)
    found: Counter[tuple[object, int]] = Counter()
    for one in batches:
        members = {source[row] for row in one.example}
        assert {infos[number].task for number in members} == {one.task}
        assert one.source is None or {infos[number].name for number in members} == {one.source}
        if plan.one_source:
            assert one.source is not None
            assert len(members) == 1
        found[(members.pop() if plan.one_source else one.task, len(one.example))] += 1
    assert found == expected
    assert plan.short_batches == sum(len(one.example) < plan.batch_size for one in batches)
    assert plan.single_query_batches == sum(len(one.example) == 1 for one in batches)


@settings(deadline=None, max_examples=15)
@given(plans())
def test_a_batch_alone_equals_the_one_in_sequence(plan: Plan) -> None:
    batches = epoch_of(plan, 3)
    fresh = replace(plan)
    for step in reversed(range(len(batches))):
        alone = fresh.batch(3, step)
        for name, value in vars(batches[step]).items():
            np.testing.assert_array_equal(getattr(alone, name), value, err_msg=name)


def test_a_half_is_drawn_anew_each_epoch_and_evenly() -> None:
    plan = make_plan(weights=(0.5,), batch_size=11)
    seen = np.zeros(len(EXAMPLES))
    for epoch in range(200):
        rows = np.concatenate([one.example for one in epoch_of(plan, epoch)])
        assert len(set(rows.tolist())) == len(rows) == 11
        seen[rows] += 1
    assert np.all(np.abs(seen - 100) < 36)  # five standard deviations


def test_each_repetition_has_an_order_and_negatives_of_its_own() -> None:
    plan = make_plan(weights=(2.0,), batch_size=11)
    batches = epoch_of(plan)
    first, second = (np.concatenate([one.example for one in batches[low : low + 2]]) for low in (0, 2))
    assert sorted(first) == sorted(second) == list(range(22))
    assert not np.array_equal(first, second)
    drawn = [
        {
            int(row): frozenset(one.passage[own[own >= 0]].tolist())
            for row, own in zip(one.example, one.own, strict=True)
        }
        for one in (make_plan(weights=(2.0,), batch_size=22).batch(0, step) for step in (0, 1))
    ]
    assert sum(drawn[0][row] != drawn[1][row] for row in range(22)) > 8


def test_sources_mix_within_a_batch_or_take_turns() -> None:
    examples = several_sources([200, 100], ["retrieval", "retrieval"])
    mixed = epoch_of(make_plan(examples, batch_size=30))
    assert all(0.4 < np.mean(one.example < 200) < 0.95 for one in mixed)
    turns = [one.source for one in epoch_of(make_plan(examples, batch_size=10, one_source=True))]
    assert turns == [one.source for one in epoch_of(make_plan(examples, batch_size=10, one_source=True))]
    assert 8 <= sum(one != other for one, other in zip(turns[1:], turns[:-1], strict=True)) <= 20
    assert turns != [one.source for one in epoch_of(make_plan(examples, batch_size=10, one_source=True), 1)]


def test_steps_of_a_hundred_million_cost_no_more_than_their_batch() -> None:
    size = 110_000_000
    mapped = np.broadcast_to(np.uint32(0), (size,))  # nothing can be written for it, or copied from it
    one = Ragged(mapped, _Offsets())  # type: ignore[arg-type]
    plan = make_plan(Examples(mapped, one, one, Ragged.of([[0]])), batch_size=64)
    assert plan.steps_per_epoch == -(-size // 64)
    assert len(np.unique(np.concatenate([plan.batch(1, step).example for step in (0, 1, 10**6)]))) == 3 * 64


class _Offsets:
    """Lists of one value each, at any place."""

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return rows


def test_the_recipe_says_the_weights() -> None:
    examples = several_sources([10, 20], ["retrieval", "retrieval"])
    rare = TrainSource(weight=0.25, query_prompt=None, passage_prompt=None)
    config = small_config(Path("none"), sources={"s1": rare}, one_source_batches=True)
    plan = Plan.of(examples, config, seed=9)
    assert (plan.weights, plan.one_source, plan.batch_size, plan.num_negatives) == ((1.0, 0.25), True, 5, 3)
    assert plan.examples_per_epoch == 15


def test_an_epoch_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="0 of 22 examples"):
        _ = make_plan(weights=(0.01,)).steps_per_epoch


# What a batch holds


@settings(deadline=None, max_examples=50)
@given(step=st.integers(0, 4), epoch=st.integers(0, 50), negatives=st.integers(0, 6))
def test_masks_are_the_other_known_positives_of_the_batch(step: int, epoch: int, negatives: int) -> None:
    found = make_plan(num_negatives=negatives).batch(epoch, step)
    expected = {
        (i, j)
        for i, query in enumerate(found.query)
        for j, passage in enumerate(found.passage)
        if passage in EXAMPLES.known_positives[query] and j != found.positive[i]
    }
    assert set(zip(found.masked_query.tolist(), found.masked_passage.tolist(), strict=True)) == expected
    assert np.all(np.diff(found.masked_query) >= 0)
    assert np.all(np.diff(found.passage) > 0)
    for i, example in enumerate(found.example):
        assert found.passage[found.positive[i]] in EXAMPLES.positives[example]


@settings(deadline=None, max_examples=30)
@given(plans(), st.integers(0, 5))
def test_own_passages_are_the_positive_and_negatives_of_the_rows_pool(plan: Plan, epoch: int) -> None:
    examples, used = plan.examples, Counter[int]()
    for one in epoch_of(plan, epoch):
        assert one.own.shape == (len(one.example), 1 + plan.num_negatives)
        assert np.array_equal(one.own[:, 0], one.positive)
        held: set[int] = set(one.passage[one.positive].tolist())
        for row, own in zip(one.example, one.own, strict=True):
            known = set(examples.known_positives[examples.query[row]].tolist())
            pool = [] if one.task == "similarity" else examples.negatives[row].tolist()
            drawn = one.passage[own[1:][own[1:] >= 0]].tolist()
            assert len(drawn) == len(set(drawn))
            assert set(drawn) <= set(pool) - known
            num_drawn = min(plan.num_negatives, len(pool))
            assert max(0, num_drawn - len(known & set(pool))) <= len(drawn) <= num_drawn
            held |= set(pool)
            used[one.task] += len(drawn)
        assert set(one.passage.tolist()) <= held
        if one.task == "similarity":
            assert np.all(one.own[:, 1:] == -1)
            assert len(one.passage) == len(set(one.passage[one.positive].tolist()))


@settings(deadline=None, max_examples=30)
@given(plans(), st.integers(0, 5))
def test_every_label_and_score_stays_with_its_row_and_passage(plan: Plan, epoch: int) -> None:
    for one in epoch_of(plan, epoch):
        if one.task == "similarity":
            assert one.label is not None
            assert one.label.tolist() == [row / 7 for row in one.example.tolist()]
        else:
            assert one.label is None
        assert one.teacher is not None
        for row, own, scores in zip(one.example, one.own, one.teacher, strict=True):
            passages = one.passage[np.maximum(own, 0)]
            expected = np.where((own < 0) | (passages % 5 == 0), np.nan, passages + 0.5)
            expected[0] = passages[0] + 0.5
            np.testing.assert_array_equal(scores, expected, err_msg=f"row {row}")


def test_negatives_are_drawn_anew_each_epoch_and_evenly() -> None:
    one = Examples(np.array([0]), Ragged.of([[0]]), Ragged.of([list(range(1, 11))]), Ragged.of([[0]]))
    plan = make_plan(one, seed=3, batch_size=1)
    counts = np.zeros(11)
    for epoch in range(1000):
        counts[plan.batch(epoch, 0).passage] += 1
    assert counts[0] == 1000
    assert np.all(np.abs(counts[1:] - 300) < 73)  # five standard deviations


def test_a_drawn_negative_that_another_source_calls_a_positive_is_none() -> None:
    """Row 0 has passage 1 in its pool; row 1, with the same query, has it as its positive."""
    query, positives = np.array([0, 0]), Ragged.of([[0], [1]])
    known = known_positives(query, positives, num_queries=1)
    teacher = Teacher(np.array([1.0, 2.0], dtype=np.float32), np.array([3.0, 4.0], dtype=np.float32))
    plan = make_plan(Examples(query, positives, Ragged.of([[1, 2], []]), known, teacher=teacher), num_negatives=2)
    found = plan.batch(0, 0)
    assert found.teacher is not None
    row = found.example.tolist().index(0)
    own = found.own[row]
    assert sorted(own[1:].tolist()) == [-1, found.passage.tolist().index(2)]
    assert np.isnan(found.teacher[row][own < 0]).all()
    assert sorted(found.teacher[row][own >= 0].tolist()) == [1.0, 4.0]


# Known positives, shares


def test_known_positives_are_joined_over_examples() -> None:
    found = known_positives(np.array([1, 0, 1]), Ragged.of([[5, 3], [9], [3, 7]]), num_queries=3)
    assert [found[row].tolist() for row in range(3)] == [[9], [3, 5, 7], []]


def test_a_text_that_is_only_compared_with_a_query_is_no_known_positive() -> None:
    found = make_examples(
        np.array([0, 0]),
        Ragged.of([[4], [2]]),
        Ragged.of([[], []]),
        num_queries=1,
        sources=(SourceInfo("a", "similarity"), SourceInfo("b", "retrieval")),
        source=np.array([0, 1]),
        label=np.array([0.1, np.nan]),
        teacher=None,
    )
    assert found.known_positives[0].tolist() == [2]


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=200), world_size=st.integers(1, 8))
@pytest.mark.filterwarnings("error")
def test_ranks_get_about_the_same_tokens(lengths: list[int], world_size: int) -> None:
    rank = share_by_tokens(np.array(lengths), world_size=world_size)
    tokens = np.bincount(rank, weights=lengths, minlength=world_size)
    assert tokens.max() - tokens.min() <= 2 * max(lengths)
