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
from peg.model import packed
from peg.model.microbatch import pad_ids, token_batches
from peg.model.packed import Pooling
from peg.model.sentence_folder import read_settings, write_settings
from peg.progress import Progress
from peg.workspace import file_sha256

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
        self._layers = packed.Layers()
        self._checkpoint_layers = False

    @property
    def packed(self) -> bool:
        """Whether texts are embedded without padding; path_line says why not."""
        return packed.reason_against(self.backbone) is None

    @property
    def path_line(self) -> str:
        """One line for a log: how texts are embedded, and why so."""
        if (reason := packed.reason_against(self.backbone)) is not None:
            return f"texts are padded: {reason}"
        dropouts = [layer.attention.self.dropout.p for layer in self.backbone.encoder.layer] if self.training else []
        kernels = {
            name: packed.kernel(self.device, dtype, dropout=max(dropouts, default=0.0))
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        }
        return f"texts are packed without padding; attention: {kernels['bf16']} in bf16, {kernels['fp32']} in fp32"

    @property
    def checkpoint_layers(self) -> bool:
        """Whether a graph keeps each layer's input alone, and computes the layer again in the backward pass."""
        return self._checkpoint_layers

    @checkpoint_layers.setter
    def checkpoint_layers(self, wanted: bool) -> None:
        if not self.packed:
            if wanted and not self.backbone.supports_gradient_checkpointing:
                raise InputError(
                    f"{self.backbone.config.model_type} cannot compute its layers again; "
                    "set train.gradient_checkpointing to false"
                )
            name = "activation" if hasattr(self.backbone, "activation_checkpointing_enable") else "gradient"
            if wanted:  # transformers 5 renamed both
                getattr(self.backbone, f"{name}_checkpointing_enable")({"use_reentrant": False})
            else:
                getattr(self.backbone, f"{name}_checkpointing_disable")()
        self._checkpoint_layers = wanted

    def compile_layers(self) -> None:
        """torch.compile what a packed layer computes beside attention; nothing where texts are padded."""
        self._layers.compile()

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return int(self.backbone.config.hidden_size)

    @property
    def row_dtype(self) -> torch.dtype:
        """Of an embedding: fp32, or the weights' own precision if that is higher."""
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

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
        said = read_settings(folder)
        pooling = pooling or said.get("pooling")
        if pooling is None:
            raise InputError(
                f"{name} does not say how token vectors are pooled; set base.pooling to 'mean', 'cls' or 'last'"
            )
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

        ids_BL, mask_BL: (B, L), the mask 1 on real tokens, which come first. Returns (B, D) unit rows, fp32 or the
        weights' own precision if that is higher.
        """
        hidden_BLD = self.backbone(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        hidden_BLD = hidden_BLD.to(torch.promote_types(hidden_BLD.dtype, torch.float32))
        if self.pooling == "cls":
            pooled_BD = hidden_BLD[:, 0]
        elif self.pooling == "last":
            pooled_BD = hidden_BLD[torch.arange(len(hidden_BLD), device=hidden_BLD.device), mask_BL.sum(1) - 1]
        else:
            weight_BL1 = mask_BL.unsqueeze(-1).to(hidden_BLD.dtype)
            pooled_BD = (hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)
        return nn.functional.normalize(pooled_BD, dim=-1)

    def embed(self, ids: Sequence[np.ndarray | Sequence[int]]) -> Tensor:
        """Embed texts given as token ids, all at once, under the caller's autocast and grad mode.

        Returns (B, D) unit rows in their order, fp32 or the weights' own precision if that is higher.
        Raises ValueError where a text has no tokens.
        """
        if not len(ids):
            return torch.empty(0, self.dimension, device=self.device)
        if empty := [index for index, one in enumerate(ids) if not len(one)]:
            raise ValueError(f"text {empty[0]} has no tokens, so no embedding; give texts of one token at least")
        if not self.packed:
            rows_BD: Tensor = self(*pad_ids(ids, pad_id=self.pad_id, device=self.device))
            return rows_BD
        packing = packed.pack(ids, self.backbone, device=self.device)
        pooled_BD = packed.embed(
            self.backbone, packing, self._layers, pooling=self.pooling, recompute=self.checkpoint_layers
        )
        return nn.functional.normalize(packing.as_given(pooled_BD), dim=-1)

    def tokenize(
        self, texts: Sequence[str], *, kind: Kind, max_length: int | None = None, prompt: str | None = None
    ) -> list[list[int]]:
        """Token ids of each text, prompt and special tokens included, cut to max_length tokens.

        prompt: instead of the encoder's own for that kind.
        """
        prompt = self.prompts.of(kind) if prompt is None else prompt
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
        """Embed texts in batches of similar length, of at most `batch_tokens` tokens each (see token_batches).

        Returns (N, D) float32 unit rows, in the order of the texts.
        """
        ids = self.tokenize(texts, kind=kind, max_length=max_length)
        rows_ND = np.empty((len(texts), self.dimension), dtype=np.float32)
        for batch in token_batches([len(one) for one in ids], budget=batch_tokens, padded=not self.packed):
            rows_ND[batch] = self.embed([ids[i] for i in batch]).float().cpu().numpy()
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
        write_settings(
            folder,
            dimension=self.dimension,
            pooling=self.pooling,
            query_prompt=self.prompts.query,
            passage_prompt=self.prompts.passage,
            max_length=self.max_length,
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
