"""The pipeline as a Prefect flow: DVC's stages in DVC's order, then registration. Nothing is computed here."""

import sys

if __name__ == "__main__":
    # Prefect reads its settings when it is imported; the demo makes them first, then imports this module by its name.
    from flows.demo import main

    sys.exit(main())

import logging
import os
import re
import time
from collections import deque
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.environment import CHILDREN, FLOW_FILE
from flows.tables import decision_markdown, metrics_markdown
from peg.process import mark, run_streaming
from peg.workspace import STATE, read_json, write_json

_BUSY = ("Unable to acquire lock", "is busy, it is being blocked by")
_UNCHANGED = re.compile(r"Stage '.*' (didn't change, skipping|is cached - skipping run)")
_KEPT_LINES = 15
_EDGE = re.compile(r'^"([^"]+)"(?: -> "([^"]+)")?;$')


class StageFailedError(RuntimeError):
    """A command of the pipeline failed; its first line says which and why, the rest are its last lines."""


class DvcBusyError(StageFailedError):
    """Another DVC command holds the lock."""


@dataclass(frozen=True)
class StageRun:
    """seconds: of the whole command, DVC included; own_seconds: of the stage in it; skipped: nothing was stale."""

    stage: str
    seconds: float
    own_seconds: float
    skipped: bool


@dataclass(frozen=True)
class Outcome:
    """What a person reads at the end."""

    stages: tuple[StageRun, ...]
    registration: dict[str, Any]


def stage_order(dot: str) -> list[str]:
    """The stages of `dvc dag --dot`, each after all that it depends on, else in DVC's own order."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for line in dot.splitlines():
        if found := _EDGE.match(line.strip()):
            before, after = found.groups()
            sorter.add(before)
            if after:
                sorter.add(after, before)
    # Data that `dvc add` tracks stands in the graph too: there is nothing to run.
    return [name for name in sorter.static_order() if not name.endswith(".dvc")]


def dvc_command(*arguments: str) -> list[str]:
    """A DVC command with the interpreter that runs this flow."""
    return [sys.executable, "-m", "dvc", *arguments]


def run_command(name: str, command: list[str], *, log_level: int = logging.INFO) -> list[str]:
    """Run a command, stream it into the log, and return its lines; StageFailedError with the last ones if it fails."""
    logger = get_run_logger()
    lines: deque[str] = deque(maxlen=200)

    def on_line(line: str) -> None:
        if line.strip():
            lines.append(line)
            logger.log(log_level, "%s", line)

    status = run_streaming(command, on_line, records=CHILDREN, cwd=Path.cwd(), env=os.environ)
    if status == 0:
        return list(lines)
    last = "\n".join(list(lines)[-_KEPT_LINES:])
    if any(message in line for line in lines for message in _BUSY):
        raise DvcBusyError(f"{name} could not start: another DVC command holds the lock\n{last}")
    raise StageFailedError(f"{name} failed: {_reason(name, status)}\n{last}")


def _reason(name: str, status: int) -> str:
    """What the stage itself said in its status file; DVC answers 255 whatever the cause."""
    path = STATE / "status" / f"{name}.json"
    said = read_json(path) if path.is_file() else {}
    if said.get("state") == "failed" and said.get("error"):
        return str(said["error"]).splitlines()[0]
    if said.get("state") == "running":
        return "it was killed; its finished work is kept"
    return f"exit status {status}"


def _is_busy(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), DvcBusyError)


# Five minutes of patience with another `dvc repro` in the same folder; nothing else is tried twice.
@task(task_run_name="{stage}", retries=60, retry_delay_seconds=5, retry_condition_fn=_is_busy, cache_policy=NO_CACHE)
def run_stage(stage: str) -> StageRun:
    """Bring one stage up to date."""
    began, began_clock = time.time(), time.monotonic()
    status_file = STATE / "status" / f"{stage}.json"
    lines = run_command(stage, dvc_command("repro", "--single-item", stage))
    status = read_json(status_file) if status_file.is_file() else {}
    ran_now = status.get("started", 0.0) >= began
    return StageRun(
        stage=stage,
        seconds=time.monotonic() - began_clock,
        own_seconds=float(status["seconds"]) if ran_now else 0.0,
        skipped=any(_UNCHANGED.search(line) for line in lines),
    )


@task(task_run_name="register", cache_policy=NO_CACHE)
def register() -> dict[str, Any]:
    """Let `peg register` put the model into MLflow's registry, and read what it decided."""
    run_command("register", [sys.executable, "-m", "peg.cli", "register"])
    registration: dict[str, Any] = read_json(STATE / "registration.json")
    return registration


@flow(name="peg-pipeline", flow_run_name="pipeline", persist_result=False)
def pipeline() -> Outcome:
    """Run the stages in order, then register the model."""
    write_json(FLOW_FILE, {"owner": mark(), "flow_run_id": str(flow_run.get_id())})
    stages = stage_order("\n".join(run_command("dvc dag", dvc_command("dag", "--dot"), log_level=logging.DEBUG)))
    steps = [*stages, "register"]
    # Prefect types its functions for both worlds; in a flow that is not async they return the value itself.
    progress: Any = create_progress_artifact(0.0, key="progress", description=f"0 of {len(steps)}: {steps[0]}")
    done = []
    for number, stage in enumerate(stages, 1):
        done.append(run_stage(stage))
        update_progress_artifact(progress, 100 * number / len(steps), f"{number} of {len(steps)}: {steps[number]}")
    registration = register()
    update_progress_artifact(progress, 100.0, "done")
    publish(registration)
    return Outcome(tuple(done), registration)


def publish(registration: dict[str, Any]) -> None:
    """Leave the metric table, the decision and the links in Prefect."""
    comparison = read_json(Path("reports/comparison.json"))
    create_markdown_artifact(metrics_markdown(comparison), key="metrics", description="Metrics on the test set")
    create_markdown_artifact(decision_markdown(registration), key="decision", description="What the gate decided")
    create_link_artifact(registration["run_url"], "MLflow run", key="mlflow-run", description="Needs `make ui`")
    report = Path("reports/report.html").resolve()
    create_link_artifact(report.as_uri(), "Report", key="report", description=str(report))
