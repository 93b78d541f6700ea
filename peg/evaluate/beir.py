"""Retrieval test sets in BEIR's folder layout.

    corpus.jsonl    {"_id": "...", "title": "...", "text": "..."}   title may be absent or empty
    queries.jsonl   {"_id": "...", "text": "..."}
    qrels.tsv       query-id <tab> corpus-id <tab> score, with that header; score is a grade from 0

Judgements may also stand in qrels/test.tsv, qrels/dev.tsv, or the only .tsv file of qrels/, in this order.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peg.errors import InputError

_HEADER = ["query-id", "corpus-id", "score"]


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, the passages to find them in, and which passages are relevant to which query.

    queries: query id -> text, each with at least one relevant passage; corpus: passage id -> text.
    qrels: query id -> {passage id: grade}; a grade of 1 or more is relevant, unlisted passages count as 0.
    num_unjudged: queries of the source that no passage is relevant to; they are in none of the three.
    """

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]
    num_unjudged: int = 0


def read_beir(folder: Path) -> RetrievalSet:
    """Read a test set; it is named after its folder, and keeps the files' order.

    A passage's text is its title, a blank, and its text. Queries that no passage is relevant to cannot be measured:
    they are left out, and counted in `num_unjudged`. Raises InputError with the file and the line.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one with corpus.jsonl, queries.jsonl and qrels.tsv")
    corpus = _read_texts(folder / "corpus.jsonl", with_title=True)
    queries = _read_texts(folder / "queries.jsonl", with_title=False)
    qrels = _read_qrels(_qrels_file(folder), queries=queries, corpus=corpus)
    judged = {query_id: text for query_id, text in queries.items() if any(qrels.get(query_id, {}).values())}
    if not judged:
        raise InputError(
            f"{folder}: none of the {len(queries)} queries has a relevant passage; qrels needs scores >= 1"
        )
    return RetrievalSet(
        name=folder.resolve().name,
        queries=judged,
        corpus=corpus,
        qrels={query_id: qrels[query_id] for query_id in judged},
        num_unjudged=len(queries) - len(judged),
    )


def write_beir(folder: Path, data: RetrievalSet) -> None:
    """Write a test set that `read_beir` reads back as it was (its name apart), in the order of its dictionaries."""
    for identifier in (*data.queries, *data.corpus):
        if not identifier or set(identifier) & set("\t\r\n"):
            raise ValueError(
                f"the id {identifier!r} cannot stand in a .tsv file; it needs characters, tabs and breaks not"
            )
    folder.mkdir(parents=True, exist_ok=True)
    passages = ({"_id": key, "title": "", "text": text} for key, text in data.corpus.items())
    _write_jsonl(folder / "corpus.jsonl", passages)
    _write_jsonl(folder / "queries.jsonl", ({"_id": key, "text": text} for key, text in data.queries.items()))
    with (folder / "qrels.tsv").open("w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(_HEADER) + "\n")
        for query_id, judged in data.qrels.items():
            file.writelines(f"{query_id}\t{passage_id}\t{grade}\n" for passage_id, grade in judged.items())


def digest(data: RetrievalSet) -> str:
    """Hex sha256 of queries, passages and judgements, whatever their order, file layout or the set's name."""
    lines = [["query", key, text] for key, text in sorted(data.queries.items())]
    lines += [["passage", key, text] for key, text in sorted(data.corpus.items())]
    state = hashlib.sha256()
    for line in lines:
        state.update((json.dumps(line, ensure_ascii=False) + "\n").encode())
    for query_id, judged in sorted(data.qrels.items()):
        for passage_id, grade in sorted(judged.items()):
            state.update((json.dumps(["judgement", query_id, passage_id, grade], ensure_ascii=False) + "\n").encode())
    return state.hexdigest()


def _write_jsonl(path: Path, rows: Iterator[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ("file:line", text) of the lines that are not blank."""
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise InputError(f"{path} is not here; a test set needs corpus.jsonl, queries.jsonl and qrels.tsv") from error
    with file:
        for number, raw in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(f"{place}: not UTF-8 (byte {error.start} of the line); convert the file") from error
            if text.strip():
                yield place, text


def _read_texts(path: Path, *, with_title: bool) -> dict[str, str]:
    texts: dict[str, str] = {}
    for place, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{place}: not JSON ({error.msg} at character {error.colno}); one object a line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f'{place}: found {type(row).__name__}; an object like {{"_id": "1", "text": "..."}} is needed'
            )
        identifier, text = _field(row, "_id", place), _field(row, "text", place)
        if not identifier or set(identifier) & set("\t\r\n"):
            raise InputError(f"{place}: the id {identifier!r} is empty or holds a tab or a line break; choose another")
        if identifier in texts:
            raise InputError(f"{place}: the id {identifier!r} occurs twice; ids must differ within the file")
        if with_title and row.get("title") is not None:
            text = f"{_field(row, 'title', place)} {text}"
        text = text.strip()
        if not text and not with_title:
            raise InputError(f"{place}: the query {identifier!r} has no text; remove it, or give it some")
        texts[identifier] = text
    if not texts:
        raise InputError(f"{path} holds no rows; at least one is needed")
    return texts


def _field(row: dict[str, object], key: str, place: str) -> str:
    if key not in row:
        raise InputError(f"{place}: has no {key!r}, only {', '.join(map(repr, row)) or 'nothing'}; add it")
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{place}: {key!r} is {type(value).__name__} {value!r:.60}; a string is needed")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: {key!r} holds half a surrogate pair at character {error.start}; mend it") from error
    return value


def _qrels_file(folder: Path) -> Path:
    wanted = [folder / "qrels.tsv", folder / "qrels" / "test.tsv", folder / "qrels" / "dev.tsv"]
    for path in wanted:
        if path.is_file():
            return path
    others = sorted((folder / "qrels").glob("*.tsv"))
    if len(others) == 1:
        return others[0]
    found = f"qrels/ holds {', '.join(path.name for path in others)}" if others else "no judgements are here"
    raise InputError(f"{folder}: {found}; name the wanted file qrels.tsv")


def _read_qrels(path: Path, *, queries: dict[str, str], corpus: dict[str, str]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for number, (place, line) in enumerate(_lines(path)):
        fields = line.split("\t")
        if number == 0 and fields == _HEADER:
            continue
        if len(fields) != 3:
            raise InputError(
                f"{place}: found {len(fields)} columns, not query-id, corpus-id and score with tabs between"
            )
        query_id, passage_id, grade = fields
        if not (grade.isascii() and grade.isdigit()):
            raise InputError(f"{place}: the score is {grade!r}; a whole number from 0 is needed (0: not relevant)")
        if query_id not in queries:
            raise InputError(f"{place}: query {query_id!r} is not in queries.jsonl; add it there, or remove this line")
        if passage_id not in corpus:
            raise InputError(
                f"{place}: passage {passage_id!r} is not in corpus.jsonl; add it there, or remove this line"
            )
        judged = qrels.setdefault(query_id, {})
        if judged.setdefault(passage_id, int(grade)) != int(grade):
            raise InputError(
                f"{place}: {query_id!r} and {passage_id!r} have the scores {judged[passage_id]} and {grade}"
            )
    return qrels
