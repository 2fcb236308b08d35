"""Heads that only ever saw a subnet's latents, tested on the original."""

import pandas as pd
import pytest
import torch
from tiny import ROOT, tiny_study

from piebridge.data import load_held_out, load_task
from piebridge.subnets import fidelity, latents_of
from piebridge.transfer import transfer

COLUMNS = [
    "backbone", "subnet", "width", "depth", "resolution", "relative_macs", "relative_latency", "fidelity_cloud",
    "dataset", "fidelity", "transfer_accuracy", "transfer_std", "reference_accuracy",
]


@pytest.fixture(scope="module")
def table(tiny):
    return transfer(tiny.setting.family, tiny.backbone, load_held_out(tiny.study), [tiny.study], seeds=(0, 1))


def test_a_row_a_subnet(tiny, table):
    assert list(table.columns) == COLUMNS
    assert table["subnet"].tolist() == [0, 1, 2]
    assert set(table["dataset"]) == {"digits"}
    assert table["fidelity_cloud"].tolist() == [facts.fidelity for facts in tiny.setting.family.manifest.subnets]
    assert table["transfer_accuracy"].between(0, 100).all()
    assert (table["transfer_std"] >= 0).all()


def test_subnet_0_is_the_reference(table):
    assert table["fidelity"][0] == 1
    assert (table["reference_accuracy"] == table["transfer_accuracy"][0]).all()


def test_fidelity_is_centred_by_public_images(tiny, table):
    task = load_task(tiny.study)
    images = task.images[torch.cat([task.splits["train"], task.splits["validation"]])]
    networks = tiny.setting.family.networks
    centre = latents_of(networks[0], load_held_out(tiny.study)).mean(0, keepdim=True)
    latents, original = (latents_of(networks[index], images) for index in (2, 0))
    expected = torch.nn.functional.cosine_similarity(latents - centre, original - centre).mean().item()
    assert fidelity(latents, original, centre)[0].mean().item() == pytest.approx(expected, abs=1e-5)
    assert table["fidelity"][2] == pytest.approx(expected, abs=1e-3)


def test_the_reference_is_what_the_method_cached_reaches(tiny, table):
    """The same heads, seeds and learning rate through another door."""
    from piebridge.experiment import run

    records = run(tiny)
    cached = records[(records["method"] == "cached") & (records["seed"] == 0)]["test_accuracy"].item()
    alone = transfer(tiny.setting.family, tiny.backbone, load_held_out(tiny.study), [tiny.study], seeds=(0,))
    assert alone["transfer_accuracy"][0] == pytest.approx(cached, abs=2.0)


@pytest.mark.parametrize("overrides", ["backbone.resolution=24", "pet.kind=adapter"])
def test_targets_must_be_of_the_same_network(tiny, overrides):
    with pytest.raises(ValueError, match="is not the family's embedded, 32, head"):
        transfer(tiny.setting.family, tiny.backbone, load_held_out(tiny.study), [tiny_study(overrides)])


def test_tuning_chooses_a_candidate(tiny):
    study = tiny_study("training.learning_rate={} training.learning_rates=[1e-6,0.01]")
    slow = tiny_study("training.learning_rate={} training.learning_rates=[1e-6]")
    arguments = (tiny.setting.family, tiny.backbone, load_held_out(tiny.study))
    tuned, untrained = (transfer(*arguments, [one], seeds=(0,)) for one in (study, slow))
    assert tuned["transfer_accuracy"][0] > untrained["transfer_accuracy"][0]


def test_committed_table_agrees_with_the_families():
    """book/records/subnets.csv, where there is one, tells of the families in params/families."""
    from piebridge.subnets import read_manifest

    path = ROOT / "book" / "records" / "subnets.csv"
    if not path.is_file():
        pytest.skip("no table of subnets is committed")
    table = pd.read_csv(path)
    assert list(table.columns) == COLUMNS
    for backbone, rows in table.groupby("backbone"):
        manifest = read_manifest(ROOT / "params" / "families" / backbone)
        for _, group in rows.groupby("dataset"):
            assert group["subnet"].tolist() == list(range(len(manifest.subnets)))
            for column, field in (("fidelity_cloud", "fidelity"), ("relative_latency", "relative_latency")):
                assert group[column].tolist() == [getattr(facts, field) for facts in manifest.subnets]
