"""The audit of routes: every variant trains, at its cost, and looking latents up changes nothing."""

import copy
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from tiny import ROOT, copied_state, same_tensors, tiny_study

from piebridge.audit import REFERENCE, VARIANTS, _Runs, audit, variants_of
from piebridge.config import KEEP_LATENTS, Study, load_study
from piebridge.experiment import split_accuracy, training_views
from piebridge.methods import REGISTRY
from piebridge.methods.setting import cheap_route, expected_cost, relative_router_cost
from piebridge.records import compared, paired_difference
from piebridge.training import fit

COLUMNS = ["study", "dataset", "backbone", "variant", "seed", "cost", "learning_rate", "test_accuracy"]
BY_NAME = {variant.name: variant for variant in VARIANTS}
UNROUTED = ("original", "best subnet", "best subnet, correction switched", "cheap subnet", "highest loss, latents kept")


@pytest.fixture(scope="module")
def table(tiny):
    return audit(tiny.study, (0, 1))


@pytest.fixture(scope="module")
def runs(tiny):
    """Passes of one image, so that a latent cannot depend on those computed beside it."""
    return _Runs(tiny_study("training.prefix_batch=1"))


@pytest.fixture(scope="module")
def augmented_runs(tiny):
    return _Runs(tiny_study("training.prefix_batch=1 training.regime=augmented"))


def test_a_row_a_variant_and_seed(table):
    assert list(table.columns) == COLUMNS
    assert list(zip(table["variant"], table["seed"])) == [(name, seed) for name in BY_NAME for seed in (0, 1)]
    assert (table["learning_rate"] == 0.01).all()
    assert table["test_accuracy"].between(0, 100).all()
    assert table["test_accuracy"].nunique() > 5


def test_the_reference_is_what_piebridge_does_by_default():
    assert BY_NAME[REFERENCE].study(Study(name="default")) == Study(name="default")


def test_variants_that_share_out_a_budget_cost_as_much(tiny, table):
    costs, budget = table.groupby("variant")["cost"].mean(), tiny.study.routing.cost
    assert costs["original"] == 1
    # without pairs, where the subnet is cheap, originals for all in every later epoch do not use the budget up
    epochs, cheap = tiny.study.training.epochs, expected_cost(tiny.setting, cheap_route(tiny.setting))
    expected = dict.fromkeys(set(costs.index) - set(UNROUTED), budget)
    expected["highest priority, correction switched"] = min(budget, (cheap + epochs - 1) / epochs)
    assert costs.drop(list(UNROUTED)).to_dict() == pytest.approx(expected, rel=0.02) and len(expected) == 8
    assert costs["cheap subnet"] < costs["best subnet"] < budget
    assert costs["best subnet, correction switched"] < costs["best subnet"]


def test_cost_by_hand(runs):
    """90 images, 3 epochs, 10 pairs."""
    cheap, count, epochs, pairs = runs.costs[2], 90, 3, 10
    plan, outcome = runs.train(BY_NAME["cheap subnet"], 0, 0.01, "test")
    assert len(runs.setting(0).images) == count
    assert runs.cost(plan, outcome) == pytest.approx((epochs * count * cheap + pairs) / (epochs * count))
    plan, outcome = runs.train(BY_NAME["highest predicted difficulty"], 0, 0.01, "test")
    originals = round((outcome.history["original_share"] * count).sum())
    assert originals > pairs
    subnets = epochs * count - originals + pairs
    expected = (originals + subnets * cheap + runs.router_cost * count) / (epochs * count)
    assert 0 < runs.router_cost < 0.2
    assert runs.cost(plan, outcome) == pytest.approx(expected)


