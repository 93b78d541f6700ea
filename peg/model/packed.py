"""Encoders of the BERT family without padding: all tokens of a micro-batch in one row of tokens.

The modules are transformers' own: they hold the weights and the dropout, and are called as they stand, so that adapters
put in place of their linear layers, and hooks, work. Only what lies between them is done here: linear layers see every
real token once, attention sees each text's own tokens, and where one token stands for a text, the last layer computes
that token alone.

Shapes: T tokens of B texts, H hidden, D per head; R rows that leave a layer (T, or B of the last layer).
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Pooling = Literal["mean", "cls", "last"]
Kernel = Literal["varlen_attn", "flash_attn", "dense"]

_FAMILY = {"bert", "roberta", "xlm-roberta"}
_COUNT_FROM_PADDING = {"roberta", "xlm-roberta"}


def _optional(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


_varlen_attn = _optional("torch.nn.attention.varlen", "varlen_attn")  # from torch 2.10 on; 16 bits, no dropout
_flash_attn_varlen = _optional("flash_attn", "flash_attn_varlen_func")  # 16 bits, has dropout


def reason_against(backbone: Any) -> str | None:
    """Why this transformers model cannot be computed without padding here; None if it can."""
    config = backbone.config
    if config.model_type not in _FAMILY:
        return f"{config.model_type} is none of {', '.join(sorted(_FAMILY))}"
    if config.is_decoder:
        return "it is a decoder"
    if (kind := getattr(config, "position_embedding_type", None) or "absolute") != "absolute":
        return f"its positions are {kind}, not absolute"
    return None


@dataclass(frozen=True)
class Packing:
    """Texts laid end to end, longest first.

    ids_T, position_T: of every token. lengths: of the B texts, on the host. runs: (texts, length) of neighbours of
    equal length. order: index of the text that was given, for each of the B. start_B1: where each text begins, and T.
    """

    ids_T: Tensor
    position_T: Tensor
    start_B1: Tensor
    lengths: np.ndarray
    runs: list[tuple[int, int]]
    order: np.ndarray

    def as_given(self, rows_BH: Tensor) -> Tensor:
        """A row of each text, back in the order in which the texts were given."""
        if (np.diff(self.order) > 0).all():  # micro-batches come sorted
            return rows_BH
        return rows_BH[torch.from_numpy(np.argsort(self.order)).to(rows_BH.device)]


def pack(ids: Sequence[np.ndarray | Sequence[int]], backbone: Any, *, device: torch.device) -> Packing:
    """Lay texts end to end, longest first; equal lengths keep their order. No text is empty."""
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    order = np.argsort(-lengths, kind="stable")
    lengths = lengths[order]
    ids_T = np.concatenate([ids[index] for index in order], dtype=np.int64)
    start_B1 = np.concatenate([[0], lengths.cumsum()])
    position_T = np.arange(len(ids_T)) - start_B1[:-1].repeat(lengths)
    if backbone.config.model_type in _COUNT_FROM_PADDING:
        position_T = _count_from_padding(ids_T, start_B1, lengths, pad_id=backbone.embeddings.padding_idx)
    length_R, count_R = np.unique(lengths, return_counts=True)
    on_device = torch.from_numpy(np.stack([ids_T, position_T])).to(device)
    return Packing(
        ids_T=on_device[0],
        position_T=on_device[1],
        start_B1=torch.from_numpy(start_B1.astype(np.int32)).to(device),
        lengths=lengths,
        runs=list(zip(count_R[::-1].tolist(), length_R[::-1].tolist(), strict=True)),
        order=order,
    )


def _count_from_padding(ids_T: np.ndarray, start_B1: np.ndarray, lengths: np.ndarray, *, pad_id: int) -> np.ndarray:
    """RoBERTa's positions: pad_id + 1, + 2, …; a padding token inside a text has position pad_id and is not counted."""
    real_T = ids_T != pad_id
    seen_T1 = np.concatenate([[0], real_T.cumsum()])
    position_T: np.ndarray = (seen_T1[1:] - seen_T1[start_B1[:-1]].repeat(lengths)) * real_T + pad_id
    return position_T


class Layers:
    """What a layer computes before and behind attention, compiled or not; no state but that."""

    def __init__(self) -> None:
        self.project: Callable[..., tuple[Tensor, Tensor, Tensor]] = _project
        self.finish: Callable[..., Tensor] = _finish

    def compile(self) -> None:
        """torch.compile both parts, for any number of tokens; attention is a kernel of its own already."""
        self.project = torch.compile(_project, dynamic=True)
        self.finish = torch.compile(_finish, dynamic=True)

    def __call__(self, layer: Any, hidden_TH: Tensor, row_R: Tensor | None, packing: Packing) -> Tensor:
        """One layer. row_R: the tokens that leave it, one of each text; None lets all leave. Returns (R, H)."""
        rows_RH = hidden_TH if row_R is None else hidden_TH.index_select(0, row_R)
        attention = layer.attention.self
        query, key, value = self.project(attention, rows_RH, hidden_TH)
        dropout = attention.dropout.p if attention.training else 0.0
        context_RH = _attend(query, key, value, packing, num_heads=attention.num_attention_heads, dropout=dropout)
        return self.finish(layer, context_RH, rows_RH)


