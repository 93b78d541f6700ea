import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DVC_YAML = """
stages:
  second:
    cmd: python stage.py second
    deps: [made/first.txt, stage.py]
    outs: [made/second.txt]
  first:
    cmd: python stage.py first
    deps: [wanted.txt]
    outs: [made/first.txt]
"""
# A stage writes its status file as peg.workspace does, and its output; "fail" in wanted.txt makes the second one fail.
STAGE_PY = """
import json, pathlib, sys, time
name = sys.argv[1]
wanted = pathlib.Path("wanted.txt").read_text()
status = pathlib.Path(f".peg/status/{name}.json")
status.parent.mkdir(parents=True, exist_ok=True)
row = {"stage": name, "started": time.time(), "seconds": 0.25, "state": "done", "error": None}
print(f"{name} works", flush=True)
if wanted == "fail" and name == "second":
    status.write_text(json.dumps({**row, "state": "failed", "error": "StageError: loss is nan at step 7"}))
    print("the last thing it said", file=sys.stderr)
    sys.exit(3)
status.write_text(json.dumps(row))
out = pathlib.Path(f"made/{name}.txt")
out.parent.mkdir(exist_ok=True)
out.write_text(wanted)
"""


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory):
    """Prefect's own test server, once per session: it takes seconds."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def dvc_project(tmp_path, monkeypatch):
    """A DVC project of two small stages, written in the other order than they run; the test's working folder."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "stage.py").write_text(STAGE_PY)
    (tmp_path / "wanted.txt").write_text("work")
    (tmp_path / ".dvcignore").write_text(".peg/\n")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True)
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)
