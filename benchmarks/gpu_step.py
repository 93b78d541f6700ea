"""A training step of PEG's size on one GPU: tokens and examples a second, memory, and the share of the GPU's peak.

    python -m benchmarks.gpu_step
    python -m benchmarks.gpu_step --queries 1024 --rival-queries 0

The encoder has BERT-large's size (24 layers x 1024) and random weights; bf16, 13,334 queries and 80,004 passages, no
text repeated, no activation kept. The peak is what a product of two 8192 x 8192 matrices reaches in the same run.
Model FLOPs are 3 forwards (backward counts as 2) of real tokens; executed FLOPs are 4, for the second pass. With CLS
pooling a forward needs the last layer for one token of each text, which is what our model FLOPs and executed FLOPs
count; a rival executes it for all. sentence-transformers' cached loss does the same for --rival-queries of the queries.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.workload import TEMPERATURE, Batch, local_texts, make_batch, make_encoder, plain_settings
from peg.model.cached import accumulate_gradients
from peg.model.distributed import Alone
from peg.model.encoder import Encoder, quiet_transformers
from peg.model.microbatch import pad_ids

GROUP = 6
PRODUCT = 8192


def main() -> int:
    """Print a line for each side; exit code 2 where there is no CUDA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=13_334)
    parser.add_argument("--rival-queries", type=int, default=1024, help="0 leaves sentence-transformers out")
    parser.add_argument(
        "--rival-size", type=int, nargs="+", default=[64, 128, 256, 512], help="its mini-batches, in texts"
    )
    parser.add_argument("--query-tokens", type=float, default=32, help="on average")
    parser.add_argument("--passage-tokens", type=float, default=128, help="on average")
    parser.add_argument("--micro-batch-tokens", type=int, default=32_768)
    parser.add_argument("--score-block", type=int, default=268_435_456)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=21_128)
    parser.add_argument("--pooling", choices=["cls", "mean"], default="cls")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the code, in fp32")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device was found, and this measures one; --device cpu with small sizes tries the code alone")
        return 2
    device = torch.device(arguments.device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    peak = _peak_flops(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: products reach {peak / 1e12:.2f} TFLOP/s in {precision}")
    encoder = make_encoder(
        layers=arguments.layers,
        hidden=arguments.hidden,
        heads=max(1, arguments.hidden // 64),
        intermediate=4 * arguments.hidden,
        vocabulary=arguments.vocabulary,
        pooling=arguments.pooling,
        dropout=0.0,
    ).to(device)
    print(encoder.path_line)
    batch = make_batch(
        arguments.queries,
        num_negatives=GROUP - 1,
        vocabulary=arguments.vocabulary,
        mean_tokens=(arguments.query_tokens, arguments.passage_tokens),
    )
    subset = _head(batch, arguments.rival_queries)
    for part in [batch] if len(batch.queries) <= len(subset.queries) else [batch, subset]:
        if part.queries:
            step = _ours(encoder, part, arguments, precision)
            _report(
                "peg", step, encoder, part, rounds=arguments.rounds, peak=peak, executed=_forward_flops(encoder, part)
            )
    if subset.queries:
        _report_rival(encoder, subset, arguments, precision, peak)
    return 0


def _ours(encoder: Encoder, batch: Batch, arguments: argparse.Namespace, precision: str) -> Callable[[], object]:
    texts = local_texts(batch, device=encoder.device)
    settings = plain_settings(
        micro_batch_tokens=arguments.micro_batch_tokens,
        keep_activations_tokens=0,
        precision=precision,
        score_block=arguments.score_block,
    )
    return lambda: accumulate_gradients(encoder, texts, settings, Alone())


def _report_rival(encoder: Encoder, batch: Batch, arguments: argparse.Namespace, precision: str, peak: float) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    device = encoder.device
    with tempfile.TemporaryDirectory() as folder:
        encoder.save(Path(folder))
        with quiet_transformers():
            model = SentenceTransformer(folder, device=str(device)).train()
    texts = [batch.queries, *(batch.passages[start::GROUP] for start in range(GROUP))]
    columns = []
    for column in texts:
        ids_BL, mask_BL = pad_ids(column, pad_id=1, device=device)
        columns.append({"input_ids": ids_BL, "attention_mask": mask_BL})
    for size in arguments.rival_size:
        loss_of = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=size)

        def step(loss_of: CachedMultipleNegativesRankingLoss = loss_of) -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss_of([dict(column) for column in columns], None).backward()

        name = f"sentence-transformers, mini-batches of {size}"
        executed = _forward_flops(encoder, batch, every_token=True)
        _report(name, step, encoder, batch, rounds=arguments.rounds, peak=peak, executed=executed)


def _report(
    name: str,
    step: Callable[[], object],
    encoder: Encoder,
    batch: Batch,
    *,
    rounds: int,
    peak: float,
    executed: float,
) -> None:
    on_gpu = encoder.device.type == "cuda"
    seconds = []
    for _ in range(1 + rounds):  # the first one warms up
        encoder.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    best = min(seconds[1:])
    memory = f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if on_gpu else ""
    print(
        f"{name}: {len(batch.queries):,} queries, {batch.num_tokens:,} tokens in {best:.2f} s: "
        f"{batch.num_tokens / best:,.0f} tokens/s, {len(batch.queries) / best:,.1f} examples/s{memory}; of the peak "
        f"{4 * executed / best / peak:.1%} executed, {3 * _forward_flops(encoder, batch) / best / peak:.1%} model",
        flush=True,
    )


def _forward_flops(encoder: Encoder, batch: Batch, *, every_token: bool = False) -> float:
    """Of one forward over real tokens, two for every multiplication: products with weights, and those of attention.

    every_token: the last layer too computes all of them, where CLS pooling needs one of each text.
    """
    config = encoder.backbone.config
    hidden, inner = config.hidden_size, config.intermediate_size
    length_T = np.array([len(ids) for ids in (*batch.queries, *batch.passages)], dtype=np.float64)
    tokens, pairs = float(length_T.sum()), float((length_T**2).sum())
    key_and_value, others = 4 * hidden**2, 4 * hidden**2 + 4 * hidden * inner
    layer = (key_and_value + others) * tokens + 4 * hidden * pairs
    last = layer
    if encoder.pooling == "cls" and not every_token:
        last = key_and_value * tokens + others * len(length_T) + 4 * hidden * tokens
    return (config.num_hidden_layers - 1) * layer + last


def _head(batch: Batch, num_queries: int) -> Batch:
    return Batch(batch.queries[:num_queries], batch.passages[: num_queries * GROUP])


def _peak_flops(device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    size, dtype, repeats = (PRODUCT, torch.bfloat16, 50) if on_gpu else (256, torch.float32, 2)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        left @ right
    if on_gpu:
        torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
