"""A tiny real encoder, and texts for it: everything that tests need of a model, made in memory."""

import os
import sys
from pathlib import Path

import pytest
import torch

from peg.model.encoder import Encoder, Prompts

_CHARACTERS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"


def pytest_configure() -> None:
    """Ranks that tests start speak over the loopback alone."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"


def make_encoder(
    *, seed: int = 0, pooling: str = "mean", dropout: float = 0.0, layers: int = 2, hidden: int = 32
) -> Encoder:
    """A BERT with random weights over single characters, in fp32."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {piece: index for index, piece in enumerate([*specials, *sorted(set(_CHARACTERS)), "q", "p", ":", " "])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>"
    )
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=1,
    )
    backbone = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in backbone.parameters():  # BERT's own initialisation maps every text to nearly one vector
            if parameter.ndim > 1:
                parameter.mul_(5)
    prompts = Prompts(query="q: ", passage="p: ")
    return Encoder(backbone, fast, pooling=pooling, prompts=prompts, max_length=48).eval()  # type: ignore[arg-type]


def make_texts(count: int, *, seed: int, low: int = 3, high: int = 20) -> list[str]:
    """Distinct random strings of the encoder's characters."""
    generator = torch.Generator().manual_seed(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        length = int(torch.randint(low, high, (1,), generator=generator))
        rows = torch.randint(len(_CHARACTERS), (length,), generator=generator).tolist()
        texts["".join(_CHARACTERS[row] for row in rows)] = None
    return list(texts)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder on disk, as a sentence-transformers folder."""
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    make_encoder().save(folder)
    return folder
