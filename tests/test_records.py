"""Records: whole files or none, and the appendix's table."""

import math
import os
import subprocess

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tiny import ROOT

from piebridge import records
from piebridge.audit import variants_of
from piebridge.config import METHODS, load_study
from piebridge.records import Record


def example(method, seed=0, **values):
    numbers = {name: 1.0 for name in Record.model_fields if name.endswith(("_seconds", "_accuracy", "_mib", "_gmacs"))}
    return Record(**(
        numbers | dict(
            study="tiny", dataset="digits", backbone="embedded", resolution=32, method=method, variant="-", seed=seed,
            epochs=1, batch_size=4, learning_rate=0.01, train_images=8, test_images=4, original_share=1.0,
            trainable_params=1, total_params=2, device="cpu", threads=1, torch="2", commit="unknown",
            started_at="2024-01-01T00:00:00Z",
        ) | values
    ))


@pytest.fixture
def table():
    return records.to_table([
        example("full", 0, train_seconds=7200.0, best_test_accuracy=91.0, test_accuracy=90.0),
        example("full", 1, train_seconds=3600.0, best_test_accuracy=93.0, test_accuracy=91.0),
        example("pet", train_seconds=1800.0, best_test_accuracy=91.5, test_accuracy=91.0),
        example("piebridge", train_seconds=900.0, best_test_accuracy=92.0, test_accuracy=91.5),
    ])


def test_table_1_has_the_appendix_shape(table):
    result = records.table_1(table)
    assert list(result.index) == ["Time", "Acc."]
    assert list(result.columns) == ["Ours", "PET", "FTAll"]
    assert result.loc["Time"].tolist() == [0.25, 0.5, 1.5]
    assert result.loc["Acc."].tolist() == [92.0, 91.5, 92.0]
    assert records.table_1(table, "test_accuracy").loc["Acc."].tolist() == [91.5, 91.0, 90.5]


def test_paired_difference_against_scipys_paired_test():
    generator = np.random.default_rng(0)
    for count in (2, 5, 12):
        one, other = (pd.Series(generator.normal(80, 3, count)) for _ in range(2))
        low, high = stats.ttest_rel(one, other).confidence_interval(0.95)
        mean, half = records.paired_difference(one, other)
        assert (mean - half, mean + half) == pytest.approx((low, high))


def test_paired_difference_by_hand():
    """Differences 1, 2, 3, 4, 5: mean 3, standard deviation sqrt(2.5); the table's t for 4 degrees is 2.776."""
    one = pd.Series([11.0, 22.0, 33.0, 44.0, 55.0])
    mean, half = records.paired_difference(one, pd.Series([10.0, 20.0, 30.0, 40.0, 50.0]))
    assert mean == 3
    assert half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3)
    assert records.paired_difference(one, one) == (0, 0)
    assert math.isnan(records.paired_difference(one[:1], one[:1])[1])


def test_paired_difference_pairs_by_index():
    one = pd.Series([1.0, 2.0, 3.0], index=[0, 1, 2])
    other = pd.Series([3.0, 1.0, 2.0, 9.0], index=[2, 0, 1, 3])
    assert records.paired_difference(one, other) == (0, 0)


@pytest.fixture
def routes():
    rows = [("a", 0, 70.0), ("a", 1, 72.0), ("b", 1, 71.0), ("b", 0, 69.5)]
    return pd.DataFrame(rows, columns=["variant", "seed", "test_accuracy"]).assign(study="tiny", cost=0.5)


def test_compared_with_a_reference(routes):
    table = records.compared(routes, "a")
    assert list(table.index) == ["a", "b"]
    assert list(table.columns) == ["cost", "test_accuracy", "behind", "half_width"]
    assert table.loc["b"].tolist() == pytest.approx([0.5, 70.25, 0.75, 12.706 * 0.25], rel=1e-4)
    assert table.loc["a", ["behind", "half_width"]].isna().all()
    with pytest.raises(ValueError, match="no variant 'c'; there are: a, b"):
        records.compared(routes, "c")


def test_rows_of_other_keys_stay(routes, tmp_path):
    path = tmp_path / "routes.csv"
    records.replace_rows(path, routes, "study")
    records.replace_rows(path, routes.assign(study="other"), "study")
    records.replace_rows(path, routes[:1], "study")
    assert pd.read_csv(path)["study"].tolist() == ["other"] * 4 + ["tiny"]
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"routes\.csv: another table: its columns are variant, seed"):
        records.replace_rows(path, routes.drop(columns="cost"), "study")
    assert path.read_bytes() == before


@pytest.mark.parametrize("method", ["full", "pet", "piebridge"])
def test_table_1_needs_all_three(table, method):
    with pytest.raises(ValueError, match=method):
        records.table_1(table[table["method"] != method])


