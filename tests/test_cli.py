import json
from pathlib import Path

import pytest

from peg.cli import main
from peg.doctor import Finding, show


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_a_persons_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("prepare") == 2
    error = capsys.readouterr().err
    assert error == "peg: params.yaml is not here; run in the project's folder, or `peg recipe use sample`\n"


def test_schema_describes_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"base", "data", "mining", "train", "evaluate", "registry"} <= set(schema["properties"])


def test_evaluating_one_model_needs_all_three_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "--model", "models/base") == 2
    assert "--model, --data and --output together" in capsys.readouterr().err


def test_doctor_names_what_mends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert run("doctor") == 1
    assert "peg recipe use sample" in capsys.readouterr().out


def test_doctor_shows_commands_with_their_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    show([Finding("ray", "not installed", "pip install -e '.[pipeline]'")])
    assert "pip install -e '.[pipeline]'" in capsys.readouterr().out
