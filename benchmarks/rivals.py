"""One step of loss and backward: ours against other trainers' on the same texts, weights, precision and dropout.

    python -m benchmarks.rivals
    python -m benchmarks.rivals --queries 64 --pooling cls --rounds 5

First the parameters' gradients are compared, with dropout off; then steps are timed in turns. Memory is what one step
adds to a fresh process that holds model and texts. Each takes the mini-batch size that costs it least CPU time.
sentence-transformers must be installed; GradCache and FlagEmbedding are measured where they are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.workload import TEMPERATURE, Batch, Use, local_texts, make_batch, make_encoder, measure, plain_settings
from peg.model.cached import accumulate_gradients
from peg.model.distributed import Alone
from peg.model.encoder import Encoder, quiet_transformers
from peg.model.microbatch import pad_ids

CPU = torch.device("cpu")
PEG, CACHED, GRAD_CACHE, FLAG = "peg", "sentence-transformers", "GradCache", "FlagEmbedding"
SIZES = {
    PEG: (1024, 2048),  # tokens
    CACHED: (4, 8, 16, 32, 64),  # texts of a column
    GRAD_CACHE: (8, 16, 32),
    FLAG: (16, 32, 64),
}
SEARCH_QUERIES = 64
FLAG_MOST_QUERIES = 64  # it keeps all activations: 256 queries would take tens of GB


@dataclass(frozen=True)
class Trainer:
    """Somebody's step over the batch: adds gradients to the backbone's parameters and returns the loss."""

    backbone: nn.Module
    step: Callable[[], float]


def peg(folder: Path, batch: Batch, size: int, *, precision: str, keep: int) -> Trainer:
    """Ours. size: tokens of a micro-batch."""
    encoder = Encoder.load(str(folder)).train()
    texts = local_texts(batch, device=CPU)
    settings = plain_settings(micro_batch_tokens=size, keep_activations_tokens=keep, precision=precision)
    return Trainer(encoder.backbone, lambda: accumulate_gradients(encoder, texts, settings, Alone())[0])


def sentence_transformers(folder: Path, batch: Batch, size: int, *, precision: str, keep: int) -> Trainer:  # noqa: ARG001
    """CachedMultipleNegativesRankingLoss, fed as its collator feeds it: a column per position, each padded apart."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    with quiet_transformers():
        model = SentenceTransformer(str(folder), device="cpu").train()
    loss_of = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=size)
    group = len(batch.passages) // len(batch.queries)
    columns = [_padded(texts) for texts in (batch.queries, *(batch.passages[start::group] for start in range(group)))]

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of([dict(column) for column in columns], None)
            loss.backward()
        return float(loss.detach())

    return Trainer(model[0].auto_model, step)


