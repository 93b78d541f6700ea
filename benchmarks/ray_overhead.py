"""What Ray Train costs beside processes of this machine: the same steps under both launchers, in one run.

    python benchmarks/ray_overhead.py --steps 20

Two workers, an encoder of 3 layers of 384 with random weights, random texts. Start-up is all that is not a step;
processor time is that of this process and every process below it.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from peg.config import Train
from peg.model.encoder import WEIGHTS, Encoder, Prompts
from peg.recipes import load_recipe
from peg.train.batches import Examples, Ragged
from peg.train.data import Texts, known_positives, write_training_data
from peg.train.loop import METRICS, write_task
from peg.workspace import file_sha256

BATCH = 32
NEGATIVES = 5
CHARACTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


@dataclass(frozen=True)
class Cost:
    """Seconds of one launch; step_s is the median of its steps."""

    wall_s: float
    steps_s: float
    step_s: float
    cpu_s: float

    @property
    def start_s(self) -> float:
        """What is no step: processes, imports, rendezvous, the model's load and its last write."""
        return self.wall_s - self.steps_s


class ProcessorTime:
    """Sums what this process and its descendants have used; a process counts until the last look at it."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "ProcessorTime":
        self._look()
        self._before = dict(self._seen)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.seconds = sum(used - self._before.get(key, 0.0) for key, used in self._seen.items())

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self._look()

    def _look(self) -> None:
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system


def make_encoder(folder: Path) -> None:
    """Save a BERT of the sample's size with random weights over single characters."""
    vocab = {piece: index for index, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # noqa: S106 (no password)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(vocab),
        hidden_size=384,
        num_hidden_layers=3,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=128,
        pad_token_id=1,
    )
    backbone = BertModel(shape, add_pooling_layer=False)
    Encoder(backbone, fast, pooling="mean", prompts=Prompts(query="", passage=""), max_length=64).save(folder)


def make_texts(*, num_queries: int) -> Texts:
    """Random texts of 8 to 40 characters: a positive and NEGATIVES negatives for each query."""
    generator = np.random.default_rng(0)

    def draw(count: int) -> list[str]:
        lengths = generator.integers(8, 40, count)
        return ["".join(generator.choice(CHARACTERS, length)) for length in lengths]

    query = np.arange(num_queries)
    positives = Ragged.of([[row] for row in query])
    negatives = Ragged.of([num_queries + generator.choice(num_queries, NEGATIVES, replace=False) for _ in query])
    return Texts(
        queries=draw(num_queries),
        num_queries=num_queries,
        passages=draw(2 * num_queries),
        num_passages=2 * num_queries,
        examples=Examples(query, positives, negatives, known_positives(query, positives, num_queries=num_queries)),
    )


def measure(folder: Path, config: Train, launch: Callable[[Path, Train], None]) -> Cost:
    """Launch a prepared training once."""
    began = time.monotonic()
    with ProcessorTime() as used:
        launch(folder, config)
    wall_s = time.monotonic() - began
    rows = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    seconds = [row["seconds"] for row in rows if "loss" in row]
    return Cost(wall_s=wall_s, steps_s=sum(seconds), step_s=float(np.median(seconds)), cpu_s=used.seconds)


def main() -> None:
    """Run both launchers in turn and print what each costs, with the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1, help="both launchers so often, one after the other")
    arguments = parser.parse_args()
    from peg.adapters import ray
    from peg.train import local

    costs: dict[str, list[Cost]] = {"local": [], "ray": []}
    weights = set()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        os.chdir(home)
        make_encoder(home / "encoder")
        encoder = Encoder.load(str(home / "encoder"))
        texts = make_texts(num_queries=arguments.steps * BATCH)
        for number in range(arguments.rounds):
            for name, launch in (("local", local.launch), ("ray", ray.launch)):
                folder = home / f"{name}-{number}"
                folder.mkdir()
                changes = {"launcher": name, "num_workers": 2, "threads_per_worker": 1, "batch_size": BATCH}
                config = load_recipe("sample").train.model_copy(
                    update={**changes, "encoder": str(home / "encoder"), "epochs": 1, "dev": None, "eval_every": 0}
                )
                write_training_data(folder, texts, None, encoder=encoder, query_max_length=64, passage_max_length=48)
                write_task(folder, config=config, seed=0, encoder=home / "encoder", data_digest="random")
                costs[name].append(measure(folder, config, launch))
                weights.add(file_sha256(folder / "final" / WEIGHTS))
    print(f"{arguments.steps} steps of {BATCH} queries, 2 workers, median of {arguments.rounds} rounds")
    print(f"{'':10}{'wall s':>10}{'start-up s':>12}{'s per step':>12}{'CPU s':>10}")
    medians = {
        name: np.median([(c.wall_s, c.start_s, c.step_s, c.cpu_s) for c in found], axis=0)
        for name, found in costs.items()
    }
    for name, (wall_s, start_s, step_s, cpu_s) in medians.items():
        print(f"{name:10}{wall_s:10.1f}{start_s:12.1f}{step_s:12.3f}{cpu_s:10.1f}")
    wall, start, step, cpu = medians["ray"] / medians["local"]
    print(f"{'ray/local':10}{wall:10.2f}{start:12.2f}{step:12.2f}{cpu:10.2f}")
    print(f"weights: {'the same bits' if len(weights) == 1 else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
