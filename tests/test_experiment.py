"""Experiments: whole records or none, continued after a kill, tuned on validation."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ROOT, same_tensors, tiny_study

from piebridge import experiment as module
from piebridge import records, tensor_selection
from piebridge.backbones import WeightsError
from piebridge.checkpoints import Checkpoint
from piebridge.config import KEEP_LATENTS, METHODS
from piebridge.experiment import load_trained, open_experiment, run
from piebridge.methods import REGISTRY


@pytest.fixture(scope="module")
def finished(tiny):
    """The tiny study, run with all methods."""
    return tiny, run(tiny)


def small(overrides="", methods="[pet, cached]"):
    """A study of its own folder that needs no family."""
    return tiny_study(f"training.methods='{methods}' {overrides}")


def test_every_method_leaves_a_record(finished):
    experiment, table = finished
    assert tuple(table["method"]) == METHODS
    assert list(table.columns) == list(records.Record.model_fields)
    assert table["test_accuracy"].between(0, 100).all()
    assert (table["best_test_accuracy"] >= table["test_accuracy"]).all()
    assert (table["train_images"] == 90).all()
    assert (table["test_images"] == 60).all()
    assert records.read_table(experiment.folder / "records.csv")["method"].tolist() == list(METHODS)
    history = pd.read_csv(experiment.folder / "history.csv")
    assert history.groupby("method")["epoch"].max().to_dict() == dict.fromkeys(METHODS, 3)


def test_records_itemise_their_seconds(finished):
    _, table = finished
    items = ["prefix", "suffix", "router", "correction", "cache", "engine", "data"]
    assert (table[[f"{item}_seconds" for item in items]].sum(axis=1) <= table["train_seconds"]).all()
    rows = table.set_index("method")
    assert rows.loc["piebridge", "router_seconds"] > 0
    assert rows.loc["cached", "cache_seconds"] > 0
    assert rows.loc["pet", ["router_seconds", "cache_seconds", "correction_seconds"]].eq(0).all()


def test_cached_reaches_what_pet_reaches(finished):
    rows = finished[1].set_index("method")
    assert rows.loc["cached", "test_accuracy"] == rows.loc["pet", "test_accuracy"]
    assert rows.loc["cached", "train_gmacs"] < rows.loc["pet", "train_gmacs"]


def test_gmacs_of_pet_against_the_formula(finished):
    """Three epochs of 90 images: the prefix forward; the head forward and its weight's gradient."""
    experiment, table = finished
    prefix, _ = experiment.backbone.cut("head")
    image = module.costs.macs(prefix, experiment.backbone.example()) + 2 * 128 * 10
    assert table.set_index("method").loc["pet", "train_gmacs"] == pytest.approx(3 * 90 * image / 1e9)


def test_parameters_are_counted(finished):
    rows = finished[1].set_index("method")
    assert rows.loc["pet", "trainable_params"] == 128 * 10 + 10
    assert rows.loc["full", "trainable_params"] == rows.loc["full", "total_params"] == rows.loc["pet", "total_params"]


@pytest.mark.parametrize("method", REGISTRY)
def test_trained_file_holds_exactly_what_is_trained(finished, method):
    experiment, _ = finished
    path = experiment.folder / "runs" / f"{method}-seed0" / "trained.safetensors"
    suffix = REGISTRY[method](experiment.setting).split.suffix
    trained = {name for name, parameter in suffix.named_parameters() if parameter.requires_grad}
    assert set(load_file(path)) == trained
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    assert notes["method"] == method
    assert notes["weights_fingerprint"] == experiment.backbone.fingerprint
    assert json.loads(notes["classes"]) == list("0123456789")


def test_trained_file_reaches_the_recorded_accuracy(finished):
    """Put into the original network by hand and tested image by image."""
    experiment, table = finished
    trained = load_file(experiment.folder / "runs" / "piebridge-seed0" / "trained.safetensors")
    prefix, _ = experiment.backbone.cut("head")
    indices = experiment.task.splits["test"]
    logits = prefix(experiment.task.images[indices]) @ trained["head.weight"].T + trained["head.bias"]
    right = (logits.argmax(1) == experiment.task.labels[indices]).float().mean().item()
    assert table.set_index("method").loc["piebridge", "test_accuracy"] == pytest.approx(100 * right, abs=0.01)


