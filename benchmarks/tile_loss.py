"""The loss and its gradients over many scores: ours in blocks against the whole matrix in plain torch.

    python -m benchmarks.tile_loss
    python -m benchmarks.tile_loss --queries 2000 --passages 12000 --dimension 256

Plain torch holds several tensors of N x M scores at once: some 10 GB at the sizes that are preset. Each side runs in a
process of its own; memory is what loss and gradients add to one that holds the embeddings.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.workload import TEMPERATURE, Use, measure
from peg.model.distributed import Alone
from peg.model.losses import Columns, contrastive_loss
from peg.model.weighting import INFO_NCE

Gradients = tuple[float, Tensor, Tensor]


def blocks(query_ND: Tensor, passage_MD: Tensor, positive_N: Tensor, *, score_block: int) -> Gradients:
    """Ours."""
    none = torch.empty(0, dtype=torch.int64)
    found = contrastive_loss(
        query_ND,
        passage_MD,
        Columns(positive_N, none, none),
        temperature=TEMPERATURE,
        weights=INFO_NCE,
        margin=None,
        score_block=score_block,
        group=Alone(),
    )
    return found.loss, found.grad_query_ND, found.grad_passage_MD


def matrix(query_ND: Tensor, passage_MD: Tensor, positive_N: Tensor, *, score_block: int) -> Gradients:  # noqa: ARG001
    """The loss as one would write it."""
    query_ND.requires_grad_()
    passage_MD.requires_grad_()
    loss = functional.cross_entropy(query_ND @ passage_MD.T / TEMPERATURE, positive_N)
    loss.backward()
    assert query_ND.grad is not None and passage_MD.grad is not None  # noqa: S101
    return float(loss.detach()), query_ND.grad, passage_MD.grad


SIDES = {"blocks": blocks, "matrix": matrix}


def main() -> int:
    """Print time and memory of both, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--passages", type=int, default=60_000)
    parser.add_argument("--dimension", type=int, default=1024)
    parser.add_argument("--score-block", type=int, default=8_388_608)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=[*SIDES], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.side:
        use, gradients = _run(SIDES[arguments.side], arguments)
        print(json.dumps([asdict(use), _digest(gradients)]))
        return 0
    inputs = (arguments.queries + arguments.passages) * arguments.dimension * 4
    scores = arguments.queries * arguments.passages * 4
    print(
        f"{arguments.queries} x {arguments.passages} x {arguments.dimension} in fp32: "
        f"embeddings {inputs / 1e9:.2f} GB, all scores {scores / 1e9:.2f} GB"
    )
    best: dict[str, Use] = {}
    digests: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for side in SIDES:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.tile_loss", *sys.argv[1:], "--side", side],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if done.returncode:
                print(
                    f"{side}: ended with {done.returncode}, as a process does that asks for more memory than there is"
                )
                return 1
            values, digests[side] = json.loads(done.stdout.splitlines()[-1])
            use = Use(**values)
            if side not in best or use.wall_s < best[side].wall_s:
                best[side] = use
    for side, use in best.items():
        loss, *lengths = digests[side]
        print(
            f"{side:<7} wall {use.wall_s:7.1f} s, CPU {use.cpu_s:7.1f} s, memory over the inputs "
            f"{use.grown_bytes / 1e9:6.2f} GB; loss {loss:.6f}, gradients' lengths {lengths[0]:.6f} {lengths[1]:.6f}"
        )
    ours, theirs = best["blocks"], best["matrix"]
    print(
        f"matrix / blocks: wall {theirs.wall_s / ours.wall_s:.2f}, CPU {theirs.cpu_s / ours.cpu_s:.2f}, "
        f"memory {theirs.grown_bytes / ours.grown_bytes:.1f}"
    )
    return 0


def _run(side: Callable[..., Gradients], arguments: argparse.Namespace) -> tuple[Use, Gradients]:
    torch.manual_seed(0)
    passage_MD = functional.normalize(torch.randn(arguments.passages, arguments.dimension), dim=1)
    positive_N = torch.randperm(arguments.passages)[: arguments.queries]
    noise_ND = functional.normalize(torch.randn(arguments.queries, arguments.dimension), dim=1)
    query_ND = functional.normalize(passage_MD[positive_N] + 4 * noise_ND, dim=1)
    del noise_ND
    found: list[Gradients] = []
    use = measure(lambda: found.append(side(query_ND, passage_MD, positive_N, score_block=arguments.score_block)))
    return use, found[0]


def _digest(gradients: Gradients) -> list[float]:
    loss, grad_query_ND, grad_passage_MD = gradients
    return [loss, float(grad_query_ND.double().norm()), float(grad_passage_MD.double().norm())]


if __name__ == "__main__":
    sys.exit(main())
