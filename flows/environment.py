"""What Prefect, MLflow, DVC and Ray read from the environment, set once before any of them is imported.

What a person's shell or profile says of other servers is cleared: the demo's state lies under `.peg`, by absolute
path, and nowhere else. Prefect's SQLite has one server at a time: that of `make ui`, or the flow's own.
"""

import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from peg.errors import InputError
from peg.process import alive
from peg.workspace import STATE, make_state_private, read_json

UI_FILE = STATE / "ui.json"
CHILDREN = STATE / "children"
FLOW_FILE = STATE / "flow.json"
_CLEARED = ("PREFECT_", "MLFLOW_", "RAY_ADDRESS")


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the environment of a flow and of the stages that it starts."""
    for name in [name for name in environ if name.startswith(_CLEARED)]:
        del environ[name]
    make_state_private()
    home = (STATE / "prefect").resolve()
    home.mkdir(parents=True, exist_ok=True)
    environ.update(
        {
            "PREFECT_HOME": str(home),
            "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
            "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_CLI_PROMPT": "false",
            "DO_NOT_TRACK": "1",
            "DVC_NO_ANALYTICS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": ",".join(
                filter(None, [environ.get("NO_PROXY", environ.get("no_proxy")), "127.0.0.1,localhost"])
            ),
            # A venv that is not activated: `peg` and `dvc` stand beside this interpreter.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ.get('PATH', os.defpath)}",
        }
    )


def running_ui() -> dict[str, str] | None:
    """The addresses that a running `make ui` wrote, or None."""
    if not UI_FILE.is_file():
        return None
    found: dict[str, str] = read_json(UI_FILE)
    return found if alive(found.get("owner", "")) else None


@contextmanager
def only_one(lock: str, what: str) -> Iterator[None]:
    """Hold a lock of the project's folder; InputError, which says what runs, where another process holds it."""
    import fcntl

    path = STATE / f"{lock}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{what} runs already in this folder; wait for its end, or end it with Ctrl-C") from error
        yield
