"""Making an encoder smaller before training: the vocabulary cut to one language, the first layers kept.

Most of a small multilingual encoder is its embedding table: of multilingual-e5-small's 118 M parameters 96 M stand
there, and Chinese text reaches a tenth of them.
"""

import json
import string
from collections.abc import Callable, Sequence
from typing import Any

from peg.errors import InputError

_WORD_START = "\u2581"
_LATIN_RANKS = 20_000
_ACRONYM_LETTERS = 4
_LATIN = frozenset(string.ascii_letters + string.digits + string.punctuation + " °")
# Ideographs and their marks; general and CJK punctuation, fullwidth forms; currency, letter-like and number signs,
# arrows, mathematics, enclosed numbers, box and geometric signs.
_CHINESE_RANGES = (
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF),
    (0x2010, 0x2027), (0x2030, 0x205E), (0x3000, 0x303F), (0xFF00, 0xFFEF), (0xFE30, 0xFE4F),
    (0x20A0, 0x20CF), (0x2100, 0x22FF), (0x2460, 0x27BF),
)  # fmt: skip
# Latin-1 signs, accented letters (pinyin among them) and Greek: as single characters, not as words of other languages.
_SINGLE_RANGES = ((0xA0, 0x17F), (0x1CD, 0x1DC), (0x1F8, 0x1F9), (0x391, 0x3C9), (0x1E3E, 0x1E3F), (0x3105, 0x312F))


def is_chinese_piece(piece: str, rank: int) -> bool:
    """Whether Chinese text needs a unigram piece, with the Latin words, numbers and signs that occur in it.

    rank: the piece's place in the vocabulary, the frequent ones first. Rare pieces of Latin letters are the words of
    some European language, short ones in capitals (GDP, CEO) apart; without them a rare English word is spelt with
    shorter pieces.
    """
    text = piece.replace(_WORD_START, "")
    num_letters = sum(character in string.ascii_letters for character in text)
    if rank >= _LATIN_RANKS and num_letters > 1 and not (text.isupper() and num_letters <= _ACRONYM_LETTERS):
        return False
    if all(character in _LATIN or _within(character, _CHINESE_RANGES) for character in text):
        return True
    return len(text) == 1 and _within(text, _SINGLE_RANGES)


def _within(character: str, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(low <= ord(character) <= high for low, high in ranges)


def cut_vocabulary(
    backbone: Any, tokenizer: Any, *, keep: Callable[[str, int], bool], prompts: Sequence[str]
) -> tuple[Any, Any]:
    """Keep the special tokens, the prompts' pieces, and those that `keep(piece, rank)` accepts, in their order.

    backbone changes in place; returns it and a new tokenizer. Text made of kept pieces is cut into the same pieces
    as before. Raises InputError for a tokenizer that is not unigram: others build pieces from pieces by merges.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tree = _tokenizer_tree(tokenizer)
    vocab = tree["model"]["vocab"]
    needed = {token["id"] for token in tree["added_tokens"]} | {tree["model"]["unk_id"]}
    needed.update(*(tokenizer(prompt)["input_ids"] for prompt in prompts))
    kept = [rank for rank, (piece, _) in enumerate(vocab) if rank in needed or keep(piece, rank)]
    new_id = {old: new for new, old in enumerate(kept)}
    tree["model"]["vocab"] = [vocab[i] for i in kept]
    tree["model"]["unk_id"] = new_id[tree["model"]["unk_id"]]
    tree["added_tokens"] = [{**token, "id": new_id[token["id"]]} for token in tree["added_tokens"]
                            if token["id"] in new_id]  # fmt: skip
    for token in (tree.get("post_processor") or {}).get("special_tokens", {}).values():
        token["ids"] = [new_id[i] for i in token["ids"]]

    make_fast: Any = PreTrainedTokenizerFast
    cut = make_fast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree, ensure_ascii=False)),
        model_max_length=tokenizer.model_max_length,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    )
    table = backbone.get_input_embeddings()
    rows = table.weight.data[torch.tensor(kept)].clone()
    smaller = torch.nn.Embedding(len(kept), rows.shape[1], padding_idx=cut.pad_token_id, dtype=rows.dtype)
    smaller.weight.data = rows
    backbone.set_input_embeddings(smaller)
    backbone.config.vocab_size = len(kept)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        old = getattr(backbone.config, name, None)
        if old is not None:
            setattr(backbone.config, name, new_id.get(old))
    return backbone, cut


def _tokenizer_tree(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tree: dict[str, Any] = json.loads(backend.to_str()) if backend else {"model": {"type": "slow"}}
    if tree["model"].get("type") != "Unigram":
        raise InputError(
            f"base.vocabulary is 'chinese', which needs a unigram tokenizer, but the base encoder's is of type "
            f"{tree['model'].get('type')}; set base.vocabulary to 'full'"
        )
    return tree


def keep_layers(backbone: Any, num_layers: int) -> Any:
    """Keep the first layers of a transformer, in place. Raises InputError if it has fewer."""
    owner = getattr(backbone, "encoder", backbone)
    name = next((name for name in ("layer", "layers") if hasattr(owner, name)), None)
    if name is None:
        raise InputError(f"base.num_layers is {num_layers}, but a {type(backbone).__name__} is not cut here; use null")
    layers = getattr(owner, name)
    if num_layers > len(layers):
        raise InputError(f"base.num_layers is {num_layers}, but the base encoder has {len(layers)}; ask for fewer")
    setattr(owner, name, layers[:num_layers])
    backbone.config.num_hidden_layers = num_layers
    return backbone