def _project(attention: Any, rows_RH: Tensor, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attention.query(rows_RH), attention.key(hidden_TH), attention.value(hidden_TH)


def _finish(layer: Any, context_RH: Tensor, rows_RH: Tensor) -> Tensor:
    attended_RH = layer.attention.output(context_RH, rows_RH)
    out_RH: Tensor = layer.output(layer.intermediate(attended_RH), attended_RH)
    return out_RH


def embed(backbone: Any, packing: Packing, layers: Layers, *, pooling: Pooling, recompute: bool) -> Tensor:
    """Pooled vectors (B, H) in the packing's order, at least fp32.

    recompute: a layer keeps its input alone, and is computed again, with the same dropout, in the backward pass.
    """
    hidden_TH = backbone.embeddings(
        input_ids=packing.ids_T[None],
        position_ids=packing.position_T[None],
        token_type_ids=torch.zeros_like(packing.ids_T)[None],
    )[0]
    row_B = None if pooling == "mean" else _token_of_each_text(packing, pooling)
    stack = backbone.encoder.layer
    for index, layer in enumerate(stack):
        row_R = row_B if index == len(stack) - 1 else None
        if recompute and torch.is_grad_enabled():
            hidden_TH = checkpoint(layers, layer, hidden_TH, row_R, packing, use_reentrant=False)
        else:
            hidden_TH = layers(layer, hidden_TH, row_R, packing)
    hidden_TH = hidden_TH.to(torch.promote_types(hidden_TH.dtype, torch.float32))
    return _mean_of_each_text(hidden_TH, packing) if pooling == "mean" else hidden_TH


def _token_of_each_text(packing: Packing, pooling: Pooling) -> Tensor:
    return packing.start_B1[:-1] if pooling == "cls" else packing.start_B1[1:] - 1


def _mean_of_each_text(hidden_TH: Tensor, packing: Packing) -> Tensor:
    parts = torch.split(hidden_TH, [texts * length for texts, length in packing.runs])
    means = [part.view(*run, -1).mean(1) for part, run in zip(parts, packing.runs, strict=True)]
    return torch.cat(means)


def kernel(device: torch.device, dtype: torch.dtype, *, dropout: float) -> Kernel:
    """What computes attention: one kernel over texts of any length, or dense attention per run of equal lengths."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        if _varlen_attn is not None and dropout == 0:
            return "varlen_attn"
        if _flash_attn_varlen is not None:
            return "flash_attn"
    return "dense"


def _attend(
    query_RH: Tensor, key_TH: Tensor, value_TH: Tensor, packing: Packing, *, num_heads: int, dropout: float
) -> Tensor:
    """Each text's queries over its own keys; (R, H)."""
    num_texts, longest = len(packing.lengths), int(packing.lengths[0])
    one_each = len(query_RH) == num_texts
    chosen = kernel(query_RH.device, query_RH.dtype, dropout=dropout)
    if chosen == "dense":
        return _attend_densely(query_RH, key_TH, value_TH, packing.runs, num_heads=num_heads, dropout=dropout)
    query, key, value = (rows.view(len(rows), num_heads, -1) for rows in (query_RH, key_TH, value_TH))
    start_B1 = packing.start_B1
    start_query_B1 = torch.arange(num_texts + 1, dtype=torch.int32, device=start_B1.device) if one_each else start_B1
    where = (start_query_B1, start_B1, 1 if one_each else longest, longest)
    if chosen == "varlen_attn":
        context: Tensor = _varlen_attn(query, key, value, *where)
    else:
        context = _flash_attn_varlen(query, key, value, *where, dropout_p=dropout)
    return context.reshape(query_RH.shape)


def _attend_densely(
    query_RH: Tensor,
    key_TH: Tensor,
    value_TH: Tensor,
    runs: list[tuple[int, int]],
    *,
    num_heads: int,
    dropout: float,
) -> Tensor:
    tokens = [texts * length for texts, length in runs]
    one_each = len(query_RH) != len(key_TH)
    queries = torch.split(query_RH, [texts for texts, _ in runs] if one_each else tokens)
    context = []
    for (texts, _), *parts in zip(
        runs, queries, torch.split(key_TH, tokens), torch.split(value_TH, tokens), strict=True
    ):
        query, key, value = (part.view(texts, -1, num_heads, part.shape[1] // num_heads) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), dropout_p=dropout
        )
        context.append(mixed.transpose(1, 2).reshape(-1, query_RH.shape[1]))
    return torch.cat(context)
