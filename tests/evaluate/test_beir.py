import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peg.errors import InputError
from peg.evaluate.beir import RetrievalSet, digest, read_beir, write_beir

QUERIES = '{"_id": "q1", "text": "画蛇添足"}\n{"_id": "q2", "text": "守株待兔"}\n{"_id": "q3", "text": "没有答案"}\n'
CORPUS = '{"_id": "p1", "title": "蛇", "text": "多此一举"}\n{"_id": "p2", "text": "不劳而获"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq1\tp1\t2\nq1\tp2\t0\nq2\tp2\t1\nq3\tp1\t0\n"


def folder_of(path: Path, *, queries: str = QUERIES, corpus: str = CORPUS, qrels: str = QRELS) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "queries.jsonl").write_text(queries, encoding="utf-8")
    (path / "corpus.jsonl").write_text(corpus, encoding="utf-8")
    (path / "qrels.tsv").write_text(qrels, encoding="utf-8")
    return path


def test_a_set_is_read_with_titles_joined_and_unanswerable_queries_counted(tmp_path: Path) -> None:
    data = read_beir(folder_of(tmp_path / "idioms"))
    assert data == RetrievalSet(
        name="idioms",
        queries={"q1": "画蛇添足", "q2": "守株待兔"},
        corpus={"p1": "蛇 多此一举", "p2": "不劳而获"},
        qrels={"q1": {"p1": 2, "p2": 0}, "q2": {"p2": 1}},
        num_unjudged=1,
    )


@pytest.mark.parametrize("name", ["test.tsv", "dev.tsv", "other.tsv"])
def test_judgements_may_stand_in_a_folder(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "set")
    (folder / "qrels").mkdir()
    (folder / "qrels.tsv").rename(folder / "qrels" / name)
    assert read_beir(folder).qrels["q2"] == {"p2": 1}


def test_of_several_judgement_files_one_must_be_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set")
    (folder / "qrels").mkdir()
    (folder / "qrels.tsv").rename(folder / "qrels" / "a.tsv")
    (folder / "qrels" / "b.tsv").write_text(QRELS, encoding="utf-8")
    with pytest.raises(InputError, match=r"holds a\.tsv, b\.tsv; name the wanted file qrels\.tsv"):
        read_beir(folder)


def test_a_byte_order_mark_and_windows_line_ends_are_no_fault(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a")
    plain = digest(read_beir(folder))
    for name in ("queries.jsonl", "corpus.jsonl", "qrels.tsv"):
        text = (folder / name).read_bytes().replace(b"\n", b"\r\n")
        (folder / name).write_bytes(b"\xef\xbb\xbf" + text + b"\r\n")
    assert digest(read_beir(folder)) == plain


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "queries",
            '{"_id": "q1", "text": "a"}\n{"_id": "q1", "text": "b"}\n',
            r"queries\.jsonl:2: the id 'q1' occurs",
        ),
        ("queries", '{"_id": "q1"\n', r"queries\.jsonl:1: not JSON"),
        ("queries", '["q1"]\n', r"queries\.jsonl:1: found list"),
        ("queries", '\n{"id": "q1", "text": "a"}\n', r"queries\.jsonl:2: has no '_id', only 'id', 'text'"),
        ("queries", '{"_id": 5, "text": "a"}\n', r"queries\.jsonl:1: '_id' is int 5; a string"),
        ("queries", '{"_id": "q1", "text": " "}\n', r"queries\.jsonl:1: the query 'q1' has no text"),
        ("queries", '{"_id": "q\\t1", "text": "a"}\n', r"queries\.jsonl:1: the id 'q\\t1'"),
        ("queries", '{"_id": "q1", "text": "\\ud800"}\n', r"queries\.jsonl:1: 'text' holds half a surrogate"),
        ("corpus", "", r"corpus\.jsonl holds no rows"),
        ("corpus", '{"_id": "p1", "text": "a", "title": 3}\n', r"corpus\.jsonl:1: 'title' is int 3"),
        ("qrels", "q1 p1 1\n", r"qrels\.tsv:1: found 1 columns"),
        ("qrels", "q1\tp1\tyes\n", r"qrels\.tsv:1: the score is 'yes'"),
        ("qrels", "q1\tp1\t-1\n", r"qrels\.tsv:1: the score is '-1'"),
        ("qrels", "q9\tp1\t1\n", r"qrels\.tsv:1: query 'q9' is not in"),
        ("qrels", "q1\tp9\t1\n", r"qrels\.tsv:1: passage 'p9' is not in"),
        ("qrels", "q1\tp1\t1\nq1\tp1\t2\n", r"qrels\.tsv:2: 'q1' and 'p1' have the scores 1 and 2"),
        ("qrels", "q1\tp1\t0\n", r"none of the 3 queries has a relevant passage"),
    ],
)
def test_faults_are_named_by_file_and_line(tmp_path: Path, file: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_beir(folder_of(tmp_path / "set", **{file: text}))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set")
    (folder / "corpus.jsonl").write_bytes(CORPUS.encode() + '{"_id": "p3", "text": "语"}\n'.encode("gbk"))
    with pytest.raises(InputError, match=r"corpus\.jsonl:3: not UTF-8"):
        read_beir(folder)


def test_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        read_beir(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"corpus\.jsonl is not here"):
        read_beir(tmp_path / "empty")


TEXTS = st.text(st.characters(codec="utf-8"), max_size=12).map(str.strip)
KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n"), min_size=1, max_size=6)


@st.composite
def sets(draw: st.DrawFn) -> RetrievalSet:
    corpus = draw(st.dictionaries(KEYS, TEXTS, min_size=1, max_size=5))
    queries = draw(st.dictionaries(KEYS, TEXTS.filter(bool), min_size=1, max_size=4))
    grades = st.dictionaries(st.sampled_from(sorted(corpus)), st.integers(0, 3), min_size=1)
    qrels = {query_id: draw(grades.filter(lambda judged: any(judged.values()))) for query_id in queries}
    return RetrievalSet("drawn", queries, corpus, qrels)


@given(data=sets())
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, data: RetrievalSet) -> None:
    folder = tmp_path_factory.mktemp("round") / "drawn"
    write_beir(folder, data)
    assert read_beir(folder) == data
    again = folder.parent / "again"
    write_beir(again, read_beir(folder))
    assert [(p.name, p.read_bytes()) for p in sorted(folder.iterdir())] == [
        (p.name, p.read_bytes()) for p in sorted(again.iterdir())
    ]


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    data = read_beir(folder_of(tmp_path / "one"))
    lines = {name: text.splitlines() for name, text in (("queries", QUERIES), ("corpus", CORPUS), ("qrels", QRELS))}
    reversed_rows = {name: "\n".join(reversed(rows)) + "\n" for name, rows in lines.items() if name != "qrels"}
    assert digest(read_beir(folder_of(tmp_path / "two", **reversed_rows))) == digest(data)
    for change in (
        {"queries": QUERIES.replace("守株", "待")},
        {"corpus": CORPUS.replace("不劳", "劳")},
        {"qrels": QRELS.replace("p1\t2", "p1\t1")},
    ):
        assert digest(read_beir(folder_of(tmp_path / "three", **change))) != digest(data)


def test_ids_that_would_break_the_table_are_not_written(tmp_path: Path) -> None:
    data = RetrievalSet("bad", {"q\t1": "a"}, {"p": "b"}, {"q\t1": {"p": 1}})
    with pytest.raises(ValueError, match=r"'q\\t1' cannot stand"):
        write_beir(tmp_path / "bad", data)
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == "[]"
