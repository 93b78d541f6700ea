"""A small training: random texts, a tiny encoder, every part real."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from peg.config import Train
from peg.evaluate.beir import RetrievalSet, write_beir
from peg.model.encoder import Encoder
from peg.train.batches import Examples, Ragged, SourceInfo, Teacher
from peg.train.data import Texts, known_positives, write_training_data
from peg.train.loop import write_task
from tests.conftest import make_texts

NUM_QUERIES, NUM_PASSAGES = 22, 40


def small_examples() -> Examples:
    generator = np.random.default_rng(0)
    query = np.arange(NUM_QUERIES)
    positives = Ragged.of([generator.choice(NUM_PASSAGES, generator.integers(1, 3), replace=False) for _ in query])
    negatives = Ragged.of(
        [
            np.setdiff1d(generator.choice(NUM_PASSAGES, generator.integers(0, 9), replace=False), positives[row])
            for row in query
        ]
    )
    return Examples(query, positives, negatives, known_positives(query, positives, num_queries=NUM_QUERIES))


def taught_examples() -> Examples:
    """The same rows as three sources of three tasks, with a teacher's scores of about half of the passages."""
    plain, generator = small_examples(), np.random.default_rng(1)

    def scores(ragged: Ragged) -> np.ndarray:
        drawn = generator.normal(size=len(ragged.values)).astype(np.float32)
        return np.where(generator.random(len(drawn)) < 0.8, drawn, np.nan).astype(np.float32)

    return replace(
        plain,
        sources=(
            SourceInfo("answers", "retrieval"),
            SourceInfo("pairs", "similarity"),
            SourceInfo("classes", "classification"),
        ),
        source=np.repeat([0, 1, 2], [9, 6, NUM_QUERIES - 15]),
        label=np.where(np.repeat([0, 1, 0], [9, 6, NUM_QUERIES - 15]), np.arange(NUM_QUERIES) % 3 / 2, np.nan),
        teacher=Teacher(scores(plain.positives), scores(plain.negatives)),
    )


def small_texts(examples: Examples | None = None) -> Texts:
    return Texts(
        queries=make_texts(NUM_QUERIES, seed=1),
        num_queries=NUM_QUERIES,
        passages=make_texts(NUM_PASSAGES, seed=2),
        num_passages=NUM_PASSAGES,
        examples=examples or small_examples(),
    )


def small_config(encoder: Path, **changes: Any) -> Train:
    ramp = {"shape": "linear", "start": -0.2, "end": 0.3}
    values = {
        "launcher": "local",
        "num_workers": 1,
        "threads_per_worker": 1,
        "max_failures": 1,
        "precision": "fp32",
        "data": None,
        "dev": None,
        "encoder": str(encoder),
        "epochs": 2,
        "batch_size": 5,
        "num_negatives": 3,
        "sources": {},
        "one_source_batches": False,
        "temperature": 0.1,
        "false_negative_margin": None,
        "weighting": {"kind": "progressive", "negatives": ramp, "queries": ramp},
        "passage_to_query": 0.0,
        "distillation": None,
        "similarity_temperature": 0.05,
        "matryoshka_dims": (),
        "lora": None,
        "learning_rate": 0.001,
        "warmup": 0.2,
        "schedule": "linear",
        "layer_decay": 1.0,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "max_loss_ratio": None,
        "ema_decay": None,
        "dropout": 0.1,
        "query_max_length": 24,
        "passage_max_length": 24,
        "micro_batch_tokens": 100,
        "keep_activations_tokens": 200,
        "gradient_checkpointing": False,
        "compile": False,
        "score_block": 60,
        "eval_every": 3,
        "keep_best": True,
        "patience": None,
        "checkpoint_every": 2,
    }
    return Train.model_validate({**values, **changes})


def write_small_dev(folder: Path) -> Path:
    queries, passages = make_texts(6, seed=3), make_texts(15, seed=4)
    data = RetrievalSet(
        name="dev",
        queries={f"q{i}": text for i, text in enumerate(queries)},
        corpus={f"p{i}": text for i, text in enumerate(passages)},
        qrels={f"q{i}": {f"p{i}": 1} for i in range(6)},
    )
    write_beir(folder, data)
    return folder


def prepare_small(
    folder: Path,
    encoder: Path,
    *,
    dev: RetrievalSet | None = None,
    examples: Examples | None = None,
    **changes: Any,
) -> Train:
    """Write everything that `loop.run(folder, …)` reads."""
    config = small_config(encoder, **changes)
    write_training_data(
        folder,
        small_texts(examples),
        dev,
        encoder=Encoder.load(str(encoder)),
        query_max_length=24,
        passage_max_length=24,
    )
    write_task(folder, config=config, seed=7, encoder=encoder, data_digest="small")
    return config
