import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import peg
from peg import own_data
from peg.errors import InputError
from peg.model.encoder import weights_sha256
from peg.workspace import read_json
from tests.conftest import make_encoder, make_texts

PROJECT = Path(__file__).parent.parent
SMALL = {"epochs": 2, "batch_size": 8, "threads_per_worker": 1, "learning_rate": 0.001}


def write_pairs(path: Path, *, count: int = 30, negatives: bool = True) -> Path:
    queries, passages = make_texts(count, seed=1), make_texts(2 * count, seed=2)
    rows = [
        {"query": query, "pos": [passages[i]], **({"neg": [passages[count + i]]} if negatives else {})}
        for i, query in enumerate(queries)
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("negatives", [True, False])
def test_own_pairs_make_a_model_that_loads_and_embeds(project: Path, encoder_folder: Path, negatives: bool) -> None:
    data = write_pairs(project / "pairs.jsonl", negatives=negatives)
    folder = peg.finetune(data, encoder=str(encoder_folder), output="mine", **SMALL)
    assert weights_sha256(folder) != weights_sha256(encoder_folder)
    model = peg.Encoder.load(str(folder))
    rows = model.encode(["天地玄黄", "宇宙洪荒"], kind="query", batch_tokens=64)
    assert rows.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert "started from" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_same_call_gives_the_same_bits(project: Path, encoder_folder: Path) -> None:
    data = write_pairs(project / "pairs.jsonl")
    first = peg.finetune(data, encoder=str(encoder_folder), output="first", **SMALL)
    second = peg.finetune(data, encoder=str(encoder_folder), output="second", **SMALL)
    assert weights_sha256(first) == weights_sha256(second)


def test_rows_that_cannot_be_used_leave_a_reason(project: Path, encoder_folder: Path) -> None:
    data = write_pairs(project / "pairs.jsonl")
    with data.open("a", encoding="utf-8") as file:
        file.write('{"query": "天地", "pos": ["天地"]}\nnot json\n')
    folder = peg.finetune(data, encoder=str(encoder_folder), output="mine", **SMALL)
    rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["row"], row["reason"]) for row in rejects] == [(31, "no_positive_beside_the_query"), (32, "not_json")]


