"""Stage `train`: mined pools and the base encoder in, the trained model, its curves and its metrics out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from peg.config import Config
from peg.data.store import Store, open_store
from peg.model.card import model_card
from peg.model.encoder import Encoder, weights_sha256
from peg.train.batches import Examples, Ragged
from peg.train.data import Texts, known_positives
from peg.train.follow import Row
from peg.train.loop import METRICS
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
        summary = train_model(
            work.scratch,
            _texts(prepared, mined),
            config=config.train,
            seed=config.seed,
            encoder=encoder,
            data_digest=key_of(digests, None),
            launch=launch,
            on_row=watch(work.key, work.scratch) if watch else lambda _: None,
        )
        card = model_card(config, encoder, summary, title=config.registry.model_name, data=_data_line(config))
        publish_model(work.scratch / "final", work.out(TRAINED), card=card)
        write_curves(
            work.scratch / METRICS,
            train_csv=work.out("reports/train_curve.csv"),
            dev_csv=work.out("reports/dev_curve.csv"),
        )
        write_json(work.out("metrics/train.json"), summary)


def _texts(prepared: Store, mined: Store) -> Texts:
    query = np.asarray(mined.columns("triples", ["query"])["query"], dtype=np.int64)
    positives, negatives = (Ragged(*mined.ragged("triples", name)) for name in ("positives", "negatives"))
    num_queries = prepared.num_rows("queries")
    return Texts(
        queries=prepared.texts("queries"),
        num_queries=num_queries,
        passages=prepared.texts("passages"),
        num_passages=prepared.num_rows("passages"),
        examples=Examples(query, positives, negatives, known_positives(query, positives, num_queries=num_queries)),
    )


def _data_line(config: Config) -> str:
    return ", ".join(f"{source.name} ({source.domain}, {source.task})" for source in config.data.sources)