def test_speedups(table):
    result = records.speedups(table)
    assert list(result.index) == ["full", "pet", "piebridge"]
    assert result["faster_than_pet"].tolist() == [1800 / 5400, 1.0, 2.0]
    assert result["faster_than_full"].tolist() == [1.0, 3.0, 6.0]
    assert result["points_above_pet"].tolist() == [-0.5, 0.0, 0.5]


def test_memory_is_compared_with_that_of_pet(table):
    table["peak_memory_mib"] = [400.0, 200.0, 100.0, 50.0]
    assert records.speedups(table)["memory_to_pet"].tolist() == [3.0, 1.0, 0.5]


def test_the_limit_is_what_is_left_without_the_prefix(table):
    table["prefix_seconds"] = [0.0, 0.0, 1700.0, 600.0]
    assert records.speedups(table)["seconds_at_the_limit"].tolist() == [5400.0, 100.0, 300.0]


@pytest.mark.parametrize("column", ["study", "regime"])
@pytest.mark.parametrize("compare", [records.speedups, records.table_1])
def test_methods_are_compared_within_one_study_and_regime(table, compare, column):
    table.loc[0, column] = "another"
    with pytest.raises(ValueError, match=r"another.*choose one"):
        compare(table)


def test_table_1_is_written_where_its_methods_were_run(tmp_path, table):
    path = tmp_path / "table_1.csv"
    assert records.write_table_1(path, table).equals(records.table_1(table))
    assert path.read_text().splitlines() == [",Ours,PET,FTAll", "Time,0.25,0.5,1.5", "Acc.,92.0,91.5,92.0"]
    assert records.write_table_1(path, table[table["method"] != "full"]) is None
    assert not path.exists()


def test_speedups_without_the_yardstick_are_unknown(table):
    result = records.speedups(table[table["method"] != "full"])
    assert math.isnan(result.loc["pet", "faster_than_full"])
    assert result.loc["piebridge", "faster_than_pet"] == 2.0


def test_tables_read_back(tmp_path, table):
    records.write_table(tmp_path / "deep" / "records.csv", table)
    read = records.read_table(tmp_path / "deep" / "records.csv")
    assert list(read.columns) == list(Record.model_fields)
    assert read["train_seconds"].tolist() == table["train_seconds"].tolist()


