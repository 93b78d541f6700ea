import subprocess
import sys
import time

import pytest
from prefect import flow
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client

from flows import pipeline
from peg.workspace import read_json, write_json

pytestmark = pytest.mark.timeout(300)

REGISTRATION = {
    "model_name": "small",
    "version": 3,
    "alias": "challenger",
    "new": True,
    "reasons": ["It is no better than the base encoder."],
    "run_url": "http://127.0.0.1:5000/#/experiments/1/runs/abc",
}


def write_results(folder):
    metrics = {"ndcg_at_10": 0.25, "recall_at_10": 0.5, "mrr_at_10": 0.125}
    difference = {"left": "trained", "right": "base", "metric": "ndcg_at_10", "difference": 0.0, "p_value": 1.0}
    write_json(
        folder / "reports/comparison.json",
        {
            "main_metric": "ndcg_at_10",
            "set": {"digest": "d", "queries": 9, "passages": 30},
            "systems": {"bm25": metrics, "base": metrics, "trained": metrics},
            "differences": [difference],
        },
    )
    write_json(folder / ".peg/registration.json", REGISTRATION)


@pytest.fixture
def registers(monkeypatch, dvc_project):
    """`peg register` replaced by a process that only answers."""
    write_results(dvc_project)
    (dvc_project / "peg").mkdir()
    real = pipeline.run_command

    def run(name, command, **knobs):
        is_ours = command[1:] == ["-m", "peg.cli", "register"]
        return real(name, [sys.executable, "-c", "print('registered')"] if is_ours else command, **knobs)

    monkeypatch.setattr(pipeline, "run_command", run)
    return dvc_project


@pytest.fixture
def quick_retries(monkeypatch):
    monkeypatch.setattr(pipeline.run_stage, "retry_delay_seconds", 0.3)
    return pipeline.run_stage


@pytest.mark.parametrize(
    ("dot", "order"),
    [
        ('strict digraph {\n"a";\n}\n', ["a"]),
        ('strict digraph {\n"b";\n"a";\n"a" -> "b";\n}\n', ["a", "b"]),
        ('strict digraph {\n"raw.dvc";\n"mine@0";\n"raw.dvc" -> "mine@0";\n}\n', ["mine@0"]),
        ('strict digraph {\n"c";\n"b";\n"a";\n"b" -> "c";\n"a" -> "b";\n"a" -> "c";\n}\n', ["a", "b", "c"]),
    ],
)
def test_stages_come_after_what_they_depend_on(dot, order):
    assert pipeline.stage_order(dot) == order


def test_the_order_is_what_this_dvc_prints(dvc_project):
    dot = subprocess.run(pipeline.dvc_command("dag", "--dot"), check=True, capture_output=True, text=True).stdout
    assert pipeline.stage_order(dot) == ["first", "second"]


def test_the_flow_runs_stages_then_registers_and_leaves_artifacts(prefect_api, registers):
    began = time.time()
    outcome = pipeline.pipeline()
    assert [(run.stage, run.own_seconds, run.skipped) for run in outcome.stages] == [
        ("first", 0.25, False),
        ("second", 0.25, False),
    ]
    assert outcome.registration == REGISTRATION
    assert (registers / "made/second.txt").read_text() == "work"
    assert read_json(registers / ".peg/status/second.json")["started"] >= began
    assert "| trained model | 0.2500 | 0.5000 | 0.1250 |" in Artifact.get(key="metrics").data
    assert "small version 3: challenger" in Artifact.get(key="decision").data
    assert REGISTRATION["run_url"] in Artifact.get(key="mlflow-run").data
    assert Artifact.get(key="progress").data == 100.0
    with get_client(sync_client=True) as client:
        messages = [log.message for log in client.read_logs(limit=200)]
    assert "first works" in messages, "the stages' output stands in the flow's log"

    again = pipeline.pipeline()
    assert [(run.own_seconds, run.skipped) for run in again.stages] == [(0.0, True), (0.0, True)]


def test_a_failed_stage_fails_the_flow_with_its_own_last_lines(prefect_api, registers):
    (registers / "wanted.txt").write_text("fail")
    with pytest.raises(pipeline.StageFailedError) as caught:
        pipeline.pipeline()
    lines = str(caught.value).splitlines()
    assert lines[0] == "second failed: StageError: loss is nan at step 7"
    assert "the last thing it said" in lines
    assert not (registers / "made/second.txt").exists()
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(read_json(registers / ".peg/flow.json")["flow_run_id"])
    assert run.state.is_failed()


def test_a_busy_lock_is_waited_for_and_a_failure_is_not_tried_again(
    prefect_api, dvc_project, monkeypatch, quick_retries
):
    busy = "ERROR: failed to reproduce 'a': 'made' is busy, it is being blocked by:\n  (PID 1): dvc repro\n"
    code = (
        "import pathlib, sys; count = pathlib.Path('count'); n = int(count.read_text()) if count.exists() else 0\n"
        f"count.write_text(str(n + 1)); print({busy!r} if n < 2 else 'ERROR: the stage is wrong'); sys.exit(255)"
    )
    monkeypatch.setattr(pipeline, "dvc_command", lambda *_: [sys.executable, "-c", code])

    @flow
    def one():
        pipeline.run_stage("first")

    with pytest.raises(pipeline.StageFailedError, match="exit status 255"):
        one()
    assert (dvc_project / "count").read_text() == "3"


def test_this_dvc_s_busy_message_is_known(dvc_project):
    """Two commands at once: the second one's words are those that are waited for."""
    (dvc_project / "dvc.yaml").write_text("stages:\n  slow:\n    cmd: sleep 4\n    outs: [x]\n")
    first = subprocess.Popen(pipeline.dvc_command("repro", "slow"), stdout=subprocess.PIPE, text=True)
    try:
        assert "slow" in first.stdout.readline()
        second = subprocess.run(pipeline.dvc_command("repro", "slow"), check=False, capture_output=True, text=True)
    finally:
        first.terminate()
        first.communicate()
    assert second.returncode == 255
    assert any(message in second.stdout + second.stderr for message in pipeline._BUSY)
