"""Five weightings of the contrastive loss on real pairs, with and without noise in the positives.

    python -m benchmarks.progressive --data DIR --encoder DIR --work DIR [--train adapter|layer]
                                     [--stage tune|final|report]

--data holds train/train_pairs.parquet (source, query, pos) and eval/<set>/ in BEIR layout; --encoder is a BERT of E5's
kind. Its lower layers are frozen, and their output cached in --work. "layer" trains the top layer on it; "adapter", far
cheaper, a feed-forward block on the frozen encoder's pooled embeddings. Without --stage all runs to the end. A killed
command goes on where it stopped, and several of them started side by side share the work. A --work folder belongs to
one version of this program: nothing in it is made anew when constants change.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.progressive.data import prepare
from benchmarks.progressive.report import render
from benchmarks.progressive.runs import Part, pooled
from benchmarks.progressive.study import PARTS, SETTINGS, Study, final, mined_pairs, tune
from peg.errors import InputError
from peg.workspace import read_json, write_json


def main() -> int:
    """Run the stages asked for; 2 and one line where data or encoder are absent."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.progressive")
    for name in ("data", "encoder", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--train", choices=tuple(PARTS), default="adapter")
    parser.add_argument("--chosen", type=Path, help="settings chosen before, instead of tuning")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS, help="of the final runs")
    parser.add_argument("--stage", choices=("tune", "final", "report"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        _study(arguments, part=PARTS[arguments.train])
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _study(given: argparse.Namespace, *, part: Part) -> None:
    results = given.work / part.name
    chosen = given.chosen or results / "chosen.json"
    if given.stage != "report":
        if not (given.data / "train" / "train_pairs.parquet").is_file():
            raise InputError(f"{given.data} has no train/train_pairs.parquet; give the folder of pairs and test sets")
        prepared = prepare(given.data, given.encoder, given.work)
        mined = mined_pairs(prepared, given.encoder, given.work)
        if part.name == "adapter":
            prepared = pooled(prepared, given.encoder, given.work)
        study = Study(prepared, given.encoder, mined, part, results)
        if given.stage != "final" and not given.chosen:
            write_json(chosen, tune(study))
        if given.stage != "tune":
            final(study, read_json(chosen), kinds=given.settings)
    if given.stage != "tune":
        print(render(results, read_json(chosen), kinds=given.settings))


if __name__ == "__main__":
    sys.exit(main())
