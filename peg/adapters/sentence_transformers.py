"""The training loss for those who train with sentence-transformers: a module for its SentenceTransformerTrainer.

    weighting = ProgressiveWeighting(kind="progressive", negatives=Ramp(...), queries=Ramp(...))
    loss = ProgressiveLoss(model, weighting=weighting, temperature=0.02, num_steps=None, mini_batch_tokens=4096,
                           margin=None, score_block=8_388_608)
    SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=loss, callbacks=[loss.callback()]).train()

Takes what MultipleNegativesRankingLoss takes: columns of queries, of their positives, and of any number of negatives.
Without weighting it is that loss, except that a text which occurs twice counts once: by its token ids, a passage is one
column, and a positive of another row with the same query is no negative. In-batch negatives are those of this process:
`peg train` is what takes them from all.

Shapes: N queries, M distinct passages, T texts of a side, B of a mini-batch, L tokens, D dimensions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from peg.config import Weighting
from peg.errors import StageError
from peg.model.distributed import Alone
from peg.model.losses import Columns, LossGradients, contrastive_loss
from peg.model.microbatch import token_batches
from peg.model.weighting import weights_at

_SEEDS = 1 << 62
_REPLAY_TOLERANCE = 1e-4
_REPLAY_TOLERANCE_HALF = 2e-2  # GPU kernels may add in another order

_Loss = Callable[[Tensor, Tensor], LossGradients]


class ProgressiveLoss(nn.Module):
    """Weighted InfoNCE over the batch, its gradient in closed form.

    weighting moves over training progress. num_steps: so many calls with gradients are the training; None has
    `callback()` tell the progress, which stays right over gradient accumulation and a resumed training.
    mini_batch_tokens: texts are embedded twice, in mini-batches of so many padded tokens, so that memory does not grow
    with the batch; None embeds once and keeps all activations. margin, score_block: as in params.yaml's train section.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weighting: Weighting,
        temperature: float,
        num_steps: int | None,
        mini_batch_tokens: int | None,
        margin: float | None,
        score_block: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.weighting = weighting
        self.temperature = temperature
        self.num_steps = num_steps
        self.mini_batch_tokens = mini_batch_tokens
        self.margin = margin
        self.score_block = score_block
        self.progress: float | None = 0.0 if num_steps else None
        self._num_calls = 0

    @property
    def uses_gradient_cache(self) -> bool:
        """Whether the model runs in the backward pass too; sentence-transformers' wrappers of losses ask."""
        return self.mini_batch_tokens is not None

    def callback(self) -> TrainerCallback:
        """What tells this loss the trainer's progress; for its list of callbacks."""
        return _Follow(self)

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of this loss."""
        return {
            "weighting": self.weighting.model_dump(),
            "temperature": self.temperature,
            "num_steps": self.num_steps,
            "mini_batch_tokens": self.mini_batch_tokens,
            "margin": self.margin,
            "score_block": self.score_block,
        }

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The loss in nats; its backward fills the gradients of the model's parameters.

        sentence_features: tokenized columns, the queries' first, then the positives', then those of negatives.
        Raises ValueError where columns are no text or too few, or nobody told the progress.
        """
        columns = [dict(features) for features in sentence_features]
        if len(columns) < 2:
            raise ValueError(f"found {len(columns)} column of texts; a query's and a positive's are needed")
        queries, passages = _Side.of(columns[:1]), _Side.of(columns[1:])
        distinct_M, column_T = _first_occurrences(passages.keys)
        passages = passages.take(distinct_M.to(passages.device))
        columns_of = _columns(queries.keys, column_T.to(queries.device))
        closed_form = partial(self._closed_form, columns=columns_of, at=self._progress())
        if self.mini_batch_tokens is None:
            loss: Tensor = _ClosedForm.apply(  # type: ignore[no-untyped-call]
                self._embed(queries), self._embed(passages), closed_form
            )
            return loss
        if isinstance(self.model, DistributedDataParallel):
            raise ValueError(
                "mini_batch_tokens is set and the model is wrapped in DistributedDataParallel, which would reduce "
                "gradients once per mini-batch; set mini_batch_tokens to None, or train with `peg train`"
            )
        return self._embed_twice([queries, passages], closed_form, budget=self.mini_batch_tokens)

    def _progress(self) -> float:
        if self.progress is None and torch.is_grad_enabled():
            raise ValueError(
                "the loss does not know how far training is; give the trainer callbacks=[loss.callback()], or the loss "
                "a num_steps"
            )
        progress = self.progress or 0.0
        if self.num_steps and torch.is_grad_enabled():
            self._num_calls += 1
            self.progress = min(1.0, self._num_calls / max(1, self.num_steps - 1))
        return progress

    def _closed_form(self, query_ND: Tensor, passage_MD: Tensor, *, columns: Columns, at: float) -> LossGradients:
        temperature, weights = weights_at(self.weighting, progress=at, temperature=self.temperature)
        with torch.autocast(query_ND.device.type, enabled=False):
            return contrastive_loss(
                query_ND,
                passage_MD,
                columns,
                temperature=temperature,
                weights=weights,
                margin=self.margin,
                score_block=self.score_block,
                group=Alone(),
            )

    def _embed(self, texts: "_Side") -> Tensor:
        row_BD: Tensor = self.model(texts.features())["sentence_embedding"]
        return nn.functional.normalize(row_BD.to(torch.promote_types(row_BD.dtype, torch.float32)), dim=-1)

    def _embed_twice(self, sides: Sequence["_Side"], closed_form: "_Loss", *, budget: int) -> Tensor:
        passes = _TwoPasses(self._embed, sides, budget=budget)
        embedded = passes.first()
        found = closed_form(*embedded)
        loss = embedded[0].new_tensor(found.loss)
        if torch.is_grad_enabled():
            grads = found.grad_query_ND, found.grad_passage_MD
            loss.requires_grad_().register_hook(  # type: ignore[no-untyped-call]
                partial(passes.second, embedded, grads)
            )
        return loss