def assert_same_as_real(runs, name):
    """The same method, seed and rate on the images or views themselves, nothing cached."""
    variant, experiment = BY_NAME[name], runs.experiment
    plan, outcome = runs.train(variant, 1, 0.01, "test")
    task = experiment.task
    setting = replace(experiment.setting, study=variant.study(runs.study), seed=1)
    torch.manual_seed(1)
    real = (variant.plan or REGISTRY[variant.method])(setting)
    labels = task.labels[torch.cat([task.splits["train"], task.splits["validation"]])]
    seen = setting.images if task.larger is None else training_views(experiment, 1)
    computed = fit(real, seen, labels, runs.study.training, 0.01, 1, lambda suffix: {}).computed
    assert real.cached == (variant.method == "piebridge_cached")
    assert setting.images.dim() == 4
    assert same_tensors(copied_state(plan.split.suffix), copied_state(real.split.suffix))
    assert outcome.history["accuracy"].iloc[-1] == split_accuracy(experiment, real, real.split.suffix, "test")
    assert outcome.computed == computed


@pytest.mark.parametrize("name", BY_NAME)
def test_looking_up_changes_no_bit(runs, name):
    assert_same_as_real(runs, name)


@pytest.mark.parametrize("name", [name for name, variant in BY_NAME.items() if variant.method not in KEEP_LATENTS])
def test_looking_views_up_changes_no_bit(augmented_runs, name):
    assert_same_as_real(augmented_runs, name)


def test_cost_of_the_router_wherever_the_prefix_is(runs):
    setting = runs.experiment.setting
    prefix = copy.deepcopy(setting.split().prefix)
    assert relative_router_cost(setting, prefix.to("meta")) == runs.router_cost > 0


def test_each_latent_is_computed_once(runs):
    source = runs.setting(0).family.networks[0].source
    before = dict(source.computed)
    runs.train(BY_NAME["lowest similarity"], 0, 0.01, "test")
    assert runs.setting(1) is runs.setting(0)
    assert source.computed == before == dict.fromkeys(runs.costs, len(runs.setting(0).images))


def test_each_seed_has_views_of_its_own_besides_the_images_as_they_are(augmented_runs):
    runs, epochs = augmented_runs, augmented_runs.study.training.epochs
    kept = {}
    for seed in (0, 1):
        known = runs.setting(seed).family.networks[0]
        count = len(runs.setting(seed).images)
        assert known.source.computed == dict.fromkeys(runs.costs, (1 + epochs) * count)
        kept[seed] = known(torch.arange((1 + epochs) * count)).view(1 + epochs, count, -1)
    assert torch.equal(kept[0][0], kept[1][0])
    for one, other in ((kept[0][1:], kept[1][1:]), (kept[0][1], kept[0][2])):  # crops of small images agree at times
        assert (one == other).all(dim=-1).float().mean() < 0.1


def test_adapters_have_latents_that_are_maps(tiny):
    runs = _Runs(tiny_study("pet.kind=adapter pet.bottleneck=4 cloud.family=auto routing.cost=0.6"))
    plan, outcome = runs.train(BY_NAME[REFERENCE], 0, 0.01, "test")
    assert runs.setting(0).family.networks[0](torch.arange(2)).dim() == 4
    assert runs.cost(plan, outcome) == pytest.approx(0.6, rel=0.02)


def test_rates_that_the_study_does_not_name_are_tuned(tiny):
    named = "training.learning_rate={} training.learning_rate.pet=0.02"
    # after three epochs rounding decides between the two, after fifteen the larger is 50 points ahead
    rates = _Runs(tiny_study(f"{named} training.learning_rates=[1e-6,0.01] training.epochs=15")).learning_rates()
    assert rates["pet"] == 0.02
    assert {rates[method] for method in ("fixed", "random", "piebridge", "piebridge_cached", "oracle")} <= {1e-6, 0.01}
    assert rates["piebridge"] == rates["oracle"] == 0.01


def test_nothing_is_kept_in_the_augmented_regime(tiny):
    study = tiny_study("training.regime=augmented training.epochs=2")
    table = audit(study, (0, 1))
    names = [variant.name for variant in variants_of(study)]
    assert set(BY_NAME) - set(names) == {"highest loss, latents kept"}
    assert list(zip(table["variant"], table["seed"])) == [(name, seed) for name in names for seed in (0, 1)]


