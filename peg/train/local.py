"""The local launcher: one rank, in this process, on its accelerator if it has one."""

from pathlib import Path

import torch

from peg.config import Train
from peg.model.distributed import Alone
from peg.train import loop


def launch(folder: Path, config: Train) -> None:
    """Train what `folder` says, to the end."""
    del config  # the loop reads it from the task
    loop.run(folder, Alone(), device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