class _Follow(TrainerCallback):
    def __init__(self, loss: ProgressiveLoss) -> None:
        self.loss = loss

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.loss.progress = min(1.0, state.global_step / max(1, state.max_steps - 1))


class _ClosedForm(torch.autograd.Function):
    """The loss of embeddings whose gradients are known beforehand."""

    @staticmethod
    def forward(ctx: Any, query_ND: Tensor, passage_MD: Tensor, closed_form: _Loss) -> Tensor:
        found = closed_form(query_ND, passage_MD)
        ctx.save_for_backward(found.grad_query_ND, found.grad_passage_MD)
        return query_ND.new_tensor(found.loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_query_ND, grad_passage_MD = ctx.saved_tensors
        return grad_query_ND * grads[0], grad_passage_MD * grads[0], None


class _TwoPasses:
    """Embeds without a graph, then again with one, mini-batch by mini-batch and with the same dropout."""

    def __init__(self, embed: Callable[["_Side"], Tensor], sides: Sequence["_Side"], *, budget: int) -> None:
        self.embed, self.sides = embed, sides
        device = self.sides[0].device
        self._seed = int(torch.randint(_SEEDS, ()))
        self._devices = [device] if device.type == "cuda" else []
        # The backward pass runs outside of the trainer's autocast.
        self._device_type = device.type
        self._dtype = torch.get_autocast_dtype(device.type)
        self._autocast = torch.is_autocast_enabled(device.type)
        self._batches = [
            (side, torch.from_numpy(rows).to(device))
            for side in range(len(sides))
            for rows in token_batches(sides[side].length_T, budget=budget)
        ]

    def first(self) -> list[Tensor]:
        """(T, D) unit rows of each side."""
        found: list[list[Tensor]] = [[] for _ in self.sides]
        with torch.no_grad(), torch.random.fork_rng(devices=self._devices):
            for index in range(len(self._batches)):
                found[self._batches[index][0]].append(self._embed_again(index))
        embedded = []
        for number, parts in enumerate(found):
            rows_TD = torch.cat(parts)
            at_T = torch.cat([rows for side, rows in self._batches if side == number])
            embedded.append(torch.empty_like(rows_TD).index_copy_(0, at_T, rows_TD))
        return embedded

    def second(self, embedded: Sequence[Tensor], grads: Sequence[Tensor], grad_loss: Tensor) -> None:
        """Backpropagate from the embeddings' gradients, each mini-batch embedded again."""
        tolerance = _REPLAY_TOLERANCE_HALF if self._autocast else _REPLAY_TOLERANCE
        with torch.enable_grad(), torch.random.fork_rng(devices=self._devices):
            for index, (side, rows) in enumerate(self._batches):
                row_BD = self._embed_again(index)
                drift = float((row_BD.detach() - embedded[side][rows]).abs().max())
                if drift > tolerance:
                    raise StageError(
                        f"the second pass differs from the first by {drift:.2g} in mini-batch {index}; the gradient "
                        "would be wrong: set mini_batch_tokens to None, or this model's dropout to 0"
                    )
                torch.autograd.backward([row_BD], [grads[side][rows] * grad_loss])

    def _embed_again(self, index: int) -> Tensor:
        side, rows = self._batches[index]
        torch.manual_seed(self._seed + index)
        with torch.autocast(self._device_type, dtype=self._dtype, enabled=self._autocast):
            return self.embed(self.sides[side].take(rows))


@dataclass(frozen=True)
class _Side:
    """Tokenized texts: tensors by row, what else the tokenizer said of all of them, and what tells texts apart."""

    tensors: dict[str, Tensor]
    rest: dict[str, Any]
    keys: list[bytes]
    length_T: np.ndarray

    @classmethod
    def of(cls, columns: list[dict[str, Any]]) -> "_Side":
        """Columns put one under the other, padded to one width."""
        for features in columns:
            if not all(isinstance(features.get(name), Tensor) for name in ("input_ids", "attention_mask")):
                raise ValueError("a column has no input_ids and attention_mask; this loss takes padded, tokenized text")
        num_rows = len(columns[0]["input_ids"])
        by_row = [name for name, value in columns[0].items() if isinstance(value, Tensor) and _rows(value) == num_rows]
        width = max(features["input_ids"].shape[1] for features in columns)
        tensors = {name: torch.cat([_widened(features, name, width) for features in columns]) for name in by_row}
        rest = {name: value for name, value in columns[0].items() if name not in by_row}
        for features in columns[1:]:
            if other := [name for name in rest if bool(features[name] != rest[name])]:
                raise ValueError(
                    f"columns of passages differ in {', '.join(other)}; give them the same prompt and task"
                )
        mask_TL = tensors["attention_mask"].cpu().numpy().astype(bool)
        ids_TL = tensors["input_ids"].cpu().numpy()
        keys = [ids_L[mask_L].tobytes() for ids_L, mask_L in zip(ids_TL, mask_TL, strict=True)]
        # Padding in front stays, so that positions do.
        length_T = mask_TL.shape[1] - mask_TL[:, ::-1].argmax(1)
        return cls(tensors, rest, keys, length_T)

    @property
    def device(self) -> torch.device:
        return self.tensors["input_ids"].device

    def take(self, rows_B: Tensor) -> "_Side":
        """Those rows alone."""
        at = rows_B.cpu().numpy()
        tensors = {name: value[rows_B] for name, value in self.tensors.items()}
        return _Side(tensors, self.rest, [self.keys[row] for row in at], self.length_T[at])

    def features(self) -> dict[str, Any]:
        """What the model takes, without the padding that all texts end in. It may write into the dictionary."""
        width, full = int(self.length_T.max()), self.tensors["input_ids"].shape
        trimmed = {name: value[:, :width] if value.shape[:2] == full else value for name, value in self.tensors.items()}
        return {**self.rest, **trimmed}


def _rows(value: Tensor) -> int:
    return len(value) if value.ndim else -1


def _widened(features: dict[str, Any], name: str, width: int) -> Tensor:
    value: Tensor = features[name]
    per_token = value.shape == features["input_ids"].shape
    return nn.functional.pad(value, (0, width - value.shape[1])) if per_token else value


def _first_occurrences(keys: list[bytes]) -> tuple[Tensor, Tensor]:
    """Rows at which a key is new, and for every row the number of its key among these."""
    row_of: dict[bytes, int] = {}
    for row, key in enumerate(keys):
        row_of.setdefault(key, row)
    number_of = {key: number for number, key in enumerate(row_of)}
    return torch.tensor(list(row_of.values())), torch.tensor([number_of[key] for key in keys])


def _columns(query_keys: list[bytes], column_T: Tensor) -> Columns:
    """Of each query its positive, and positives that it has in other rows. column_T: positives' columns come first."""
    positive_N = column_T[: len(query_keys)]
    known: dict[bytes, set[int]] = {}
    for key, column in zip(query_keys, positive_N.tolist(), strict=True):
        known.setdefault(key, set()).add(column)
    masked = [
        (row, column)
        for row, (key, own) in enumerate(zip(query_keys, positive_N.tolist(), strict=True))
        for column in sorted(known[key] - {own})
    ]
    row_K, column_K = torch.tensor(masked, dtype=torch.int64, device=column_T.device).reshape(-1, 2).T.contiguous()
    return Columns(positive_N, row_K, column_K)