def test_committed_table_is_whole():
    """book/records/routes.csv, where there is one: all variants and seeds, at the budgets of the studies."""
    path = ROOT / "book" / "records" / "routes.csv"
    if not path.is_file():
        pytest.skip("no table of routes is committed")
    table = pd.read_csv(path)
    assert list(table.columns) == COLUMNS
    for study, rows in table.groupby("study"):
        expected = [(name, seed) for name in BY_NAME for seed in sorted(rows["seed"].unique())]
        assert list(zip(rows["variant"], rows["seed"])) == expected
        budgeted = rows[~rows["variant"].isin(UNROUTED)]
        assert budgeted["cost"].tolist() == pytest.approx([load_study(study).routing.cost] * len(budgeted), rel=0.02)


def test_what_the_book_says_of_two_hundred_more_seeds():
    table = pd.read_csv(ROOT / "book" / "records" / "routes_more_seeds.csv")
    assert set(table["study"]) == {"dtd_resnet18"}
    assert table.groupby("variant")["seed"].agg(list).map(lambda seeds: seeds == list(range(100, 300))).all()
    rows = compared(table, REFERENCE).drop(REFERENCE)
    told = {"original": (-0.30, 0.07), "best subnet": (0.44, 0.10), "drawn uniformly": (0.13, 0.07)}
    assert set(rows.index) == set(told)
    for variant, expected in told.items():
        assert rows.loc[variant, ["behind", "half_width"]].tolist() == pytest.approx(expected, abs=0.005)


