import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peg.config import Config, load, parse
from peg.errors import InputError
from peg.evaluate import metrics
from peg.evaluate.beir import RetrievalSet, digest, read_beir, write_beir
from peg.evaluate.suite import Searched
from peg.model.encoder import weights_sha256
from peg.stages import evaluate
from tests.conftest import make_encoder, make_texts

RECIPE = Path(__file__).parents[2] / "recipes/sample.yaml"
DVC = """stages:
  evaluate:
    cmd: peg evaluate
    deps: [data/eval/test, models/base, models/trained, reports/train_curve.csv, reports/dev_curve.csv]
    outs: [reports/results, reports/comparison.json, reports/report.html]
    metrics: [metrics/evaluate.json]
"""


class Search:
    """A naive search in place of mteb's; it notes which systems it was asked for."""

    def __init__(self, *, dies_at: str | None = None) -> None:
        self.asked: list[str] = []
        self.revisions: dict[str, str] = {}
        self._dies_at = dies_at

    def __call__(self, encoder: Any, data: RetrievalSet, *, system: str, revision: str, **_: Any) -> Searched:
        self.asked.append(system)
        self.revisions[system] = revision
        if system == self._dies_at:
            raise KeyboardInterrupt
        if encoder is None:
            rankings = {key: overlap(text, data.corpus) for key, text in data.queries.items()}
            return Searched(rankings, None, None)
        query, passage = (
            vectors(encoder, kind, texts) for kind, texts in (("query", data.queries), ("passage", data.corpus))
        )
        rows = zip(data.queries, query @ passage.T, strict=True)
        return Searched(
            {key: dict(zip(data.corpus, map(float, row), strict=True)) for key, row in rows}, query, passage
        )


def vectors(encoder: Any, kind: str, texts: dict[str, str]) -> np.ndarray:
    rows: np.ndarray = encoder.encode(list(texts.values()), kind=kind, batch_tokens=512)
    return rows


def overlap(text: str, corpus: dict[str, str]) -> dict[str, float]:
    return {key: float(len(set(text) & set(passage))) for key, passage in corpus.items() if set(text) & set(passage)}


def write_curve(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n", encoding="utf-8")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project as the stages before leave it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(DVC, encoding="utf-8")
    make_encoder(seed=0).save(Path("models/base"))
    make_encoder(seed=1).save(Path("models/trained"))
    corpus = {f"p{i}": text for i, text in enumerate(make_texts(40, seed=3))}
    queries = {f"q{i}": corpus[f"p{i}"][:4] for i in range(15)}
    data = RetrievalSet("test", queries, corpus, {f"q{i}": {f"p{i}": 1} for i in range(15)})
    write_beir(Path("data/eval/test"), data)
    columns = [
        "step",
        "loss",
        "learning_rate",
        "negative_exponent",
        "query_exponent",
        "positive_score",
        "negative_score",
    ]
    write_curve(Path("reports/train_curve.csv"), columns, [[i, 1 / i, 1e-4, 0.1, 0.2, 0.9, ""] for i in (1, 2, 3)])
    write_curve(Path("reports/dev_curve.csv"), ["step", "ndcg_at_10"], [[0, 0.1], [3, 0.2]])
    for stage in ("prepare", "mine", "train"):
        Path("metrics").mkdir(exist_ok=True)
        Path(f"metrics/{stage}.json").write_text(json.dumps({"examples": 9, "steps": 3}), encoding="utf-8")
    return tmp_path


def recipe(**changes: Any) -> Config:
    tree = load(RECIPE).model_dump(mode="json")
    tree["evaluate"] |= {"test": "data/eval/test", "permutations": 200, "bootstrap": 200, "examples": 4, **changes}
    return parse(tree, origin="the test's recipe")


OUTPUTS = ["reports/results", "reports/comparison.json", "reports/report.html", "metrics/evaluate.json"]


def contents() -> dict[str, bytes]:
    files = [file for out in OUTPUTS for file in ([Path(out)] if Path(out).is_file() else sorted(Path(out).iterdir()))]
    return {str(file): file.read_bytes() for file in files}


def test_the_stage_writes_what_the_next_ones_read(project: Path) -> None:
    search = Search()
    evaluate.run(recipe(), measure=search)
    assert search.asked == ["bm25", "base", "trained"]
    assert search.revisions["trained"] == weights_sha256(Path("models/trained")) != search.revisions["base"]
    table = json.loads(Path("metrics/evaluate.json").read_text())
    for system in search.asked:
        result = json.loads(Path(f"reports/results/{system}.json").read_text(encoding="utf-8"))
        assert result["weights_sha256"] == (None if system == "bm25" else search.revisions[system])
        assert len(result["per_query"]) == len(result["top"]) == 15
        assert result["metrics"] == pytest.approx(metrics.means(result["per_query"]))
        assert table[system] == pytest.approx(result["metrics"], abs=1e-6)
    comparison = json.loads(Path("reports/comparison.json").read_text())
    assert comparison["set"]["digest"] == digest(read_beir(Path("data/eval/test")))
    assert len(comparison["differences"]) == 9
    assert "The trained model" in Path("reports/report.html").read_text(encoding="utf-8")
    assert list((project / ".peg/work/evaluate").iterdir()) == []


def test_running_twice_gives_the_same_bytes(project: Path) -> None:
    evaluate.run(recipe(), measure=Search())
    first = contents()
    evaluate.run(recipe(), measure=Search())
    assert contents() == first and len(first) == 6


def test_a_killed_stage_keeps_the_systems_it_measured(project: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(recipe(), measure=Search(dies_at="trained"))
    assert not Path("reports/comparison.json").exists()
    search = Search()
    evaluate.run(recipe(), measure=search)
    assert search.asked == ["trained"]
    resumed = contents()
    evaluate.run(recipe(), measure=Search())
    assert contents() == resumed


def test_any_model_is_measured_on_any_folder(project: Path) -> None:
    evaluate.run(recipe(), measure=Search())
    for model, system in (("models/trained", "trained"), ("bm25", "bm25")):
        evaluate.evaluate_one(model, Path("data/eval/test"), Path("out/f.json"), measure=Search())
        alone = json.loads(Path("out/f.json").read_text(encoding="utf-8"))
        staged = json.loads(Path(f"reports/results/{system}.json").read_text(encoding="utf-8"))
        assert alone | {"system": system} == staged


def test_sharded_weights_have_an_identity_too(project: Path) -> None:
    encoder = make_encoder(seed=0)
    other = evaluate._identity("owner/name", make_encoder(seed=1))
    assert evaluate._identity("owner/name", encoder) == evaluate._identity("absent", make_encoder(seed=0)) != other
    assert evaluate._identity("models/base", encoder) == weights_sha256(Path("models/base"))


def test_faults_are_one_line(project: Path) -> None:
    with pytest.raises(InputError, match="is a folder; give the JSON file"):
        evaluate.evaluate_one("bm25", Path("data/eval/test"), Path("models"), measure=Search())
    write_curve(Path("reports/train_curve.csv"), ["step", "loss"], [[1, "much"]])
    with pytest.raises(InputError, match=r"train_curve\.csv holds something other than numbers"):
        evaluate.run(recipe(), measure=Search())
    Path("metrics/mine.json").unlink()
    write_curve(Path("reports/train_curve.csv"), ["step", "loss"], [[1, 1]])
    with pytest.raises(InputError, match=r"metrics/mine\.json is not here"):
        evaluate.run(recipe(), measure=Search())
