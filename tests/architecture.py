"""Which file imports which: the closure of a stage's code, and the directions that design allows.

`python -m tests.architecture` writes the closures into dvc.yaml.
"""

import ast
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).parent.parent
DVC_FILE = PROJECT / "dvc.yaml"
ENTRY_MODULES = {
    "base": ["peg.stages.base"],
    "prepare": ["peg.stages.prepare"],
    "mine": ["peg.stages.mine"],
    "train": ["peg.stages.train", "peg.train.local", "peg.adapters.ray"],
    "evaluate": ["peg.stages.evaluate", "peg.adapters.mteb"],
}
"""What `peg STAGE` runs: the stage, and the adapters that the command line hands to it."""


@cache
def module_file(module: str) -> Path | None:
    """The file of a module of this project, None for others and for packages, which hold no code of stages."""
    file = PROJECT / Path(*module.split(".")).with_suffix(".py")
    return file if file.is_file() else None


@cache
def imports(file: Path) -> frozenset[str]:
    """All modules that a file names in imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def closure(modules: list[str]) -> list[str]:
    """Files that a run of the modules may import from this project, and the templates beside them; sorted."""
    seen: set[Path] = set()
    queue = [file for module in modules if (file := module_file(module))]
    while queue:
        file = queue.pop()
        if file not in seen:
            seen.add(file)
            queue += [target for module in imports(file) if (target := module_file(module))]
    templates = {template for file in seen for template in file.parent.glob("*.j2") if template.stem in _texts(file)}
    return sorted(path.relative_to(PROJECT).as_posix() for path in seen | templates)


def _texts(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def write_closures() -> None:
    """Replace the code dependencies of every stage in dvc.yaml, keeping all else as it stands."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    tree = yaml.load(DVC_FILE)
    for stage, modules in ENTRY_MODULES.items():
        data = [dep for dep in tree["stages"][stage]["deps"] if not dep.startswith("peg/")]
        tree["stages"][stage]["deps"] = [*data, *closure(modules)]
    with DVC_FILE.open("w", encoding="utf-8") as file:
        yaml.dump(tree, file)


if __name__ == "__main__":
    write_closures()