def test_what_the_book_says_of_the_committed_table():
    table = pd.read_csv(ROOT / "book" / "records" / "routes.csv")
    studies = {study: compared(rows, REFERENCE) for study, rows in table.groupby("study")}

    def beyond(variant):
        """Studies in which the variant is behind the loss, the interval clear of zero."""
        rows = {study: rows.loc[variant] for study, rows in studies.items()}
        return {study for study, row in rows.items() if row["behind"] > row["half_width"]}

    resnet = {study for study in studies if study.endswith("resnet18")}
    mobile = set(studies) - resnet
    assert len(studies) == 6
    behind = pd.DataFrame({study: rows["behind"] for study, rows in studies.items()})
    clear = behind > pd.DataFrame({study: rows["half_width"] for study, rows in studies.items()})
    ahead = -behind > pd.DataFrame({study: rows["half_width"] for study, rows in studies.items()})

    def told(variant, *names):
        return behind.loc[variant, list(names)].tolist()

    forty = resnet | {"dtd_mobilenetv2"}
    for study, rows in table.groupby("study"):
        assert set(rows["seed"]) == set(range(40 if study in forty else 5))
    assert beyond("drawn uniformly") == mobile | {"caltech101_resnet18"}
    assert told("drawn uniformly", "dogsvscats_mobilenetv2", "caltech101_mobilenetv2", "dtd_mobilenetv2") == (
        pytest.approx([0.7, 0.7, 0.4], abs=0.045)
    )
    drawn = {study: studies[study].loc["drawn uniformly", ["behind", "half_width"]].round(2).tolist()
             for study in resnet}
    assert drawn == {"caltech101_resnet18": [0.06, 0.06], "dtd_resnet18": [0.16, 0.18],
                     "dogsvscats_resnet18": [0.03, 0.06]}
    assert not clear.loc["drawn by loss"].any() and not ahead.loc[["drawn by loss", "drawn uniformly"]].any(axis=None)
    winning = ["dogsvscats_mobilenetv2", "caltech101_mobilenetv2", "dtd_mobilenetv2", "dtd_resnet18",
               "caltech101_resnet18"]
    assert beyond("best subnet") == set(winning) and not ahead.loc["best subnet"].any()
    assert told("best subnet", *winning) == pytest.approx([1.2, 1.1, 0.9, 0.4, 0.1], abs=0.055)
    assert studies["dogsvscats_resnet18"].loc["best subnet"].tolist()[-2:] == pytest.approx([0.06, 0.06], abs=0.005)
    for study, alone, drawn in (
        ("dtd_mobilenetv2", 2.8, 0.4), ("caltech101_mobilenetv2", 2.7, 0.7), ("dtd_resnet18", 0.8, 0.2),
        ("caltech101_resnet18", 0.1, 0.1),
    ):
        short = behind.loc[["cheap subnet", "drawn uniformly"], study]
        assert short.tolist() == pytest.approx([alone, drawn], abs=0.05)
    worse = beyond("highest predicted difficulty")
    assert worse == set(studies) - {"dogsvscats_resnet18"}
    by = behind.loc["highest predicted difficulty", sorted(worse)]
    assert [by.min(), by.max()] == pytest.approx([0.1, 2.8], abs=0.05)
    router = ["highest predicted difficulty", "highest loss and predicted difficulty"]
    assert set(ahead.columns[ahead.loc[router[0]]]) == {"dogsvscats_resnet18"} and not ahead.loc[router[1]].any()
    assert behind.loc[router, "dogsvscats_resnet18"].tolist() == pytest.approx([-0.14, 0.17], abs=0.006)
    assert beyond(router[1]) == set(studies) - {"dtd_mobilenetv2", "dtd_resnet18"}
    reached = table.groupby(["study", "variant"])["test_accuracy"].mean().unstack()
    lower = reached["drawn uniformly"] - reached["lowest similarity"]
    assert (lower.drop("dtd_resnet18") > 0).all() and lower["dtd_resnet18"] == pytest.approx(0, abs=1e-9)
    assert (behind.loc["lowest similarity"] > 0).all()
    assert beyond("lowest similarity") == set(studies) - {"dtd_resnet18"}
    switched = "highest priority, correction switched"
    assert all(load_study(study).routing.correction for study in studies)
    assert beyond(switched) == {"dtd_resnet18", "caltech101_resnet18", "dtd_mobilenetv2"}
    assert told(switched, "dtd_resnet18", "caltech101_resnet18", "dogsvscats_resnet18", "dtd_mobilenetv2") == (
        pytest.approx([1.21, 0.34, 0.03, 0.96], abs=0.006)
    )
    assert set(ahead.columns[ahead.loc[switched]]) == {"dogsvscats_mobilenetv2"}
    assert told(switched, "dogsvscats_mobilenetv2") == pytest.approx([-0.27], abs=0.005)
    assert (-behind.loc["original"]).to_dict() == pytest.approx({
        "dogsvscats_resnet18": 0.16, "dtd_resnet18": 0.3, "caltech101_resnet18": 0.04,
        "dogsvscats_mobilenetv2": 0.08, "dtd_mobilenetv2": 0.43, "caltech101_mobilenetv2": 0.22,
    }, abs=0.006)
    assert set(ahead.columns[~ahead.loc["original"]]) == {"caltech101_resnet18", "dogsvscats_mobilenetv2"}
    kept = "highest loss, latents kept"
    below = behind.loc[kept] - behind.loc["original"]
    assert below.to_dict() == pytest.approx({
        "dtd_resnet18": 0.1375, "caltech101_resnet18": 0.211, "dogsvscats_resnet18": 0.035, "dtd_mobilenetv2": 0.5,
        "caltech101_mobilenetv2": 0.72, "dogsvscats_mobilenetv2": -0.01,
    }, abs=0.005)
    assert beyond(kept) == {"caltech101_mobilenetv2", "caltech101_resnet18"}
    assert set(ahead.columns[ahead.loc[kept]]) == {"dogsvscats_resnet18"}
    assert told(kept, "dogsvscats_resnet18", "caltech101_resnet18") == pytest.approx([-0.12, 0.17], abs=0.006)
    # without measured difficulty the highest priority is the highest loss
    assert (behind.loc["highest loss"] == 0).all()
    tuned = pd.read_csv(ROOT / "book" / "records" / "tuning.csv").groupby(["study", "method"])["val_accuracy"].max()
    gained = {study: tuned[study, "piebridge"] - tuned[study, "pet"] for study in resnet}
    assert gained == pytest.approx({
        "dtd_resnet18": -0.27, "caltech101_resnet18": -0.04, "dogsvscats_resnet18": 0.07,
    }, abs=0.006)


