"""Several studies in one place: `make studies` runs them, `collect` writes their tables, the book shows these."""

import json
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from test_records import example
from tiny import ROOT

from piebridge import records
from piebridge.collection import collect, has_runs, read_runs
from piebridge.config import load_study, study_folder

LISTED = [
    f"params/{data}_{rest}.yaml"
    for rest in ("resnet18", "mobilenetv2", "resnet18_augmented") for data in ("caltech101", "dtd", "dogsvscats")
]


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """Two small studies, by the command that runs each; nothing is run yet."""
    monkeypatch.setenv("PIEBRIDGE_BUILD", str(tmp_path / "build"))
    texts = {
        "digits": "training: {methods: [full, pet, piebridge], seeds: [0, 1]}",
        "moved": "training: {methods: [pet, piebridge], regime: augmented}",
    }
    made = {}
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        made[f"make study STUDY={name}.yaml"] = load_study(tmp_path / f"{name}.yaml")
    return made


def pretend(study, tuned=False, **values):
    """Leave behind what the runs of a study would."""
    for place, method in enumerate(study.training.methods):
        for seed in study.training.seeds:
            folder = study_folder(study) / "runs" / f"{method}-seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            record = example(
                method, seed, study=study.name, regime=study.training.regime, test_accuracy=80.1 + place,
                train_seconds=0.1 + 0.2 * (place + 1), prefix_seconds=0.1, **values,
            )
            content = {"code": "0", "record": record.model_dump()}
            (folder / "record.json").write_text(json.dumps(content))
            history = pd.DataFrame({
                "epoch": [1, 2], "train_seconds": [1 / 3, 0.1 + 0.2], "loss": 1.0, "original_share": 1.0,
                "test_accuracy": [None, 80.1 + place],
            })
            records.write_table(folder / "history.csv", history)
    if tuned:
        rates = [(method, rate, 90 - rate) for method in study.training.methods for rate in (0.01, 0.03)]
        table = pd.DataFrame(rates, columns=["method", "learning_rate", "val_accuracy"])
        table.insert(0, "study", study.name)
        records.write_table(study_folder(study) / "tuning.csv", table)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_collects_all_studies_in_order(studies, tmp_path):
    digits, moved = studies.values()
    pretend(digits, tuned=True)
    pretend(moved)
    collect(studies, tmp_path / "tables")
    assert set(contents(tmp_path / "tables")) == {
        "end_to_end.csv", "end_to_end_history.csv", "tuning.csv", "table_1_digits.csv"
    }
    table = records.read_table(tmp_path / "tables" / "end_to_end.csv")
    assert list(zip(table["study"], table["method"], table["seed"])) == [
        *(("digits", method, seed) for method in ("full", "pet", "piebridge") for seed in (0, 1)),
        ("moved", "pet", 0), ("moved", "piebridge", 0),
    ]
    assert set(table[table["study"] == "moved"]["regime"]) == {"augmented"}
    history = pd.read_csv(tmp_path / "tables" / "end_to_end_history.csv", float_precision="round_trip")
    assert len(history) == 2 * len(table)
    assert list(history.columns[:2]) == ["study", "regime"]
    assert history["train_seconds"].tolist()[:2] == [1 / 3, 0.1 + 0.2]  # not rounded
    tuning = pd.read_csv(tmp_path / "tables" / "tuning.csv")
    assert set(tuning["study"]) == {"digits"}
    table_1 = pd.read_csv(tmp_path / "tables" / "table_1_digits.csv", index_col=0)
    assert list(table_1.columns) == ["Ours", "PET", "FTAll"]


