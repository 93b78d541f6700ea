import json
import subprocess

import pytest

from peg.lineage import dvc_stages, git_state, lineage_document, without_credentials
from peg.model.encoder import weights_sha256
from tests.adapters.small_project import SET_DIGEST, fill, recipe

LOCK = """
schema: '2.0'
stages:
  train:
    cmd: peg train
    deps:
    - path: data/mined
      hash: md5
      md5: abc.dir
      size: 3
    outs:
    - path: models/trained
      hash: md5
      md5: def.dir
    - path: reports/train_curve.csv
      md5: "123"
"""


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q")
    for name in ("code.py", "dvc.lock", "参数.yaml"):
        (tmp_path / name).write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def test_a_clean_commit_is_not_dirty_and_neither_dvc_lock_nor_new_files_count(repository):
    (repository / "dvc.lock").write_text("2")
    (repository / "new.txt").write_text("2")
    commit = git(repository, "rev-parse", "HEAD")
    assert git_state(repository) == {"commit": commit, "dirty": False, "changed": [], "problem": None}


def test_changed_tracked_files_are_named_staged_or_not(repository):
    (repository / "code.py").write_text("2")
    (repository / "参数.yaml").write_text("2")
    git(repository, "add", "code.py")
    state = git_state(repository)
    assert state["dirty"] is True
    assert state["changed"] == ["code.py", "参数.yaml"]


def test_without_a_commit_lineage_says_so(tmp_path):
    assert git_state(tmp_path)["commit"] is None
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path)["problem"] == "no git commit here"


def test_dvc_stages_hold_the_hashes_of_what_went_in_and_came_out(tmp_path):
    (tmp_path / "dvc.lock").write_text(LOCK)
    assert dvc_stages(tmp_path / "dvc.lock") == {
        "train": {
            "cmd": "peg train",
            "deps": {"data/mined": "md5:abc.dir"},
            "outs": {"models/trained": "md5:def.dir", "reports/train_curve.csv": "md5:123"},
        }
    }
    assert dvc_stages(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        ("https://user:token@host/path", "https://host/path"),
        ("see s3://key@bucket/x and http://a/b", "see s3://bucket/x and http://a/b"),
        ("mail a@b.c", "mail a@b.c"),
        (["https://t@h", {"k": "https://t@h", "n": 1}], ["https://h", {"k": "https://h", "n": 1}]),
    ],
)
def test_credentials_are_taken_out_of_addresses(found, kept):
    assert without_credentials(found) == kept


def test_the_document_is_json_and_names_models_set_and_versions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_TOKEN", "do-not-tell")
    weights = fill(tmp_path, model_seed=1, trained=0.5)
    document = lineage_document(recipe())
    text = json.dumps(document)
    assert "do-not-tell" not in text
    assert document["models"] == {"models/base": weights_sha256(tmp_path / "models/base"), "models/trained": weights}
    assert document["test_set"]["digest"] == SET_DIGEST
    assert document["seed"] == document["parameters"]["seed"]
    assert {"torch", "numpy", "transformers"} <= document["packages"].keys()
    assert document["machine"]["torch_threads"] >= 1


def test_an_empty_folder_has_a_document_with_nulls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = lineage_document(recipe())
    assert document["models"] == {"models/base": None, "models/trained": None}
    assert document["dvc"] is None
    assert document["test_set"] is None
