"""What the README says of the committed records is what they say."""

import re
import subprocess
import sys

import pandas as pd
import pytest
from tiny import ROOT

from piebridge.audit import REFERENCE
from piebridge.records import compared, read_table, speedups

RECORDS = ROOT / "book" / "records"


def test_the_table_of_the_readme_is_the_records():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    form = r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+|-) \| ([\d.]+) \| (-?[\d.]+) ± ([\d.]+) \|$"
    rows = re.findall(form, text, re.MULTILINE)
    runs, routes = read_table(RECORDS / "end_to_end.csv"), pd.read_csv(RECORDS / "routes.csv")
    assert {row[0] for row in rows} == set(routes["study"])
    for study, than_pet, than_full, cached, points, half_width in rows:
        table = speedups(runs[runs["study"] == study])
        ours = table.loc["piebridge"]
        assert float(than_pet) == round(ours["faster_than_pet"], 1)
        assert (than_full == "-") == ("full" not in table.index)
        assert than_full == "-" or float(than_full) == round(ours["faster_than_full"], 1)
        assert float(cached) == round(table.loc["cached", "faster_than_pet"], 1)
        behind = compared(routes[routes["study"] == study], REFERENCE).loc["original"]
        assert float(points) == pytest.approx(behind["behind"], abs=0.006)
        assert float(half_width) == pytest.approx(behind["half_width"], abs=0.006)


def test_the_ranges_of_the_readme_are_the_records():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def said(form):
        return [float(number) for number in re.search(form, text).groups()]

    runs, routes = read_table(RECORDS / "end_to_end.csv"), pd.read_csv(RECORDS / "routes.csv")
    plain = runs[runs["regime"] == "plain"].pivot(index="study", columns="method", values="train_seconds")
    saved = 100 * (1 - plain["piebridge"] / plain["pet"])
    assert said(r"So (\d+) to (\d+) % of the time") == [round(saved.min()), round(saved.max())]
    resnet = plain[plain.index.str.endswith("resnet18")]
    kept = resnet["cached"] / resnet["piebridge_cached"]
    assert said(r"subnet is ([\d.]+) times") == [round(kept.min(), 1)] == [round(kept.max(), 1)]
    lost = [-compared(routes[routes["study"] == study], REFERENCE).loc["original", "behind"] for study in resnet.index]
    assert said(r"loses ([\d.]+) to ([\d.]+) points with ResNet-18") == pytest.approx(
        [min(lost), max(lost)], abs=0.006
    )


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
