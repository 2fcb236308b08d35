"""Every study in params/ is valid, and what it says of its backbone can be done."""

import pytest
import torch
from tiny import ROOT

from piebridge import costs
from piebridge.backbones import load_backbone
from piebridge.config import load_study, project_root
from piebridge.cutting import cut_set
from piebridge.pet import cut_of
from piebridge.subnets import read_manifest

STUDIES = sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))
FAMILIES = sorted(path.parent for path in (ROOT / "params" / "families").glob("*/manifest.json"))


def test_there_are_studies():
    assert "embedded" in STUDIES
    assert project_root() == ROOT


@pytest.mark.parametrize("name", STUDIES)
def test_study_is_valid_and_its_subnets_can_be_cut(name):
    study = load_study(name)
    assert study.name == name
    torch.manual_seed(0)
    backbone = load_backbone(study.backbone.model_copy(update={"weights": "random"}))
    cut = cut_of(backbone, study.pet)
    assert cut in dict(backbone.blocks.named_children())
    if study.cloud.family == "generate":
        prefix, _ = backbone.cut(cut)
        whole = costs.macs(prefix, backbone.example())
        for spec in study.cloud.subnets:
            for member in cut_set(prefix, spec, backbone.example(2)):
                assert set(spec.without) <= set(member.removed)
                assert costs.macs(member.network, backbone.example()) < whole


@pytest.mark.parametrize("name", STUDIES)
def test_study_names_a_family_that_exists(name):
    family = load_study(name).cloud.family
    assert family in ("generate", "auto") or (ROOT / "params" / "families" / family / "manifest.json").is_file()


@pytest.mark.parametrize("folder", FAMILIES, ids=lambda folder: folder.name)
def test_shipped_family_is_whole(folder):
    manifest = read_manifest(folder)
    assert manifest.subnets[0].relative_macs == 1
    for facts in manifest.subnets[1:]:
        assert (folder / facts.file).is_file()
        assert 0 < facts.relative_macs < 1
        assert 0 < facts.fidelity <= 1
