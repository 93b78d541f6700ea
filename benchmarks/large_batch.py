"""An optimizer step over ever more in-batch negatives: does time per query, or memory, grow with the score matrix?

    python -m benchmarks.large_batch                                    # 256 to 80,000: about half an hour on two cores
    python -m benchmarks.large_batch --negatives 256 1024 --encoder models/base

A query brings its positive and 5 negatives, so that M = 6 N passages make M - 1 negatives. No text is repeated and no
activation is kept. Each batch is a step, AdamW's included, in a process of its own, after a small one that makes the
optimizer's state. What has to grow is the embeddings and their gradients: 2 x (N + M) x D x 4 bytes.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict

import torch

from benchmarks.workload import Use, local_texts, make_batch, make_encoder, measure, plain_settings
from peg.model.cached import accumulate_gradients
from peg.model.distributed import Alone
from peg.model.encoder import Encoder

GROUP = 6
WARM_UP_QUERIES = 4


def main() -> int:
    """Print a line per batch, then how time and memory grow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--negatives", type=int, nargs="+", default=[256, 1024, 10_000, 40_000, 80_000])
    parser.add_argument("--query-tokens", type=float, default=10, help="on average")
    parser.add_argument("--passage-tokens", type=float, default=24, help="on average")
    parser.add_argument("--encoder", help="a model folder; 3 layers x 384 with random weights without it")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--score-block", type=int, default=8_388_608)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        use, dimension = _step(arguments, num_queries=arguments.only)
        print(json.dumps([asdict(use), dimension]))
        return 0
    heads = ("negatives", "queries", "wall s", "CPU s", "ms a query", "ratio", "peak MB", "grown MB")
    print("".join(f"{head:>11}" for head in heads))
    found: list[tuple[int, Use]] = []
    dimension = 0
    for negatives in sorted(arguments.negatives):
        num_queries = -(-(negatives + 1) // GROUP)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.large_batch", *sys.argv[1:], "--only", str(num_queries)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        values, dimension = json.loads(done.stdout.splitlines()[-1])
        use = Use(**values)
        found.append((num_queries, use))
        per_query = [one.wall_s / count for count, one in (found[0], found[-1])]
        print(
            f"{GROUP * num_queries - 1:>11,}{num_queries:>11,}{use.wall_s:>11.1f}{use.cpu_s:>11.1f}"
            f"{per_query[1] * 1e3:>11.1f}{per_query[1] / per_query[0]:>11.2f}"
            f"{use.peak_bytes / 1e6:>11.0f}{use.grown_bytes / 1e6:>11.0f}",
            flush=True,
        )
    _print_growth(found, dimension)
    return 0


def _print_growth(found: list[tuple[int, Use]], dimension: int) -> None:
    """From the first batch of 10,000 negatives or more to the largest."""
    first = next((pair for pair in found if GROUP * pair[0] > 10_000), found[0])
    last = found[-1]
    if first is last:
        return
    grown = last[1].peak_bytes - first[1].peak_bytes
    needed = 2 * (last[0] - first[0]) * (1 + GROUP) * dimension * 4
    print(
        f"from {first[0]:,} to {last[0]:,} queries the peak grew by {grown / 1e6:.0f} MB, {grown / needed:.2f} "
        f"times the {needed / 1e6:.0f} MB of embeddings and their gradients (at most 1.10 is aimed at)"
    )


def _step(arguments: argparse.Namespace, *, num_queries: int) -> tuple[Use, int]:
    torch.set_num_threads(arguments.threads)
    if arguments.encoder:
        encoder = Encoder.load(arguments.encoder).train()
    else:
        sizes = {"layers": 3, "hidden": 384, "heads": 12, "intermediate": 1536, "vocabulary": 32590}
        encoder = make_encoder(**sizes, pooling="mean", dropout=0.0)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5)
    settings = plain_settings(
        micro_batch_tokens=arguments.micro_batch_tokens,
        keep_activations_tokens=0,
        precision="fp32",
        score_block=arguments.score_block,
    )

    def step(count: int, *, seed: int) -> Use:
        batch = make_batch(
            count,
            num_negatives=GROUP - 1,
            vocabulary=encoder.backbone.config.vocab_size,
            seed=seed,
            mean_tokens=(arguments.query_tokens, arguments.passage_tokens),
        )
        texts = local_texts(batch, device=encoder.device)

        def run() -> None:
            accumulate_gradients(encoder, texts, settings, Alone())
            optimizer.step()
            optimizer.zero_grad()

        return measure(run)

    step(WARM_UP_QUERIES, seed=1)
    return step(num_queries, seed=0), encoder.dimension


if __name__ == "__main__":
    sys.exit(main())
