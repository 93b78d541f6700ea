import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.architecture import DVC_FILE, ENTRY_MODULES, PROJECT, closure, imports

PLATFORM = {"prefect", "ray", "mlflow", "dvc", "mteb"}
STAGES = yaml.safe_load(DVC_FILE.read_text(encoding="utf-8"))["stages"]


def python_files(folder: str) -> list[Path]:
    return sorted((PROJECT / folder).rglob("*.py"))


def is_core(file: Path) -> bool:
    return "adapters" not in file.parts and file.name != "cli.py"


@pytest.mark.parametrize("file", [file for file in python_files("peg") if is_core(file)], ids=lambda file: file.stem)
def test_core_imports_neither_platform_nor_adapters_nor_flows(file: Path) -> None:
    roots = {module.split(".")[0] for module in imports(file)}
    assert not roots & (PLATFORM | {"flows"})
    assert not [module for module in imports(file) if module.startswith(("peg.adapters", "peg.cli"))]


def test_the_package_never_imports_flows_and_flows_compute_nothing() -> None:
    assert not [file for file in python_files("peg") for module in imports(file) if module.split(".")[0] == "flows"]
    computing = {"torch", "numpy", "transformers", "faiss"}
    assert not [file for file in python_files("flows") for module in imports(file) if module.split(".")[0] in computing]


def test_packages_hold_no_code_that_a_stage_could_depend_on() -> None:
    for file in python_files("peg"):
        if file.name == "__init__.py" and file.parent.name != "peg":
            body = ast.parse(file.read_text(encoding="utf-8")).body
            assert all(isinstance(node, ast.Expr) for node in body), file


@pytest.mark.parametrize("stage", ENTRY_MODULES)
def test_dvc_yaml_lists_the_import_closure_of_each_stage(stage: str) -> None:
    listed = [dep for dep in STAGES[stage]["deps"] if dep.startswith("peg/")]
    assert listed == closure(ENTRY_MODULES[stage]), "`python -m tests.architecture` writes it anew"


def test_every_stage_of_dvc_yaml_is_a_command_of_its_name() -> None:
    assert {name: stage["cmd"] for name, stage in STAGES.items()} == {name: f"peg {name}" for name in ENTRY_MODULES}


def test_the_trainer_runs_where_the_platform_is_not_installed() -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(PLATFORM | {"sentence_transformers", "faiss", "bm25s", "jieba", "scipy"})!r}))
import peg
peg.finetune, peg.Encoder
from peg import cli, search
import peg.train.loop
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys, peg.cli
heavy = {"torch", "numpy", "pydantic", "transformers", "mlflow", "ray", "prefect"} & set(sys.modules)
sys.exit(str(heavy) if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)
