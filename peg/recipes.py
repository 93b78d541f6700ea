"""Recipes: whole parameter files in recipes/, of which one is copied over params.yaml."""

import subprocess
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from peg.config import PARAMS_FILE, Config, load, parse
from peg.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """about is the first line of the file's comment; in_use says that params.yaml has the same content."""

    name: str
    about: str
    in_use: bool


def read_recipe(name: str) -> str:
    """The text of a recipe. InputError names the ones there are."""
    files = _files()
    if name not in files:
        raise InputError(f"there is no recipe {name!r}, only {', '.join(files)}; `peg recipe list` says what they are")
    return files[name]


def load_recipe(name: str) -> Config:
    """A recipe's parameters, checked."""
    import yaml

    return parse(yaml.safe_load(read_recipe(name)), origin=f"recipes/{name}.yaml")


def load_any(name: str | None) -> Config:
    """The recipe of that name, the recipe file of that path, or params.yaml where neither is given."""
    if name is None or name.endswith((".yaml", ".yml")):
        return load(Path(name) if name else PARAMS_FILE)
    return load_recipe(name)


def list_recipes(project: Path) -> list[Recipe]:
    """All recipes by name."""
    params = project / PARAMS_FILE
    current = params.read_text(encoding="utf-8") if params.is_file() else ""
    return [
        Recipe(name=name, about=text.splitlines()[0].removeprefix("#").strip(), in_use=text == current)
        for name, text in _files().items()
    ]


def use_recipe(name: str, project: Path, *, force: bool) -> str:
    """Copy a recipe over the project's params.yaml; return a line that says what was done.

    Edits that are neither committed nor themselves a recipe are not overwritten, unless forced.
    """
    text, params = read_recipe(name), project / PARAMS_FILE
    if params.is_file() and not force:
        current = params.read_text(encoding="utf-8")
        if current not in _files().values() and not _is_committed(params):
            raise InputError(
                f"{params} has edits that are not committed; commit them, or overwrite them with "
                f"`peg recipe use {name} --force`"
            )
    aside = params.with_suffix(".yaml.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(params)
    return f"{PARAMS_FILE} is now the recipe {name}"


def _files() -> dict[str, str]:
    folder = resources.files("recipes")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}


def _is_committed(path: Path) -> bool:
    """Whether git has this very content in HEAD; without git, or before it is tracked, it has not."""
    status = subprocess.run(
        ["git", "status", "--porcelain", "--ignored", "--", path.name],
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return status.returncode == 0 and not status.stdout.strip()
