"""Text in, unit vectors out: a transformers backbone, its tokenizer, pooling and prompts.

On disk it is a sentence-transformers folder, so that `SentenceTransformer(path)`, transformers' `AutoModel` and
text-embeddings-inference load what was trained here. This module needs torch and transformers alone.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from peg.errors import InputError
from peg.model.microbatch import pad_ids, token_batches
from peg.progress import Progress
from peg.workspace import file_sha256, read_json, write_json

Pooling = Literal["mean", "cls"]
Kind = Literal["query", "passage"]

WEIGHTS = "model.safetensors"
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "1_Pooling/*"]
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert"}
_NO_POOLER = {"bert", "roberta", "xlm-roberta"}  # their AutoModel adds a pooler that embeddings never use


@dataclass(frozen=True)
class Prompts:
    """What is put before a text, by its role."""

    query: str
    passage: str

    def of(self, kind: Kind) -> str:
        """The prompt of that role."""
        return self.query if kind == "query" else self.passage


class Encoder(nn.Module):
    """Embeds texts as unit vectors, whose inner product is their cosine."""

    def __init__(self, backbone: Any, tokenizer: Any, *, pooling: Pooling, prompts: Prompts, max_length: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.pooling: Pooling = pooling
        self.prompts = prompts
        self.max_length = max_length

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return int(self.backbone.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        pooling: Pooling | None = None,
        prompts: Prompts | None = None,
        max_length: int | None = None,
    ) -> "Encoder":
        """Load a model folder, or a model of the hub by its id, in fp32 and evaluation mode.

        pooling, prompts and max_length override what the folder says. Only safetensors are read, no code of the
        model's own is run. Raises InputError where the model is absent, or says nothing of its pooling.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        folder = local_folder(name, revision)
        if not (folder / WEIGHTS).is_file() and not (folder / f"{WEIGHTS}.index.json").is_file():
            raise InputError(f"{folder} has no {WEIGHTS}; only safetensors are loaded: convert the model's weights")
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            extra = {"add_pooling_layer": False} if config.model_type in _NO_POOLER else {}
            with quiet_transformers():
                backbone = AutoModel.from_pretrained(
                    folder, use_safetensors=True, trust_remote_code=False, **extra
                ).float()
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{name} is not a model that transformers can load: {_first_line(error)}") from error
        said = _saved_settings(folder)
        pooling = pooling or said.get("pooling")
        if pooling is None:
            raise InputError(f"{name} does not say how token vectors are pooled; set base.pooling to 'mean' or 'cls'")
        limit = num_positions(config)
        length = min(max_length or int(said.get("max_length") or limit), limit)
        encoder = cls(
            backbone,
            tokenizer,
            pooling=pooling,
            prompts=prompts or Prompts(said.get("query", ""), said.get("passage", "")),
            max_length=length,
        )
        return encoder.eval()

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Embed padded token ids.

        ids_BL, mask_BL: (B, L), the mask 1 on real tokens. Returns (B, D) unit rows, fp32 or the weights' own
        precision if that is higher.
        """
        hidden_BLD = self.backbone(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        hidden_BLD = hidden_BLD.to(torch.promote_types(hidden_BLD.dtype, torch.float32))
        if self.pooling == "cls":
            pooled_BD = hidden_BLD[:, 0]
        else:
            weight_BL1 = mask_BL.unsqueeze(-1).to(hidden_BLD.dtype)
            pooled_BD = (hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)
        return nn.functional.normalize(pooled_BD, dim=-1)

    def tokenize(self, texts: Sequence[str], *, kind: Kind, max_length: int | None = None) -> list[list[int]]:
        """Token ids of each text, prompt and special tokens included, cut to max_length tokens."""
        prompt = self.prompts.of(kind)
        batch = self.tokenizer(
            [prompt + text for text in texts],
            truncation=True,
            max_length=min(max_length or self.max_length, self.max_length),
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return list(batch["input_ids"])

    @torch.inference_mode()
    def encode(
        self,
        texts: Sequence[str],
        *,
        kind: Kind,
        batch_tokens: int,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Embed texts in batches of similar length, of at most `batch_tokens` padded tokens each.

        Returns (N, D) float32 unit rows, in the order of the texts.
        """
        ids = self.tokenize(texts, kind=kind, max_length=max_length)
        rows_ND = np.empty((len(texts), self.dimension), dtype=np.float32)
        for batch in token_batches([len(one) for one in ids], budget=batch_tokens):
            ids_BL, mask_BL = pad_ids([ids[i] for i in batch], pad_id=self.pad_id, device=self.device)
            rows_ND[batch] = self(ids_BL, mask_BL).float().cpu().numpy()
            if progress:
                progress.advance(len(batch))
        return rows_ND

    @property
    def pad_id(self) -> int:
        """Token id that fills rows up; the mask hides it."""
        return int(self.tokenizer.pad_token_id or 0)

    def save(self, folder: Path) -> None:
        """Write a sentence-transformers folder: safetensors and JSON, byte for byte the same for the same weights."""
        folder.mkdir(parents=True, exist_ok=True)
        with quiet_transformers():
            self.backbone.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)
        write_json(
            folder / "modules.json",
            [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
                {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
            ],
        )
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": self.max_length, "do_lower_case": False})
        write_json(
            folder / "1_Pooling" / "config.json",
            {
                "word_embedding_dimension": self.dimension,
                "pooling_mode_cls_token": self.pooling == "cls",
                "pooling_mode_mean_tokens": self.pooling == "mean",
                "include_prompt": True,
            },
        )
        (folder / "2_Normalize").mkdir(exist_ok=True)
        # sentence-transformers' encode_query and encode_document look for these names.
        prompts = {"query": self.prompts.query, "document": self.prompts.passage, "passage": self.prompts.passage}
        write_json(
            folder / "config_sentence_transformers.json",
            {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
        )


def weights_sha256(folder: Path) -> str:
    """Hex digest of a model folder's weights: the identity of a model."""
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}; give a model folder, for example models/trained")
    return file_sha256(folder / WEIGHTS)


def num_positions(config: Any) -> int:
    """The most tokens that a backbone has positions for; RoBERTa's count starts behind the padding id."""
    limit = int(getattr(config, "max_position_embeddings", 512))
    return limit - int(config.pad_token_id) - 1 if config.model_type in _OFFSET_POSITIONS else limit


def local_folder(name: str, revision: str | None) -> Path:
    """The folder of that name, or the hub's model of that id, downloaded. InputError where there is neither."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "models/")) or name.count("/") != 1:
        raise InputError(f"{name} is no model folder; give one that exists, or a hub id such as owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"{name} is neither a folder here nor could it be had from the hub ({_first_line(error)}); "
            "give a model folder, or a network that reaches the hub"
        ) from error


def _saved_settings(folder: Path) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if (pooling_file := folder / "1_Pooling" / "config.json").is_file():
        pooling = read_json(pooling_file)
        modes = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
        on = [name for name, key in modes.items() if pooling.get(key) or pooling.get("pooling_mode") == name]
        if len(on) != 1:
            raise InputError(f"{pooling_file} asks for a pooling other than 'mean' or 'cls'; set base.pooling to one")
        said["pooling"] = on[0]
    if (length_file := folder / "sentence_bert_config.json").is_file():
        said["max_length"] = read_json(length_file).get("max_seq_length")
    if (prompts_file := folder / "config_sentence_transformers.json").is_file():
        prompts = read_json(prompts_file).get("prompts") or {}
        said["query"] = prompts.get("query") or ""
        said["passage"] = prompts.get("passage") or prompts.get("document") or ""
    return said


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' bars, and its tables of heads that are absent or unused, which are no news."""
    import transformers.utils.logging

    logging: Any = transformers.utils.logging  # its functions have no types
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return json.dumps(str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__)
