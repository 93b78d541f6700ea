"""Ctrl-C and kill -9 in any stage: the next run finishes, with the weights of a run that nothing stopped."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from peg.model.encoder import weights_sha256
from tests.pipeline.conftest import Project, make_project
from tests.pipeline.test_end_to_end import STAGES

pytestmark = pytest.mark.slow


def start_flow(project: Project) -> "subprocess.Popen[str]":
    return project.start("python", "-m", "flows.pipeline")


def wait_until_running(project: Project, stage: str, *, process: "subprocess.Popen[str]") -> None:
    """Return a moment after the stage has written that it runs."""
    path = project.folder / ".peg" / "status" / f"{stage}.json"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and json.loads(path.read_text())["state"] == "running":
            time.sleep(1)
            return
        time.sleep(0.1)
    raise AssertionError(f"{stage} did not start: {process.stdout.read() if process.stdout else ''}")


def processes_of(folder: Path) -> list[str]:
    """Command lines of all processes that work in the folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "cwd").readlink() == folder:
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [command for command in found if command]


@pytest.mark.timeout(3000)
def test_a_run_stopped_in_every_stage_finishes_with_the_same_weights(tmp_path: Path) -> None:
    stopped = make_project(tmp_path / "stopped")
    for stage in STAGES:
        process = start_flow(stopped)
        wait_until_running(stopped, stage, process=process)
        os.killpg(process.pid, signal.SIGINT)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 130, printed
        assert "the same command goes on from here" in printed
        assert not processes_of(stopped.folder)
    process = start_flow(stopped)
    wait_until_running(stopped, "evaluate", process=process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    printed = stopped.flow()
    assert "version 1 (new), alias 'champion'" in printed

    whole = make_project(tmp_path / "whole")
    whole.run("dvc", "repro")
    assert weights_sha256(stopped.folder / "models/trained") == weights_sha256(whole.folder / "models/trained")


@pytest.mark.timeout(1200)
def test_dvc_experiments_run_from_the_command_line(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    project.run("dvc", "repro")
    project.run("git", "add", "-A")
    project.run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "first run")
    project.run("dvc", "exp", "run", "-S", "train.epochs=2")
    assert "train.epochs" in project.run("dvc", "exp", "diff")
    assert "epochs: 2" in (project.folder / "params.yaml").read_text(encoding="utf-8")
