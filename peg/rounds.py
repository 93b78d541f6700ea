"""The next round: mining and training again, from the encoder that this round made.

A round's model is kept under models/rounds/, and params.yaml's base section is pointed at it by path and sha256. The
next `dvc repro` (or flow) then mines with it and trains from it; progress and weighting begin anew. The report's base
row is the round before.
"""

import re
import shutil
from pathlib import Path

from peg.config import PARAMS_FILE, load
from peg.errors import InputError
from peg.model.encoder import WEIGHTS, weights_sha256

TRAINED, ROUNDS = Path("models/trained"), Path("models/rounds")


def next_round(project: Path) -> str:
    """Keep models/trained as a round, let params.yaml start from it, and return a line that says what was done.

    Raises InputError where no model has been trained, or it is the one that params.yaml starts from already.
    """
    trained, params = project / TRAINED, project / PARAMS_FILE
    if not (trained / WEIGHTS).is_file():
        raise InputError(f"{trained} holds no model; train one first (`dvc repro`, `make demo`)")
    digest = weights_sha256(trained)
    if load(params).base.sha256 == digest:
        raise InputError(f"{PARAMS_FILE} starts from {TRAINED}'s weights already; run `dvc repro` for the next round")
    kept = ROUNDS / str(_newest(project / ROUNDS) + 1)
    aside = project / ROUNDS / f".{kept.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(trained, aside)
    aside.rename(project / kept)
    # The vocabulary has been cut and the layers chosen already, where they were to be.
    changes = {"source": str(kept), "revision": "null", "sha256": digest, "vocabulary": "full", "num_layers": "null"}
    text = _with_base(params.read_text(encoding="utf-8"), changes)
    written = params.with_suffix(".yaml.partial")
    written.write_text(text, encoding="utf-8")
    load(written)
    written.replace(params)
    return f"{PARAMS_FILE} now starts from {kept}; `dvc repro` or the flow mines and trains the next round"


def _newest(folder: Path) -> int:
    return max((int(path.name) for path in folder.glob("[0-9]*")), default=0) if folder.is_dir() else 0


def _with_base(text: str, changes: dict[str, str]) -> str:
    """The file with other values in its section `base`, all else as it stands; comments behind a value go with it."""
    head, base, tail = re.split(r"(?ms)^(base:\n.*?)(?=^\S|\Z)", text, maxsplit=1)
    for key, value in changes.items():
        base = re.sub(rf"(?m)^(  {key}:).*$", rf"\1 {value}", base)
    return head + base + tail
