"""A trained model becomes a version in MLflow's registry, and the gate gives it its alias.

A version is its weights' sha256: the same weights are never registered twice, and a new evaluation of them goes to
the version that is there. Each step can be run again after a kill; the version is made late and in one call, with
the tag by which it is found. Everything happens under a lock, the alias is read again before it is set, and an alias
that a person moved stays where the person put it.
"""

import importlib.metadata
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peg.adapters.mlflow_live import TRAIN_KEY_TAG, WEIGHTS_TAG, live_run
from peg.adapters.mlflow_record import (
    MODEL,
    Made,
    find_or_start_run,
    record_evaluation,
    record_training,
    results_folder,
)
from peg.adapters.mlflow_store import Store, champion_path, connect, registry_lock, resolve, tracking_uri
from peg.config import Config
from peg.errors import StageError
from peg.gate import Decision, Rules, Scores, decide
from peg.model.encoder import Encoder, quiet_transformers
from peg.workspace import STATE, read_json, write_json

__all__ = ["Registration", "champion_path", "connect", "live_run", "register", "resolve", "tracking_uri"]

CHAMPION = "champion"
CHALLENGER = "challenger"
REGISTRATION_FILE = STATE / "registration.json"
_EXAMPLES = ("形容做事多此一举", "比喻机会难得,稍纵即逝", "Text in two languages, 中文与英文", "一")
_TOLERANCE = 1e-5
_MAX_DESCRIPTION_CHARS = 5000
_REQUIREMENTS = ("mlflow", "sentence-transformers", "transformers", "tokenizers", "safetensors", "torch", "numpy")
# Tags of the registered model: which version the pipeline made champion, and is about to.
_PROMOTED, _PROMOTING = "peg.promoted", "peg.promoting"
_CHECKED = "peg.loads_back"


@dataclass(frozen=True)
class Registration:
    """What `register` did. alias: of this version now, "" if it has none; new: the version was made just now."""

    model_name: str
    version: int
    alias: str
    new: bool
    new_evaluation: bool
    reasons: tuple[str, ...]
    run_id: str
    run_url: str
    tracking_uri: str
    weights_sha256: str

    def describe(self) -> str:
        """Say it in a few lines, for the terminal."""
        happened = "is new" if self.new else "is known, its evaluation is new" if self.new_evaluation else "is known"
        named = f"alias '{self.alias}'" if self.alias else "no alias"
        lines = [f"{self.model_name} version {self.version} {happened}, {named}", *(f"  {r}" for r in self.reasons)]
        return "\n".join([*lines, f"  run: {self.run_url}"])


def register(config: Config) -> Registration:
    """Register what the stages made, whoever ran them, and write .peg/registration.json.

    Raises InputError if stages are missing or do not fit together, StageError if the registered model does not give
    the trained model's embeddings (it then gets no alias).
    """
    made = Made.read(config)
    name = config.registry.model_name
    with registry_lock():
        store = connect()
        registry = _Registry(store, name)
        version = registry.find(made.weights)
        new = version is None
        run_id = str(version.run_id) if version else find_or_start_run(store, config, made)
        record_training(store, run_id, config, made)
        if version is None:
            model_id = _log_model_once(store, run_id, made.weights)
            version = registry.create(model_id, run_id, config, made)
        new_evaluation = record_evaluation(store, run_id, version.tags["model_id"], made)
        store.client.set_terminated(run_id, status="FINISHED")
        registry.describe(version, config, made)
        registry.check_loads_back(version)
        alias, reasons = registry.settle_alias(version, config, made)
        experiment = store.client.get_run(run_id).info.experiment_id
    registration = Registration(
        model_name=name,
        version=int(version.version),
        alias=alias,
        new=new,
        new_evaluation=new_evaluation,
        reasons=reasons,
        run_id=run_id,
        run_url=store.run_url(experiment, run_id),
        tracking_uri=_without_credentials(store.uri),
        weights_sha256=made.weights,
    )
    write_json(REGISTRATION_FILE, asdict(registration))
    return registration


def _without_credentials(uri: str) -> str:
    from peg.lineage import without_credentials

    return str(without_credentials(uri))


