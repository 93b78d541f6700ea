"""Text in one form, and the reasons for dropping pairs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peg.config import Clean
from peg.data.clean import chinese_share, clean_pair, normalise, reject_reason
from peg.records import Pair

RULES = Clean(min_query_chars=4, max_query_chars=20, min_passage_chars=4, max_passage_chars=30, min_chinese_share=0.5)


def make_pair(query: str, positives: list[str], negatives: list[str] | None = None) -> Pair:
    return Pair(query, tuple(positives), tuple(negatives or []), source="s", domain="d", task="retrieval", row=7)


@settings(deadline=None)
@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


@settings(deadline=None)
@given(st.text(alphabet="ａＺ９０é́e \u3000\n\u200b\ufeff（，中²①\u0301가ᄀ"))
def test_normalising_twice_is_normalising_once_on_hard_characters(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  天地\u3000玄黄\n\t宇宙 ", "天地 玄黄 宇宙"),
        ("ＧＤＰ增长４．５％", "GDP增长4．5％"),
        ("中\u200b文\ufeff", "中文"),
        ("e\u0301", "é"),
        ("Ａ\u0300", "À"),
        ("甲，乙。10² ①", "甲，乙。10² ①"),
        ("\u2002", ""),
    ],
)
def test_one_form(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("query", "passage", "reason"),
    [
        ("天地玄黄", "宇宙洪荒日月", None),
        ("天地玄", "宇宙洪荒日月", "query_too_short"),
        ("", "宇宙洪荒日月", "query_empty"),
        ("天" * 21, "宇宙洪荒日月", "query_too_long"),
        ("天" * 20, "宇宙洪荒日月", None),
        ("天地\x00玄黄", "宇宙洪荒日月", "query_control_characters"),
        ("天地玄黄", "宇宙洪荒\ufffd", "passage_control_characters"),
        ("天地玄黄", "宇宙洪", "passage_too_short"),
        ("天地玄黄", "", "passage_empty"),
        ("天地玄黄", "天地玄黄", "passage_is_the_query"),
        ("天地玄黄", "the sky and the earth", "too_little_chinese"),
        ("天地玄黄", "sky 地玄", None),
    ],
)
def test_reasons(query: str, passage: str, reason: str | None) -> None:
    assert reject_reason(query, passage, RULES) == reason


def test_chinese_share_counts_letters_and_ideographs_alone() -> None:
    assert chinese_share("天地ab", "12，。") == 0.5
    assert chinese_share("123", "……") == 0.0


def test_long_passages_are_cut_and_short_queries_drop_the_pair() -> None:
    pair, rejects = clean_pair(make_pair("天地玄黄？", ["宇" * 40]), RULES)
    assert pair is not None
    assert (pair.positives, rejects) == (("宇" * 30,), [])
    pair, rejects = clean_pair(make_pair("天", ["宇宙洪荒"]), RULES)
    assert pair is None
    assert [(one.reason, one.row, one.query) for one in rejects] == [("query_too_short", 7, "天")]


def test_a_bad_passage_is_dropped_alone() -> None:
    pair, rejects = clean_pair(
        make_pair("天地玄黄？", ["宇宙洪荒", "短", "宇宙洪荒 "], ["宇宙洪荒", "寒来暑往", "寒来暑往", "x"]), RULES
    )
    assert pair is not None
    assert (pair.positives, pair.negatives) == (("宇宙洪荒",), ("寒来暑往",))
    assert [one.reason for one in rejects] == [
        "passage_too_short",
        "passage_twice",
        "negative_is_a_positive",
        "passage_twice",
        "negative_passage_too_short",
    ]


def test_a_pair_without_a_good_positive_is_dropped() -> None:
    assert clean_pair(make_pair("天地玄黄？", ["短"], ["寒来暑往"]), RULES)[0] is None


def test_scores_stay_with_their_passages() -> None:
    pair = Pair(
        "天地玄黄",
        ("短", "宇宙洪荒", " 宇宙洪荒", "日月盈昃"),
        ("寒来暑往", "宇宙洪荒", "天地玄黄", "秋收冬藏"),
        source="s",
        domain="d",
        task="retrieval",
        row=7,
        teacher=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0),
    )
    found, _ = clean_pair(pair, RULES)
    assert found
    assert found.positives == ("宇宙洪荒", "日月盈昃")
    assert found.negatives == ("寒来暑往", "秋收冬藏")
    assert found.teacher == (2.0, 4.0, 5.0, 8.0)
