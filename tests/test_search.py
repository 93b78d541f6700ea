import numpy as np
import pytest
from rich.console import Console

from peg.errors import InputError
from peg.evaluate.beir import RetrievalSet, write_beir
from peg.model.encoder import Encoder
from peg.search import Hit, render, search
from tests.conftest import make_encoder, make_texts

TEXTS = make_texts(20, seed=5)
QUERY = "天地玄黄"


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", list(range(len(TEXTS))))


def write_corpus(folder, order):
    data = RetrievalSet("small", {"q": QUERY}, {f"p{row:02}": TEXTS[row] for row in order}, {"q": {"p00": 1}})
    write_beir(folder, data)
    return folder


def naive(encoder_folder, k):
    encoder = Encoder.load(str(encoder_folder))
    query = encoder.encode([QUERY], kind="query", batch_tokens=64)[0]
    rows = [
        (float(encoder.encode([text], kind="passage", batch_tokens=64)[0] @ query), i) for i, text in enumerate(TEXTS)
    ]
    return [f"p{i:02}" for _, i in sorted(rows, key=lambda row: -row[0])[:k]]


def test_search_finds_what_a_loop_over_all_passages_finds(encoder_folder, corpus, tmp_path):
    hits = search(encoder_folder, corpus, QUERY, 7, index=tmp_path / "index")
    assert [hit.passage_id for hit in hits] == naive(encoder_folder, 7)
    assert [hit.rank for hit in hits] == list(range(1, 8))
    assert all(hit.text == TEXTS[int(hit.passage_id[1:])] for hit in hits)


def test_more_passages_than_there_are_gives_them_all(encoder_folder, corpus, tmp_path):
    assert len(search(encoder_folder, corpus, QUERY, 99, index=tmp_path / "index")) == len(TEXTS)


def test_the_second_search_does_not_encode_the_corpus(encoder_folder, corpus, tmp_path, monkeypatch):
    first = search(encoder_folder, corpus, QUERY, 5, index=tmp_path / "index")
    encode = Encoder.encode

    def only_queries(self, texts, *, kind, **knobs):
        assert kind == "query"
        return encode(self, texts, kind=kind, **knobs)

    monkeypatch.setattr(Encoder, "encode", only_queries)
    assert search(encoder_folder, corpus, QUERY, 5, index=tmp_path / "index") == first
    assert len(list((tmp_path / "index").iterdir())) == 1


def test_the_corpus_in_another_order_gives_the_same_hits_from_the_same_file(encoder_folder, corpus, tmp_path):
    first = search(encoder_folder, corpus, QUERY, 5, index=tmp_path / "index")
    turned = write_corpus(tmp_path / "turned", list(reversed(range(len(TEXTS)))))
    assert search(encoder_folder, turned, QUERY, 5, index=tmp_path / "index") == first
    assert len(list((tmp_path / "index").iterdir())) == 1


def test_another_model_has_an_index_of_its_own(encoder_folder, corpus, tmp_path):
    search(encoder_folder, corpus, QUERY, 5, index=tmp_path / "index")
    make_encoder(seed=9).save(tmp_path / "other")
    search(tmp_path / "other", corpus, QUERY, 5, index=tmp_path / "index")
    kept = sorted((tmp_path / "index").iterdir())
    assert len(kept) == 2
    assert not np.array_equal(*[np.load(path) for path in kept])


@pytest.mark.parametrize(("query", "k"), [("", 5), ("  ", 5), ("天", 0)])
def test_what_cannot_be_searched_is_one_line(encoder_folder, corpus, query, k):
    with pytest.raises(InputError):
        search(encoder_folder, corpus, query, k)


def test_the_table_shows_a_passage_s_brackets_as_they_are():
    console = Console(width=80, record=True, file=None, force_terminal=False)
    with console.capture() as shown:
        console.print(render([Hit(1, 0.5, "p1", "[bold]不是标记[/bold]"), Hit(2, -0.25, "p2", "乙")]))
    lines = shown.get().splitlines()
    assert "[bold]不是标记[/bold]" in lines[1]
    assert "0.500" in lines[1]
    assert "-0.250" in lines[2]
