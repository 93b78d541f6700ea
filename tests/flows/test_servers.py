"""The real servers of `make ui`: slow to start, so one test says all of it."""

import http.client
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peg.process import alive, mark
from peg.workspace import read_json


def status(address, path, *, host):
    """The HTTP status of a request that names `host` in its Host header."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    try:
        connection.request("GET", path, headers={"Host": host})
        return connection.getresponse().status
    finally:
        connection.close()


def group_members(owner_pid):
    """Marks of all processes that descend from a process."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = [], [owner_pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        waiting += below
        found += [mark(pid) for pid in below]
    return [one for one in found if one]


def start_ui(project):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ui = subprocess.Popen([sys.executable, "-m", "flows.ui"], cwd=project, env=env, start_new_session=True)
    until = time.monotonic() + 180
    while not (project / ".peg/ui.json").exists():
        assert ui.poll() is None, "it ended before it answered"
        assert time.monotonic() < until
        time.sleep(0.2)
    return ui


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_both_servers_check_hosts_and_end_with_their_owner(tmp_path, number):
    ui = start_ui(tmp_path)
    try:
        where = read_json(tmp_path / ".peg/ui.json")
        assert (tmp_path / ".peg/ui.json").stat().st_mode & 0o777 == 0o600
        for name, path in (("mlflow", "/"), ("prefect", "/"), ("prefect", "/api/health")):
            own = where[name].removeprefix("http://")
            assert own.startswith("127.0.0.1:")
            assert status(where[name], path, host=own) == 200
            assert status(where[name], path, host="pages.example.com") in (400, 403)
        below = group_members(ui.pid)
        assert len(below) >= 4, "two guards, and a server under each"
        ui.send_signal(number)
        ui.wait(60)
        until = time.monotonic() + 30
        while any(alive(one) for one in below) and time.monotonic() < until:
            time.sleep(0.2)
        assert not any(alive(one) for one in below)
        if number == signal.SIGTERM:
            assert ui.returncode == 0
            assert not (tmp_path / ".peg/ui.json").exists()
    finally:
        ui.kill()
        ui.wait()
