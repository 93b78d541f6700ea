"""Stage `train`: mined pools and the base encoder in, the trained model, its curves and its metrics out."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np

from peg.config import Config
from peg.data.store import Store, open_store
from peg.model.card import model_card
from peg.model.encoder import Encoder, weights_sha256
from peg.records import Task
from peg.train.batches import Examples, Ragged, SourceInfo, Teacher
from peg.train.data import Texts, make_examples
from peg.train.follow import Row
from peg.train.loop import METRICS
from peg.train.prompts import save_prompts, with_prompts
from peg.train.run import Launch, publish_model, train_model, write_curves
from peg.workspace import key_of, path_digest, stage_work, write_json

PREPARED, MINED, TRAINED = Path("data/prepared"), Path("data/mined"), Path("models/trained")


def run(config: Config, *, launch: Launch, watch: Callable[[str, Path], Callable[[Row], None]] | None = None) -> None:
    """Train as params.yaml says.

    launch runs the ranks. watch(key, folder) may give a callable for the training's rows, for live logging; it is
    told the work's key, which names this training.
    """
    sections = {"seed": config.seed, "train": config.train.model_dump(mode="json")}
    with stage_work("train", sections=sections) as work:
        work.require_input(config.train.encoder, key="train.encoder")
        if config.train.dev:
            work.require_input(config.train.dev, key="train.dev")
        prepared, mined = open_store(PREPARED), open_store(MINED)
        encoder = Encoder.load(config.train.encoder)
        digests = {str(path): path_digest(path) for path in (PREPARED, MINED)}
        digests["encoder"] = weights_sha256(Path(config.train.encoder))
        examples, domains = read_examples(mined, num_queries=prepared.num_rows("queries"))
        summary = train_model(
            work.scratch,
            with_prompts(_texts(prepared, examples), config.train.sources, encoder.prompts),
            config=config.train,
            seed=config.seed,
            encoder=encoder,
            data_digest=key_of(digests, None),
            launch=launch,
            on_row=watch(work.key, work.scratch) if watch else lambda _: None,
        )
        named = zip(examples.sources, domains, strict=True)
        data = ", ".join(f"{one.name} ({domain}, {one.task})" for one, domain in named)
        card = model_card(config, encoder, summary, title=config.registry.model_name, data=data)
        save_prompts(work.scratch / "final", config.train.sources, encoder.prompts)
        publish_model(work.scratch / "final", work.out(TRAINED), card=card)
        write_curves(
            work.scratch / METRICS,
            train_csv=work.out("reports/train_curve.csv"),
            dev_csv=work.out("reports/dev_curve.csv"),
            weighting_csv=work.out("reports/weighting.csv"),
        )
        write_json(work.out("metrics/train.json"), summary)


def _texts(prepared: Store, examples: Examples) -> Texts:
    return Texts(
        queries=prepared.texts("queries"),
        num_queries=prepared.num_rows("queries"),
        passages=prepared.texts("passages"),
        num_passages=prepared.num_rows("passages"),
        examples=examples,
    )


def read_examples(mined: Store, *, num_queries: int) -> tuple[Examples, tuple[str, ...]]:
    """What mining has written, and the domain of each of its sources."""
    sources, source = mined.groups("triples", ["source", "domain", "task"])
    passages, scores = (
        {name: Ragged(*mined.ragged("triples", f"{kind}{name}")) for name in ("positives", "negatives")}
        for kind in ("", "teacher_")
    )
    has_teacher = any(len(one.values) for one in scores.values())
    examples = make_examples(
        mined.array("triples", "query"),
        **passages,
        num_queries=num_queries,
        sources=tuple(SourceInfo(name, cast(Task, task)) for name, _, task in sources),
        source=source,
        label=mined.array("triples", "score"),
        teacher=Teacher(**{name: _parallel(scores[name], passages[name]) for name in scores}) if has_teacher else None,
    )
    return examples, tuple(domain for _, domain, _ in sources)


def _parallel(scores: Ragged, passages: Ragged) -> np.ndarray:
    """Scores parallel to passages.values, NaN in rows that have none."""
    out = np.full(len(passages.values), np.nan, dtype=np.float32)
    out[passages.index(np.flatnonzero(np.diff(scores.offsets)))[0]] = scores.values
    return out
