"""Records: one tidy row of evidence a run, with what ran, where, what it cost and what it reached.

Accuracies are in percent, times in seconds. Files are written whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import pandas as pd
from pydantic import BaseModel, ConfigDict
from scipy import stats


class Record(BaseModel):
    """One finished run of one method. Every `*_seconds` but `eval_seconds` is part of `train_seconds`."""

    model_config = ConfigDict(extra="forbid")

    study: str
    dataset: str
    backbone: str
    resolution: int
    regime: str = "plain"
    method: str
    variant: str
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    train_images: int
    test_images: int
    test_accuracy: float  # after the last epoch: the main figure
    best_test_accuracy: float  # of the best evaluated epoch, the appendix's metric: chosen by looking at the test split
    val_accuracy: Optional[float] = None  # of the last epoch, only where validation images were held out
    train_seconds: float
    prefix_seconds: float
    suffix_seconds: float
    router_seconds: float
    correction_seconds: float
    cache_seconds: float
    engine_seconds: float
    data_seconds: float
    eval_seconds: float
    original_share: float  # share of all latents used that the original prefix computed
    trainable_params: int
    total_params: int
    train_gmacs: float
    peak_memory_mib: float
    energy_j: Optional[float] = None
    device: str
    threads: int
    torch: str
    commit: str
    started_at: str


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: the folder is not writable or the disk is full; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, whole or not at all."""
    write_atomically(path, table.to_csv(index=False, lineterminator="\n"))


def to_table(records: list[Record]) -> pd.DataFrame:
    """One row a record, columns in the order of `Record`'s fields."""
    return pd.DataFrame([record.model_dump() for record in records], columns=list(Record.model_fields))


def read_table(path: Path) -> pd.DataFrame:
    """Read records written by `write_table`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column of `Record` is missing; the message names the file and the column.
    """
    table = pd.read_csv(path)
    missing = [name for name in Record.model_fields if name not in table.columns]
    if missing:
        raise ValueError(f"{path}: not a table of records: column {missing[0]!r} is missing")
    return table


def replace_rows(path: Path, table: pd.DataFrame, key: str) -> None:
    """Write rows into a CSV in which other rows stay: those whose value of `key` the new ones do not have.

    Args:
        path: made if it does not exist.
        table: the new rows; they come last.
        key: a column.

    Raises:
        ValueError: the file's columns are others than the table's.
    """
    if path.is_file():
        known = pd.read_csv(path)
        if list(known.columns) != list(table.columns):
            raise ValueError(f"{path}: another table: its columns are {', '.join(known.columns)}")
        table = pd.concat([known[~known[key].isin(table[key])], table], ignore_index=True)
    write_table(path, table)


def paired_difference(one: pd.Series, other: pd.Series, confidence: float = 0.95) -> tuple[float, float]:
    """How much higher one row of paired values is than another, and how sure that is.

    Args:
        one, other: values of the same runs, for example accuracies by seed; paired by their index.
        confidence: of the interval, in (0, 1).

    Returns:
        The mean of `one - other`, and half the width of its t-interval: NaN with fewer than two pairs.
    """
    differences = (one - other).dropna()
    quantile = stats.t.ppf(0.5 + confidence / 2, len(differences) - 1)
    return float(differences.mean()), float(quantile * differences.sem())


