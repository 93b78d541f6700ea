from pathlib import Path

import pytest
import torch

from peg.config import load
from peg.errors import InputError
from peg.model.encoder import Encoder, weights_sha256
from peg.recipes import use_recipe
from peg.rounds import next_round
from peg.stages.base import base_encoder


@pytest.fixture
def project(tmp_path: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    use_recipe("sample", tmp_path, force=True)
    params = tmp_path / "params.yaml"
    params.write_text(params.read_text().replace("  max_length: 512", "  max_length: 24", 1))
    encoder = Encoder.load(str(encoder_folder))
    encoder.save(tmp_path / "models" / "trained")
    return tmp_path


def test_the_next_round_starts_from_the_model_that_was_trained(project: Path) -> None:
    before = (project / "params.yaml").read_text()
    assert "models/rounds/1" in next_round(project)
    config = load(project / "params.yaml")
    assert config.base.sha256 == weights_sha256(project / "models" / "trained")
    started, trained = base_encoder(config.base), Encoder.load("models/trained")
    ids = [torch.tensor([2, 7, 9, 3]).numpy()]
    assert torch.equal(started.embed(ids), trained.embed(ids))
    after = (project / "params.yaml").read_text()
    assert before[before.index("data:") :] == after[after.index("data:") :]


def test_a_round_is_kept_once_and_a_changed_model_is_the_next(project: Path) -> None:
    next_round(project)
    with pytest.raises(InputError, match="starts from models/trained's weights already"):
        next_round(project)
    encoder = Encoder.load("models/trained")
    with torch.no_grad():
        next(encoder.parameters()).add_(1)
    encoder.save(project / "models" / "trained")
    assert "models/rounds/2" in next_round(project)
    assert load(project / "params.yaml").base.source == "models/rounds/2"


def test_without_a_trained_model_there_is_no_next_round(project: Path) -> None:
    (project / "models" / "trained" / "model.safetensors").unlink()
    before = (project / "params.yaml").read_text()
    with pytest.raises(InputError, match="train one first"):
        next_round(project)
    assert (project / "params.yaml").read_text() == before
