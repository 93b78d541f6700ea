"""Training over Ray Train workers: Ray starts, places and restarts processes; the loop is peg.train.loop's.

A worker that dies is started again with the others, up to train.max_failures times; they go on from the newest
checkpoint in the training's folder, which all nodes must see.
"""

import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

from peg.config import Train
from peg.errors import StageError
from peg.workspace import STATE

_MAX_SOCKET_PATH = 40  # Ray puts about 65 more characters behind it, and a Unix socket's path ends at 107
_OBJECT_STORE_BYTES = 100 << 20  # the loop passes file names, not tensors


def launch(folder: Path, config: Train) -> None:
    """Train what `folder` says over config.num_workers workers, on RAY_ADDRESS or a Ray of its own."""
    _environment()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    try:
        _connect(config)
        use_gpu = ray.cluster_resources().get("GPU", 0) >= config.num_workers
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"folder": str(folder.resolve())},
            scaling_config=ScalingConfig(
                num_workers=config.num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": config.threads_per_worker, "GPU": int(use_gpu)},
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=RunConfig(
                name=folder.name,
                storage_path=str((STATE / "ray" / "results").resolve()),
                failure_config=FailureConfig(max_failures=config.max_failures),
            ),
        )
        trainer.fit()
    except ray.train.v2.api.exceptions.TrainingFailedError as error:
        raise StageError(f"training over Ray failed: {_cause(error)}") from error
    finally:
        ray.shutdown()


def _worker(task: dict[str, Any]) -> None:
    import ray.train
    from ray.train.torch import get_device

    from peg.model.distributed import Workers
    from peg.train import loop

    loop.run(Path(task["folder"]), Workers(), device=get_device())
    ray.train.report({})


def _connect(config: Train) -> None:
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    ray.init(
        num_cpus=max(os.cpu_count() or 1, config.num_workers * config.threads_per_worker + 1),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(_ray_folder()),
    )


def _ray_folder() -> Path:
    folder = (STATE / "ray").resolve()
    if len(str(folder)) > _MAX_SOCKET_PATH:
        return Path(tempfile.gettempdir()) / f"peg-ray-{os.getuid()}"
    return folder


def _environment() -> None:
    """Before Ray is imported: closed to others, and silent to the outside."""
    token = (STATE / "ray-token").resolve()
    token.parent.mkdir(parents=True, exist_ok=True)
    if not token.exists():
        descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(token))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")


def _cause(error: BaseException) -> str:
    """The worker's own message, out of Ray's layers of them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("peg.errors.")]
    return (ours or lines or [type(error).__name__])[-1]
