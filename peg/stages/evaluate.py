"""Stage `evaluate`: BM25, the base encoder and the trained model on the test set, compared and reported.

What searches and scores is passed in (`measure`, from an adapter). A killed stage keeps the systems it has measured.
"""

import csv
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from peg.config import Config
from peg.errors import InputError
from peg.evaluate.beir import RetrievalSet, read_beir
from peg.evaluate.report import Curve, Findings, render
from peg.evaluate.suite import Measure, SystemResult, compare, score_samples, system_result
from peg.evaluate.weighting import read_weighting
from peg.model.encoder import WEIGHTS, Encoder, weights_sha256
from peg.workspace import STATE, Work, read_json, stage_work, write_json

MODELS = {"base": Path("models/base"), "trained": Path("models/trained")}
RESULTS, COMPARISON, REPORT = Path("reports/results"), Path("reports/comparison.json"), Path("reports/report.html")
METRICS = Path("metrics/evaluate.json")
TRAIN_CURVE, DEV_CURVE = Path("reports/train_curve.csv"), Path("reports/dev_curve.csv")
WEIGHTING = Path("reports/weighting.csv")
COUNTS = {stage: Path(f"metrics/{stage}.json") for stage in ("prepare", "mine", "train")}
PAIRS = (("trained", "base"), ("trained", "bm25"), ("base", "bm25"))

BM25 = "bm25"
_BM25_REVISION = "1"  # raised when BM25's own settings change
_SECTIONS = ("seed", "base", "data", "mining", "train", "evaluate")  # the report shows them all
_BATCH_TOKENS = 16_384  # for `peg evaluate --model`, which has no recipe
_METRIC_DIGITS = 6

Samples = dict[str, list[float]]


def run(config: Config, *, measure: Measure) -> None:
    """Measure the three systems and write results, comparison, metrics and report."""
    tree = config.model_dump(mode="json")
    params = {name: tree[name] for name in _SECTIONS}
    with stage_work("evaluate", sections=params) as work:
        work.require_input(config.evaluate.test, key="evaluate.test")
        data = read_beir(Path(config.evaluate.test))
        if data.num_unjudged:
            print(
                f"{data.num_unjudged} queries of {config.evaluate.test} have no relevant passage: left out", flush=True
            )
        results, samples = {}, {}
        for system in (BM25, *MODELS):
            results[system], samples[system] = _measured(system, data, config, work=work, measure=measure)
            print(_line(results[system]), flush=True)
            write_json(work.out(RESULTS) / f"{system}.json", results[system].to_json())
        comparison = compare(
            results,
            data,
            pairs=PAIRS,
            main_metric=config.evaluate.main_metric,
            permutations=config.evaluate.permutations,
            bootstrap=config.evaluate.bootstrap,
            seed=config.seed,
        )
        write_json(work.out(COMPARISON), comparison)
        write_json(work.out(METRICS), {name: _rounded(result.metrics) for name, result in results.items()})
        page = render(
            Findings(
                results=results,
                comparison=comparison,
                samples=samples,
                data=data,
                train_curve=_read_curve(TRAIN_CURVE),
                dev_curve=_read_curve(DEV_CURVE),
                weighting=read_weighting(WEIGHTING),
                counts={stage: read_json(path) for stage, path in COUNTS.items()},
                params=params,
                examples=config.evaluate.examples,
            )
        )
        work.out(REPORT).write_text(page, encoding="utf-8", newline="\n")


def evaluate_one(model: str, data: Path, output: Path, *, measure: Measure, name: str | None = None) -> SystemResult:
    """Measure any model on any BEIR folder, and write its result to `output`.

    model: a model folder, a hub id, or "bm25". name: what the result calls it, where that is not `model`.
    """
    name = name or model
    if output.is_dir():
        raise InputError(f"{output} is a folder; give the JSON file to write, for example {output / 'result.json'}")
    test = read_beir(data)
    encoder = None if model == BM25 else _load(model)
    revision = _BM25_REVISION if encoder is None else _identity(model, encoder)
    searched = measure(encoder, test, system=name, revision=revision, batch_tokens=_BATCH_TOKENS, cache=None)
    result = system_result(searched, test, system=name, weights_sha256=None if encoder is None else revision)
    write_json(output, result.to_json())
    left_out = f"; {test.num_unjudged} queries without a relevant passage left out" if test.num_unjudged else ""
    print(f"{_line(result)} ({len(test.queries)} queries, {len(test.corpus)} passages{left_out})", flush=True)
    return result


def _measured(
    system: str, data: RetrievalSet, config: Config, *, work: Work, measure: Measure
) -> tuple[SystemResult, Samples]:
    """Measure a system, or take what a killed run of the same work has left of it."""
    kept = work.scratch / f"{system}.json"
    if kept.is_file():
        tree = read_json(kept)
        return SystemResult.from_json(tree["result"], origin=str(kept)), tree["samples"]
    encoder = None if system == BM25 else _load(str(MODELS[system]))
    weights = None if encoder is None else weights_sha256(MODELS[system])
    searched = measure(
        encoder,
        data,
        system=system,
        revision=weights or _BM25_REVISION,
        batch_tokens=config.evaluate.encode_batch_tokens,
        cache=STATE / "mteb",
    )
    result = system_result(searched, data, system=system, weights_sha256=weights)
    samples = score_samples(searched, data, seed=config.seed) if encoder else {}
    write_json(kept, {"result": result.to_json(), "samples": samples})
    return result, samples


def _load(name: str) -> Encoder:
    return Encoder.load(name).to("cuda" if torch.cuda.is_available() else "cpu")


def _identity(name: str, encoder: Encoder) -> str:
    """Hash the weights file of a folder; of a hub's model or of sharded weights, the tensors as loaded."""
    if (Path(name) / WEIGHTS).is_file():
        return weights_sha256(Path(name))
    digest = hashlib.sha256()
    for key, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)}\n".encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_curve(path: Path) -> Curve:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns: dict[str, list[float]] = {name: [] for name in reader.fieldnames or ()}
            for row in reader:
                for name, values in columns.items():
                    values.append(float(row[name]) if row[name] else float("nan"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is not here; run the stage `train`, which writes it") from error
    except ValueError as error:
        raise InputError(f"{path} holds something other than numbers ({error}); run the stage `train` again") from error
    return columns


def _rounded(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: round(value, _METRIC_DIGITS) for name, value in values.items()}


def _line(result: SystemResult) -> str:
    return f"{result.system}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
