from pathlib import Path
from typing import Any

import pytest

from peg.errors import InputError, StageError
from peg.workspace import Work, path_digest, read_json, stage_work, wiring, write_json

DVC = """
stages:
  mine:
    cmd: peg mine
    params: [seed, train.epochs]
    deps: [data/in, code.py]
    outs: [data/out]
    metrics: [metrics/mine.json]
    plots:
      - curve.csv: {x: step}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(DVC)
    (tmp_path / "params.yaml").write_text("seed: 1\ntrain: {epochs: 2, speed: 3}\n")
    (tmp_path / "data" / "in").mkdir(parents=True)
    (tmp_path / "data" / "in" / "rows").write_text("1")
    (tmp_path / "code.py").write_text("pass")
    return tmp_path


def write_outputs(work: Work, *, text: str = "new") -> None:
    work.out("data/out").mkdir()
    (work.out("data/out") / "rows").write_text(text)
    write_json(work.out("metrics/mine.json"), {"rows": 1})
    work.out("curve.csv").write_text("step\n")


def status() -> Any:
    return read_json(Path(".peg/status/mine.json"))


def test_outputs_come_into_place_when_all_are_complete_and_the_work_goes(project: Path) -> None:
    (project / "data" / "out").mkdir()
    (project / "data" / "out" / "stale").write_text("old")
    with stage_work("mine", sections={"seed": 1}) as work:
        write_outputs(work)
        assert (project / "data" / "out" / "stale").exists()
    assert [path.name for path in (project / "data" / "out").iterdir()] == ["rows"]
    assert read_json(project / "metrics" / "mine.json") == {"rows": 1}
    assert not work.folder.exists()
    assert status()["state"] == "done"


def test_a_killed_stage_goes_on_in_its_own_work_and_no_other(project: Path) -> None:
    with pytest.raises(KeyboardInterrupt), stage_work("mine", sections={"seed": 1}) as work:
        (work.scratch / "half").write_text("done so far")
        raise KeyboardInterrupt
    assert status()["state"] == "failed"
    assert status()["error"].startswith("KeyboardInterrupt")
    with pytest.raises(StageError, match="without writing"), stage_work("mine", sections={"seed": 2}) as other:
        assert not (other.scratch / "half").exists()
    with stage_work("mine", sections={"seed": 1}) as again:
        assert (again.scratch / "half").read_text() == "done so far"
        write_outputs(again)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("code.py", "other code"),
        ("data/in/rows", "2"),
        ("params.yaml", "seed: 1\ntrain: {epochs: 5, speed: 3}\n"),
    ],
)
def test_a_change_while_the_stage_runs_fails_it_and_keeps_its_work(project: Path, path: str, text: str) -> None:
    with pytest.raises(StageError, match="changed while it ran"), stage_work("mine", sections={}) as work:
        write_outputs(work)
        (project / path).write_text(text)
    assert (work.out("data/out") / "rows").exists()
    assert not (project / "data" / "out").exists()


def test_a_parameter_of_another_stage_may_change_meanwhile(project: Path) -> None:
    with stage_work("mine", sections={}) as work:
        write_outputs(work)
        (project / "params.yaml").write_text("seed: 1\ntrain: {epochs: 2, speed: 9}\n")
    assert (project / "data" / "out").exists()


def test_an_input_that_dvc_does_not_watch_is_refused(project: Path) -> None:
    with stage_work("mine", sections={}) as work:
        work.require_input("data/in/rows", key="data.path")
        with pytest.raises(InputError, match=r"data\.path is elsewhere, which is no input of the stage mine"):
            work.require_input("elsewhere", key="data.path")
        write_outputs(work)


def test_an_output_that_dvc_yaml_does_not_name_is_our_own_mistake(project: Path) -> None:
    with pytest.raises(AssertionError, match="has no output"), stage_work("mine", sections={}) as work:
        work.out("data/other")


def test_a_digest_is_of_names_and_contents_and_not_of_byte_code(project: Path) -> None:
    folder = project / "data" / "in"
    before = path_digest(folder)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_text("x")
    assert path_digest(folder) == before
    (folder / "rows").rename(folder / "other")
    assert path_digest(folder) != before
    with pytest.raises(InputError, match="is not here"):
        path_digest(project / "nowhere")


def test_an_unknown_stage_names_those_there_are(project: Path) -> None:
    with pytest.raises(InputError, match="only mine"):
        wiring("mined")


def test_json_that_cannot_be_read_is_one_line(project: Path) -> None:
    (project / "half.json").write_text('{"a": ')
    with pytest.raises(InputError, match="is not JSON"):
        read_json(project / "half.json")