def test_what_the_book_says_of_small_budgets():
    table = pd.read_csv(ROOT / "book" / "records" / "budgets.csv")
    below, spread, chance = {}, {}, {}
    for study, rows in table.groupby("study"):
        original = rows[rows["variant"] == "original"].set_index("seed")["test_accuracy"]
        for (budget, variant), reached in rows[rows["variant"] != "original"].groupby(["budget", "variant"]):
            reached = reached.set_index("seed")["test_accuracy"]
            assert len(reached) == len(original) == (5 if study.startswith("caltech") else 10)
            if variant == "highest priority":
                below[study, budget], spread[study, budget] = paired_difference(original, reached)
            if variant == "drawn uniformly" and budget == 0.21:
                priority = rows[(rows["budget"] == 0.21) & (rows["variant"] == "highest priority")]
                chance[study] = paired_difference(priority.set_index("seed")["test_accuracy"], reached)
    dtd, dogs, caltech = "dtd_resnet18", "dogsvscats_resnet18", "caltech101_resnet18"
    assert [below[study, 0.21] for study in (dtd, dogs, caltech)] == pytest.approx([0.0, 0.23, 0.76], abs=0.006)
    assert [spread[study, 0.21] for study in (dtd, dogs, caltech)] == pytest.approx([0.51, 0.19, 0.14], abs=0.006)
    assert [below[caltech, budget] for budget in (0.37, 0.3, 0.25)] == pytest.approx([0.15, 0.29, 0.51], abs=0.006)
    for study, lowest, highest in ((dogs, 0.18, 0.24), (dtd, 0.0, 0.6)):
        values = [value for (name, _), value in below.items() if name == study]
        assert [min(values), max(values)] == pytest.approx([lowest, highest], abs=0.006)
    assert len(chance) == 3 and all(abs(difference) < width for difference, width in chance.values())
    seconds = pd.read_csv(ROOT / "book" / "records" / "budget_seconds.csv")
    by_method = seconds.pivot(index="study", columns="method", values=["train_seconds", "prefix_seconds"])
    whole, passes = by_method["train_seconds"], by_method["prefix_seconds"]
    faster = (whole["pet"] / whole["piebridge"])[[dtd, dogs]]
    assert faster.tolist() == pytest.approx([4.58, 4.48], abs=0.006)
    assert (12 * passes["cached"] / passes["pet"]).tolist() == pytest.approx([1, 1], abs=1 / 40)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"0.21 is {faster.min():.1f} to {faster.max():.1f} times faster than `pet` on DTD-10 and Dogs" in readme


def test_what_the_book_says_of_resemblance():
    table = pd.read_csv(ROOT / "book" / "records" / "route_choice.csv", dtype={"pairs": str})
    usual = table.set_index(["study", "method", "subnet", "pairs", "weight"])["divergence"]
    for study in ("dtd_resnet18", "caltech101_resnet18", "dogsvscats_resnet18"):
        routing = load_study(study).routing
        assert routing.correction and not routing.cached_correction
        assert routing.pairs == "all" and routing.cached_subnet == 2
        ours, kept = usual[study, "piebridge"], usual[study, "piebridge_cached"]
        chosen, chosen_kept = ours[6, "all", 0.3], kept[2, "0", 0.0]
        if study == "dogsvscats_resnet18":
            assert chosen - ours.min() < 0.001 and chosen_kept - kept.min() < 0.001
        else:
            assert chosen == ours.min() and chosen_kept == kept.min()
        for method in ("piebridge", "random", "fixed"):
            by_pairs = usual[study, method].xs(0.0, level="weight").unstack("pairs")
            both = by_pairs.dropna(subset=["0", "200"])
            assert len(both) and (both["200"] < both["0"]).all()
    kept = usual.xs("piebridge_cached", level="method").xs(0.0, level="weight").unstack("pairs").dropna()
    assert len(kept) and (kept["100"] < kept["0"]).any() and (kept["100"] > kept["0"]).any()
    ratio = usual.xs("random", level="method").xs("200", level="pairs") / usual.xs("piebridge", level="method").xs(
        "200", level="pairs")
    assert [ratio.dropna().min(), ratio.dropna().max()] == pytest.approx([1.4, 3.3], abs=0.05)
    textures = usual["dtd_resnet18", "piebridge"]
    assert textures[6, "all", 0.3] == pytest.approx(0.026, abs=0.0006)
    assert textures[8, "0", 1.0] == pytest.approx(0.073, abs=0.0006)