def compared(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Each variant of a study against one of them, over the seeds.

    Args:
        rows: of one study, a row a variant and seed, with cost and test_accuracy.
        reference: a variant.

    Returns:
        Indexed by variant in order of appearance: cost and test_accuracy (means), behind (points that the variant is
        below the reference on average, paired by seed) and half_width (of its 95 % interval); both NaN for the
        reference itself.

    Raises:
        ValueError: the reference is not among the variants.
    """
    accuracies = rows.pivot(index="seed", columns="variant", values="test_accuracy")
    if reference not in accuracies:
        raise ValueError(f"no variant {reference!r}; there are: {', '.join(accuracies)}")
    table = rows.groupby("variant", sort=False)[["cost", "test_accuracy"]].mean()
    others = [variant for variant in table.index if variant != reference]
    pairs = {variant: paired_difference(accuracies[reference], accuracies[variant]) for variant in others}
    return table.join(pd.DataFrame.from_dict(pairs, orient="index", columns=["behind", "half_width"]))


def table_1(records: pd.DataFrame, accuracy: str = "best_test_accuracy") -> pd.DataFrame:
    """The appendix's Table 1 in its own shape: rows Time (hours) and Acc. (percent), columns Ours, PET, FTAll.

    Args:
        records: rows of one study; means over its seeds are taken.
        accuracy: `best_test_accuracy` is the appendix's metric, `test_accuracy` the final epoch's.

    Raises:
        ValueError: a method of the three was not run, or the rows are of several studies or regimes.
    """
    _check_one_study(records)
    methods = {"Ours": "piebridge", "PET": "pet", "FTAll": "full"}
    absent = [method for method in methods.values() if method not in set(records["method"])]
    if absent:
        raise ValueError(f"Table 1 needs the methods piebridge, pet and full; {absent[0]!r} was not run")
    means = records.groupby("method")[["train_seconds", accuracy]].mean()
    rows = {
        "Time": [means.loc[method, "train_seconds"] / 3600 for method in methods.values()],
        "Acc.": [means.loc[method, accuracy] for method in methods.values()],
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(methods))


def write_table_1(path: Path, records: pd.DataFrame) -> Optional[pd.DataFrame]:
    """Write `table_1` of a study that ran its three methods and return it; else remove what an earlier run left."""
    if not {"piebridge", "pet", "full"} <= set(records["method"]):
        path.unlink(missing_ok=True)
        return None
    table = table_1(records)
    write_table(path, table.rename_axis("").reset_index())
    return table


def speedups(records: pd.DataFrame) -> pd.DataFrame:
    """Mean seconds, accuracies and peak memory a method, against those of `pet`, and the seconds against `full`'s too.

    Columns: train_seconds, test_accuracy, best_test_accuracy, faster_than_pet, faster_than_full, points_above_pet,
    memory_to_pet (peak memory as a multiple of `pet`'s), seconds_at_the_limit (what would be left of train_seconds if
    frozen layers and subnets cost nothing); indexed by method in order of appearance. What has no yardstick, because
    that was not run, is NaN.

    Raises:
        ValueError: the rows are of several studies or regimes.
    """
    _check_one_study(records)
    order = list(dict.fromkeys(records["method"]))
    shown = ["train_seconds", "test_accuracy", "best_test_accuracy"]
    means = records.groupby("method")[[*shown, "prefix_seconds", "peak_memory_mib"]].mean().loc[order]
    table = means[shown].copy()
    for rival in ("pet", "full"):
        seconds = table["train_seconds"].get(rival, float("nan"))
        table[f"faster_than_{rival}"] = seconds / table["train_seconds"]
    table["points_above_pet"] = table["test_accuracy"] - table["test_accuracy"].get("pet", float("nan"))
    table["memory_to_pet"] = means["peak_memory_mib"] / means["peak_memory_mib"].get("pet", float("nan"))
    table["seconds_at_the_limit"] = means["train_seconds"] - means["prefix_seconds"]
    return table


def _check_one_study(records: pd.DataFrame) -> None:
    found = records[["study", "regime"]].drop_duplicates()
    if len(found) > 1:
        names = "; ".join(", ".join(pair) for pair in found.itertuples(index=False))
        raise ValueError(f"methods are compared within one study and regime, not over {names}: choose one")


def provenance() -> dict[str, Any]:
    """Where and with what a run is made: torch, commit, started_at (UTC)."""
    return {
        "torch": version("torch"),
        "commit": commit(),
        "started_at": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def commit() -> str:
    """The commit of this source tree, with `+` if it has uncommitted changes; `unknown` outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", here, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code_fingerprint() -> str:
    """Eight hexadecimal digits of the sources that results depend on: results of other code are not continued."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        if path.name not in ("figures.py", "collection.py", "__main__.py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def processor_name() -> str:
    """The CPU's marketing name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