@pytest.mark.parametrize("method", REGISTRY)
def test_trained_network_loads_again(finished, method):
    experiment, table = finished
    path = experiment.folder / "runs" / f"{method}-seed0" / "trained.safetensors"
    network, classes, side = load_trained(path)
    assert (classes, side) == (list("0123456789"), 32)
    indices = experiment.task.splits["test"]
    with torch.inference_mode():
        right = network(experiment.task.images[indices]).argmax(1) == experiment.task.labels[indices]
    reached = table.set_index("method").loc[method, "test_accuracy"]
    assert reached == pytest.approx(100 * right.float().mean().item(), abs=0.01)


def test_other_files_are_no_trained_networks(finished, tmp_path):
    (tmp_path / "text.safetensors").write_text("a text")
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "bare.safetensors")
    for name in ("absent", "text", "bare"):
        with pytest.raises(WeightsError, match=rf"{name}\.safetensors"):
            load_trained(tmp_path / f"{name}.safetensors")


def test_trained_network_of_other_weights_is_refused(finished, tmp_path):
    path = finished[0].folder / "runs" / "pet-seed0" / "trained.safetensors"
    with safe_open(path, "pt") as file:
        notes = file.metadata() | {"weights_fingerprint": "0" * 16}
    save_file(load_file(path), tmp_path / "other.safetensors", metadata=notes)
    with pytest.raises(WeightsError, match=r"other\.safetensors: trained with other weights of embedded"):
        load_trained(tmp_path / "other.safetensors")


def test_finished_runs_are_not_run_again(finished, monkeypatch):
    experiment, table = finished

    def forbidden(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "fit", forbidden)
    assert run(open_experiment(experiment.study))["started_at"].tolist() == table["started_at"].tolist()


def test_runs_of_other_code_are_run_again(tiny, monkeypatch):
    experiment = open_experiment(small("seed=3"))
    run(experiment)
    place = experiment.folder / "runs" / "pet-seed0"
    content = json.loads((place / "record.json").read_text())
    content["code"], content["record"]["test_accuracy"] = "00000000", 123.0
    (place / "record.json").write_text(json.dumps(content))
    table = run(experiment).set_index("method")
    assert table.loc["pet", "test_accuracy"] <= 100
    assert json.loads((place / "record.json").read_text())["code"] == records.code_fingerprint()


def test_failure_before_the_record_leaves_the_run_unfinished(tiny, monkeypatch):
    experiment = open_experiment(small("seed=4", "[pet]"))
    place = experiment.folder / "runs" / "pet-seed0"

    def fail(*arguments, **options):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(module, "save_file", fail)
        run(experiment)
    assert not (place / "record.json").exists()
    assert not (experiment.folder / "records.csv").exists()
    assert len(run(experiment)) == 1
    assert (place / "trained.safetensors").is_file()


KILLED = """
import sys, time
from piebridge import experiment
from piebridge.config import load_study
first, fit = [], experiment.fit
def slow_from_the_second_on(*arguments, **options):
    if first:
        time.sleep(600)
    first.append(True)
    return fit(*arguments, **options)
experiment.fit = slow_from_the_second_on
experiment.run(experiment.open_experiment(load_study(sys.argv[1], sys.argv[2])))
"""


def test_killed_experiment_continues(tiny):
    overrides = "seed=5 training.methods='[pet, cached, last_k]'"
    study = tiny_study(overrides)
    experiment = open_experiment(study)  # makes the backbone
    command = [sys.executable, "-c", KILLED, str(ROOT / "tests" / "tiny.yaml"), overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    first = experiment.folder / "runs" / "pet-seed0" / "record.json"
    try:
        while not first.is_file():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.parent.name for path in experiment.folder.glob("runs/*/record.json")] == ["pet-seed0"]
    assert not (experiment.folder / "records.csv").exists()
    before = first.read_bytes(), load_file(first.parent / "trained.safetensors")
    table = run(experiment)
    assert table["method"].tolist() == ["pet", "cached", "last_k"]
    assert first.read_bytes() == before[0]
    assert same_tensors(load_file(first.parent / "trained.safetensors"), before[1])
    assert records.read_table(experiment.folder / "records.csv")["method"].tolist() == ["pet", "cached", "last_k"]
    assert set(pd.read_csv(experiment.folder / "history.csv")["method"]) == {"pet", "cached", "last_k"}
    for path in experiment.folder.glob("runs/*/record.json"):
        assert (path.parent / "trained.safetensors").is_file()


class Killed(BaseException):
    """Ends a run where a signal could have."""


CHANGEFUL = (
    "elastic.interval=2 prune.interval=1 prune.threshold=0.12 routing.refit_pairs=5 training.evaluate_every=2 "
    "routing.measured_difficulty=0.5"
)


