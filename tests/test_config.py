from pathlib import Path
from typing import Any

import pytest
import yaml

from peg import config
from peg.errors import InputError
from peg.recipes import list_recipes, load_recipe, read_recipe

PROJECT = Path(__file__).parent.parent
SAMPLE: dict[str, Any] = yaml.safe_load(read_recipe("sample"))


def changed(path: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(read_recipe("sample"))
    *parents, last = path.split(".")
    branch = tree
    for parent in parents:
        branch = branch[int(parent)] if isinstance(branch, list) else branch[parent]
    branch[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "needed"),
    [
        ("train.temperature", 0, "train.temperature: found 0; input should be greater than 0"),
        ("train.temperature", "warm", "train.temperature: found 'warm'; input should be a valid number"),
        ("train.epochs", 1.5, "train.epochs: found 1.5; input should be a valid integer"),
        ("train.speed", 3, "train.speed: unknown key (value 3)"),
        ("train.schedule", "steep", "train.schedule: found 'steep'; input should be 'linear', 'cosine' or 'constant'"),
        ("train.weighting.negatives.start", -1.5, "above -1 is needed"),
        ("data.sources.0.format", "xml", "data.sources.0.format: found 'xml'"),
        ("data.clean.min_query_chars", 500, "min_query_chars 500 is above max_query_chars 200"),
        ("mining.pool_size", 2, "a step cannot draw more than the pool holds"),
    ],
)
def test_a_fault_is_one_line_with_key_value_and_what_is_allowed(path: str, value: Any, needed: str) -> None:
    with pytest.raises(InputError) as caught:
        config.parse(changed(path, value), origin="params.yaml")
    assert str(caught.value).startswith("params.yaml: ")
    assert needed in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_fault_has_its_line() -> None:
    tree = changed("train.temperature", 0)
    tree["seed"] = -1
    del tree["mining"]
    with pytest.raises(InputError) as caught:
        config.parse(tree, origin="params.yaml")
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["seed", "mining", "train.temperature"]


@pytest.mark.parametrize("recipe", [recipe.name for recipe in list_recipes(PROJECT)])
def test_every_recipe_is_valid(recipe: str) -> None:
    assert load_recipe(recipe).seed >= 0


def test_the_tree_is_frozen_and_every_field_is_described() -> None:
    params = load_recipe("sample")
    with pytest.raises(ValueError, match="frozen"):
        params.train.epochs = 3  # type: ignore[misc]
    for name, section in config.Config.model_json_schema()["$defs"].items():
        for key, field in section["properties"].items():
            assert "description" in field or "$ref" in field, f"{name}.{key}"


def test_a_file_that_is_absent_or_no_mapping_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not here"):
        config.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("- a\n")
    with pytest.raises(InputError, match="holds list, not a mapping"):
        config.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [\n")
    with pytest.raises(InputError, match="is not YAML"):
        config.load(tmp_path / "params.yaml")


def test_changes_of_the_train_section_are_checked_too() -> None:
    params = config.with_train(load_recipe("sample"), {"launcher": "local", "epochs": 3})
    assert (params.train.launcher, params.train.epochs) == ("local", 3)
    assert params.train.num_workers == load_recipe("sample").train.num_workers
    with pytest.raises(InputError, match=r"train\.epochs: found 0"):
        config.with_train(params, {"epochs": 0})
