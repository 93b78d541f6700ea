"""Training on own data, without any of the platform: a JSONL of {query, pos, neg} in, a model folder out.

    import peg
    folder = peg.finetune("pairs.jsonl", encoder="intfloat/multilingual-e5-small", output="models/mine", epochs=2)
    vectors = peg.Encoder.load(str(folder)).encode(["..."], kind="query", batch_tokens=8192)

A row is {"query": "...", "pos": ["...", ...], "neg": ["...", ...]}; neg may be absent or empty: then the other
passages of the batch are the only negatives. Further keys, each of which may be absent:
    pos_scores, neg_scores   a teacher's scores, lists parallel to pos and neg, for train.distillation
    task                     "retrieval" (the default); "similarity": one pos, no neg, and a score that says how much
                             alike the two are; "classification": its own neg are the only negatives
    source                   a name, for train.sources and train.one_source_batches
"""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from peg.config import Config, with_train
from peg.data.clean import normalise
from peg.data.readers import read_jsonl
from peg.errors import InputError
from peg.model.card import model_card
from peg.model.encoder import Encoder, Prompts, local_folder
from peg.records import Pair, Reject
from peg.train.batches import Ragged, SourceInfo, Teacher
from peg.train.data import Texts, make_examples
from peg.train.local import launch
from peg.train.loop import METRICS
from peg.train.prompts import save_prompts, with_prompts
from peg.train.run import check_target, publish_model, train_model, write_curves
from peg.workspace import STATE, file_sha256, key_of, make_state_private, path_digest


def finetune(data: str | Path, *, encoder: str, output: str | Path, **train: Any) -> Path:
    """Train `encoder` (folder or hub id) on a JSONL; return the model's folder.

    Any further keyword is a parameter of params.yaml's train section (`peg schema`), over those of the recipe
    `finetune`. A run that was killed goes on where it was when called again with the same arguments.
    Raises InputError for rows, parameters or models that cannot be used.
    """
    from peg.recipes import load_recipe

    config = with_train(load_recipe("finetune"), {**train, "data": str(data), "encoder": encoder})
    return finetune_with(config, output=Path(output))


def finetune_with(config: Config, *, output: Path) -> Path:
    """Train as the recipe says on train.data, in this process; return the model's folder.

    In the model's folder also stand train_curve.csv, dev_curve.csv, weighting.csv and, if rows were dropped,
    rejects.jsonl.
    """
    if config.train.data is None:
        raise InputError("train.data is null; give the path of a JSONL of {query, pos, neg}")
    make_state_private()
    target = output.resolve()
    check_target(target)
    data = Path(config.train.data)
    texts, rejects = _read(data)
    _check_sources(config, texts, data)
    said = config.base
    known = local_folder(config.train.encoder, None)
    encoder = Encoder.load(
        str(known),
        pooling=None if (known / "1_Pooling").is_dir() else said.pooling,
        prompts=None if (known / "config_sentence_transformers.json").is_file() else _prompts(config),
    )
    digests = {"data": file_sha256(data), "encoder": path_digest(known)}
    if config.train.dev:
        digests["dev"] = path_digest(Path(config.train.dev))
    start = STATE / "work" / "finetune" / key_of(digests, config.model_dump(mode="json"))
    encoder.save(start / "start")
    local = with_train(config, {"encoder": str(start / "start"), "launcher": "local"})
    summary = train_model(
        start / "training",
        with_prompts(texts, config.train.sources, encoder.prompts),
        config=local.train,
        seed=config.seed,
        encoder=encoder,
        data_digest=file_sha256(data),
        launch=launch,
    )
    card = model_card(config, encoder, summary, title=target.name, data=data.name)
    save_prompts(start / "training" / "final", config.train.sources, encoder.prompts)
    publish_model(start / "training" / "final", target, card=card)
    write_curves(
        start / "training" / METRICS,
        train_csv=target / "train_curve.csv",
        dev_csv=target / "dev_curve.csv",
        weighting_csv=target / "weighting.csv",
    )
    if rejects:
        lines = [json.dumps(vars(reject), ensure_ascii=False) for reject in rejects]
        (target / "rejects.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.rmtree(start)
    return output


def _read(path: Path) -> tuple[Texts, list[Reject]]:
    """The file's texts, each once, and an example per row; rows that cannot be used apart."""
    queries: dict[str, int] = {}
    passages: dict[str, int] = {}
    sources: dict[SourceInfo, int] = {}
    query, source, label = [], [], []
    rows: dict[str, list[list[int]]] = {"positives": [], "negatives": []}
    scores: dict[str, list[float]] = {"positives": [], "negatives": []}
    rejects: list[Reject] = []
    for row in read_jsonl(path):
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        text = normalise(row.query)
        good, bad = _scored_passages(row)
        if not text or not good:
            reason = "no_positive_beside_the_query" if text else "query_is_empty"
            rejects.append(Reject(source=row.source, row=row.row, reason=reason, query=row.query, passage=""))
            continue
        query.append(queries.setdefault(text, len(queries)))
        source.append(sources.setdefault(SourceInfo(row.source, row.task), len(sources)))
        label.append(np.nan if row.score is None else row.score)
        for name, found in (("positives", good), ("negatives", bad)):
            rows[name].append([passages.setdefault(one, len(passages)) for one in sorted(found)])
            scores[name] += [found[one] for one in sorted(found)]
    if rejects:
        counts = Counter(reject.reason for reject in rejects)
        print(f"{path}: {len(rejects)} rows dropped: {dict(counts)}", file=sys.stderr)
    if len(query) < 2:
        raise InputError(
            f"{path} has {len(query)} usable rows; at least 2 are needed, so that one is the other's negative"
        )
    teacher = Teacher(**{name: np.array(one, dtype=np.float32) for name, one in scores.items()})
    examples = make_examples(
        np.array(query, dtype=np.int64),
        Ragged.of(rows["positives"]),
        Ragged.of(rows["negatives"]),
        num_queries=len(queries),
        sources=tuple(sources),
        source=np.array(source),
        label=np.array(label),
        teacher=None if np.isnan(teacher.positives).all() else teacher,
    )
    return Texts(
        queries=queries,
        num_queries=len(queries),
        passages=passages,
        num_passages=len(passages),
        examples=examples,
    ), rejects


def _scored_passages(row: Pair) -> tuple[dict[str, float], dict[str, float]]:
    """Normalised positives and negatives, each once, none of them the query, with the teacher's score or NaN."""
    good: dict[str, float] = {}
    bad: dict[str, float] = {}
    given = row.teacher or (np.nan,) * (len(row.positives) + len(row.negatives))
    for place, (passage, score) in enumerate(zip((*row.positives, *row.negatives), given, strict=True)):
        text = normalise(passage)
        if text not in ("", normalise(row.query)) and text not in good:
            (good if place < len(row.positives) else bad).setdefault(text, score)
    return good, bad


def _check_sources(config: Config, texts: Texts, data: Path) -> None:
    known = {one.name for one in texts.examples.sources}
    if unknown := sorted(set(config.train.sources) - known):
        raise InputError(f"train.sources names {unknown}, the rows of {data} {sorted(known)}; the names must match")


def _prompts(config: Config) -> Prompts:
    return Prompts(query=config.base.query_prompt, passage=config.base.passage_prompt)
