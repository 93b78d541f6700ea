import subprocess
from pathlib import Path

import pytest

from peg.errors import InputError
from peg.recipes import list_recipes, read_recipe, use_recipe


@pytest.fixture
def project(tmp_path: Path) -> Path:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-qm", "start"], cwd=tmp_path, check=True)
    return tmp_path


def test_a_recipe_replaces_committed_parameters_and_other_recipes(project: Path) -> None:
    use_recipe("finetune", project, force=False)
    use_recipe("sample", project, force=False)
    assert (project / "params.yaml").read_text(encoding="utf-8") == read_recipe("sample")
    assert [recipe.name for recipe in list_recipes(project) if recipe.in_use] == ["sample"]


def test_edits_are_not_lost_unless_forced(project: Path) -> None:
    (project / "params.yaml").write_text("seed: 2\n")
    with pytest.raises(InputError, match="not committed"):
        use_recipe("sample", project, force=False)
    assert (project / "params.yaml").read_text() == "seed: 2\n"
    use_recipe("sample", project, force=True)
    assert (project / "params.yaml").read_text(encoding="utf-8") == read_recipe("sample")


def test_edits_are_not_lost_where_there_is_no_git(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 2\n")
    with pytest.raises(InputError, match="not committed"):
        use_recipe("sample", tmp_path, force=False)


def test_an_unknown_recipe_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only finetune, peg-large, sample"):
        use_recipe("smaple", tmp_path, force=False)


def test_every_recipe_says_what_it_is_for(tmp_path: Path) -> None:
    assert all(len(recipe.about) > 20 for recipe in list_recipes(tmp_path))
