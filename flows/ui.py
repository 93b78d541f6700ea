"""`make ui`: the pages of MLflow and Prefect over the stores of the demo, until Ctrl-C."""

import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from flows import environment, servers
from peg.errors import PegError
from peg.process import end_stale, mark
from peg.workspace import write_json

_MLFLOW_PORT, _PREFECT_PORT = 5000, 4200


def main() -> int:
    """Serve until Ctrl-C or SIGTERM; 2 where a `make ui` or a flow runs already."""
    if (running := environment.running_ui()) is not None:
        print(f"make ui runs already: MLflow {running['mlflow']}, Prefect {running['prefect']}", file=sys.stderr)
        return 2
    environment.prepare()
    end_stale(environment.CHILDREN)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with environment.only_one("prefect", "make ui, or a flow with a server of its own,"):
            _serve(environment.UI_FILE)
    except KeyboardInterrupt:
        print("both servers ended")
    except PegError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _serve(ui_file: Path) -> None:
    with ExitStack() as stack:
        mlflow = stack.enter_context(servers.mlflow_server(servers.free_port(_MLFLOW_PORT)))
        prefect = stack.enter_context(servers.prefect_server(servers.free_port(_PREFECT_PORT)))
        print("starting MLflow and Prefect ...", flush=True)
        servers.wait_until_it_answers("mlflow", f"{mlflow}/health")
        servers.wait_until_it_answers("prefect", f"{prefect}/api/health")
        stack.callback(ui_file.unlink, missing_ok=True)
        ui_file.parent.mkdir(parents=True, exist_ok=True)
        ui_file.touch(mode=0o600)
        write_json(ui_file, {"owner": mark(), "mlflow": mlflow, "prefect": prefect})
        ui_file.chmod(0o600)
        print(f"MLflow   {mlflow}\nPrefect  {prefect}\nCtrl-C ends both.", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    sys.exit(main())
