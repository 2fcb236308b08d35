"""What the README says of the committed records is what they say."""

import re
import subprocess
import sys

from tiny import ROOT

from piebridge.records import read_table, speedups


def test_the_claims_of_the_readme():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    table = read_table(ROOT / "book" / "records" / "end_to_end.csv")
    compared = speedups(table[table["study"] == "caltech101_resnet18"])
    ours = compared.loc["piebridge"]
    assert "PieBridge halves the time of `pet`" in text and ours["faster_than_pet"] >= 2.0
    assert "ten times faster than `full`" in text and ours["faster_than_full"] >= 10
    assert "for less than a point of `pet`'s accuracy" in text and -1 < ours["points_above_pet"] < 0
    assert "did no better than random ones" in text and ours["test_accuracy"] <= compared.loc["random", "test_accuracy"]
    assert "faster still and exact" in text and compared.loc["cached", "train_seconds"] < ours["train_seconds"]


def test_the_commands_of_the_readme_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = set(re.findall(r"\bmake ([a-z]+) *(?:`|#|$|STUDY)", text, re.MULTILINE))
    assert {"book", "test", "study", "studies", "tables"} <= asked <= targets
    ended = subprocess.run([sys.executable, "-m", "piebridge", "--help"], cwd=ROOT, capture_output=True, text=True)
    commands = set(re.findall(r"^    ([a-z]+)", ended.stdout, re.MULTILINE))
    assert set(re.findall(r"-m piebridge ([a-z]+)", text)) <= commands
    assert "collect" in commands


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
