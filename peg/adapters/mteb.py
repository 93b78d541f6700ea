"""A BEIR folder as an mteb retrieval task, and our systems as mteb models, for mteb's own retrieval evaluation.

Texts are encoded once: the embeddings that mteb asked for are kept, as are the rankings that it scored. Nothing here
reaches a network. mteb's cache is written, and never read: it holds means alone.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import mteb
import numpy as np
import torch
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.models import ModelMeta, SearchEncoderWrapper
from mteb.types import PromptType
from numpy.typing import NDArray

from peg.errors import StageError
from peg.evaluate import metrics
from peg.evaluate.beir import RetrievalSet, digest
from peg.evaluate.suite import Searched, TextEncoder
from peg.mining.bm25 import BM25Index
from peg.progress import Progress

_SPLIT = "test"
_LOADER_BATCH = 1024  # texts that mteb hands over at once; our encoder cuts its own batches from all of them
_TOLERANCE = 1.1e-5  # mteb rounds its means to five places


def measure(
    encoder: TextEncoder | None,
    data: RetrievalSet,
    *,
    system: str,
    revision: str,
    batch_tokens: int,
    cache: Path | None,
) -> Searched:
    """Search and score a set with mteb; the encoder is BM25 where it is None.

    cache: where mteb writes its own result file, or None for nowhere. Raises StageError if the means of our values
    per query are not mteb's.
    """
    task = FolderRetrieval(data)
    task.load_data()  # what mteb loads itself it unloads again, and drops an instance's own metadata with it
    meta = model_meta(system, revision=revision, dense=encoder is not None)
    encoding = None if encoder is None else EncoderModel(encoder, data, meta=meta, batch_tokens=batch_tokens)
    model: Any = BM25Model(meta) if encoding is None else SearchEncoderWrapper(encoding)
    with _quiet():
        result = mteb.evaluate(
            model,
            task,
            co2_tracker=False,
            encode_kwargs={"batch_size": _LOADER_BATCH, "show_progress_bar": False},
            cache=None if cache is None else ResultCache(cache_path=cache.resolve()),
            overwrite_strategy="always",
            show_progress_bar=False,
        )
    scores = result.task_results[0].scores[_SPLIT][0]
    _check_means(metrics.means(metrics.per_query(task.rankings, data.qrels)), scores)
    return Searched(
        rankings=task.rankings,
        query_QD=encoding.rows(PromptType.query) if encoding else None,
        passage_PD=encoding.rows(PromptType.document) if encoding else None,
    )


class FolderRetrieval(AbsTaskRetrieval):
    """A test set as a task of mteb; after an evaluation `rankings` holds what was scored."""

    def __init__(self, data: RetrievalSet) -> None:
        # mteb's result files are named after the task: the digest keeps two sets of one name apart.
        name = f"{re.sub(r'[^A-Za-z0-9]+', '-', data.name).strip('-') or 'set'}-{digest(data)[:12]}"
        self.metadata = TaskMetadata(
            name=name,
            description=f"{len(data.queries)} queries over {len(data.corpus)} passages",
            dataset={"path": name, "revision": digest(data)},
            type="Retrieval",
            category="t2t",
            eval_splits=[_SPLIT],
            eval_langs=["cmn-Hans"],
            main_score="ndcg_at_10",
        )
        super().__init__()
        self._data = data
        self.rankings: dict[str, dict[str, float]] = {}

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:  # noqa: ARG002  (mteb's signature)
        """Fill the task from memory."""
        split = RetrievalSplitData(
            corpus=_table(self._data.corpus),
            queries=_table(self._data.queries),
            relevant_docs={key: dict(judged) for key, judged in self._data.qrels.items()},
            top_ranked=None,
        )
        self.dataset = {"default": {_SPLIT: split}}
        self.data_loaded = True

    def task_specific_scores(  # the signature is mteb's
        self,
        scores: Any,  # noqa: ARG002
        qrels: Any,  # noqa: ARG002
        results: dict[str, dict[str, float]],
        hf_split: str,  # noqa: ARG002
        hf_subset: str,  # noqa: ARG002
    ) -> dict[str, float]:
        """Keep the rankings that mteb has just scored; there are no scores to add."""
        self.rankings = {key: dict(ranking) for key, ranking in results.items()}
        return {}


class EncoderModel:
    """Our encoder as mteb sees an encoder: the kind of text, told by PromptType, chooses the model's own prompt."""

    def __init__(self, encoder: TextEncoder, data: RetrievalSet, *, meta: ModelMeta, batch_tokens: int) -> None:
        self.mteb_model_meta = meta
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        self._totals = {PromptType.query: len(data.queries), PromptType.document: len(data.corpus)}
        self._blocks: dict[PromptType, list[NDArray[np.float32]]] = {kind: [] for kind in self._totals}

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **_: Any) -> NDArray[np.float32]:
        """Embed the texts of mteb's loader, in its order: (N, D) unit rows."""
        if prompt_type is None:
            raise ValueError("mteb did not say whether these are queries or documents; retrieval needs it")
        texts = [text for batch in inputs for text in batch["text"]]
        kind, done = self._blocks[prompt_type], sum(map(len, self._blocks[prompt_type]))
        what = "query" if prompt_type == PromptType.query else "passage"
        with Progress(
            f"encode {'queries' if what == 'query' else 'passages'} with {self.mteb_model_meta.name}",
            total=self._totals[prompt_type],
            unit="texts",
            start=done,
        ) as progress:
            kind.append(
                self._encoder.encode(
                    texts,
                    kind="query" if what == "query" else "passage",
                    batch_tokens=self._batch_tokens,
                    progress=progress,
                )
            )
        return kind[-1]

    def rows(self, prompt_type: PromptType) -> NDArray[np.float32]:
        """All embeddings of a kind that were made so far, in order."""
        return np.concatenate(self._blocks[prompt_type])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines of unit rows: (N, D) and (M, D) to (N, M)."""
        return torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines of unit rows side by side: (N, D) twice to (N,)."""
        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(-1)


