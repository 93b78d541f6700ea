"""What a recipe costs before it is run: tokens, FLOPs, GPU-hours, memory, network and disk.

All of it is arithmetic on the recipe and the encoder's shape, so these are estimates: a passage counts as often as
queries hold it, padding and looks at dev are left out. What a figure rests on stands beside it.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from peg.config import Config
from peg.errors import InputError
from peg.model.shape import EncoderShape
from peg.workspace import read_json

_METRICS = Path("metrics/prepare.json")
_FP32, _INT64, _INT32 = 4, 8, 4
_UTF8_BYTES_PER_TOKEN = 3  # Chinese: a token is about a character
# Bytes that a layer keeps for the backward pass, per token and hidden unit, in 16 bits, attention not materialised
# (Korthikanti et al. 2022, section 4.1); with its input alone kept, 2.
_ACTIVATION_BYTES, _INPUT_BYTES = 34, 2
_ROW_STATISTICS = 8  # numbers per query in float64 that ranks reduce: log-sum-exps, the positive's score, a count


@dataclass(frozen=True)
class Assumptions:
    """query_tokens, passage_tokens: mean lengths. pairs: examples of an epoch. utilisation: of the GPU's peak."""

    pairs: int
    query_tokens: float
    passage_tokens: float
    utilisation: float
    peak_tflops: float


@dataclass(frozen=True)
class Cost:
    """Of one training. Bytes are per rank; network is per step. hours are GPU-hours at the assumed utilisation."""

    queries: int
    passages: int
    steps: int
    step_tokens: float
    epoch_tokens: float
    all_tokens: float
    example_model_flops: float
    example_executed_flops: float
    step_encoder_flops: float
    step_loss_flops: float
    epoch_flops: float
    all_flops: float
    gpu_hours: float
    hours: float
    examples_per_gpu_second: float
    memory_bytes: dict[str, float]
    network_bytes: dict[str, float]


def training_cost(config: Config, shape: EncoderShape, assumed: Assumptions, *, batch_size: int) -> Cost:
    """What train costs with so many queries in the global batch."""
    train = config.train
    ranks, group = train.num_workers, 1 + train.num_negatives
    passages = batch_size * group
    steps_per_epoch = math.ceil(assumed.pairs / batch_size)
    step_tokens = batch_size * assumed.query_tokens + passages * assumed.passage_tokens
    forward = shape.forward_flops(assumed.query_tokens) + group * shape.forward_flops(assumed.passage_tokens)
    # A backward pass costs two forwards, or one where weights are frozen and their gradient is not formed.
    model = forward * (2 if train.lora else 3)
    kept = min(1.0, train.keep_activations_tokens * ranks / step_tokens)
    executed = model + forward * ((1 - kept) + (1 if train.gradient_checkpointing else 0))
    widths = sum(train.matryoshka_dims) or shape.hidden
    columns = passages + (batch_size if train.passage_to_query else 0)
    loss = 3 * 2 * float(batch_size) * columns * widths
    epoch_flops = assumed.pairs * executed + steps_per_epoch * loss
    gpu_hours = _gpu_hours(train.epochs * epoch_flops, assumed)
    return Cost(
        queries=batch_size,
        passages=passages,
        steps=steps_per_epoch * train.epochs,
        step_tokens=step_tokens,
        epoch_tokens=step_tokens / batch_size * assumed.pairs,
        all_tokens=step_tokens / batch_size * assumed.pairs * train.epochs,
        example_model_flops=model,
        example_executed_flops=executed,
        step_encoder_flops=executed * batch_size,
        step_loss_flops=loss,
        epoch_flops=epoch_flops,
        all_flops=epoch_flops * train.epochs,
        gpu_hours=gpu_hours,
        hours=gpu_hours / ranks,
        examples_per_gpu_second=assumed.pairs * train.epochs / gpu_hours / 3600,
        memory_bytes=_memory(config, shape, batch_size=batch_size, step_tokens=step_tokens),
        network_bytes=_network(config, shape, batch_size=batch_size),
    )


def _trainable(config: Config, shape: EncoderShape) -> int:
    lora = config.train.lora
    return shape.adapter_parameters(lora.rank) if lora else shape.parameters


