"""The package's commands end bad input with a message and status 2."""

import subprocess
import sys

import pytest
from tiny import ROOT


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


def test_generate_makes_a_family_and_its_router(tiny, tmp_path):
    weights = next((tiny.folder.parents[1] / "backbones").glob("*.safetensors"))
    ended = command(
        "generate", str(ROOT / "tests" / "tiny.yaml"), "--set", f"backbone.weights={weights} cloud.steps=2",
        "--output", str(tmp_path / "family"),
    )
    assert ended.returncode == 0, ended.stderr
    names = {path.name for path in (tmp_path / "family").iterdir()}
    members = {"subnet_1.safetensors", "subnet_2.safetensors"}
    assert names == members | {"manifest.json", "router.safetensors", "alignment.csv"}
    assert ended.stdout.count("fidelity") == 3


def test_help_lists_the_commands():
    ended = command("--help")
    assert ended.returncode == 0
    assert "generate" in ended.stdout
