"""Exact and near duplicates, against the definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peg.data.dedup
from peg.data.dedup import TextIndex, near_duplicates, text_id
from peg.errors import InputError

TEXTS = st.lists(st.text(alphabet="天地玄黄𠀀a", min_size=1, max_size=8), max_size=30)


def naive_bigrams(text: str) -> set[str]:
    return {text[i : i + 2] for i in range(len(text) - 1)} or {text}


def naive_near_duplicates(anchors: list[str], texts: list[str], threshold: float) -> list[tuple[int, int]]:
    found = []
    for row, text in enumerate(texts):
        for anchor_row, anchor in enumerate(anchors):
            left, right = naive_bigrams(text), naive_bigrams(anchor)
            if len(left & right) >= threshold * len(left | right) - 1e-9:
                found.append((row, anchor_row))
    return found


@settings(deadline=None)
@given(anchors=TEXTS, texts=TEXTS, threshold=st.sampled_from([0.1, 1 / 3, 0.5, 0.6, 1.0]))
def test_blocks_equal_the_definition(anchors: list[str], texts: list[str], threshold: float) -> None:
    found = near_duplicates(anchors, iter(texts), threshold=threshold)
    assert list(zip(found.rows.tolist(), found.anchors.tolist(), strict=True)) == naive_near_duplicates(
        anchors, texts, threshold
    )


def test_rows_count_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["天地玄黄", "宇宙洪荒", "天地玄黄", "日月盈昃", "天地玄黄啊"]
    whole = near_duplicates(["天地玄黄"], texts, threshold=0.5)
    monkeypatch.setattr(peg.data.dedup, "_BLOCK_TEXTS", 2)
    blocks = near_duplicates(["天地玄黄"], texts, threshold=0.5)
    assert whole.rows.tolist() == blocks.rows.tolist() == [0, 2, 4]
    assert np.allclose(blocks.similarity, [1, 1, 0.75])


def test_a_threshold_at_which_all_is_near_is_refused() -> None:
    with pytest.raises(InputError, match="near_duplicate is 0"):
        near_duplicates(["天地"], ["玄黄"], threshold=0.0)


@settings(deadline=None)
@given(TEXTS)
def test_each_distinct_text_gets_one_row(texts: list[str]) -> None:
    index = TextIndex()
    numbered = [index.row(text) for text in texts]
    first = list(dict.fromkeys(texts))
    assert [row for row, _ in numbered] == [first.index(text) for text in texts]
    assert [text for text, (_, is_new) in zip(texts, numbered, strict=True) if is_new] == first
    assert len(index) == len(first)
    again = [index.row(text) for text in first]
    assert again == [(row, False) for row in range(len(first))]


def test_a_texts_id_is_half_of_its_sha256() -> None:
    assert text_id("") == "e3b0c44298fc1c149afbf4c8996fb924"
    assert text_id("天") != text_id("地")