def test_given_studies_are_replaced_and_others_stay(studies, tmp_path):
    (command, digits), (_, moved) = studies.items()
    pretend(digits, tuned=True)
    pretend(moved)
    collect(studies, tmp_path / "tables")
    before = contents(tmp_path / "tables")
    pretend(digits, commit="newer", learning_rate=0.03)
    (study_folder(digits) / "tuning.csv").unlink()
    collect({command: digits}, tmp_path / "tables")
    after = contents(tmp_path / "tables")
    for name in ("end_to_end.csv", "end_to_end_history.csv"):
        kept = [line for line in before[name].splitlines() if line.startswith("moved")]
        assert kept == [line for line in after[name].splitlines() if line.startswith("moved")]
        assert sorted(line.split(",")[0] for line in before[name].splitlines()) == sorted(
            line.split(",")[0] for line in after[name].splitlines())
    table = records.read_table(tmp_path / "tables" / "end_to_end.csv")
    assert set(table[table["study"] == "digits"]["commit"]) == {"newer"}
    assert set(table[table["study"] == "moved"]["commit"]) == {"unknown"}
    assert before["tuning.csv"] == after["tuning.csv"]  # where the rates came from


@pytest.mark.parametrize("column", ["commit", "device", "threads", "torch"])
def test_mixtures_are_refused_and_nothing_is_written(studies, tmp_path, column):
    (command, digits), _ = studies.items()
    pretend(digits)
    path = study_folder(digits) / "runs" / "piebridge-seed1" / "record.json"
    content = json.loads(path.read_text())
    content["record"][column] = 7 if column == "threads" else "another"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"digits: its runs are not of one {column} .*(7|another): piebridge") as error:
        collect({command: digits}, tmp_path / "tables")
    assert command in str(error.value)
    assert not (tmp_path / "tables").exists()


def test_what_is_missing_is_named_with_its_command(studies, tmp_path):
    (command, digits), (other, moved) = studies.items()
    assert not has_runs(digits)
    with pytest.raises(ValueError, match=f"digits: no record of full .*piebridge .seed 1.*{re.escape(command)}"):
        read_runs(digits, command)
    pretend(digits)
    pretend(moved)
    assert has_runs(moved)
    (study_folder(moved) / "runs" / "piebridge-seed0" / "record.json").unlink()
    with pytest.raises(ValueError, match=rf"moved: no record of piebridge \(seed 0\); .*{re.escape(other)}"):
        collect(studies, tmp_path / "tables")
    assert not (tmp_path / "tables").exists()


def test_rates_are_those_that_tuning_chose(studies, tmp_path):
    (command, digits), _ = studies.items()
    pretend(digits, tuned=True, learning_rate=0.03)
    with pytest.raises(ValueError, match=r"full was not trained with the rate that .*tuning\.csv chose"):
        read_runs(digits, command)


def test_two_studies_of_one_name_are_refused(studies, tmp_path):
    digits = next(iter(studies.values()))
    with pytest.raises(ValueError, match="two studies are named 'digits'"):
        collect({"one": digits, "two": digits}, tmp_path / "tables")


def test_a_file_of_other_columns_is_refused(studies, tmp_path):
    for study in studies.values():
        pretend(study)
    records.write_table(tmp_path / "end_to_end_history.csv", pd.DataFrame({"study": ["x"], "step": [1]}))
    with pytest.raises(ValueError, match=r"end_to_end_history\.csv: other columns .*step"):
        collect(studies, tmp_path)
    assert not (tmp_path / "end_to_end.csv").exists()


def command(*arguments):
    asked = [sys.executable, "-m", "piebridge", *map(str, arguments)]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)


