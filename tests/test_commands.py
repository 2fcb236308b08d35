"""The package's commands end bad input with a message and status 2."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny import ROOT, tiny_study

from piebridge import __main__ as commands
from piebridge.backbones import load_backbone
from piebridge.cloud import family_folder
from piebridge.config import load_study, study_folder
from piebridge.embedded import handwritten_digits
from piebridge.experiment import open_experiment, run
from piebridge.router import load_router
from piebridge.subnets import read_manifest


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "piebridge", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("study", "overrides", "named"),
    [("no_such_study", "", "no_such_study"), ("embedded", "training.epoch=3", "training.epoch")],
)
def test_bad_study_is_a_message_and_status_2(tmp_path, study, overrides, named):
    ended = command("generate", study, "--set", overrides, "--output", str(tmp_path / "family"))
    assert ended.returncode == 2
    assert named in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "family").exists()


@pytest.fixture(scope="module")
def weights(tiny, build):
    """The file of the tiny study's backbone."""
    for path in (build / "backbones").glob("*.safetensors"):
        config = tiny.study.backbone.model_copy(update={"weights": str(path)})
        if load_backbone(config).fingerprint == tiny.backbone.fingerprint:
            return path
    raise AssertionError("the tiny study's backbone has no file")


def test_generate_makes_a_family_and_its_router(weights, tmp_path):
    ended = command(
        "generate", str(ROOT / "tests" / "tiny.yaml"), "--set", f"backbone.weights={weights} cloud.steps=2",
        "--output", str(tmp_path / "family"),
    )
    assert ended.returncode == 0, ended.stderr
    names = {path.name for path in (tmp_path / "family").iterdir()}
    members = {"subnet_1.safetensors", "subnet_2.safetensors"}
    assert names == members | {"manifest.json", "router.safetensors", "alignment.csv"}
    assert ended.stdout.count("fidelity") == 3


def test_extend_adds_a_subnet_and_leaves_the_files_of_others(tiny, weights, tmp_path):
    given, study = family_folder(tiny.study, tiny.backbone), str(ROOT / "tests" / "tiny.yaml")
    before = {path.name: path.read_bytes() for path in given.iterdir()}
    arguments = ["extend", study, "--family", str(given), "--like", "1", "--output", str(tmp_path / "family"), "--set"]
    overrides = f"backbone.weights={weights} cloud.steps=2 cloud.subnets=[{{resolution:"
    ended = command(*arguments, f"{overrides}' 24}}]'")
    assert ended.returncode == 0, ended.stderr
    made = {path.name: path.read_bytes() for path in (tmp_path / "family").iterdir()}
    assert made["subnet_1.safetensors"] == before["subnet_1.safetensors"]
    assert made["subnet_3.safetensors"] == before["subnet_2.safetensors"]
    files = {f"subnet_{index}.safetensors" for index in (1, 2, 3)}
    assert made.keys() == files | {"manifest.json", "router.safetensors", "extension.csv"}
    assert len(load_router(tmp_path / "family").relative_costs) == 4
    assert {path.name: path.read_bytes() for path in given.iterdir()} == before
    arguments[arguments.index("1")] = "7"
    ended = command(*arguments, f"{overrides}' 24}}]'")
    assert ended.returncode == 2 and "no subnet 7" in ended.stderr and "Traceback" not in ended.stderr


def test_check_names_the_folder_of_the_results(build):
    ended = command("check", "embedded", "--set", "seed=3")
    assert ended.returncode == 0
    assert str(study_folder(load_study("embedded", "seed=3"))) in ended.stdout
    assert command("check", "embedded", "--set", "seed=-3").returncode == 2


@pytest.fixture(scope="module")
def trained(tiny):
    """A study with one method, run; its overrides and the folder of the run."""
    overrides = "seed=8 training.methods='[pet]'"
    experiment = open_experiment(tiny_study(overrides))
    run(experiment)
    return overrides, experiment.folder / "runs" / "pet-seed0"