def grad_cache(folder: Path, batch: Batch, size: int, *, precision: str, keep: int) -> Trainer:  # noqa: ARG001
    """luyug/GradCache: queries and passages, each padded to its longest."""
    import gradcache

    sys.modules.setdefault("grad_cache", gradcache)  # what the package imports from itself: it was renamed
    from gradcache.grad_cache import GradCache

    embed = _Embed(folder)

    def loss_of(query_ND: Tensor, passage_MD: Tensor) -> Tensor:
        target = torch.arange(len(query_ND)) * (len(passage_MD) // len(query_ND))
        return nn.functional.cross_entropy(query_ND @ passage_MD.T / TEMPERATURE, target)

    cache = GradCache(models=[embed, embed], chunk_sizes=size, loss_fn=loss_of)
    inputs = _padded(batch.queries), _padded(batch.passages)
    return Trainer(embed.encoder.backbone, lambda: float(cache(*inputs)))


def flag_embedding(folder: Path, batch: Batch, size: int, *, precision: str, keep: int) -> Trainer:  # noqa: ARG001
    """FlagEmbedding's encoder-only embedder in sub-batches. It has no cache: all activations are kept."""
    from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import BiEncoderOnlyEmbedderModel

    encoder = Encoder.load(str(folder))
    model = BiEncoderOnlyEmbedderModel(
        encoder.backbone,
        temperature=TEMPERATURE,
        sub_batch_size=size,
        sentence_pooling_method=encoder.pooling,
        normalize_embeddings=True,
    ).train()
    inputs = _padded(batch.queries), _padded(batch.passages)

    def step() -> float:
        loss = model(*inputs).loss
        loss.backward()
        return float(loss.detach())

    return Trainer(encoder.backbone, step)


TRAINERS = {PEG: peg, CACHED: sentence_transformers, GRAD_CACHE: grad_cache, FLAG: flag_embedding}


class _Embed(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = Encoder.load(str(folder)).train()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        rows_BD: Tensor = self.encoder(input_ids, attention_mask)
        return rows_BD


def _padded(texts: list[np.ndarray]) -> dict[str, Tensor]:
    ids_BL, mask_BL = pad_ids(texts, pad_id=1, device=CPU)
    return {"input_ids": ids_BL, "attention_mask": mask_BL}


def main() -> int:
    """Print a table per number of queries and pooling."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.fresh:
        print(json.dumps(asdict(_memory(json.loads(arguments.fresh)))))
        return 0
    present = [name for name in TRAINERS if name in {PEG, *arguments.trainers} and _is_present(name)]
    with tempfile.TemporaryDirectory() as temporary:
        for pooling in arguments.pooling:
            for num_queries in arguments.queries:
                _compare(present, Path(temporary), arguments, pooling=pooling, num_queries=num_queries)
            if arguments.bf16_queries:
                _compare_bf16(present, Path(temporary), arguments, pooling=pooling)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--negatives", type=int, default=5, help="mined negatives of a query")
    parser.add_argument("--pooling", nargs="+", choices=["cls", "mean"], default=["cls", "mean"])
    parser.add_argument("--trainers", nargs="+", choices=[*TRAINERS], default=[*TRAINERS])
    parser.add_argument("--rival-sizes", type=int, nargs="+", help="try these mini-batches alone, in texts")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=21128, help="BERT's Chinese one by default")
    parser.add_argument("--dropout", type=float, default=0.1, help="while timing; gradients are compared without")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=int, default=0, help="tokens whose activations our step keeps")
    parser.add_argument("--bf16-queries", type=int, default=8, help="for gradients in bf16 against fp32; 0 for none")
    parser.add_argument("--fresh", help=argparse.SUPPRESS)
    return parser


def _is_present(name: str) -> bool:
    try:
        if name == CACHED:
            import sentence_transformers as module
        elif name == GRAD_CACHE:
            import gradcache as module
        elif name == FLAG:
            import FlagEmbedding.finetune.embedder.encoder_only.base.modeling as module
        else:
            return True
    except ImportError as error:
        print(f"{name} is left out: {error}")
        return False
    print(f"{name} {getattr(module, '__version__', '')}")
    return True


def _write_model(folder: Path, arguments: argparse.Namespace, *, pooling: str, dropout: float) -> Path:
    path = folder / f"{pooling}-{dropout}"
    if not path.is_dir():
        make_encoder(
            layers=arguments.layers,
            hidden=arguments.hidden,
            heads=arguments.hidden // 64,
            intermediate=4 * arguments.hidden,
            vocabulary=arguments.vocabulary,
            pooling=pooling,
            dropout=dropout,
        ).save(path)
    return path


def _compare(
    present: list[str], temporary: Path, arguments: argparse.Namespace, *, pooling: str, num_queries: int
) -> None:
    batch = make_batch(num_queries, num_negatives=arguments.negatives, vocabulary=arguments.vocabulary)
    print(
        f"\n{num_queries} queries, {len(batch.passages)} passages, {batch.num_tokens} tokens, {pooling} pooling, fp32"
    )
    present = [name for name in present if name != FLAG or num_queries <= FLAG_MOST_QUERIES]
    still = _write_model(temporary, arguments, pooling=pooling, dropout=0.0)
    expected = _gradient(TRAINERS[PEG](still, batch, SIZES[PEG][0], precision="fp32", keep=0))
    for name in present[1:]:
        cosine, ratio = _agreement(expected, _gradient(TRAINERS[name](still, batch, 32, precision="fp32", keep=0)))
        print(f"  gradient of {name}: cosine 1 - {1 - cosine:.1e}, length x {ratio:.7f}")

    folder = _write_model(temporary, arguments, pooling=pooling, dropout=arguments.dropout)
    sizes = {name: _best_size(name, folder, batch, arguments) for name in present}
    trainers = {
        name: TRAINERS[name](folder, batch, size, precision="fp32", keep=arguments.keep) for name, size in sizes.items()
    }
    uses: dict[str, list[Use]] = {name: [] for name in present}
    for _ in range(arguments.rounds):
        for name, trainer in trainers.items():
            uses[name].append(measure(trainer.step))
    _print_table(
        present, sizes, uses, {name: _fresh(name, sizes[name], folder, num_queries, arguments) for name in present}
    )


def _best_size(name: str, folder: Path, batch: Batch, arguments: argparse.Namespace) -> int:
    """Of those tried, the size that costs least CPU time on the batch's first queries."""
    num_queries = min(len(batch.queries), SEARCH_QUERIES)
    group = 1 + arguments.negatives
    part = Batch(batch.queries[:num_queries], batch.passages[: num_queries * group])
    sizes = SIZES[name] if name == PEG else arguments.rival_sizes or SIZES[name]
    spent = {}
    for size in sizes:
        trainer = TRAINERS[name](folder, part, size, precision="fp32", keep=arguments.keep)
        spent[size] = measure(trainer.step).cpu_s
    print(f"  {name}: CPU s by size " + ", ".join(f"{size}: {spent[size]:.2f}" for size in spent), flush=True)
    return min(spent, key=spent.__getitem__)


def _print_table(present: list[str], sizes: dict[str, int], uses: dict[str, list[Use]], memory: dict[str, Use]) -> None:
    rounds = f"median of {len(uses[PEG])}"
    print(f"  {rounds:<24}{'size':>6}{'CPU s':>9}{'ratio':>7}{'wall s':>9}{'ratio':>7}{'MB':>8}{'ratio':>7}")
    ours = [median(use.cpu_s for use in uses[PEG]), median(use.wall_s for use in uses[PEG]), memory[PEG].grown_bytes]
    for name in present:
        found = median(use.cpu_s for use in uses[name]), median(use.wall_s for use in uses[name])
        grown = memory[name].grown_bytes
        print(
            f"  {name:<24}{sizes[name]:>6}{found[0]:>9.2f}{found[0] / ours[0]:>7.2f}{found[1]:>9.2f}"
            f"{found[1] / ours[1]:>7.2f}{grown / 1e6:>8.0f}{grown / ours[2]:>7.2f}"
        )


def _compare_bf16(present: list[str], temporary: Path, arguments: argparse.Namespace, *, pooling: str) -> None:
    batch = make_batch(arguments.bf16_queries, num_negatives=arguments.negatives, vocabulary=arguments.vocabulary)
    folder = _write_model(temporary, arguments, pooling=pooling, dropout=0.0)
    exact = _gradient(TRAINERS[PEG](folder, batch, 1024, precision="fp32", keep=0))
    print(f"\n{arguments.bf16_queries} queries, {pooling} pooling: gradient in bf16 against fp32")
    for name in (name for name in (PEG, CACHED) if name in present):
        size = 1024 if name == PEG else 32
        cosine, ratio = _agreement(exact, _gradient(TRAINERS[name](folder, batch, size, precision="bf16", keep=0)))
        print(f"  {name}: cosine {cosine:.5f}, length x {ratio:.4f}")


def _gradient(trainer: Trainer) -> dict[str, Tensor]:
    trainer.backbone.zero_grad()
    trainer.step()
    return {
        name: parameter.grad.double()
        for name, parameter in trainer.backbone.named_parameters()
        if parameter.grad is not None
    }


def _agreement(expected: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[float, float]:
    """Cosine of the whole gradient, and length of `found` over that of `expected`."""
    if other := expected.keys() ^ found.keys():
        raise ValueError(
            f"one side alone has gradients of {', '.join(sorted(other))}; both are to train the same weights"
        )
    dot = sum(float((expected[name] * found[name]).sum()) for name in expected)
    lengths = [sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5 for grads in (expected, found)]
    return dot / (lengths[0] * lengths[1]), lengths[1] / lengths[0]


def _fresh(name: str, size: int, folder: Path, num_queries: int, arguments: argparse.Namespace) -> Use:
    wanted = {
        "name": name,
        "size": size,
        "folder": str(folder),
        "num_queries": num_queries,
        "num_negatives": arguments.negatives,
        "vocabulary": arguments.vocabulary,
        "keep": arguments.keep,
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.rivals",
        "--threads",
        str(arguments.threads),
        "--fresh",
        json.dumps(wanted),
    ]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "TQDM_DISABLE": "1"}
    )
    return Use(**json.loads(done.stdout.splitlines()[-1]))


def _memory(wanted: dict[str, Any]) -> Use:
    batch = make_batch(wanted["num_queries"], num_negatives=wanted["num_negatives"], vocabulary=wanted["vocabulary"])
    trainer = TRAINERS[wanted["name"]](
        Path(wanted["folder"]), batch, wanted["size"], precision="fp32", keep=wanted["keep"]
    )
    return measure(trainer.step)


if __name__ == "__main__":
    sys.exit(main())