def test_the_commands(studies, tmp_path):
    digits, moved = studies.values()
    files = [tmp_path / "digits.yaml", tmp_path / "moved.yaml"]
    asked = ["collect", *files, "--output", tmp_path / "tables"]
    ended = command(*asked, "--if-run")
    assert ended.returncode == 2
    assert "none of these studies has been run" in ended.stderr
    pretend(digits)
    ended = command(*asked)
    assert ended.returncode == 2
    assert f"make study STUDY={files[1]}" in ended.stderr
    ended = command(*asked, "--if-run")
    assert ended.returncode == 0, ended.stderr
    assert "moved: left out" in ended.stdout
    pretend(moved)
    assert command(*asked).returncode == 0
    table, picture = tmp_path / "tables" / "end_to_end.csv", tmp_path / "picture.png"
    ended = command("figure", table, "--output", picture)
    assert ended.returncode == 2
    assert "choose one study of digits, moved" in ended.stderr
    ended = command("figure", table, "--study", "nothing", "--output", picture)
    assert "there are: digits, moved" in ended.stderr
    assert not picture.exists()
    assert command("figure", table, "--study", "moved", "--output", picture).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def workplace(tmp_path):
    """The Makefile with stand-ins for what it calls; they write down the studies that they are given."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "pyproject.toml").touch()
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (tmp_path / ".venv" / ".installed").touch()
    text = '#!/bin/bash\necho "$(basename "$0") $*" >> calls.txt\n[[ "$*" != *absent* || "$*" != *check* ]]\n'
    for name in ("python", "snakemake"):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    return tmp_path


def make(folder, *arguments):
    surroundings = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "STUDIES", "SET")}
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, env=surroundings)


def test_make_studies_lists_each_study_once_in_order(workplace):
    ended = make(workplace, "-n", "studies")
    assert ended.returncode == 0, ended.stderr
    assert re.findall(r'piebridge check "(.*?)"', ended.stdout) == LISTED
    assert not (workplace / "calls.txt").exists()
    for path in LISTED:
        load_study(ROOT / path)


def test_make_studies_goes_on_after_a_study_that_cannot_run(workplace):
    ended = make(workplace, "-j4", "studies", "STUDIES=a.yaml absent.yaml b.yaml", "SET=seed=1 data.root='/x y'")
    assert ended.returncode != 0
    assert "not finished, see above: absent.yaml\n" in ended.stderr
    calls = (workplace / "calls.txt").read_text().splitlines()
    assert [re.search(r"(\w+)\.yaml", line).group(1) for line in calls] == ["a"] * 3 + ["absent"] + ["b"] * 3


def test_make_tables_asks_for_all_of_a_list_of_your_own(workplace):
    assert make(workplace, "tables", "TABLES=here").returncode == 0
    assert make(workplace, "tables", "STUDIES=a.yaml b.yaml").returncode == 0
    calls = (workplace / "calls.txt").read_text().splitlines()
    assert calls[0] == f"python -m piebridge collect {' '.join(LISTED)} --set  --output here --if-run"
    assert calls[1] == "python -m piebridge collect a.yaml b.yaml --set  --output _build/tables"


def test_the_book_shows_each_study_of_a_file(studies, tmp_path):
    for study in studies.values():
        pretend(study)
    source = tmp_path / "source"
    collect(studies, source / "records")
    (source / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'book' / '_ext')!r})\n"
        "extensions = ['myst_parser', 'record_tables']\nexclude_patterns = ['generated']\n"
    )
    (source / "index.md").write_text("# All\n\n```{study-comparisons} end_to_end.csv\n```\n")
    (source / "one.md").write_text(
        "---\norphan: true\n---\n# One\n\n```{study-comparisons} end_to_end.csv\n:where: study == 'moved'\n```\n"
    )
    asked = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", str(source), str(tmp_path / "html")]
    ended = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    page = (tmp_path / "html" / "index.html").read_text()
    assert page.count("<table") == page.count("<img") == 2
    assert page.index("digits") < page.index("moved")
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]
    assert rows[1] == ["full", "0.3", "0.2", "1.67", "1.00", "80.10", "-1.00", "1.00"]
    assert rows[3] == ["piebridge", "0.7", "0.6", "0.71", "0.43", "82.10", "+1.00", "1.00"]
    assert rows[5] == ["pet", "0.3", "0.2", "1.00", "-", "80.10", "+0.00", "1.00"]  # full was not run
    page = (tmp_path / "html" / "one.html").read_text()
    assert page.count("<table") == page.count("<img") == 1