def test_every_score_belongs_to_the_passage_it_was_given_for(project: Path) -> None:
    rows = [
        {"query": "天", "pos": ["玄", " 地", "地"], "neg": ["荒", "玄", "宇"], "pos_scores": [1, 2, 9],
         "neg_scores": [3, 9, 4], "source": "a"},
        {"query": "天", "pos": ["荒"], "task": "similarity", "score": 0.25, "source": "b"},
        {"query": "宙", "pos": ["洪"], "neg": ["地"], "task": "classification", "source": "a"},
        {"query": "日", "pos": ["月"], "source": "a"},
    ]  # fmt: skip
    (project / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    texts, rejects = own_data._read(project / "pairs.jsonl")
    examples, passages = texts.examples, list(texts.passages)
    assert rejects == []
    teacher = examples.teacher
    assert teacher is not None
    found = [
        {passages[one]: score for one, score in zip(ragged.values, scores.tolist(), strict=True) if np.isfinite(score)}
        for ragged, scores in ((examples.positives, teacher.positives), (examples.negatives, teacher.negatives))
    ]
    assert found == [{"玄": 1, "地": 2}, {"荒": 3, "宇": 4}]
    assert [(one.name, one.task) for one in examples.sources] == [
        ("a", "retrieval"),
        ("b", "similarity"),
        ("a", "classification"),
    ]
    assert examples.source is not None
    assert examples.source.tolist() == [0, 1, 2, 0]
    np.testing.assert_array_equal(examples.label, [np.nan, 0.25, np.nan, np.nan])
    assert sorted(passages[row] for row in examples.known_positives[0]) == sorted(["玄", "地"])


def test_all_tasks_scores_and_prompts_train_together(project: Path, encoder_folder: Path) -> None:
    texts = make_texts(60, seed=9)
    rows = [
        [
            {"query": one, "pos": [two], "neg": [three], "pos_scores": [2], "neg_scores": [0.5], "source": "law"},
            {"query": one, "pos": [two], "task": "similarity", "score": i / 20, "source": "sts"},
            {"query": one, "pos": [two], "neg": [three], "task": "classification", "source": "news"},
        ][i % 3]
        for i, (one, two, three) in enumerate(zip(texts[:20], texts[20:40], texts[40:], strict=True))
    ]
    (project / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    sources = {"law": {"weight": 2.0, "query_prompt": "q: ", "passage_prompt": ""}}
    settings = SMALL | {"sources": sources, "distillation": {"weight": 0.5, "temperature": 1.0}, "batch_size": 4}
    folder = peg.finetune(project / "pairs.jsonl", encoder=str(encoder_folder), output="mine", **settings)
    assert weights_sha256(folder) != weights_sha256(encoder_folder)
    prompts = read_json(folder / "config_sentence_transformers.json")["prompts"]
    assert (prompts["law-query"], prompts["law-passage"], prompts["query"]) == ("q: ", "", "q: ")
    steps = (folder / "train_curve.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(steps) == 2 * (4 + 2 + 2)  # 14 rows for retrieval, 7 and 6 for the others
    with pytest.raises(InputError, match=r"train\.sources names \['low'\], the rows of .*\['law', 'news', 'sts'\]"):
        peg.finetune(
            project / "pairs.jsonl", encoder=str(encoder_folder), output="other", sources={"low": sources["law"]}
        )


def test_a_folder_of_other_things_is_never_replaced_and_said_before_training(
    project: Path, encoder_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(project / "pairs.jsonl")
    for output in (".", "pairs.jsonl"):
        with pytest.raises(InputError, match="holds something else than a model made here"):
            peg.finetune(data, encoder=str(encoder_folder), output=output, **SMALL)
    assert data.is_file()
    assert "train:" not in capsys.readouterr().err


def test_another_encoder_of_the_same_name_is_another_training(project: Path, encoder_folder: Path) -> None:
    data = write_pairs(project / "pairs.jsonl")
    shutil.copytree(encoder_folder, project / "start")
    first = weights_sha256(peg.finetune(data, encoder="start", output="mine", **SMALL))
    make_encoder(seed=1).save(project / "start")
    assert weights_sha256(peg.finetune(data, encoder="start", output="mine", **SMALL)) != first


def test_nothing_is_left_in_the_state_folder_which_is_private(project: Path, encoder_folder: Path) -> None:
    peg.finetune(write_pairs(project / "pairs.jsonl"), encoder=str(encoder_folder), output="mine", **SMALL)
    assert list((project / ".peg" / "work" / "finetune").iterdir()) == []
    assert oct((project / ".peg").stat().st_mode)[-3:] == "700"


def test_faults_of_the_call_are_input_errors(project: Path, encoder_folder: Path) -> None:
    with pytest.raises(InputError, match=r"pairs\.jsonl"):
        peg.finetune("pairs.jsonl", encoder=str(encoder_folder), output="mine")
    data = write_pairs(project / "pairs.jsonl")
    with pytest.raises(InputError, match=r"train\.temprature: unknown key"):
        peg.finetune(data, encoder=str(encoder_folder), output="mine", temprature=0.1)
    with pytest.raises(InputError, match="is no model folder"):
        peg.finetune(data, encoder="./nowhere", output="mine")


def test_two_commands_train_on_own_data_without_the_platform(project: Path, encoder_folder: Path) -> None:
    write_pairs(project / "pairs.jsonl")
    peg_command = [sys.executable, "-m", "peg.cli"]
    subprocess.run([*peg_command, "recipe", "use", "finetune"], check=True)
    train = ["train", "--data", "pairs.jsonl", "--encoder", str(encoder_folder), "--output", "mine"]
    blocked = "import sys; sys.modules.update(dict.fromkeys(['prefect', 'ray', 'mlflow', 'dvc', 'mteb'])); "
    done = subprocess.run(
        [sys.executable, "-c", f"{blocked}from peg.cli import main; main({train!r})"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "the model is in mine" in done.stdout
    assert "train: 2/2 steps (100%)" in done.stderr
    assert (project / "mine" / "model.safetensors").is_file()