def test_missing_column_is_named(tmp_path, table):
    path = tmp_path / "records.csv"
    records.write_table(path, table.drop(columns="train_gmacs"))
    with pytest.raises(ValueError, match=r"records\.csv.*'train_gmacs'"):
        records.read_table(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        records.read_table(tmp_path / "absent.csv")


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file.txt"
    records.write_atomically(path, "old")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        records.write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_replaces(tmp_path):
    path = tmp_path / "file.txt"
    records.write_atomically(path, "old")
    records.write_atomically(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("a regular file")
    with pytest.raises(OSError):
        records.write_atomically(tmp_path / "file" / "below.txt", "text")
    assert (tmp_path / "file").read_text() == "a regular file"


def test_unknown_field_is_an_error():
    with pytest.raises(ValueError, match="extra"):
        example("pet", surprise=1)


def test_provenance_names_torch_and_commit():
    import torch

    facts = records.provenance()
    assert torch.__version__.startswith(facts["torch"].split("+")[0])
    asked = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    assert facts["commit"].rstrip("+") == (asked.stdout.strip() or "unknown")
    assert pd.Timestamp(facts["started_at"]).tzinfo is not None


def test_code_fingerprint_follows_the_sources(monkeypatch, tmp_path):
    (tmp_path / "records.py").write_text("one")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    first = records.code_fingerprint()
    (tmp_path / "records.py").write_text("two")
    assert first != records.code_fingerprint()
    assert records.commit() == "unknown"


def test_committed_records_are_records():
    table = records.read_table(ROOT / "book" / "records" / "end_to_end.csv")
    assert {"full", "pet", "cached", "fixed", "random", "piebridge", "piebridge_cached"} <= set(table["method"])
    assert not table["commit"].str.endswith("+").any()  # made by code that is in the history


def committed_plain_studies():
    """Of each study of the plain regime its runs, by method."""
    table = records.read_table(ROOT / "book" / "records" / "end_to_end.csv")
    plain = table[table["regime"] == "plain"].set_index("method")
    return dict(list(plain.groupby("study")))


def test_committed_plain_runs_are_of_a_steady_machine():
    studies = committed_plain_studies()
    assert len(studies) == 6
    for rows in studies.values():
        passes = rows["prefix_seconds"]
        assert rows.loc["pet", "epochs"] * passes["cached"] / passes["pet"] == pytest.approx(1, abs=1 / 40)


def test_what_the_book_says_of_speed_budgets_and_lower_resolutions():
    studies = committed_plain_studies()
    spent, cached, behind, faster = {}, {}, {}, {}
    for name, rows in studies.items():
        seconds, passes, accuracy = rows["train_seconds"], rows["prefix_seconds"], rows["test_accuracy"]
        spent[name] = passes / passes["pet"] / load_study(name).routing.cost - 1
        cached[name] = seconds["cached"] / seconds["piebridge_cached"]
        behind[name] = accuracy["fixed"] - accuracy["resolution"]
        assert 9 < seconds["pet"] / seconds["cached"] < 11.2
        faster[name] = seconds["pet"] / seconds["piebridge"]
    resnet = {name for name in studies if name.endswith("resnet18")}
    assert sorted(round(cached[name], 2) for name in set(studies) - resnet) == [1.35, 1.42, 1.71]
    kept = [cached[f"{name}_resnet18"] for name in ("dtd", "dogsvscats", "caltech101")]
    assert kept == pytest.approx([1.81, 1.76, 1.82], abs=0.005)
    slowest, fastest = ([kind(faster[name] for name in names) for names in (resnet, set(studies) - resnet)]
                        for kind in (min, max))
    assert slowest == pytest.approx([2.58, 2.12], abs=0.005) and fastest == pytest.approx([2.69, 2.26], abs=0.005)
    over = {name: share["piebridge"] for name, share in spent.items()}
    for names, expected in ((resnet, [-0.015, 0.008]), (set(studies) - resnet, [-0.053, -0.023])):
        shares = [over[name] for name in names]
        assert [min(shares), max(shares)] == pytest.approx(expected, abs=0.0006)
    drawn = [abs(share["random"]) for share in spent.values()]
    assert max(drawn) == pytest.approx(0.036, abs=0.0006)
    memory = {name: rows["peak_memory_mib"]["piebridge"] / rows["peak_memory_mib"]["pet"]
              for name, rows in studies.items()}
    assert [min(memory.values()), max(memory.values())] == pytest.approx([0.805, 0.930], abs=0.001)
    assert memory["dtd_mobilenetv2"] == max(memory.values())
    own = [1 - rows["prefix_seconds"]["piebridge_cached"] / rows["train_seconds"]["piebridge_cached"]
           for name, rows in studies.items() if name not in resnet]
    assert [min(own), max(own)] == pytest.approx([0.285, 0.379], abs=0.005)
    rows = studies["caltech101_mobilenetv2"]["prefix_seconds"]
    spent_kept = 12 * rows["piebridge_cached"] / rows["pet"] / 0.6  # the budget of that run
    assert spent_kept == pytest.approx(1.05, abs=0.005)
    for names, expected in ((resnet, [0.25, 1.03]), (set(studies) - resnet, [1.2, 5.0])):
        gaps = [behind[name] for name in names]
        assert [min(gaps), max(gaps)] == pytest.approx(expected, abs=0.01)
    passes = {name: 1000 * studies[name].loc["pet", "prefix_seconds"] / 12 / studies[name].loc["pet", "train_images"]
              for name in resnet}
    assert [min(passes.values()), max(passes.values())] == pytest.approx([2.7, 2.8], abs=0.05)


def test_what_the_book_says_of_kept_latents_run_in_turn():
    table = pd.read_csv(ROOT / "book" / "records" / "kept_seconds.csv")
    assert table["commit"].nunique() == 1 and not table["commit"].str.endswith("+").any()
    assert table.groupby("study", sort=False)["repeat"].nunique().tolist() == [5, 5, 3]
    pairs = table.pivot(index=["study", "repeat"], columns="method", values="train_seconds")
    ratios = pairs["cached"] / pairs["piebridge_cached"]
    assert [ratios.min(), ratios.max()] == pytest.approx([1.62, 1.96], abs=0.005)
    studies = ["dtd_resnet18", "dogsvscats_resnet18", "caltech101_resnet18"]
    medians = pairs.groupby("study").median()
    assert (medians["cached"] / medians["piebridge_cached"])[studies].tolist() == pytest.approx(
        [1.87, 1.85, 1.89], abs=0.005
    )


def test_what_the_book_says_of_kept_latents_of_mobilenetv2():
    table = pd.read_csv(ROOT / "book" / "records" / "kept_seconds_mobilenetv2.csv")
    assert table["commit"].nunique() == 1 and not table["commit"].str.endswith("+").any()
    runs = [("caltech101_mobilenetv2", 0.6), ("caltech101_mobilenetv2", 0.67), ("dogsvscats_mobilenetv2", 0.56)]
    pairs = table.pivot(index=["study", "budget", "repeat"], columns="method", values="train_seconds")
    assert pairs.groupby(["study", "budget"]).size().to_dict() == dict.fromkeys(runs, 5)
    ratios, medians = pairs["cached"] / pairs["piebridge_cached"], pairs.groupby(["study", "budget"]).median()
    assert [ratios.min(), ratios.max()] == pytest.approx([1.31, 1.72], abs=0.005)
    assert (medians["cached"] / medians["piebridge_cached"])[runs].tolist() == pytest.approx(
        [1.55, 1.42, 1.57], abs=0.005
    )
    lost = records.compared(pd.read_csv(ROOT / "book" / "records" / "kept_budget.csv"), "original")
    assert (lost["behind"].drop("original") > 0.5).all() and len(lost) == 3


def test_what_the_book_says_of_originals_drawn_at_first():
    table = pd.read_csv(ROOT / "book" / "records" / "kept_drawn.csv")
    before = pd.read_csv(ROOT / "book" / "records" / "kept_budget.csv")
    same = [rows.loc[rows["variant"] == "original"].set_index("seed")["test_accuracy"] for rows in (table, before)]
    assert (same[0] - same[1]).abs().max() < 0.1 and len(same[0]) == len(same[1]) == 20
    lost = records.compared(table, "original").loc["highest loss, latents kept"]
    assert [lost["behind"], lost["half_width"]] == pytest.approx([0.41, 0.16], abs=0.005)
    kept = table[table["variant"] != "original"]
    assert kept["seed"].tolist() == list(range(20))
    routing = load_study("caltech101_mobilenetv2").routing
    assert (routing.cached_cost, routing.cached_subnet, routing.cached_correction) == (0.67, 2, True)
    assert 12 * kept["cost"].mean() == pytest.approx(routing.cached_cost, rel=0.01)
    timed = pd.read_csv(ROOT / "book" / "records" / "kept_drawn_seconds.csv")
    assert timed["commit"].nunique() == 1 and not timed["commit"].str.endswith("+").any()
    assert set(timed["budget"]) == {routing.cached_cost} and len(timed) == 6
    medians = timed.groupby("method")["train_seconds"].median()
    assert medians["piebridge_cached"] == pytest.approx(15.4, abs=0.05)
    assert medians["cached"] / medians["piebridge_cached"] == pytest.approx(1.37, abs=0.005)


def test_what_the_book_says_of_another_machine():
    other = records.read_table(ROOT / "book" / "records" / "other_machine.csv").set_index("method")
    assert set(other["study"]) == {"dtd_mobilenetv2"} and other["device"].nunique() == 1
    here = committed_plain_studies()["dtd_mobilenetv2"]
    assert set(other["device"]).isdisjoint(here["device"])
    assert set(other.index) == set(here.index)
    for name in ("epochs", "batch_size", "learning_rate", "seed"):
        assert other[name].to_dict() == here[name].to_dict()
    seconds, passes = other["train_seconds"], other["prefix_seconds"]
    images = other.loc["pet", "epochs"] * other.loc["pet", "train_images"]
    assert [1000 * rows["prefix_seconds"]["pet"] / images for rows in (other, here)] == pytest.approx(
        [4.1, 6.4], abs=0.05
    )
    assert seconds["pet"] / seconds["piebridge"] == pytest.approx(1.94, abs=0.005)
    assert seconds["cached"] / seconds["piebridge_cached"] == pytest.approx(1.18, abs=0.005)
    assert here["train_seconds"]["cached"] / here["train_seconds"]["piebridge_cached"] == pytest.approx(1.71, abs=0.005)
    assert passes["piebridge"] / passes["pet"] / load_study("dtd_mobilenetv2").routing.cost - 1 == pytest.approx(
        0.057, abs=0.0005
    )
    assert seconds["piebridge_cached"] == pytest.approx(3.8, abs=0.05)
    assert 1 - passes["piebridge_cached"] / seconds["piebridge_cached"] == pytest.approx(0.5, abs=0.01)
    moved = other["test_accuracy"] - here["test_accuracy"]
    assert moved.drop(["full", "resolution"]).abs().max() == 200 / other.loc["pet", "test_images"] == 0.5
    assert (moved["full"], moved["resolution"]) == (-2.75, -1)


def test_what_the_book_says_of_rivals_that_train_the_backbone():
    rivals = ["last_k", "elastic", "full", "prune"]
    expected = {  # times PieBridge's seconds and operations, points above it, shares of full training's
        "dtd_resnet18": ([5.5, 7.2, 14.1, 17.3], [3.45, 3.83, 8.49, 8.49], [1.25, 1.75, -0.25, -0.25], 0.51, 1.23),
        "dogsvscats_resnet18": ([6.0, 7.5, 16.4, 18.4], [3.83, 4.88, 9.43, 9.43], [-0.15, 2.55, 2.0, 1.8], 0.46, 1.12),
    }
    tuning = pd.read_csv(ROOT / "book" / "records" / "rivals_tuning.csv")
    assert set(tuning["study"]) == set(committed_plain_studies())
    for name, (slower, more, points, halved, lasso) in expected.items():
        runs, study = committed_plain_studies()[name], load_study(name)
        assert set(study.training.methods) == set(METHODS) == set(runs.index) and set(runs["seed"]) == {0}
        seconds, operations = (runs[column] / runs.loc["piebridge", column]
                               for column in ("train_seconds", "train_gmacs"))
        assert seconds[rivals].tolist() == pytest.approx(slower, abs=0.05)
        assert operations[rivals].tolist() == pytest.approx(more, abs=0.005)
        ahead = runs["test_accuracy"] - runs.loc["piebridge", "test_accuracy"]
        assert ahead[rivals].tolist() == pytest.approx(points, abs=1e-6)
        assert set(runs["test_images"]) == {400 if name == "dtd_resnet18" else 2000}  # how many images a point is
        assert seconds["elastic"] / seconds["full"] == pytest.approx(halved, abs=0.005)
        assert ahead["elastic"] > ahead["full"] and abs(ahead["prune"] - ahead["full"]) < 0.21
        assert seconds["prune"] / seconds["full"] == pytest.approx(lasso, abs=0.005)
        assert runs.loc["prune", ["total_params", "train_gmacs"]].tolist() == pytest.approx(
            runs.loc["full", ["total_params", "train_gmacs"]].tolist()
        )
        assert ahead["oracle"] < 0 and (ahead["random"] > 0) == (name == "dtd_resnet18")
        for method, tried in tuning[tuning["study"] == name].groupby("method"):
            tried = tried.sort_values("learning_rate")
            assert len(tried) >= 3
            assert tried.loc[tried["val_accuracy"].idxmax(), "learning_rate"] == study.training.learning_rate[method]


def test_what_the_book_says_of_rivals_over_seeds():
    runs = pd.read_csv(ROOT / "book" / "records" / "rivals_seeds.csv")
    tuning = pd.read_csv(ROOT / "book" / "records" / "rivals_tuning.csv")
    assert set(runs.groupby(["study", "method"])["seed"].agg(tuple)) == {(0, 1, 2)}
    assert runs.groupby("method")["study"].nunique().to_dict() == {
        "elastic": 6, "full": 6, "last_k": 3, "prune": 6, "resolution": 2
    }
    tuned = dict(list(tuning.set_index("learning_rate").groupby(["study", "method"])))
    for key, rows in runs.groupby(["study", "method"]):
        if key in tuned:
            reached = tuned[key]["val_accuracy"]
            assert reached[rows["learning_rate"].unique()].tolist() == [reached.max()]
    routes = pd.read_csv(ROOT / "book" / "records" / "routes.csv")
    original = routes[(routes["variant"] == "original") & (routes["seed"] < 3)].groupby("study")["test_accuracy"].mean()
    means = runs.pivot_table(index="study", columns="method", values="test_accuracy")
    ahead = means.sub(original, axis=0)
    assert ahead["full"]["dtd_resnet18"] == pytest.approx(-0.5, abs=0.005)
    others = ahead["full"].drop("dtd_resnet18")
    assert [others.min(), others.max()] == pytest.approx([1.3, 2.9], abs=0.05)
    pruned = means["prune"] - means["full"]
    assert [pruned.min(), pruned.max()] == pytest.approx([-0.8, 0.5], abs=0.05)
    elastic = ahead["elastic"].drop(["dogsvscats_resnet18", "dtd_mobilenetv2"])
    assert [elastic.min(), elastic.max()] == pytest.approx([0.6, 0.9], abs=0.05)
    assert ahead["elastic"]["dogsvscats_resnet18"] == pytest.approx(0, abs=0.08)
    assert [ahead["last_k"].min(), ahead["last_k"].max()] == pytest.approx([0.1, 0.9], abs=0.05)
    collapsed = runs[(runs["study"] == "dtd_mobilenetv2") & (runs["method"] == "elastic")]
    tried = tuning[(tuning["study"] == "dtd_mobilenetv2") & (tuning["method"] == "elastic")]["learning_rate"]
    assert (collapsed["test_accuracy"] == 10).sum() == 2 and set(collapsed["learning_rate"]) == {tried.max()}


def test_what_full_training_brings():
    both = {study: rows.loc[["full", "pet"]] for study, rows in committed_plain_studies().items()
            if "full" in rows.index}
    gains = {study: rows["test_accuracy"]["full"] - rows["test_accuracy"]["pet"] for study, rows in both.items()}
    assert gains == pytest.approx({
        "caltech101_mobilenetv2": 2.7, "dtd_mobilenetv2": 3.5, "dogsvscats_mobilenetv2": 1.5,
        "dogsvscats_resnet18": 1.8, "dtd_resnet18": -0.25, "caltech101_resnet18": 2.2,
    }, abs=0.2)
    slower = [rows["train_seconds"]["full"] / rows["train_seconds"]["pet"] for rows in both.values()]
    assert [min(slower), max(slower)] == pytest.approx([5.45, 9.47], abs=0.01)


def test_committed_history_is_of_the_committed_records():
    table = records.read_table(ROOT / "book" / "records" / "end_to_end.csv")
    history = pd.read_csv(ROOT / "book" / "records" / "end_to_end_history.csv")
    runs = ["study", "regime", "method", "seed"]
    last = history.groupby(runs)[["epoch", "train_seconds", "test_accuracy"]].last()
    expected = table.set_index(runs)[["epochs", "train_seconds", "test_accuracy"]].sort_index()
    assert last.index.equals(expected.index)
    assert last["epoch"].tolist() == expected["epochs"].tolist()
    assert last["test_accuracy"].tolist() == pytest.approx(expected["test_accuracy"].tolist())


def test_learning_rates_of_the_committed_studies_are_the_tuned_ones():
    tuning = pd.read_csv(ROOT / "book" / "records" / "tuning.csv")
    table = records.read_table(ROOT / "book" / "records" / "end_to_end.csv")
    for study, rows in tuning.groupby("study"):
        rates = load_study(study).training.learning_rate
        runs = table[table["study"] == study]
        assert set(zip(runs["method"], runs["learning_rate"])) <= set(rates.items())
        if load_study(study).training.regime == "plain":
            assert rates["cached"] == rates["pet"]  # the same training on the same latents, so not tuned again
        for method, tried in rows.groupby("method"):
            assert len(tried) >= 2
            chosen = tried.loc[tried["learning_rate"] == rates[method], "val_accuracy"]
            assert chosen.item() == tried["val_accuracy"].max()


@pytest.mark.parametrize(
    "study,kind,below_pet,random_lower,fixed_below,cached_lower,shares",
    [
        ("dtd_resnet18_adapter", "adapter", 0.08, 0.17, 1.25, 1.08, [0.69, 0.43]),
        ("dtd_resnet18_lora", "lora", 0.17, 0.25, 1.25, 0.5, [0.68, 0.41]),
        ("caltech101_resnet18_adapter", "adapter", -0.37, 0.5, 1.0, 0.92, [0.69, 0.43]),
    ],
)
def test_what_the_book_says_of_a_deep_cut(study, kind, below_pet, random_lower, fixed_below, cached_lower, shares):
    runs, study = pd.read_csv(ROOT / "book" / "records" / "deep_cut.csv"), load_study(study)
    runs = runs[runs["study"] == study.name]
    assert study.pet.kind == kind and list(runs["method"].unique()) == list(study.training.methods)
    assert (runs.groupby("method")["seed"].nunique() == 3).all() and not runs.duplicated(["method", "seed"]).any()
    assert runs.groupby("method")["learning_rate"].unique().map(list).to_dict() == {
        method: [rate] for method, rate in study.training.learning_rate.items()
    }
    accuracy, operations = (runs.groupby("method")[column].mean() for column in ("test_accuracy", "train_gmacs"))
    below = accuracy["pet"] - accuracy
    assert below["piebridge"] == pytest.approx(below_pet, abs=0.005)
    assert below["random"] - below["piebridge"] == pytest.approx(random_lower, abs=0.005)
    assert below["fixed"] == pytest.approx(fixed_below, abs=0.005)
    assert below["piebridge_cached"] - below["cached"] == pytest.approx(cached_lower, abs=0.005)
    share = operations / operations["pet"]
    assert share[["piebridge", "cached"]].tolist() == pytest.approx(shares, abs=0.005)
    assert operations["piebridge_cached"] / operations["cached"] == pytest.approx(0.95, abs=0.005)


def test_what_the_book_says_of_a_deep_cut_by_the_clock():
    runs = pd.read_csv(ROOT / "book" / "records" / "deep_cut_seconds.csv")
    assert (runs["threads"] == 2).all() and runs["device"].nunique() == 1
    assert not runs["commit"].str.endswith("+").any()
    expected = {  # pet's share of passes, the limit, piebridge, cached, shortest and longest steps, twelfths of passes
        "dtd_resnet18_adapter": (0.35, 1.5, 1.31, 1.7, 68, 80, 1),
        "dtd_resnet18_lora": (0.36, 1.6, 1.18, 1.4, 75, 77, 1.03),
        "caltech101_resnet18_adapter": (0.4, 1.7, 1.16, 1.6, 237, 257, 1),
    }
    assert set(runs["study"]) == set(expected)
    for study, (share, limit, faster, kept, shortest, longest, twelfths) in expected.items():
        rows = runs[runs["study"] == study].set_index("method")
        seconds, passes, steps = rows["train_seconds"], rows["prefix_seconds"], rows["suffix_seconds"]
        assert rows["learning_rate"].to_dict().items() <= load_study(study).training.learning_rate.items()
        assert passes["pet"] / seconds["pet"] == pytest.approx(share, abs=0.005)
        assert seconds["pet"] / (seconds["pet"] - passes["pet"]) == pytest.approx(limit, abs=0.05)
        assert seconds["pet"] / seconds["piebridge"] == pytest.approx(faster, abs=0.005)
        assert seconds["pet"] / seconds["cached"] == pytest.approx(kept, abs=0.05)
        saved = 1 - seconds["piebridge_cached"] / seconds["cached"]
        assert passes["piebridge_cached"] < passes["cached"]
        assert saved < 0 if study.endswith("adapter") else saved == pytest.approx(0.04, abs=0.005)
        assert [steps.min(), steps.max()] == pytest.approx([shortest, longest], abs=0.6)
        assert 12 * passes["cached"] / passes["pet"] == pytest.approx(twelfths, abs=1 / 40 if twelfths == 1 else 0.001)


def augmented_studies():
    """Of each study of the augmented regime its runs, by method."""
    table = records.read_table(ROOT / "book" / "records" / "end_to_end.csv")
    return dict(list(table[table["regime"] == "augmented"].set_index("method").groupby("study")))


def test_what_the_book_says_of_the_augmented_regime_by_the_clock():
    expected = {  # times faster than pet, latents' seconds above the budget, seconds that are no passes, pet to them
        "dtd_resnet18_augmented": (2.54, 0.02, 2.4, 30), "dogsvscats_resnet18_augmented": (2.53, 0.026, 3.0, 33),
        "caltech101_resnet18_augmented": (2.63, -0.035, 8.9, 27),
    }
    studies = augmented_studies()
    assert set(studies) == set(expected)
    left, each = [], []
    times = sorted(rows["train_seconds"]["pet"] / rows["train_seconds"]["piebridge"] for rows in studies.values())
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{times[0]:.1f} to {times[-1]:.1f} times faster than `pet` with ResNet-18, 0.50 points" in readme
    for name, (faster, over, own, limit) in expected.items():
        rows, study = studies[name], load_study(name)
        assert rows.index.tolist() == list(study.training.methods) and set(rows["seed"]) == {0}
        seconds, passes = rows["train_seconds"], rows["prefix_seconds"]
        assert seconds["pet"] / seconds["piebridge"] == pytest.approx(faster, abs=0.005)
        assert passes["piebridge"] / passes["pet"] / study.routing.cost - 1 == pytest.approx(over, abs=0.0006)
        assert seconds["piebridge"] - passes["piebridge"] == pytest.approx(own, abs=0.05)
        assert seconds["pet"] / (seconds["pet"] - passes["pet"]) == pytest.approx(limit, abs=0.5)
        left.append(seconds["pet"] - passes["pet"])
        each.append(1000 * passes["pet"] / 12 / rows.loc["pet", "train_images"])
    assert [min(left), max(left)] == pytest.approx([1.8, 8.1], abs=0.05)
    assert [min(each), max(each)] == pytest.approx([5.4, 5.7], abs=0.05)


def test_what_the_book_says_of_choices_in_the_augmented_regime():
    table = pd.read_csv(ROOT / "book" / "records" / "augmented_choice.csv")
    assert table["half_width"].min() == 0.2 and table["half_width"].max() == pytest.approx(1.5, abs=0.05)
    kept, both = "residuals", "residuals, difficulty"
    gains, more = {}, 0
    for study, rows in table.groupby("study"):
        near, points = (rows.pivot(index="subnet", columns="how", values=name) for name in ("divergence", "above_pet"))
        assert (near[kept] < near["correction"]).all()
        assert (near[both] < near["correction, difficulty"]).drop(4).all()
        gains[study] = (points[kept] > points["correction"]).sum()
        more += (points[both] > points[kept]).sum()
        routing = load_study(study).routing
        assert routing.residuals and routing.measured_difficulty == 0.3
        if study.startswith("dogs"):
            assert points.loc[5, both] - points.loc[6, both] == pytest.approx(1 / 15, abs=0.01)
            assert routing.subnet == 6 and near.loc[6, both] < near.loc[5, both]
        else:
            assert points[both].idxmax() == routing.subnet
        assert bool((near[both] < near[kept]).drop(4).all()) == study.startswith("caltech")
        if study.startswith("dtd"):
            assert near.loc[9, kept] < near.loc[9, "correction"] / 2
    assert [gains[f"{name}_resnet18_augmented"] for name in ("dtd", "caltech101", "dogsvscats")] == [5, 4, 1]
    assert more == 10 > 15 / 2


def test_what_the_book_says_of_twenty_seeds_in_the_augmented_regime():
    table = pd.read_csv(ROOT / "book" / "records" / "routes_augmented_more_seeds.csv")
    assert set(table["study"]) == {"dogsvscats_resnet18_augmented"}
    assert (table.groupby("variant")["seed"].nunique() == 20).all() and len(table) == 20 * table["variant"].nunique()
    lost = records.compared(table, "highest priority")
    said = {"original": (-0.46, 0.12), "drawn uniformly": (0.0, 0.13), "best subnet": (0.25, 0.11),
            "highest loss and predicted difficulty": (-0.11, 0.09)}
    for variant, numbers in said.items():
        assert tuple(lost.loc[variant, ["behind", "half_width"]]) == pytest.approx(numbers, abs=0.0055)


def test_what_the_book_says_of_routes_in_the_augmented_regime():
    table = pd.read_csv(ROOT / "book" / "records" / "routes_augmented.csv")
    behind, spread = {}, {}
    for study, rows in table.groupby("study"):
        assert rows["variant"].drop_duplicates().tolist() == [v.name for v in variants_of(load_study(study))]
        assert (rows.groupby("variant")["seed"].nunique() == 5).all() and len(rows) == 5 * rows["variant"].nunique()
        routed = rows[rows["variant"].isin(["drawn uniformly", "highest priority", "highest loss"])]
        assert routed["cost"].tolist() == pytest.approx([load_study(study).routing.cost] * len(routed), rel=0.02)
        columns = records.compared(rows, "highest priority")[["behind", "half_width"]]
        behind[study.split("_")[0]], spread[study.split("_")[0]] = columns["behind"], columns["half_width"]
    behind, spread = pd.DataFrame(behind), pd.DataFrame(spread)

    def told(variant):
        return [(round(behind.loc[variant, name], 2), round(spread.loc[variant, name], 2))
                for name in ("dtd", "dogsvscats", "caltech101")]

    assert told("original") == [(-0.25, 1.22), (-0.5, 0.37), (0.03, 0.3)]
    assert told("drawn uniformly") == [(0.65, 0.56), (0.34, 0.28), (0.17, 0.45)]
    assert [value for value, _ in told("best subnet")] == [1.2, 0.42, 0.43] and told("best subnet")[0][1] == 2.05
    assert told("best subnet, correction switched")[1] == (0.16, 0.5)
    clear = behind > spread
    assert clear.loc["best subnet", ["dogsvscats", "caltech101"]].all()
    assert [value for value, _ in told("highest priority, correction switched")] == [1.85, 0.16, 0.33]
    assert clear.loc["highest priority, correction switched"].to_dict() == {
        "caltech101": True, "dogsvscats": False, "dtd": True
    }
    assert (behind.loc["highest loss"] > 0).all() and not clear.loc["highest loss"].any()
    assert clear.loc["lowest similarity"].all()
    assert clear.loc["highest predicted difficulty", ["dtd", "caltech101"]].all()
    assert not clear.loc["highest predicted difficulty", "dogsvscats"]
    runs = augmented_studies()
    ahead = [round(float(rows["test_accuracy"]["piebridge"] - rows["test_accuracy"]["resolution"]), 1)
             for rows in (runs[f"{name}_resnet18_augmented"] for name in ("dogsvscats", "caltech101", "dtd"))]
    assert ahead == [1.8, 4.9, 0.0]
    for name, share in (("dtd", 0.32), ("dogsvscats", 0.27)):
        rows = runs[f"{name}_resnet18_augmented"].loc["resolution"]
        assert rows["engine_seconds"] / rows["train_seconds"] == pytest.approx(share, abs=0.005)


def test_the_choice_on_dogs_vs_cats_said_otherwise():
    tuning = pd.read_csv(ROOT / "book" / "records" / "tuning.csv").query("study == 'dogsvscats_resnet18_augmented'")
    best = tuning.groupby("method")["val_accuracy"].max()
    assert best["piebridge"] - best["pet"] == pytest.approx(0.25, abs=0.005)