def test_summary_prints_what_was_reached(trained):
    overrides, folder = trained
    ended = command("summary", str(ROOT / "tests" / "tiny.yaml"), "--set", overrides)
    assert ended.returncode == 0, ended.stderr
    reached = json.loads((folder / "record.json").read_text())["record"]["test_accuracy"]
    assert f"{reached:.2f}".rstrip("0").rstrip(".") in ended.stdout
    assert str(folder / "trained.safetensors") in ended.stdout


def test_summary_of_a_study_that_was_not_run():
    ended = command("summary", str(ROOT / "tests" / "tiny.yaml"), "--set", "seed=99")
    assert ended.returncode == 2
    assert "has not been run" in ended.stderr


def test_predict_classifies_photos(trained, tmp_path):
    images, _ = handwritten_digits()
    Image.fromarray(images[0]).save(tmp_path / "zero.png")
    Image.fromarray(images[1]).save(tmp_path / "one.png")
    photos = [str(tmp_path / "zero.png"), str(tmp_path / "one.png")]
    ended = command("predict", str(trained[1] / "trained.safetensors"), *photos)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == photos
    assert all(re.fullmatch(r".*: \d \(\d+\.\d %\)", line) for line in lines)


def test_predict_names_the_photo_that_is_none(trained, tmp_path):
    (tmp_path / "text.png").write_text("no photo")
    ended = command("predict", str(trained[1] / "trained.safetensors"), str(tmp_path / "text.png"))
    assert ended.returncode == 2
    assert "text.png" in ended.stderr


@pytest.fixture
def unmeasured(tiny, tmp_path):
    """A family's folder, its latencies not known."""
    folder = shutil.copytree(family_folder(tiny.study, tiny.backbone), tmp_path / "family")
    manifest = json.loads((folder / "manifest.json").read_text())
    for facts in manifest["subnets"]:
        facts["relative_latency"] = None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_measure_writes_new_latencies(unmeasured, weights):
    before = read_manifest(unmeasured)
    study = [str(ROOT / "tests" / "tiny.yaml"), "--set", f"backbone.weights={weights}"]
    ended = command("measure", *study, "--family", str(unmeasured), "--processes", "2")
    assert ended.returncode == 0, ended.stderr
    assert "2/2" in ended.stderr
    measured = read_manifest(unmeasured)
    assert all(facts.relative_latency > 0 for facts in measured.subnets)
    assert measured.subnets[0].relative_latency == 1
    assert [facts.sha256 for facts in measured.subnets] == [facts.sha256 for facts in before.subnets]


def test_measure_takes_the_median_of_its_processes(unmeasured, monkeypatch):
    seen = iter([0.5, 0.9, 0.6])

    class Fresh:
        def __init__(self, count, context): ...

        def __enter__(self):
            return self

        def __exit__(self, *error): ...

        def submit(self, function, study, folder):
            manifest, latency = read_manifest(folder), next(seen)
            facts = [facts.model_copy(update={"relative_latency": latency}) for facts in manifest.subnets]
            return SimpleNamespace(result=lambda: manifest.model_copy(update={"subnets": tuple(facts)}))

    monkeypatch.setattr(commands, "ProcessPoolExecutor", Fresh)
    commands.measure(SimpleNamespace(study="smoke", set="", family=unmeasured, processes=3))
    assert {facts.relative_latency for facts in read_manifest(unmeasured).subnets} == {0.6}


def test_measure_refuses_what_it_cannot_use(unmeasured, weights):
    study = [str(ROOT / "tests" / "tiny.yaml"), "--set", f"backbone.weights={weights}"]
    none = command("measure", *study, "--family", str(unmeasured), "--processes", "0")
    assert none.returncode == 2 and "--processes: 0" in none.stderr
    (unmeasured / "manifest.json").unlink()
    nothing = command("measure", *study, "--family", str(unmeasured), "--processes", "1")
    assert nothing.returncode == 2 and str(unmeasured) in nothing.stderr and "Traceback" not in nothing.stderr


def test_help_lists_the_commands():
    ended = command("--help")
    assert ended.returncode == 0
    assert "generate" in ended.stdout
