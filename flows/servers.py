"""Prefect's and MLflow's servers over the project's stores: on the loopback alone, and ended with who started them.

A page open in a browser can send requests to the loopback under a name of its own (DNS rebinding), so that both
refuse a Host header other than the loopback's.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flows.environment import CHILDREN
from peg.errors import PegError
from peg.process import OWNER, die_with_owner, end_group, mark
from peg.workspace import STATE, write_json

if TYPE_CHECKING:
    from starlette.types import ASGIApp

HOST = "127.0.0.1"
_START_S = 180.0
_POLL_S = 0.2


def free_port(preferred: int | None = None) -> int:
    """The preferred port, or the next free one above it; without a preference any free one."""
    for port in range(preferred, preferred + 100) if preferred else [0]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise PegError(f"no free port between {preferred} and {(preferred or 0) + 99}; end what listens there")


def prefect_app() -> "ASGIApp":
    """Prefect's own application behind a check of the Host header, for uvicorn's --factory."""
    from prefect.server.api.server import create_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    return TrustedHostMiddleware(create_app(), allowed_hosts=[HOST, "localhost"], www_redirect=False)


@contextmanager
def prefect_server(port: int) -> Iterator[str]:
    """Prefect's server over PREFECT_HOME, scheduler included; gives its address, before it answers."""
    address = f"http://{HOST}:{port}"
    command = ["uvicorn", "--factory", "flows.servers:prefect_app", "--host", HOST, "--port", str(port)]
    env = {
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_SERVER_UI_API_URL": f"{address}/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{address},http://localhost:{port}",
    }
    with _guarded("prefect", [*command, "--log-level", "warning"], env):
        yield address


@contextmanager
def mlflow_server(port: int) -> Iterator[str]:
    """MLflow's server over the demo's store; gives its address, before it answers."""
    from peg.adapters.mlflow_store import artifact_root, own_uri

    artifact_root().mkdir(parents=True, exist_ok=True)
    address = f"http://{HOST}:{port}"
    command = ["mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", own_uri(), "--default-artifact-root", artifact_root().as_uri()]
    command += ["--no-serve-artifacts", "--allowed-hosts", f"{HOST}:{port},localhost:{port}"]
    command += ["--cors-allowed-origins", f"{address},http://localhost:{port}"]
    with _guarded("mlflow", command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}):
        yield address


@contextmanager
def _guarded(name: str, module: list[str], env: dict[str, str]) -> Iterator[None]:
    """Run `python -m module` in a process group that ends with this process, whatever ends that."""
    log = STATE / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "flows.servers", sys.executable, "-m", *module]
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            command,
            env={**os.environ, **env, OWNER: mark() or ""},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    record = CHILDREN / f"{child.pid}.json"
    try:
        write_json(record, {"process": mark(child.pid), "owner": mark(), "command": [name, "server"]})
        yield
    finally:
        end_group(child.pid, grace_s=5.0, reap=child.poll)
        child.wait()
        record.unlink(missing_ok=True)


def wait_until_it_answers(name: str, url: str) -> None:
    """Return when the address answers; PegError with the log's last line if it does not within three minutes."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        try:
            with direct.open(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_S)
    log = STATE / "logs" / f"{name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "its log is empty")
    raise PegError(f"{name}'s server did not answer within {_START_S:g} s ({last.strip()}); the log is {log}")


def _guard(command: list[str]) -> int:
    """Run a command in this process's own group, and take the whole group along when this process ends."""
    child = subprocess.Popen(command)

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            pass
        finally:
            os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    die_with_owner()
    return child.wait()


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1:]))