def _memory(config: Config, shape: EncoderShape, *, batch_size: int, step_tokens: float) -> dict[str, float]:
    """What one rank's GPU holds at the fullest moment of a step, by what it is for."""
    train, trainable = config.train, _trainable(config, shape)
    texts = batch_size * (2 + train.num_negatives) / train.num_workers
    row = shape.hidden * _FP32
    if train.micro_batch_tokens == "auto":
        graph_tokens = 0.0  # takes what is left, by design
    else:
        graph_tokens = float(min(train.micro_batch_tokens, step_tokens / train.num_workers))
    graph_tokens += min(train.keep_activations_tokens, step_tokens / train.num_workers)
    is_bf16 = train.precision == "bf16"  # autocast keeps a copy of the weights in 16 bits
    per_token = (_INPUT_BYTES if train.gradient_checkpointing else _ACTIVATION_BYTES) * (1 if is_bf16 else 2)
    return {
        "weights": float((shape.parameters + (trainable if train.lora else 0)) * (_FP32 + (2 if is_bf16 else 0))),
        "optimizer": 2.0 * trainable * _FP32,
        "mean of the weights": float(trainable * _FP32) if train.ema_decay else 0.0,
        "gradients, sum over ranks": (1.0 if train.num_workers == 1 else 2.0) * trainable * _FP32,
        "embeddings and gradients": 2 * texts * row,
        "all queries, and gradients": (2.0 if train.num_workers == 1 else 4.0) * batch_size * row,
        "scores": 2.0 * min(train.score_block, float(batch_size) ** 2 * (1 + train.num_negatives)) * _FP32,
        "activations, about": graph_tokens * per_token * shape.hidden * shape.num_layers,
    }


def _network(config: Config, shape: EncoderShape, *, batch_size: int) -> dict[str, float]:
    """What one rank sends in a step, by rings: an all-reduce of n bytes sends 2·n·(W - 1)/W, a gather half of that."""
    share = (config.train.num_workers - 1) / config.train.num_workers
    row = shape.hidden * _FP32
    return {
        "gradients of the weights": 2 * share * _trainable(config, shape) * _FP32,
        "queries to all": share * batch_size * row,
        "gradients of queries": share * batch_size * row,
        "row statistics": 2 * share * batch_size * _ROW_STATISTICS * 8,
    }


def data_bytes(config: Config, shape: EncoderShape, assumed: Assumptions) -> dict[str, float]:
    """Bytes at rest, uncompressed, with one query and one new passage per pair."""
    tokens = assumed.pairs * (assumed.query_tokens + assumed.passage_tokens)
    pool = config.mining.pool_size * (_INT64 + _FP32 + _INT32)  # row, score, rank
    return {
        "texts": tokens * _UTF8_BYTES_PER_TOKEN,
        "token ids": tokens * (2 if shape.vocabulary <= 2**16 else 4),
        "embeddings for mining": 2.0 * assumed.pairs * shape.hidden * _FP32,
        "mined pools": float(assumed.pairs * (2 * _INT64 + pool)),
    }


def mining_flops(shape: EncoderShape, assumed: Assumptions) -> float:
    """Of embedding every text once; the search itself is not in it."""
    return assumed.pairs * (shape.forward_flops(assumed.query_tokens) + shape.forward_flops(assumed.passage_tokens))


def other_batch_size(config: Config) -> tuple[int, int]:
    """In-batch negatives that the recipe has, to two digits, and the batch in which so many *queries* are others.

    The paper's "80,000 in-batch negatives" may count passages of the batch, as our recipes do, or its queries.
    """
    negatives = config.train.batch_size * (1 + config.train.num_negatives) - 1
    unit = 10 ** max(0, len(str(negatives)) - 2)
    return negatives // unit * unit, negatives // unit * unit + 1


def count_pairs(config: Config) -> tuple[int, str]:
    """Examples of an epoch, and where the number comes from: what `prepare` counted, else the sources' limits."""
    weights = {source.name: 1.0 for source in config.data.sources}
    weights |= {name: source.weight for name, source in config.train.sources.items()}
    if config.train.data is None:
        if _METRICS.is_file():
            counted = {name: counts["training_pairs"] for name, counts in read_json(_METRICS)["sources"].items()}
            if counted.keys() == weights.keys():  # else another recipe was prepared
                return round(sum(weights[name] * count for name, count in counted.items())), f"from {_METRICS}"
        limits = {source.name: source.limit for source in config.data.sources}
        if all(limits.values()):
            return round(sum(weights[name] * (limit or 0) for name, limit in limits.items())), "the sources' limits"
    elif (rows := Path(config.train.data)).is_file():
        with rows.open("rb") as file:
            return sum(1 for line in file if line.strip()), f"rows of {rows}"
    raise InputError("how many pairs there are is not known before `peg prepare`; give --pairs, for example 1000000")


