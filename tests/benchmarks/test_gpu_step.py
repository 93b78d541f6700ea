import re
import sys

import numpy as np
import pytest
import torch

from benchmarks import gpu_step
from benchmarks.workload import make_batch, make_encoder

SIZES = {"layers": 2, "hidden": 64, "heads": 1, "intermediate": 256, "vocabulary": 300, "dropout": 0.0}


def test_without_cuda_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_step"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_step.main() == 2
    assert capsys.readouterr().out.count("\n") == 1


def test_a_tiny_step_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = "--device cpu --queries 8 --rival-queries 0 --query-tokens 6 --passage-tokens 9 --layers 2 --hidden 64"
    monkeypatch.setattr(sys, "argv", ["gpu_step", *tiny.split(), "--vocabulary", "300", "--rounds", "1"])
    assert gpu_step.main() == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"peg: 8 queries, \d+ tokens in [\d.]+ s: [\d,]+ tokens/s, [\d.,]+ examples/s; of the peak", last)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_counted_flops_are_those_that_a_forward_executes(pooling: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    encoder = make_encoder(pooling=pooling, **SIZES)  # type: ignore[arg-type]
    batch = make_batch(4, num_negatives=5, vocabulary=300, mean_tokens=(6, 9))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it cannot count the CPU's kernel
        encoder.embed([*batch.queries, *batch.passages])
    assert gpu_step._forward_flops(encoder, batch) == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_no_text_of_a_batch_is_repeated_and_lengths_have_the_mean_that_was_asked_for() -> None:
    batch = make_batch(500, num_negatives=5, vocabulary=21_128, mean_tokens=(10, 24))
    texts = [*batch.queries, *batch.passages]
    assert len(texts) == 7 * 500 == len({ids.tobytes() for ids in texts})
    assert np.mean([len(ids) for ids in batch.queries]) == pytest.approx(10, abs=0.3)
    assert np.mean([len(ids) for ids in batch.passages]) == pytest.approx(24, abs=0.3)
