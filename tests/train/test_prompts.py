"""Prompts by source: rows of text and prompt, and what they are to each other."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from peg.config import TrainSource
from peg.model.encoder import Encoder, Prompts
from peg.train.batches import Examples, Plan, Ragged
from peg.train.data import Texts, TrainingData, write_training_data
from peg.train.prompts import save_prompts, with_prompts
from peg.workspace import read_json
from tests.train.small import small_texts
from tests.train.test_batches import several_sources

PROMPTS = Prompts(query="q: ", passage="p: ")
NUM_QUERIES, NUM_PASSAGES = 12, 30


def source(query: str | None = None, passage: str | None = None) -> TrainSource:
    return TrainSource(weight=1.0, query_prompt=query, passage_prompt=passage)


def make_texts(examples: Examples) -> Texts:
    return Texts(
        queries=[f"问{row}" for row in range(NUM_QUERIES)],
        num_queries=NUM_QUERIES,
        passages=[f"文{row}" for row in range(NUM_PASSAGES)],
        num_passages=NUM_PASSAGES,
        examples=examples,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Texts, dict[str, TrainSource]]:
    sizes = draw(st.lists(st.integers(1, 12), min_size=2, max_size=4))
    tasks = [draw(st.sampled_from(["retrieval", "similarity", "classification"])) for _ in sizes]
    examples = several_sources(sizes, tasks, shuffled=draw(st.booleans()), seed=draw(st.integers(0, 99)))
    prompts = st.sampled_from([None, "", "a: ", "b: "])
    named = {info.name: source(draw(prompts), draw(prompts)) for info in examples.sources[:-1]}
    return make_texts(examples), named


def prompt_of(sources: dict[str, TrainSource], name: str, kind: str) -> str:
    one = sources.get(name)
    said = getattr(one, f"{kind}_prompt") if one else None
    return getattr(PROMPTS, kind) if said is None else said


@settings(deadline=None, max_examples=60)
@given(cases())
def test_every_example_has_its_texts_under_its_sources_prompts(case: tuple[Texts, dict[str, TrainSource]]) -> None:
    texts, sources = case
    plain, found = texts.examples, with_prompts(texts, sources, PROMPTS)
    if not found.has_prompts:
        assert found is texts
        assert all(one.query_prompt is None and one.passage_prompt is None for one in sources.values())
        return
    queries, passages = list(found.queries), list(found.passages)
    assert (len(queries), len(passages)) == (found.num_queries, found.num_passages)
    assert len(set(queries)) == len(queries)
    assert len(set(passages)) == len(passages)
    used_queries, used_passages = set(), set()
    for row in range(len(plain)):
        name = plain.sources[plain.source[row]].name  # type: ignore[index]
        query, passage = (prompt_of(sources, name, kind) for kind in ("query", "passage"))
        assert queries[found.examples.query[row]] == f"{query}问{plain.query[row]}"
        used_queries.add(queries[found.examples.query[row]])
        for kind in ("positives", "negatives"):
            was, now = (getattr(one, kind)[row].tolist() for one in (plain, found.examples))
            assert [passages[one] for one in now] == [f"{passage}文{one}" for one in was]
            used_passages |= {passages[one] for one in now}
    assert (used_queries, used_passages) == (set(queries), set(passages))
    assert found.examples.label is plain.label
    assert found.examples.teacher is plain.teacher


@settings(deadline=None, max_examples=60)
@given(cases())
def test_known_positives_are_all_prompts_of_every_known_text(case: tuple[Texts, dict[str, TrainSource]]) -> None:
    texts, sources = case
    found = with_prompts(texts, sources, PROMPTS)
    if not found.has_prompts:
        return
    queries, passages = list(found.queries), list(found.passages)
    for row, query in enumerate(queries):
        known = {f"文{one}" for one in texts.examples.known_positives[int(query.partition("问")[2])]}
        expected = [passage for passage in passages if passage[passage.index("文") :] in known]
        assert [passages[one] for one in found.examples.known_positives[row]] == expected


def test_a_text_under_another_prompt_is_never_a_negative_of_its_query() -> None:
    examples = several_sources([20, 20], ["retrieval", "retrieval"])
    found = with_prompts(make_texts(examples), {"s1": source(passage="b: ")}, PROMPTS)
    passages = list(found.passages)
    plan = Plan(found.examples, seed=0, batch_size=40, num_negatives=6, weights=(1.0, 1.0), one_source=False)
    batch = plan.batch(0, 0)
    masked = set(zip(batch.masked_query.tolist(), batch.masked_passage.tolist(), strict=True))
    other_prompt = 0
    for i, column in enumerate(batch.positive):
        text = passages[batch.passage[column]]
        for j, row in enumerate(batch.passage):
            if j != column and passages[row].partition("文")[2] == text.partition("文")[2]:
                other_prompt += 1
                assert (i, j) in masked
                assert j not in batch.own[i]
    assert other_prompt > 5


def test_prompted_texts_are_tokenized_with_that_prompt_alone(tmp_path: Path, encoder_folder: Path) -> None:
    encoder = Encoder.load(str(encoder_folder))
    plain = small_texts()
    queries, passages = list(plain.queries), list(plain.passages)
    texts = with_prompts(plain, {"all": source(query="p: ")}, encoder.prompts)
    write_training_data(tmp_path, texts, None, encoder=encoder, query_max_length=24, passage_max_length=24)
    data = TrainingData.open(tmp_path)
    assert [row.tolist() for row in map(data.queries.__getitem__, range(len(queries)))] == encoder.tokenize(
        queries, kind="query", max_length=24, prompt="p: "
    )
    found = [data.passages[row].tolist() for row in range(len(data.passages))]
    used = np.unique(np.concatenate([plain.examples.positives.values, plain.examples.negatives.values]))
    assert found == encoder.tokenize([passages[row] for row in used], kind="passage", max_length=24)


def test_examples_are_read_as_they_were_written(tmp_path: Path, encoder_folder: Path) -> None:
    examples = several_sources([5, 4], ["retrieval", "similarity"])
    encoder = Encoder.load(str(encoder_folder))
    write_training_data(
        tmp_path, make_texts(examples), None, encoder=encoder, query_max_length=24, passage_max_length=24
    )
    found = TrainingData.open(tmp_path).examples
    assert found.sources == examples.sources
    for name in ("query", "source", "label"):
        np.testing.assert_array_equal(getattr(found, name), getattr(examples, name))
        assert isinstance(getattr(found, name), np.memmap)
    for name in ("positives", "negatives"):
        np.testing.assert_array_equal(getattr(found.teacher, name), getattr(examples.teacher, name))
    for name in ("positives", "negatives", "known_positives"):
        was, now = getattr(examples, name), getattr(found, name)
        assert isinstance(now, Ragged)
        assert now.values.dtype == np.uint32
        np.testing.assert_array_equal(now.values, was.values)
        np.testing.assert_array_equal(now.offsets, was.offsets)


def test_the_models_folder_names_the_prompts_of_sources_that_have_some(tmp_path: Path, encoder_folder: Path) -> None:
    encoder = Encoder.load(str(encoder_folder))
    encoder.save(tmp_path)
    save_prompts(tmp_path, {"law": source(query="L: "), "plain": source()}, encoder.prompts)
    prompts = read_json(tmp_path / "config_sentence_transformers.json")["prompts"]
    assert prompts == {"query": "q: ", "document": "p: ", "passage": "p: ", "law-query": "L: ", "law-passage": "p: "}
    assert Encoder.load(str(tmp_path)).prompts == encoder.prompts
