"""What a sentence-transformers folder says beside weights and tokenizer: pooling, prompts, length, in JSON."""

from pathlib import Path
from typing import Any

from peg.errors import InputError
from peg.model.packed import Pooling
from peg.workspace import read_json, write_json

# As a switch of its own, which every version reads, and as the one name that sentence-transformers writes by now.
_SAVED_AS: dict[Pooling, tuple[str, str]] = {
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "cls": ("pooling_mode_cls_token", "cls"),
    "last": ("pooling_mode_lasttoken", "lasttoken"),
}


def write_settings(
    folder: Path, *, dimension: int, pooling: Pooling, query_prompt: str, passage_prompt: str, max_length: int
) -> None:
    """Make a folder with a transformers model in it one that `SentenceTransformer(folder)` loads."""
    write_json(
        folder / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": dimension,
            **{switch: pooling == ours for ours, (switch, _) in _SAVED_AS.items()},
            "include_prompt": True,
        },
    )
    (folder / "2_Normalize").mkdir(exist_ok=True)
    # sentence-transformers' encode_query and encode_document look for these names.
    prompts = {"query": query_prompt, "document": passage_prompt, "passage": passage_prompt}
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """What the folder says of pooling, max_length, query and passage prompt; what it does not say is absent or None.

    Raises InputError at a pooling that is not ours.
    """
    said: dict[str, Any] = {}
    if (pooling_file := folder / "1_Pooling" / "config.json").is_file():
        pooling = read_json(pooling_file)
        on = [
            ours
            for ours, (switch, name) in _SAVED_AS.items()
            if pooling.get(switch) or pooling.get("pooling_mode") == name
        ]
        if len(on) != 1:
            raise InputError(
                f"{pooling_file} asks for a pooling other than 'mean', 'cls' or 'last'; set base.pooling to one"
            )
        said["pooling"] = on[0]
    if (length_file := folder / "sentence_bert_config.json").is_file():
        said["max_length"] = read_json(length_file).get("max_seq_length")
    if (prompts_file := folder / "config_sentence_transformers.json").is_file():
        prompts = read_json(prompts_file).get("prompts") or {}
        said["query"] = prompts.get("query") or ""
        said["passage"] = prompts.get("passage") or prompts.get("document") or ""
    return said
