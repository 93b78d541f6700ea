"""Training over Ray Train workers: Ray starts, places and restarts processes; the loop is peg.train.loop's.

A worker that dies is started again with the others, up to train.max_failures times; they go on from the newest
checkpoint in the training's folder, which all nodes must see. One that says what is wrong (an error of this
project's) is not asked twice.
"""

import logging
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

from peg.config import Train
from peg.errors import InputError, PegError, StageError
from peg.train.local import LOOPBACK, MEETING, forget_meetings, note, run_rank
from peg.workspace import STATE

_MAX_SOCKET_PATH = 40  # Ray puts about 65 more characters behind it, and a Unix socket's path ends at 107
_OBJECT_STORE_BYTES = 100 << 20  # the loop passes file names, not tensors


def launch(folder: Path, config: Train) -> None:
    """Train what `folder` says over config.num_workers workers, on RAY_ADDRESS or a Ray of its own."""
    own = not os.environ.get("RAY_ADDRESS")
    _environment(own=own)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    forget_meetings(folder)
    try:
        _connect(config, own=own)
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        if 0 < num_gpus < config.num_workers:
            raise InputError(
                f"train.num_workers is {config.num_workers}, but Ray has {num_gpus} GPUs; set it to at most {num_gpus}"
            )
        use_gpu = num_gpus > 0
        backend = "nccl" if use_gpu else "gloo"
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"folder": str(folder.resolve()), "backend": backend},
            scaling_config=ScalingConfig(
                num_workers=config.num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": config.threads_per_worker, "GPU": int(use_gpu)},
            ),
            torch_config=_file_rendezvous() if own else TorchConfig(backend=backend),
            run_config=RunConfig(
                name=f"{folder.parent.name}-{folder.name}",
                storage_path=str((STATE / "ray" / "results").resolve()),
                failure_config=FailureConfig(max_failures=config.max_failures),
                callbacks=[_watcher(folder.resolve())],
            ),
        )
        trainer.fit()
    except TrainingFailedError as error:
        said = getattr(error, "controller_failure", None)  # what the watcher raised
        if isinstance(said, PegError):
            raise said from error
        raise StageError(f"training over Ray failed: {_cause(error)}") from error
    finally:
        ray.shutdown()


def _file_rendezvous() -> Any:
    """Leaves the process group to the workers: torch's own TCP store would listen on every interface."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class FileRendezvous(TorchConfig):
        @property
        def backend_cls(self) -> type[Any]:
            return Backend

    return FileRendezvous()


def _watcher(folder: Path) -> Any:
    """Notes in the training's log why workers died, and stops where they said what is wrong: it would be so again."""
    from ray.train import UserCallback

    class Watcher(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            del run_context
            for error in worker_exceptions.values():
                if isinstance(error, PegError):
                    raise error
            reasons = "; ".join(f"rank {rank}: {_cause(error)}" for rank, error in sorted(worker_exceptions.items()))
            note(folder, f"workers died ({reasons}); training starts again if train.max_failures allows it")

    return Watcher()


def _worker(task: dict[str, Any]) -> None:
    import ray.train
    import torch.distributed as dist
    from ray.train.collective import broadcast_from_rank_zero
    from ray.train.torch import get_device

    from peg.model.distributed import Workers

    folder, context = Path(task["folder"]), ray.train.get_context()
    if not dist.is_initialized():
        world_size = context.get_world_size()
        meeting = folder / f"{MEETING}{broadcast_from_rank_zero(secrets.token_hex(8))}"
        dist.init_process_group(
            task["backend"],
            store=dist.FileStore(str(meeting), world_size),  # type: ignore[attr-defined]
            rank=context.get_world_rank(),
            world_size=world_size,
        )
    run_rank(folder, Workers(), device=get_device())
    ray.train.report({})


def _connect(config: Train, *, own: bool) -> None:
    import ray

    if own:
        ray.init(
            num_cpus=max(os.cpu_count() or 1, config.num_workers * config.threads_per_worker + 1),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=str(_ray_folder()),
        )
    else:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)


def _ray_folder() -> Path:
    folder = (STATE / "ray").resolve()
    if len(os.fsencode(folder)) <= _MAX_SOCKET_PATH:
        return folder
    private = Path(tempfile.gettempdir()) / f"peg-ray-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    if private.stat().st_uid != os.getuid() or private.is_symlink():
        raise StageError(f"{private} belongs to somebody else; remove it, or set TMPDIR to a folder of your own")
    return private


def _environment(*, own: bool) -> None:
    """Before Ray is imported: closed to others, and silent to the outside."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    if not own:
        return
    token = (STATE / "ray-token").resolve()
    token.parent.mkdir(parents=True, exist_ok=True)
    if not token.exists():
        aside = token.with_name(f"{token.name}.{os.getpid()}")
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        aside.replace(token)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    # Ray listens on the loopback alone where it knows that no other node will come; the variable's name is history.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = LOOPBACK


def _cause(error: BaseException) -> str:
    """The worker's own message, out of Ray's layers of them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("peg.errors.")]
    return (ours or lines or [type(error).__name__])[-1]