def _log_model_once(store: Store, run_id: str, weights: str) -> str:
    """Log models/trained to the run, unless a call that was killed later had done so; returns the model's id."""
    import mlflow
    from mlflow.models import infer_signature
    from sentence_transformers import SentenceTransformer

    experiment = store.client.get_run(run_id).info.experiment_id
    for logged in store.client.search_logged_models([experiment], f"tags.`{WEIGHTS_TAG}` = '{weights}'"):
        if str(logged.status) == "READY":
            return str(logged.model_id)
        store.client.delete_logged_model(logged.model_id)
    with quiet_transformers(), mlflow.start_run(run_id=run_id):
        model = SentenceTransformer(str(MODEL), device="cpu", model_kwargs=_without_pooler())
        prompt = (model.prompts or {}).get("query") or ""
        example = [prompt + text for text in _EXAMPLES[:2]]
        info = mlflow.sentence_transformers.log_model(
            model,
            name="model",
            signature=infer_signature(example, model.encode(example, show_progress_bar=False)),
            input_example=example,
            pip_requirements=_pinned(),
            tags={WEIGHTS_TAG: weights},
        )
    return str(info.model_id)


def _without_pooler() -> dict[str, Any]:
    """A pooler that the weights do not have would be made at random, and saved as part of the model."""
    with_pooler = read_json(MODEL / "config.json").get("model_type") in {"bert", "roberta", "xlm-roberta"}
    return {"add_pooling_layer": False} if with_pooler else {}


def _pinned() -> list[str]:
    # "2.13.0+cpu" is one machine's build of 2.13.0.
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS]


