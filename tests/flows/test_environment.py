import pytest

from flows import environment, servers
from peg.errors import InputError
from peg.process import mark
from peg.workspace import write_json


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_the_shell_says_of_other_servers_is_cleared(project):
    environ = {
        "PREFECT_API_URL": "https://elsewhere/api",
        "PREFECT_API_KEY": "k",
        "MLFLOW_TRACKING_URI": "http://elsewhere",
        "RAY_ADDRESS": "ray://elsewhere",
        "HOME": "/home/a",
        "PATH": "/usr/bin",
        "no_proxy": "inside",
    }
    environment.prepare(environ)
    assert not any("elsewhere" in value for value in environ.values())
    assert "PREFECT_API_KEY" not in environ
    assert environ["PREFECT_HOME"] == f"{project}/.peg/prefect"
    assert environ["PATH"].endswith(":/usr/bin")
    assert environ["NO_PROXY"] == "inside,127.0.0.1,localhost"
    assert environ["HOME"] == "/home/a"


def test_only_a_ui_that_runs_is_joined(project):
    assert environment.running_ui() is None
    write_json(environment.UI_FILE, {"owner": "999999999:1", "mlflow": "m", "prefect": "p"})
    assert environment.running_ui() is None
    write_json(environment.UI_FILE, {"owner": mark(), "mlflow": "m", "prefect": "p"})
    assert environment.running_ui()["prefect"] == "p"


def test_a_lock_is_for_one_at_a_time():
    with environment.only_one("flow", "the pipeline"):
        with pytest.raises(InputError, match="the pipeline runs already"), environment.only_one("flow", "the pipeline"):
            pass
        with environment.only_one("other", "something else"):
            pass
    with environment.only_one("flow", "the pipeline"):
        pass


def test_a_taken_port_is_passed_over():
    import socket

    with socket.socket() as taken:
        taken.bind((servers.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = servers.free_port(port)
        assert port < found < port + 100