@dataclass(frozen=True)
class Estimate:
    """recipe: as it is written. other_reading: with `negatives` other queries in the batch, see `other_batch_size`."""

    shape: EncoderShape
    assumed: Assumptions
    pairs_from: str
    tokens_from: str
    ranks: int
    negatives: int
    recipe: Cost
    other_reading: Cost
    data_bytes: dict[str, float]
    mining_gpu_hours: float


def estimate(
    config: Config, shape: EncoderShape, assumed: Assumptions, *, pairs_from: str, tokens_from: str
) -> Estimate:
    """All figures of a recipe; pairs_from and tokens_from say what the assumptions rest on."""
    negatives, other = other_batch_size(config)
    return Estimate(
        shape=shape,
        assumed=assumed,
        pairs_from=pairs_from,
        tokens_from=tokens_from,
        ranks=config.train.num_workers,
        negatives=negatives,
        recipe=training_cost(config, shape, assumed, batch_size=config.train.batch_size),
        other_reading=training_cost(config, shape, assumed, batch_size=other),
        data_bytes=data_bytes(config, shape, assumed),
        mining_gpu_hours=_gpu_hours(mining_flops(shape, assumed), assumed),
    )


def to_json(found: Estimate) -> str:
    """All figures, in tokens, FLOPs, bytes and hours."""
    return json.dumps(asdict(found), ensure_ascii=False, indent=2)


def show(found: Estimate) -> None:
    """Print the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "as the recipe says", f"{found.negatives:,} other queries", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, *cells in zip(_labels(found), _cells(found.recipe), _cells(found.other_reading), strict=True):
        table.add_row(label, *cells)
    for label, size in _with_total("data at rest, uncompressed", found.data_bytes):
        table.add_row(label, _bytes(size))
    table.add_row("GPU-hours to embed all for mining", f"{found.mining_gpu_hours:,.3g}")
    console, assumed = Console(highlight=False), found.assumed
    console.print(table)
    console.print(
        f"\nEstimates, for {assumed.pairs:,} pairs ({found.pairs_from}), queries of {assumed.query_tokens:g} and "
        f"passages of {assumed.passage_tokens:g} tokens ({found.tokens_from}), at {assumed.utilisation:.0%} of "
        f"{assumed.peak_tflops:g} TFLOP/s."
    )


def _labels(found: Estimate) -> list[str]:
    return [
        "queries in a step",
        "passages in a step, none twice",
        "steps",
        "tokens: a step",
        "  an epoch",
        "  in all",
        "FLOPs: an example",
        "  with what is computed twice",
        "  a step, encoder",
        "  a step, loss",
        "  an epoch",
        "  in all",
        "GPU-hours",
        f"hours on {found.ranks:,} GPUs" if found.ranks > 1 else "hours on one GPU",
        "examples a second and GPU",
        *(label for label, _ in _with_total("GPU memory of a rank", found.recipe.memory_bytes)),
        *(label for label, _ in _with_total("sent by a rank in a step", found.recipe.network_bytes)),
    ]


def _cells(cost: Cost) -> list[str]:
    return [
        f"{cost.queries:,}",
        f"{cost.passages:,}",
        f"{cost.steps:,}",
        _short(cost.step_tokens),
        _short(cost.epoch_tokens),
        _short(cost.all_tokens),
        _short(cost.example_model_flops),
        _short(cost.example_executed_flops),
        _short(cost.step_encoder_flops),
        _short(cost.step_loss_flops),
        _short(cost.epoch_flops),
        _short(cost.all_flops),
        f"{cost.gpu_hours:,.3g}",
        f"{cost.hours:,.3g}",
        f"{cost.examples_per_gpu_second:,.3g}",
        *(_bytes(size) for _, size in _with_total("", cost.memory_bytes)),
        *(_bytes(size) for _, size in _with_total("", cost.network_bytes)),
    ]


def _with_total(title: str, sizes: dict[str, float]) -> list[tuple[str, float]]:
    return [(title, sum(sizes.values())), *((f"  {name}", size) for name, size in sizes.items())]


def _gpu_hours(flops: float, assumed: Assumptions) -> float:
    return flops / (assumed.peak_tflops * 1e12 * assumed.utilisation) / 3600


def _short(number: float) -> str:
    """Three digits and a prefix: 26.3 P."""
    power = min(max(0, math.floor(math.log10(number) / 3)), 8) if number > 0 else 0
    return f"{number / 1000**power:,.3g} {' kMGTPEZY'[power].strip()}"


def _bytes(size: float) -> str:
    return f"{_short(size)}B"
