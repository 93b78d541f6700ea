from pathlib import Path

import numpy as np
import pytest

from peg.errors import InputError
from peg.model.encoder import Encoder
from peg.model.sentence_folder import read_settings
from peg.workspace import write_json
from tests.conftest import make_encoder, make_texts


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_saved_encoder_is_loaded_with_its_pooling_here_and_by_sentence_transformers(
    pooling: str, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers")
    encoder, texts = make_encoder(pooling=pooling), make_texts(5, seed=0)
    encoder.save(tmp_path)
    expected = encoder.encode(texts, kind="passage", batch_tokens=100)
    again = Encoder.load(str(tmp_path))
    assert (again.pooling, again.prompts, again.max_length) == (pooling, encoder.prompts, encoder.max_length)
    np.testing.assert_allclose(again.encode(texts, kind="passage", batch_tokens=100), expected, atol=1e-6)
    theirs = library.SentenceTransformer(str(tmp_path), device="cpu").encode(texts, prompt_name="passage")
    np.testing.assert_allclose(theirs, expected, atol=1e-5)


@pytest.mark.parametrize(("name", "pooling"), [("mean", "mean"), ("cls", "cls"), ("lasttoken", "last")])
def test_a_pooling_is_known_by_the_name_that_newer_versions_write(name: str, pooling: str, tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    write_json(tmp_path / "1_Pooling/config.json", {"embedding_dimension": 8, "pooling_mode": name})
    assert read_settings(tmp_path) == {"pooling": pooling}


@pytest.mark.parametrize("said", [{"pooling_mode": "max"}, {"pooling_mode_cls_token": True, "pooling_mode": "mean"}])
def test_other_poolings_are_refused(said: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    write_json(tmp_path / "1_Pooling/config.json", said)
    with pytest.raises(InputError, match="pooling other than 'mean', 'cls' or 'last'"):
        read_settings(tmp_path)
