"""`make demo`: the flow from a bare folder to a registered model, and what a person wants to know at the end."""

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import environment, servers
from peg.errors import PegError
from peg.process import alive, end_stale
from peg.workspace import read_json

if TYPE_CHECKING:
    from flows.pipeline import Outcome


def main() -> int:
    """Run it all; 0 when a model is registered, 1 after a failed stage, 2 for a mistake, 130 after Ctrl-C."""
    began = time.monotonic()
    environment.prepare()
    try:
        with environment.only_one("flow", "the pipeline"):
            outcome = _run()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except PegError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if outcome is None:
        return 1
    _report(outcome, seconds=time.monotonic() - began)
    return 0


def _run() -> "Outcome | None":
    for command in end_stale(environment.CHILDREN):
        print(f"ended what an earlier run left behind: {command}", file=sys.stderr)
    with ExitStack() as stack:
        if (running := environment.running_ui()) is not None:
            address = running["prefect"]
        else:
            stack.enter_context(environment.only_one("prefect", "make ui"))
            address = stack.enter_context(servers.prefect_server(servers.free_port()))
        os.environ["PREFECT_API_URL"] = f"{address}/api"
        # While the server starts, which takes seconds, Prefect is imported.
        from flows import pipeline

        servers.wait_until_it_answers("prefect", f"{address}/api/health")
        _close_stale_run()
        try:
            return pipeline.pipeline()
        except pipeline.StageFailedError as error:
            print(f"\nthe pipeline failed: {str(error).splitlines()[0]}", file=sys.stderr)
            return None
        finally:
            _send_what_is_queued()


def _send_what_is_queued() -> None:
    """Prefect sends logs and events from threads, at the latest at the end: its own server is gone then."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=10)
    EventsWorker.drain_all(timeout=10)


def _close_stale_run() -> None:
    """A run whose process was killed stands as Running for ever, unless someone says that it crashed."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import State
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed

    if not environment.FLOW_FILE.is_file():
        return
    last = read_json(environment.FLOW_FILE)
    if alive(last["owner"]):
        return
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(last["flow_run_id"]).state
            if state is not None and not state.is_final():
                crashed: State[Any] = Crashed(message="Its process was killed; a later run found that.")
                client.set_flow_run_state(last["flow_run_id"], crashed, force=True)
        except ObjectNotFound:
            pass
    environment.FLOW_FILE.unlink()


def _report(outcome: "Outcome", *, seconds: float) -> None:
    from rich.console import Console

    from flows.tables import results_table

    console = Console()
    console.print()
    console.print(results_table(read_json(Path("reports/comparison.json"))))
    registration = outcome.registration
    alias = f"alias '{registration['alias']}'" if registration["alias"] else "no alias"
    known = "new" if registration["new"] else "known already: no second version for the same weights"
    print(f"\n{registration['model_name']} version {registration['version']} ({known}), {alias}")
    for reason in registration["reasons"]:
        print(f"  {reason}")
    print("\nseconds per stage, DVC's own share in brackets")
    for run in outcome.stages:
        shown = "nothing to do" if run.skipped else f"{run.own_seconds:.1f}"
        print(f"  {run.stage:<10} {shown:>13}  ({run.seconds - run.own_seconds:.1f})")
    own = sum(run.own_seconds for run in outcome.stages)
    print(f"  in all {seconds:.1f}, of which orchestration (flow, DVC, registration) {seconds - own:.1f}")
    print(
        f"\nreport  {Path('reports/report.html').resolve()}\n"
        "next    make ui                            the runs, the model and this flow in a browser\n"
        '        .venv/bin/peg search "画蛇添足"    the nearest passages, by the champion\n'
        "        .venv/bin/dvc metrics show         what each stage measured; dvc dag, dvc plots show\n"
        "        .venv/bin/peg recipe list          other recipes; `peg recipe use NAME` takes one"
    )
    environment.FLOW_FILE.unlink(missing_ok=True)
