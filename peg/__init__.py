"""Progressive contrastive training of text embeddings.

    import peg
    folder = peg.finetune("pairs.jsonl", encoder="models/base", output="models/mine")
    model = peg.Encoder.load(str(folder))

The names below are loaded when they are first used: importing peg costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peg.model.encoder import Encoder
    from peg.own_data import finetune

__all__ = ["Encoder", "finetune"]


def __getattr__(name: str) -> Any:
    if name == "finetune":
        from peg.own_data import finetune

        return finetune
    if name == "Encoder":
        from peg.model.encoder import Encoder

        return Encoder
    raise AttributeError(f"module 'peg' has no attribute {name!r}")