@pytest.fixture(scope="module", params=["plain", "augmented"])
def whole_and_pieces(tiny, request):
    """All methods of a regime, much changing from epoch to epoch, twice: never stopped, and stopped after each epoch.

    ElasticTrainer's measured times, which would differ, are replaced by the tensors' sizes.
    """
    keep, profiled, kills = Checkpoint.keep, [], 0
    studies = [
        tiny_study(f"name={name} training.regime={request.param} {CHANGEFUL}") for name in ("whole", "pieces")
    ]
    expected = 2 * len(studies[0].training.methods)

    def profile(network, batch, labels, iterations):
        tensors = list(network.parameters())[::-1]
        sizes = np.array([float(tensor.numel()) for tensor in tensors])
        profiled.append(network)
        return tensor_selection.BackwardProfile(tensors, sizes, 2 * sizes, sizes.sum(), 3 * sizes.sum())

    def keep_and_die(checkpoint, state):
        keep(checkpoint, state)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_selection, "profile_backward", profile)
        whole = open_experiment(studies[0])
        run(whole)
        patch.setattr(Checkpoint, "keep", keep_and_die)
        pieces = open_experiment(studies[1])
        while kills <= expected:
            try:
                run(pieces)
                break
            except Killed:
                kills += 1
                (checkpoint,) = pieces.folder.glob("runs/*/checkpoint.safetensors")
                assert not (checkpoint.parent / "record.json").exists()
    assert kills == expected
    assert len(profiled) == 2  # once a run, not once a piece
    return whole.folder / "runs", pieces.folder / "runs"


@pytest.mark.parametrize("method", METHODS)
def test_run_in_pieces_is_the_whole_run(whole_and_pieces, method):
    one, other = (folder / f"{method}-seed0" for folder in whole_and_pieces)
    if method in KEEP_LATENTS and not one.exists():
        pytest.skip("not in the augmented regime")
    assert sorted(path.name for path in other.iterdir()) == ["history.csv", "record.json", "trained.safetensors"]
    assert same_tensors(load_file(one / "trained.safetensors"), load_file(other / "trained.safetensors"))
    records_of = [json.loads((folder / "record.json").read_text())["record"] for folder in (one, other)]
    alike = [name for name in records_of[0] if not name.endswith("_seconds")]
    for name in set(alike) - {"study", "started_at", "peak_memory_mib", "energy_j"}:
        assert records_of[0][name] == records_of[1][name], name
    for name in ("prefix", "suffix", "correction", "cache", "engine", "router"):
        assert (records_of[0][f"{name}_seconds"] > 0) == (records_of[1][f"{name}_seconds"] > 0), name
    histories = [pd.read_csv(folder / "history.csv") for folder in (one, other)]
    assert histories[1]["train_seconds"].is_monotonic_increasing
    assert histories[1]["train_seconds"].iloc[-1] == pytest.approx(records_of[1]["train_seconds"])
    pd.testing.assert_frame_equal(*(history.drop(columns="train_seconds") for history in histories), check_exact=True)


def test_channels_were_dropped_before_a_kill(whole_and_pieces):
    rebuilds = []
    for folder in whole_and_pieces:
        with safe_open(folder / "prune-seed0" / "trained.safetensors", "pt") as file:
            rebuilds.append(json.loads(file.metadata()["rebuilds"]))
    assert rebuilds[0] == rebuilds[1]
    assert rebuilds[0]


def test_checkpoint_of_another_run_is_not_gone_on_from(tiny, monkeypatch):
    experiment = open_experiment(small("seed=81", "[pet]"))
    rates = iter([{"pet": 0.5}, {"pet": 0.01}])
    monkeypatch.setattr(module, "learning_rates", lambda experiment: next(rates))
    keep = Checkpoint.keep

    def keep_and_die(checkpoint, state):
        keep(checkpoint, state)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoint, "keep", keep_and_die)
        run(experiment)
    one = run(experiment)
    place = experiment.folder / "runs" / "pet-seed0"
    trained = load_file(place / "trained.safetensors")
    (place / "record.json").unlink()
    monkeypatch.setattr(module, "learning_rates", lambda experiment: {"pet": 0.01})
    assert run(experiment)["test_accuracy"].tolist() == one["test_accuracy"].tolist()
    assert same_tensors(load_file(place / "trained.safetensors"), trained)