class BM25Model:
    """Our BM25 as mteb sees a search model. Passages that share no word with the query are not found."""

    def __init__(self, meta: ModelMeta) -> None:
        self.mteb_model_meta = meta
        self._ids: list[str] = []
        self._index: BM25Index | None = None

    def index(self, corpus: Any, **_: Any) -> None:
        """Build the index over a table of id and text."""
        self._ids = list(corpus["id"])
        self._index = BM25Index.build(list(corpus["text"]))

    def search(self, queries: Any, *, top_k: int, **_: Any) -> dict[str, dict[str, float]]:
        """Return {query id: {passage id: score}}, scores as float32 above 0."""
        if self._index is None:
            raise ValueError("search before index; mteb calls index first")
        scores_QK, rows_QK = self._index.search(list(queries["text"]), min(top_k, len(self._ids)))
        return {
            query_id: {
                self._ids[row]: float(np.float32(score))
                for score, row in zip(scores_K, rows_K, strict=True)
                if score > 0 and row >= 0
            }
            for query_id, scores_K, rows_K in zip(queries["id"], scores_QK, rows_QK, strict=True)
        }


def model_meta(system: str, *, revision: str, dense: bool) -> ModelMeta:
    """Name a system to mteb; the weights' hash as revision gives every model a place of its own in mteb's cache."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", system).strip("-.") or "model"
    return ModelMeta(
        name=f"peg/{name}",
        revision=revision,
        loader=None,
        release_date=None,
        languages=["cmn-Hans"],
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=None,
        embed_dim=None,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=[],
        similarity_fn_name="cosine" if dense else None,
        use_instructions=dense,
        training_datasets=None,
        model_type=["dense" if dense else "sparse"],
    )


def _table(texts: dict[str, str]) -> Dataset:
    return Dataset.from_dict({"id": list(texts), "text": list(texts.values())})


def _check_means(ours: Mapping[str, float], theirs: Mapping[str, Any]) -> None:
    faults = [f"{name} {ours[name]:.6f} and {theirs[name]:.6f}" for name in ours if _apart(ours[name], theirs[name])]
    if faults:
        raise StageError(f"our means and mteb's differ ({', '.join(faults)}); results that disagree are not written")


def _apart(ours: float, theirs: float) -> bool:
    return not abs(ours - theirs) <= _TOLERANCE


@contextmanager
def _quiet(names: Sequence[str] = ("mteb", "datasets")) -> Iterator[None]:
    """No bars, and nothing below an error, from libraries whose progress we print ourselves."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
