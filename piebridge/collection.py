"""Collection: the runs of several studies in one folder of CSV files, the form in which records are committed.

`end_to_end.csv` holds the records, `end_to_end_history.csv` their epochs, `tuning.csv` what chose the learning rates,
and `table_1_<study>.csv` the appendix's table of a study.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import pandas as pd

from . import records
from .config import Study, study_folder
from .records import Record

ALIKE = ("commit", "device", "threads", "torch")  # of all runs of a study: else their times are not comparable


@dataclass(frozen=True)
class Runs:
    """All that a finished study left.

    Attributes:
        records: one row a run, in the order of the study's methods.
        history: one row a run and epoch; also columns study, regime, method, seed.
        tuning: one row a method and candidate rate; None if the study tuned nothing.
    """

    records: pd.DataFrame
    history: pd.DataFrame
    tuning: Optional[pd.DataFrame]


def has_runs(study: Study) -> bool:
    """Whether at least one run of a study was finished."""
    return any((study_folder(study) / "runs").glob("*/record.json"))


def read_runs(study: Study, command: str) -> Runs:
    """What a study's runs left in its folder.

    Args:
        command: runs the study; errors name it.

    Raises:
        ValueError: a run is missing, the runs are not of one commit, device, thread count and torch, or they were not
            trained with the rates that tuning chose.
    """
    folder = study_folder(study)
    places = {
        (method, seed): folder / "runs" / f"{method}-seed{seed}"
        for method in study.training.methods for seed in study.training.seeds
    }
    missing = [f"{method} (seed {seed})" for (method, seed), place in places.items()
               if not (place / "record.json").is_file()]
    if missing:
        raise ValueError(f"{study.name}: no record of {', '.join(missing)}; run the study first: {command}")
    contents = [json.loads((place / "record.json").read_text(encoding="utf-8")) for place in places.values()]
    table = records.to_table([Record.model_validate(content["record"]) for content in contents])
    for column in ALIKE:
        if table[column].nunique() > 1:
            methods = table.groupby(column, sort=False)["method"].agg(", ".join)
            raise ValueError(
                f"{study.name}: its runs are not of one {column} "
                f"({'; '.join(f'{value}: {names}' for value, names in methods.items())}); remove those that are to be "
                f"made anew from {folder / 'runs'}, then: {command}"
            )
    histories = []
    for (method, seed), place in places.items():
        history = pd.read_csv(place / "history.csv", dtype=str, keep_default_na=False).assign(method=method, seed=seed)
        history.insert(0, "study", study.name)
        history.insert(1, "regime", study.training.regime)
        histories.append(history)
    return Runs(table, pd.concat(histories, ignore_index=True), _read_tuning(study, table, command))


def _read_tuning(study: Study, table: pd.DataFrame, command: str) -> Optional[pd.DataFrame]:
    path = study_folder(study) / "tuning.csv"
    if not path.is_file():
        return None
    tuning = pd.read_csv(path, float_precision="round_trip")
    best = tuning.loc[tuning.groupby("method")["val_accuracy"].idxmax()].set_index("method")["learning_rate"]
    used = table.drop_duplicates("method").set_index("method")["learning_rate"]
    odd = [method for method in best.index if best[method] != used[method]]
    if odd:
        raise ValueError(f"{study.name}: {odd[0]} was not trained with the rate that {path} chose; run it: {command}")
    return tuning


def collect(studies: dict[str, Study], output: Path) -> None:
    """Write the runs of studies into a folder of CSV files; all is checked before anything is written.

    Rows of other studies stay as they are, byte by byte; those of the given studies are replaced as a whole and come
    last, in the order given. Rows of tuning.csv are replaced only by new tuning: a study whose rates have since been
    written into its file tunes no more, and the rows say where these rates come from.

    Args:
        studies: by the command that runs each.
        output: folder; made if absent.

    Raises:
        ValueError: two studies have one name, see `read_runs`, or a file in the folder has other columns.
        OSError: the folder cannot be written.
    """
    names = [study.name for study in studies.values()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two studies are named {twice[0]!r}: their rows could not be told apart")
    runs = {study.name: read_runs(study, command) for command, study in studies.items()}
    tables = {
        "end_to_end.csv": [each.records for each in runs.values()],
        "end_to_end_history.csv": [each.history for each in runs.values()],
        "tuning.csv": [each.tuning for each in runs.values() if each.tuning is not None],
    }
    merged = {name: _merged(output / name, parts) for name, parts in tables.items() if parts}
    for name, table in merged.items():
        records.write_table(output / name, table)
    for name, each in runs.items():
        records.write_table_1(output / f"table_1_{name}.csv", each.records)


def _merged(path: Path, parts: list[pd.DataFrame]) -> pd.DataFrame:
    """A file's rows of other studies, then the parts; every value as its text, so that none is rounded anew."""
    text = pd.concat(parts, ignore_index=True).to_csv(index=False)
    table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    if not path.is_file():
        return table
    known = pd.read_csv(path, dtype=str, keep_default_na=False)
    odd = sorted(set(known.columns) ^ set(table.columns))
    if odd:
        raise ValueError(f"{path}: other columns than this version writes ({', '.join(odd)}); choose another folder")
    return pd.concat([known[~known["study"].isin(table["study"])], table], ignore_index=True)
