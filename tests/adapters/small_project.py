"""A project folder as the stages leave it: tiny models, made-up results, the files that `peg register` reads."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from peg.config import Config, load, parse
from peg.model.encoder import weights_sha256
from peg.workspace import write_json
from tests.conftest import make_encoder

SET_DIGEST = "5e7d" * 16
RECIPE = Path(__file__).parents[2] / "recipes/sample.yaml"
NUM_QUERIES = 60
STEPS = 5


def recipe(**registry: Any) -> Config:
    """The sample recipe with a small test and names of its own; keywords change its registry section."""
    tree = load(RECIPE).model_dump(mode="json")
    tree["evaluate"] |= {"main_metric": "ndcg_at_10", "permutations": 200}
    tree["registry"] |= {"model_name": "small", "experiment": "small", "max_p_value": 0.05, "min_gain": 0.0, **registry}
    return parse(tree, origin="the test's recipe")


def values(*, mean: float, seed: int) -> np.ndarray:
    """One made-up metric value per query, about `mean`."""
    return np.clip(np.random.default_rng(seed).normal(mean, 0.05, NUM_QUERIES), 0, 1)


def fill(folder: Path, *, model_seed: int, trained: float, base: float = 0.2, set_digest: str = SET_DIGEST) -> str:
    """Write models, results and curves into a project folder; returns the trained weights' sha256."""
    if not (folder / "models/base").exists():
        make_encoder(seed=0).save(folder / "models/base")
    make_encoder(seed=model_seed).save(folder / "models/trained")
    (folder / "models/trained/README.md").write_text("---\nlicense: mit\n---\n# A small model\n", encoding="utf-8")
    systems = {"bm25": 0.1, "base": base, "trained": trained}
    means = {}
    for number, (system, mean) in enumerate(systems.items()):
        per_query = {f"q{row}": float(value) for row, value in enumerate(values(mean=mean, seed=number))}
        means[system] = dict.fromkeys(
            ("ndcg_at_10", "recall_at_10", "mrr_at_10"), float(np.mean(list(per_query.values())))
        )
        path = folder / "models" / system
        write_json(
            folder / f"reports/results/{system}.json",
            {
                "system": system,
                "set_digest": set_digest,
                "weights_sha256": weights_sha256(path) if path.exists() else None,
                "metrics": means[system],
                "per_query": {query: dict.fromkeys(means[system], value) for query, value in per_query.items()},
                "top": {query: [["p1", 0.5]] for query in per_query},
            },
        )
    difference = {"left": "trained", "right": "base", "metric": "ndcg_at_10", "difference": trained - base}
    write_json(
        folder / "reports/comparison.json",
        {
            "main_metric": "ndcg_at_10",
            "set": {"digest": set_digest, "queries": NUM_QUERIES, "passages": 100},
            "systems": means,
            "differences": [{**difference, "p_value": 0.01, "p_value_holm": 0.02, "low": 0.1, "high": 0.3}],
        },
    )
    (folder / "reports/report.html").write_text("<html>report</html>", encoding="utf-8")
    write_json(folder / "metrics/prepare.json", {"pairs": {"kept": 12, "dropped": 3}})
    write_json(folder / "data/prepared/manifest.json", {"tables": {}})
    write_curves(folder)
    return weights_sha256(folder / "models/trained")


def write_curves(folder: Path) -> None:
    """A row for each step, and a dev value every other step."""
    rows = {"train_curve": [{"step": step, "loss": 2.0 / step} for step in range(1, STEPS + 1)]}
    rows["dev_curve"] = [{"step": step, "ndcg_at_10": 0.1 * step} for step in (2, 4)]
    for name, lines in rows.items():
        with (folder / f"reports/{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