def test_what_the_book_says_of_maps_fitted_to_the_training_images():
    table = pd.read_csv(ROOT / "book" / "records" / "in_sample.csv", dtype={"pairs": str})
    gains, unmeasured, random, fixed, fewer = {}, {}, [], [], []
    for study, rows in table.groupby("study"):
        routing = load_study(study).routing
        assert routing.pairs == "all" and routing.correction and not routing.measured_difficulty
        ours = rows[rows["method"] == "piebridge"]
        ours = ours[ours["cost"] == ours["cost"].max()].set_index(["subnet", "fit", "weight"])["divergence"]
        gains[study] = ours[6, "in sample", 0.3] / ours[6, "generalising", 0.3]
        alone = ours.xs("in sample", level="fit").xs(0.0, level="weight")
        unmeasured[study] = (alone / ours.xs("in sample", level="fit").xs(0.3, level="weight")).tolist()
        assert alone.idxmin() == routing.subnet
        others = rows.set_index(["method", "subnet", "fit"])["divergence"]
        random += (others["random"].droplevel("fit") / alone).tolist()
        subnet = others["fixed"].droplevel("subnet")
        fixed += (subnet["in sample"] / alone).tolist()
        fewer.append(subnet["generalising"] / subnet["in sample"])
    assert gains == pytest.approx(
        {"dtd_resnet18": 1 / 9, "dogsvscats_resnet18": 0.28, "caltech101_resnet18": 0.6}, abs=0.01
    )
    assert unmeasured["dtd_resnet18"] == pytest.approx([0.9, 0.9], abs=0.025)
    assert unmeasured["dogsvscats_resnet18"] == pytest.approx([2 / 3, 2 / 3], abs=0.01)
    assert 1 < min(unmeasured["caltech101_resnet18"]) <= max(unmeasured["caltech101_resnet18"]) < 1.02
    for ratios, lowest, highest in ((random, 1.5, 4.3), (fixed, 1.7, 4.6), (fewer, 1.6, 9.8)):
        assert [min(ratios), max(ratios)] == pytest.approx([lowest, highest], abs=0.05)