class _Registry:
    """One registered model's versions, tags and aliases."""

    def __init__(self, store: Store, name: str) -> None:
        from mlflow.exceptions import MlflowException

        self._client, self._name = store.client, name
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def find(self, weights: str) -> Any | None:
        """The version with these weights, or None."""
        found = self._client.search_model_versions(f"name = '{self._name}' and tags.{WEIGHTS_TAG} = '{weights}'")
        return min(found, key=lambda version: int(version.version)) if found else None

    def create(self, model_id: str, run_id: str, config: Config, made: Made) -> Any:
        """Make the version, with its tags in the same call, so that a kill leaves all of it or nothing."""
        version = self._client.create_model_version(
            self._name,
            source=f"models:/{model_id}",
            run_id=run_id,
            model_id=model_id,
            tags={WEIGHTS_TAG: made.weights, "model_id": model_id, **_describing_tags(config, made)},
            description=_model_card(),
        )
        # The link from the model's page to its version, as mlflow.register_model leaves it.
        link = json.dumps([{"name": self._name, "version": int(version.version)}])
        self._client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
        return version

    def describe(self, version: Any, config: Config, made: Made) -> None:
        """Bring the version's tags to the newest evaluation."""
        held = self._client.get_model_version(self._name, version.version).tags
        for key, value in _describing_tags(config, made).items():
            if held.get(key) != value:
                self._client.set_model_version_tag(self._name, version.version, key, value)

    def check_loads_back(self, version: Any) -> None:
        """Load the version out of the registry and compare its embeddings with those of models/trained, once."""
        import mlflow

        if _CHECKED in self._client.get_model_version(self._name, version.version).tags:
            return
        with quiet_transformers():
            loaded = mlflow.sentence_transformers.load_model(f"models:/{self._name}/{version.version}")
            encoder = Encoder.load(str(MODEL))
        worst = 0.0
        for kind, prompt in (("query", encoder.prompts.query), ("passage", encoder.prompts.passage)):
            ours = encoder.encode(_EXAMPLES, kind=kind, batch_tokens=1 << 12)  # type: ignore[arg-type]
            theirs = np.asarray(loaded.encode([prompt + text for text in _EXAMPLES], show_progress_bar=False))
            worst = max(worst, float(np.abs(ours - theirs).max()))
        if not worst < _TOLERANCE:
            raise StageError(
                f"version {version.version} of {self._name}, loaded back, differs from {MODEL} by {worst:.2g} in its "
                f"embeddings, {_TOLERANCE:g} is allowed; it gets no alias: delete the version and register again"
            )
        self._client.set_model_version_tag(self._name, version.version, _CHECKED, f"max difference {worst:.1e}")

    def settle_alias(self, version: Any, config: Config, made: Made) -> tuple[str, tuple[str, ...]]:
        """Decide about the version and set its alias; returns the alias that it has in the end, and why."""
        number = str(version.version)
        champion = self._holder(CHAMPION)
        tags = self._client.get_registered_model(self._name).tags
        promoted = tags.get(_PROMOTED)
        if champion is not None and tags.get(_PROMOTING) == champion:
            self._note_promotion(champion)  # a call was killed between the alias and the note of it
            promoted = champion
        if champion == number:
            return CHAMPION, (f"Version {number} has these weights and is the champion already: it stays champion.",)
        if promoted == number:
            now = f"gave it to version {champion}" if champion else "removed it"
            return self._alias_of(number), (
                f"A person took the champion alias from version {number} and {now}: that is respected.",
            )
        notes: tuple[str, ...] = ()
        if champion is not None and champion != promoted:
            notes = (f"Version {champion} was made champion by a person: it is what a candidate must beat.",)
        decision = self._decide(champion, config, made)
        again = self._holder(CHAMPION)
        if again != champion:
            moved = f"to version {again}" if again else "away"
            reason = f"Meanwhile a person moved the champion alias {moved}; run `peg register` again."
            decision = Decision(False, (*decision.reasons, reason))
        if decision.passed:
            self._promote(number)
        elif self._holder(CHALLENGER) != number:
            self._client.set_registered_model_alias(self._name, CHALLENGER, number)
        return (CHAMPION if decision.passed else CHALLENGER), notes + decision.reasons

    def _promote(self, number: str) -> None:
        self._client.set_registered_model_tag(self._name, _PROMOTING, number)
        self._client.set_registered_model_alias(self._name, CHAMPION, number)
        self._note_promotion(number)
        if self._holder(CHALLENGER) == number:
            self._client.delete_registered_model_alias(self._name, CHALLENGER)

    def _decide(self, champion: str | None, config: Config, made: Made) -> Decision:
        metric = config.evaluate.main_metric

        def scores(system: str, name: str) -> Scores:
            weights = str(made.results[system]["weights_sha256"])
            return Scores(name, weights, made.set_digest, made.scores(system, metric))

        rules = Rules(
            metric=metric,
            min_gain=config.registry.min_gain,
            max_p_value=config.registry.max_p_value,
            permutations=config.evaluate.permutations,
            seed=config.seed,
        )
        held = None if champion is None else self._champion_scores(champion, metric, made.set_digest)
        return decide(scores("trained", "the candidate"), scores("base", "the base encoder"), held, rules)

    def _champion_scores(self, number: str, metric: str, set_digest: str) -> Scores:
        """The champion's results on this set from its run; where it has none, scores of the set that it has."""
        champion = self._client.get_model_version(self._name, number)
        name, weights = f"version {number}", champion.tags.get(WEIGHTS_TAG, "")
        inside = results_folder(set_digest)
        known = champion.run_id and any(
            item.path == f"{inside}/trained.json" for item in self._client.list_artifacts(champion.run_id, inside)
        )
        if not known:
            return Scores(name, weights, champion.tags.get("set_digest", "unknown"), {})
        with tempfile.TemporaryDirectory() as folder:
            path = self._client.download_artifacts(champion.run_id, f"{inside}/trained.json", folder)
            result = read_json(Path(path))
        per_query = {query: float(values[metric]) for query, values in result["per_query"].items()}
        return Scores(name, weights, result["set_digest"], per_query)

    def _holder(self, alias: str) -> str | None:
        """The number of the version that holds the alias."""
        version = self._client.get_registered_model(self._name).aliases.get(alias)
        return None if version is None else str(version)

    def _alias_of(self, number: str) -> str:
        aliases = self._client.get_registered_model(self._name).aliases
        return next((name for name, version in sorted(aliases.items()) if str(version) == number), "")

    def _note_promotion(self, number: str) -> None:
        self._client.set_registered_model_tag(self._name, _PROMOTED, number)
        self._client.delete_registered_model_tag(self._name, _PROMOTING)


def _describing_tags(config: Config, made: Made) -> dict[str, str]:
    metric = config.evaluate.main_metric
    return {
        "git_commit": made.lineage["git"]["commit"] or "none",
        "data_digest": made.data_digest,
        "set_digest": made.set_digest,
        TRAIN_KEY_TAG: made.train_key or "unknown",
        "main_metric": metric,
        metric: f"{made.results['trained']['metrics'][metric]:.4f}",
    }


def _model_card() -> str:
    card = MODEL / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else "This model has no card."
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        text = text[4:].partition("\n---\n")[2].lstrip()
    if len(text) <= _MAX_DESCRIPTION_CHARS:
        return text
    ending = "\n\n(cut here; the whole card is the model's README.md)"
    return text[: _MAX_DESCRIPTION_CHARS - len(ending)] + ending
