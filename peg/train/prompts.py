"""Prompts by source: a text that is used under two prompts becomes two rows of what is trained on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from peg.config import TrainSource
from peg.data.store import narrow
from peg.model.encoder import Prompts
from peg.train.batches import Ragged
from peg.train.data import Texts
from peg.workspace import read_json, write_json

_SAVED = "config_sentence_transformers.json"


def with_prompts(texts: Texts, sources: Mapping[str, TrainSource], prompts: Prompts) -> Texts:
    """Texts under their sources' prompts; as they are where no source has prompts of its own.

    Rows stand by text, then by prompt. Known positives of a query are all its positives' texts under every prompt in
    use, and every prompt's row of the query has them. prompts: the encoder's, of sources without their own.
    """
    examples = texts.examples
    own = [sources.get(info.name) for info in examples.sources]
    if not any(one and _has_prompts(one) for one in own):
        return texts
    source = np.zeros(len(examples), dtype=np.uint8) if examples.source is None else examples.source
    query_prompts = [prompts.query if one is None or one.query_prompt is None else one.query_prompt for one in own]
    passage_prompts = [
        prompts.passage if one is None or one.passage_prompt is None else one.passage_prompt for one in own
    ]
    query, query_rows = _Variants.of([(examples.query, source)], query_prompts, num_texts=texts.num_queries)
    lists = (examples.positives, examples.negatives)
    used = [(one.values, np.repeat(source, np.diff(one.offsets))) for one in lists]
    passage, passage_rows = _Variants.of(used, passage_prompts, num_texts=texts.num_passages)
    positives, negatives = (Ragged(rows, one.offsets) for rows, one in zip(passage_rows, lists, strict=True))
    known = _every_variant(examples.known_positives, query.offsets, passage.offsets)
    return Texts(
        queries=query.texts(texts.queries),
        num_queries=query.num_rows,
        passages=passage.texts(texts.passages),
        num_passages=passage.num_rows,
        examples=replace(
            examples, query=query_rows[0], positives=positives, negatives=negatives, known_positives=known
        ),
        has_prompts=True,
    )


def save_prompts(folder: Path, sources: Mapping[str, TrainSource], prompts: Prompts) -> None:
    """Name the sources' prompts in a model folder: "<source>-query" and "<source>-passage", for its `encode`."""
    saved = read_json(folder / _SAVED)
    for name, one in sources.items():
        if _has_prompts(one):
            saved["prompts"][f"{name}-query"] = prompts.query if one.query_prompt is None else one.query_prompt
            saved["prompts"][f"{name}-passage"] = prompts.passage if one.passage_prompt is None else one.passage_prompt
    write_json(folder / _SAVED, saved)


def _has_prompts(source: TrainSource) -> bool:
    return source.query_prompt is not None or source.passage_prompt is not None


@dataclass(frozen=True)
class _Variants:
    """Texts under prompts. used: (P, T) bool, whether a text stands under a prompt. offsets: (T + 1,) its rows."""

    prompts: tuple[str, ...]
    used: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(
        cls, uses: Sequence[tuple[np.ndarray, np.ndarray]], prompts: Sequence[str], *, num_texts: int
    ) -> tuple["_Variants", list[np.ndarray]]:
        """From uses of texts (text rows, sources), each source's prompt being known; and the new row of each use."""
        distinct = tuple(dict.fromkeys(prompts))
        number = np.array([distinct.index(one) for one in prompts], dtype=np.uint8)
        used = np.zeros((len(distinct), num_texts), dtype=bool)
        for rows, source in uses:
            used[number[source], rows] = True
        before = np.cumsum(used, axis=0, dtype=np.uint8) - used
        offsets = np.concatenate([[0], np.cumsum(used.sum(0))])
        return cls(distinct, used, offsets), [
            narrow(offsets[rows] + before[number[source], rows]) for rows, source in uses
        ]

    @property
    def num_rows(self) -> int:
        return int(self.offsets[-1])

    def texts(self, plain: Iterable[str]) -> Iterator[str]:
        """Every row's text with its prompt before it; a text that nothing uses has no row."""
        for row, text in enumerate(plain):
            for prompt, is_used in zip(self.prompts, self.used[:, row], strict=True):
                if is_used:
                    yield prompt + text


def _every_variant(known: Ragged, query_offsets: np.ndarray, passage_offsets: np.ndarray) -> Ragged:
    query = np.repeat(np.arange(len(known)), np.diff(query_offsets))
    values, owner = known.take(query)
    rows = Ragged(np.arange(passage_offsets[-1]), passage_offsets)
    variants, which = rows.take(values)
    lengths = np.bincount(owner[which], minlength=len(query))
    return Ragged(narrow(variants), np.concatenate([[0], np.cumsum(lengths)]))