def test_what_the_book_says_of_the_choice_of_subnets():
    every = pd.read_csv(ROOT / "book" / "records" / "subnet_choice.csv")
    table = every[every["family"] == every["study"].map(lambda study: 9 if study.endswith("resnet18") else 6)]
    asked = table[table["study"].str.endswith("resnet18") | (table["pairs"] > 0)]
    best = asked.loc[asked.groupby("study")["above_pet"].idxmax()].set_index("study")
    assert best["subnet"].to_dict() == {
        "dtd_resnet18": 8, "dogsvscats_resnet18": 6, "caltech101_resnet18": 4,
        "dtd_mobilenetv2": 5, "dogsvscats_mobilenetv2": 4, "caltech101_mobilenetv2": 6,
    }
    manifests = pd.read_csv(ROOT / "book" / "records" / "cloud_machines.csv").query("process == 'manifest'")
    latency = manifests.set_index("subnet")["relative_latency"]
    assert latency[[8, 6, 5]].tolist() == pytest.approx([0.15, 0.20, 0.25], abs=0.005)
    mobile = table[table["study"].str.endswith("mobilenetv2")]
    with_pairs = mobile[mobile["pairs"].isin([100, 200])].groupby(["study", "subnet"])["above_pet"].max()
    difference = (with_pairs - mobile[mobile["pairs"] == 0].set_index(["study", "subnet"])["above_pet"]).dropna()
    assert len(difference) == 9 and difference.min() > 0
    whole = mobile.query("subnet == 3").set_index("study")["above_pet"] - best["above_pet"]
    assert whole["dogsvscats_mobilenetv2"] > 0.25 and whole["caltech101_mobilenetv2"] == pytest.approx(0)
    dogs = mobile.query("study == 'dogsvscats_mobilenetv2' and subnet == 4").set_index("pairs")["above_pet"]
    assert dogs[100] - dogs[0] == pytest.approx(0.4)
    earlier = every[(every["family"] == 6) & every["study"].str.endswith("resnet18")]
    corrected = earlier["pairs"] > 0
    above = {how: rows.set_index(["study", "subnet"])["above_pet"] for how, rows in earlier.groupby(corrected)}
    difference = (above[True] - above[False]).dropna()
    assert len(difference) == 8 and difference.abs().max() < 0.25 and (difference > 0).any() and (difference < 0).any()
    newest = table.set_index(["study", "subnet"])["above_pet"]
    dogs, textures = newest["dogsvscats_resnet18"], newest["dtd_resnet18"]
    assert set(dogs.index) == {5, 6, 8} and dogs.max() - dogs.min() < 0.2
    assert (textures[8] - textures[[5, 6]]).tolist() == pytest.approx([0.5, 0.5], abs=0.07)
    seventh = every.query("study == 'dtd_resnet18' and family == 7").set_index("subnet")["above_pet"]
    assert textures[4] < textures[[5, 6]].min() and seventh[9] < seventh[[5, 6, 8]].min()
    caltech = newest["caltech101_resnet18"].sort_values()
    assert caltech.index[0] == 8 and caltech.index[-1] == 4


def test_what_the_book_says_of_measured_difficulty():
    table = pd.read_csv(ROOT / "book" / "records" / "measured_difficulty.csv")
    paying = table[table["above_loss"] > table["half_width"]]
    assert set(paying["study"]) == {"dtd_resnet18", "caltech101_resnet18"} and (paying["weight"] > 0).all()
    assert (table.query("weight == 0")["above_loss"].abs() < 0.1).all()
    best = table[table["weight"] == 1].sort_values("above_loss").groupby("study").tail(1).set_index("study")
    assert best["above_loss"].to_dict() == {
        "dtd_resnet18": 0.81, "caltech101_resnet18": 0.4, "dogsvscats_resnet18": 0.2,
    }
    others = {path.stem for path in (ROOT / "params").glob("*_mobilenetv2.yaml")}
    assert len(others) == 3
    chosen = pd.read_csv(ROOT / "book" / "records" / "subnet_choice.csv")
    for study in others:
        rows = chosen[(chosen["study"] == study) & (chosen["family"] == 6)]
        routing = load_study(study).routing
        rows = rows[(rows["pairs"] > 0) == routing.correction]
        assert rows.loc[rows["above_pet"].idxmax(), ["subnet", "cost"]].tolist() == [routing.subnet, routing.cost]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "piebridge", "audit", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_command_keeps_the_rows_of_other_studies(tiny, table, tmp_path):
    output = tmp_path / "new" / "routes.csv"
    output.parent.mkdir()
    pd.concat([table.assign(study="other"), table]).to_csv(output, index=False)
    ended = command(str(ROOT / "tests" / "tiny.yaml"), "--seeds", "0", "1", "--output", str(output))
    assert ended.returncode == 0, ended.stderr
    written = pd.read_csv(output)
    assert written["study"].tolist() == ["other"] * len(table) + ["tiny"] * len(table)
    pd.testing.assert_frame_equal(written[written["study"] == "tiny"].reset_index(drop=True), table)
    assert all(any(line.startswith(name) for line in ended.stdout.splitlines()) for name in BY_NAME)


def test_command_refuses_before_it_trains(tmp_path):
    output = tmp_path / "routes.csv"
    study = str(ROOT / "tests" / "tiny.yaml")
    ended = command(study, "--set", "routing.subnet=99", "--output", str(output))
    assert ended.returncode == 2
    assert "routing.subnet: 99" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not output.exists()
