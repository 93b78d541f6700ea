import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peg.process import OWNER, alive, end_stale, mark, run_streaming
from peg.workspace import write_json

SLEEPER = "import time; time.sleep(60)"
WATCHER = "from peg.process import die_with_owner; import time; die_with_owner(every_s=0.05); print('up', flush=True)\n"


def wait_until(fact, *, timeout_s=10.0):
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if fact():
            return True
        time.sleep(0.02)
    return False


def start(code, **env):
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture
def sleeper():
    process = start(SLEEPER)
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_mark_names_one_process_only(sleeper):
    first = mark(sleeper.pid)
    assert alive(first)
    assert not alive(f"{sleeper.pid}:1"), "the same pid with another start time is another process"
    sleeper.kill()
    sleeper_is_gone = wait_until(lambda: not alive(first))
    assert sleeper_is_gone
    assert mark(sleeper.pid) is None, "a zombie is no process"
    assert alive(mark())


@pytest.mark.parametrize("text", ["", "x:1", ":", "999999999:5"])
def test_a_mark_that_names_nothing_is_not_alive(text):
    assert not alive(text)


def test_a_child_ends_when_its_owner_is_killed(sleeper):
    child = start(WATCHER + SLEEPER, **{OWNER: mark(sleeper.pid)})
    try:
        assert child.stdout.readline() == "up\n"
        assert child.poll() is None
        time.sleep(0.3)
        assert child.poll() is None, "it must live as long as its owner"
        sleeper.send_signal(signal.SIGKILL)
        assert child.wait(timeout=10) == -signal.SIGTERM
    finally:
        child.kill()
        child.stdout.close()


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(sleeper):
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        + WATCHER.replace("every_s=0.05", "every_s=0.05, grace_s=0.3")
        + SLEEPER
    )
    child = start(code, **{OWNER: mark(sleeper.pid)})
    try:
        assert child.stdout.readline() == "up\n"
        sleeper.kill()
        assert child.wait(timeout=10) == -signal.SIGKILL
    finally:
        child.kill()
        child.stdout.close()


def test_run_streaming_hands_over_lines_of_both_streams_and_the_status(tmp_path):
    code = "import sys; print('one'); sys.stdout.flush(); print('two', file=sys.stderr); print('a\\rb'); sys.exit(7)"
    lines = []
    status = run_streaming(
        [sys.executable, "-u", "-c", code], lines.append, records=tmp_path / "r", cwd=tmp_path, env=dict(os.environ)
    )
    assert status == 7
    assert lines == ["one", "two", "a", "b"]
    assert list((tmp_path / "r").iterdir()) == []


def test_run_streaming_ends_the_whole_group_when_it_is_left_early(tmp_path):
    grandchild = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEPER!r}]); "
    code = grandchild + "print(p.pid, flush=True); p.wait()"
    seen = []

    def on_line(line):
        seen.append(mark(int(line)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_streaming(
            [sys.executable, "-c", code], on_line, records=tmp_path, cwd=tmp_path, env=dict(os.environ), grace_s=3
        )
    assert seen[0] is not None
    assert not alive(seen[0])
    assert list(tmp_path.iterdir()) == []


def test_end_stale_ends_only_children_without_an_owner(tmp_path, sleeper):
    orphan = start(SLEEPER)
    ours = mark(orphan.pid)
    write_json(tmp_path / "1.json", {"process": ours, "owner": "999999999:1", "command": ["the", "orphan"]})
    write_json(tmp_path / "2.json", {"process": mark(sleeper.pid), "owner": mark(), "command": ["ours"]})
    write_json(tmp_path / "3.json", {"process": f"{os.getpid()}:1", "owner": "999999999:1", "command": ["reused pid"]})
    try:
        assert end_stale(tmp_path) == ["the orphan"]
        assert not alive(ours)
        assert sleeper.poll() is None
        assert [path.name for path in tmp_path.iterdir()] == ["2.json"]
    finally:
        orphan.kill()
        orphan.wait()
        orphan.stdout.close()


def test_end_stale_without_records_does_nothing(tmp_path):
    assert end_stale(tmp_path / "absent") == []
    assert not Path(tmp_path / "absent").exists()
