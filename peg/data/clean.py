"""Text in one form, and the reasons for which pairs are dropped."""

import re
import sys
import unicodedata
from functools import cache

from peg.config import Clean
from peg.records import Pair, Reject

_FULLWIDTH = {ord(wide): chr(ord(wide) - 0xFEE0) for first, last in ("０９", "ＡＺ", "ａｚ")
              for wide in map(chr, range(ord(first), ord(last) + 1))}  # fmt: skip
_IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")

_LETTER = re.compile(r"[^\W\d_]")  # ideographs included, and a few numeric signs


def normalise(text: str) -> str:
    """Text in the form that is stored, hashed and shown.

    NFC; fullwidth letters and digits as ASCII; no invisible format characters (zero-width spaces, marks of byte
    order and direction); every run of white space, line breaks included, as one blank; none at the ends.
    Not NFKC: it would turn Chinese punctuation into ASCII's, 10² into 102 and ① into 1, in what people read. The
    encoder's tokenizer does that for itself. Doing it twice changes nothing.
    """
    text = unicodedata.normalize("NFC", _invisible().sub("", text).translate(_FULLWIDTH))
    return " ".join(text.split())


@cache
def _invisible() -> re.Pattern[str]:
    """All characters of category Cf."""
    return _category_pattern("Cf")


@cache
def _control() -> re.Pattern[str]:
    """Control characters, surrogates, and the mark of bytes that were no text."""
    return _category_pattern("Cc", "Cs", extra="\ufffd")


def _category_pattern(*categories: str, extra: str = "") -> re.Pattern[str]:
    wanted = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in categories]
    return re.compile("[" + "".join(re.escape(chr(code)) for code in wanted) + extra + "]")


def chinese_share(*texts: str) -> float:
    """Ideographs among all letters and ideographs of the texts; 0 where there are none."""
    num_chinese = sum(len(_IDEOGRAPH.findall(text)) for text in texts)
    num_letters = sum(len(_LETTER.findall(text)) for text in texts)
    return num_chinese / num_letters if num_letters else 0.0


def query_reason(query: str, rules: Clean) -> str | None:
    """Why a normalised query is dropped with all its passages, or None."""
    if not query:
        return "query_empty"
    if _control().search(query):
        return "query_control_characters"
    if len(query) < rules.min_query_chars:
        return "query_too_short"
    if len(query) > rules.max_query_chars:
        return "query_too_long"
    return None


def passage_reason(passage: str, rules: Clean) -> str | None:
    """Why a normalised passage is dropped, whatever its query, or None."""
    if not passage:
        return "passage_empty"
    if _control().search(passage):
        return "passage_control_characters"
    if len(passage) < rules.min_passage_chars:
        return "passage_too_short"
    return None


def reject_reason(query: str, passage: str, rules: Clean) -> str | None:
    """Why a normalised query and passage are no pair to train on, or None."""
    if reason := query_reason(query, rules) or passage_reason(passage, rules):
        return reason
    if query == passage:
        return "passage_is_the_query"
    if chinese_share(query, passage) < rules.min_chinese_share:
        return "too_little_chinese"
    return None


def clean_pair(pair: Pair, rules: Clean) -> tuple[Pair | None, list[Reject]]:
    """Normalise a pair, cut long passages and drop those that fail; None if no positive is left.

    A passage given twice is kept once, with its first score; one given as positive and as negative is a positive.
    """
    query = normalise(pair.query)
    rejects: list[Reject] = []

    def drop(reason: str, passage: str) -> None:
        rejects.append(Reject(source=pair.source, row=pair.row, reason=reason, query=query, passage=passage))

    if reason := query_reason(query, rules):
        drop(reason, pair.positives[0] if pair.positives else "")
        return None, rejects
    kept: dict[str, bool] = {}
    scores: dict[str, float] = {}
    for place, text in enumerate((*pair.positives, *pair.negatives)):
        is_positive = place < len(pair.positives)
        passage = normalise(text)[: rules.max_passage_chars].rstrip()
        if reason := reject_reason(query, passage, rules):
            drop(reason if is_positive else f"negative_{reason}", passage)
        elif passage in kept:
            drop("passage_twice" if kept[passage] == is_positive else "negative_is_a_positive", passage)
        else:
            kept[passage] = is_positive
            if pair.teacher:
                scores[passage] = pair.teacher[place]
    positives = tuple(passage for passage, is_positive in kept.items() if is_positive)
    negatives = tuple(passage for passage, is_positive in kept.items() if not is_positive)
    if not positives:
        return None, rejects
    teacher = tuple(scores[passage] for passage in (*positives, *negatives)) if pair.teacher else None
    return pair.with_texts(query, positives, negatives, teacher=teacher), rejects