def test_what_was_measured_is_kept_for_the_study(tiny, monkeypatch):
    study = tiny_study("name=measured training.methods='[resolution]' routing.costs=measured routing.cost=0.95")
    setting = open_experiment(study).setting
    assert setting.side_seconds > 0
    monkeypatch.setattr(module, "choose_side", None)
    again = open_experiment(study).setting
    assert all(getattr(again, name) == getattr(setting, name) for name in module.MEASURED)


def test_tuning_takes_the_rate_that_validates_best(tiny, monkeypatch):
    rates = [1e-6, 0.02]
    experiment = open_experiment(small(f"training.learning_rate={{}} training.learning_rates='{rates}'", "[pet]"))
    table = run(experiment)
    tuning = pd.read_csv(experiment.folder / "tuning.csv")
    assert tuning["learning_rate"].tolist() == rates
    best = tuning.loc[tuning["val_accuracy"].idxmax(), "learning_rate"]
    assert table["learning_rate"].tolist() == [best]
    assert best == 0.02
    for rate in rates:
        record = json.loads((experiment.folder / "tuning" / f"pet-{rate:g}" / "record.json").read_text())["record"]
        assert record["train_images"] == 70
        assert record["val_accuracy"] is not None
        assert not record["test_accuracy"] >= 0  # never measured while tuning


@pytest.mark.parametrize(("regime", "cached"), [("plain", True), ("augmented", False)])
def test_tuning_keeps_latents_only_where_that_is_exact(tiny, monkeypatch, regime, cached):
    plans, fit = [], module.fit

    def watched(plan, *arguments, **options):
        plans.append(plan)
        return fit(plan, *arguments, **options)

    monkeypatch.setattr(module, "fit", watched)
    rates = "training.learning_rate={} training.learning_rates='[0.01, 0.02]'"
    module.learning_rates(open_experiment(small(f"seed=9 training.regime={regime} {rates}", "[pet]")))
    assert [plan.cached for plan in plans] == [cached, cached]


@pytest.fixture(scope="module")
def augmented(tiny):
    """Some methods of the tiny study in the augmented regime."""
    study = small("training.regime=augmented routing.residuals=false", "[full, pet, random, oracle]")
    experiment = open_experiment(study)
    return experiment, run(experiment)


def test_augmented_training_is_tested_on_plain_images(tiny, augmented):
    experiment, table = augmented
    assert set(table["regime"]) == {"augmented"}
    assert torch.equal(experiment.task.images, tiny.task.images)
    assert torch.equal(experiment.setting.images, tiny.setting.images)
    indices = tiny.task.splits["test"]
    for method, reached in table.set_index("method")["test_accuracy"].items():
        network, _, _ = load_trained(experiment.folder / "runs" / f"{method}-seed0" / "trained.safetensors")
        with torch.inference_mode():
            right = network(tiny.task.images[indices]).argmax(1) == tiny.task.labels[indices]
        assert reached == pytest.approx(100 * right.float().mean().item(), abs=0.01)


def test_augmented_training_is_another_one(finished, augmented):
    for method in augmented[1]["method"]:
        places = [each.folder / "runs" / f"{method}-seed0" for each in (finished[0], augmented[0])]
        assert not same_tensors(*(load_file(place / "trained.safetensors") for place in places))
    plain, cropped = (each[1].set_index("method").loc["random"] for each in (finished, augmented))
    assert plain["train_gmacs"] == cropped["train_gmacs"]  # networks get images of the same size
    assert plain["regime"] == "plain"


def test_tuning_is_kept_and_continued(tiny, monkeypatch):
    study = small("seed=6 training.learning_rate={} training.learning_rates='[0.01, 0.02]'", "[pet]")
    first = open_experiment(study)
    chosen = module.learning_rates(first)

    def forbidden(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "fit", forbidden)
    assert module.learning_rates(open_experiment(study)) == chosen


def test_several_seeds_are_several_runs(tiny):
    table = run(open_experiment(small("seed=7 training.seeds='[0, 1]'", "[pet]")))
    assert table["seed"].tolist() == [0, 1]
    folder = module.study_folder(small("seed=7 training.seeds='[0, 1]'", "[pet]"))
    one, other = (load_file(folder / "runs" / f"pet-seed{seed}" / "trained.safetensors") for seed in (0, 1))
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_build_folder_that_cannot_be_made(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("a regular file")
    monkeypatch.setenv("PIEBRIDGE_BUILD", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError):
        open_experiment(small())


def test_runs_do_not_touch_the_working_folder(finished):
    assert not (ROOT / "runs").exists()
    assert finished[0].folder.is_relative_to(os.environ["PIEBRIDGE_BUILD"])
