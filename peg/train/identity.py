"""Which training a checkpoint belongs to: what must be equal to go on, and what equal bits alone ask for.

Two runs are the same training when data, seed and every parameter that forms the result are equal; then the global
batches, the schedule and, but for dropout's masks, the gradients are equal to rounding, on any number of ranks.
They give the same bits when ranks, threads, budgets, versions and processor are equal too.
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

NO_INFLUENCE = frozenset({"launcher", "num_workers", "max_failures", "max_loss_ratio", "checkpoint_every"})
"""Fields of config.Train that change no weight. num_workers is a wish: the ranks that there are count."""

ROUNDING = frozenset(
    {
        "threads_per_worker",
        "micro_batch_tokens",
        "keep_activations_tokens",
        "gradient_checkpointing",
        "compile",
        "score_block",
    }
)
"""Fields of config.Train that change in which order numbers are added, and no more. All others form the result."""


@dataclass(frozen=True)
class Identity:
    """training: a difference is another training. bits: a difference is the same training in other bits."""

    training: dict[str, Any]
    bits: dict[str, Any]

    def state(self) -> dict[str, dict[str, Any]]:
        """As a checkpoint's JSON holds it."""
        return asdict(self)


def identity_of(
    task: Mapping[str, Any], *, world_size: int, device: torch.device, micro_batch_tokens: int, embedding: str
) -> Identity:
    """The identity of a run of `task` (task.json of the training's folder) on so many ranks.

    micro_batch_tokens is what 'auto' has found, embedding how texts are embedded (Encoder.path_line).
    """
    config: dict[str, Any] = task["config"]
    forming = {f"train.{key}": value for key, value in config.items() if key not in NO_INFLUENCE | ROUNDING}
    rounding = {f"train.{key}": config[key] for key in sorted(ROUNDING)}
    return Identity(
        training={"data": task["data_digest"], "seed": task["seed"], **forming},
        bits={
            "world size": world_size,
            **rounding,
            "train.micro_batch_tokens": micro_batch_tokens,
            "embedding": embedding,
            "torch": str(torch.__version__),
            "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        },
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What has changed, as "seed was 1, is 2; data was …", or "" where nothing has."""
    keys = [*now, *(key for key in before if key not in now)]
    return "; ".join(
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)
    )


def cpu_model() -> str:
    """The processor's name where the system tells it, else the machine's type."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
