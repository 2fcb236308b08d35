"""The cloud side: made once, found again, never mixed up."""

import dataclasses
import shutil

import pytest
import torch
from tiny import copied_state, random_backbone, same_tensors, tiny_study

from piebridge import cloud
from piebridge.cloud import family_folder, free_family, learn_router, obtain_backbone, obtain_family, obtain_router
from piebridge.config import SubnetSpec
from piebridge.data import load_cloud
from piebridge.subnets import FamilyError, fidelity, latents_of


def forbidden(*arguments):
    raise AssertionError("made again")


def test_what_was_made_is_found_again(tiny, monkeypatch):
    for name in ("pretrain", "generate_family", "learn_router", "load_cloud"):
        monkeypatch.setattr(cloud, name, forbidden)
    study = tiny_study()
    backbone = obtain_backbone(study)
    assert backbone.fingerprint == tiny.backbone.fingerprint
    family = obtain_family(study, backbone)
    assert family.manifest == tiny.setting.family.manifest
    router = obtain_router(study, backbone, family)
    images = tiny.setting.images[:5]
    assert torch.equal(router.difficulty(images), tiny.setting.router.difficulty(images))


def test_pretraining_learns_and_follows_the_seed(tiny):
    study = tiny_study("cloud.backbone_epochs=5")
    images = load_cloud(study)
    model, again = cloud.pretrain(images, study), cloud.pretrain(images, study)
    same = again.state_dict()
    assert all(torch.allclose(value, same[key], atol=1e-4) for key, value in model.state_dict().items())
    blocks = cloud.take_apart(model, "embedded", 32).blocks
    right = (blocks(images.train).argmax(1) == images.train_labels).float().mean()
    assert right > 3 / 62


def test_family_is_ordered_measured_and_of_this_backbone(tiny):
    manifest = tiny.setting.family.manifest
    assert manifest.weights_fingerprint == tiny.backbone.fingerprint
    relative_macs = [facts.relative_macs for facts in manifest.subnets]
    assert relative_macs == sorted(relative_macs, reverse=True)
    assert manifest.subnets[0].relative_macs == manifest.subnets[0].fidelity == 1
    assert all(facts.relative_latency > 0 for facts in manifest.subnets)
    assert len(manifest.subnets[2].removed) == 2
    assert manifest.latency_device
    assert manifest.provenance["steps"] == tiny.study.cloud.steps


def test_fidelity_in_the_manifest_is_that_of_the_files(tiny):
    held_out = load_cloud(tiny.study).held_out
    original = latents_of(tiny.setting.family.networks[0], held_out)
    for facts, network in zip(tiny.setting.family.manifest.subnets, tiny.setting.family.networks):
        centred, plain = fidelity(latents_of(network, held_out), original)
        assert facts.fidelity == pytest.approx(centred.mean().item(), abs=2e-3)
        assert facts.cosine == pytest.approx(plain.mean().item(), abs=2e-3)


def test_what_is_cut_does_not_depend_on_held_out_images(tiny):
    """Fidelity is measured on them: they may choose neither channels nor blocks."""
    study = tiny_study("cloud.importance=taylor cloud.steps=0")
    images = load_cloud(study)
    turned = dataclasses.replace(images, held_out=images.held_out.flip(0, 2, 3))
    cut, other = (cloud.generate_family(study, tiny.backbone, given)[0] for given in (images, turned))
    for network, again in zip(cut.networks, other.networks):
        assert same_tensors(network.state_dict(), again.state_dict())
    assert cut.manifest.subnets[1].fidelity != other.manifest.subnets[1].fidelity


def test_alignment_table_lies_beside_the_family(tiny):
    assert (family_folder(tiny.study, tiny.backbone) / "alignment.csv").is_file()


@pytest.mark.parametrize(
    "overrides", ["cloud.steps=7", "seed=1", "pet.kind=adapter", "router.steps=11", "cloud.subnets=[]"]
)
def test_another_cloud_side_is_another_folder(tiny, overrides):
    assert family_folder(tiny_study(overrides), tiny.backbone) != family_folder(tiny_study(), tiny.backbone)


def test_device_side_values_share_the_family(tiny):
    other = tiny_study("training.epochs=9 routing.pairs=4")
    assert family_folder(other, tiny.backbone) == family_folder(tiny_study(), tiny.backbone)


def test_a_family_is_found_by_its_path(tiny, tmp_path):
    copied = shutil.copytree(family_folder(tiny.study, tiny.backbone), tmp_path / "copied")
    study = tiny_study(f"cloud.family={copied}")
    assert obtain_family(study, tiny.backbone).manifest == tiny.setting.family.manifest


def test_unknown_family_is_named(tiny):
    with pytest.raises(FamilyError, match=r"cloud\.family: no_such_family"):
        family_folder(tiny_study("cloud.family=no_such_family"), tiny.backbone)


def test_family_of_other_weights_is_refused(tiny, tmp_path):
    copied = shutil.copytree(family_folder(tiny.study, tiny.backbone), tmp_path / "copied")
    other = obtain_backbone(tiny_study("cloud.backbone_epochs=2"))
    with pytest.raises(FamilyError, match="weights_fingerprint"):
        obtain_family(tiny_study(f"cloud.family={copied}"), other)


def test_the_free_family_is_the_original_at_lower_resolutions(tiny):
    family = free_family(tiny_study("cloud.family=auto"), tiny.backbone)
    assert [facts.resolution for facts in family.manifest.subnets] == [32, 24, 16, 16, 16]
    assert all(facts.width == 1 and not facts.removed for facts in family.manifest.subnets)
    weights = {name: tensor for name, tensor in family.networks[0].named_parameters()}
    for network in family.networks[1:]:
        assert all(torch.equal(tensor, weights[name]) for name, tensor in network.named_parameters())


def test_the_free_family_of_a_transformer_keeps_whole_patches():
    backbone = random_backbone("vit_tiny_patch16_224")
    for resolution in (32, 80):
        larger = dataclasses.replace(backbone, resolution=resolution)
        specs = [facts.resolution for facts in free_family(tiny_study("cloud.family=auto"), larger).manifest.subnets]
        assert all(side % 16 == 0 for side in specs)


def test_auto_without_a_shipped_family_makes_the_free_one(tiny):
    family = obtain_family(tiny_study("cloud.family=auto"), tiny.backbone)
    assert family.manifest.provenance["alignment"] == "none"


def test_router_is_the_familys(tiny):
    router = learn_router(tiny.study, tiny.backbone, tiny.setting.family, load_cloud(tiny.study).train)
    assert router.relative_costs.tolist() == pytest.approx(tiny.setting.family.relative_macs)
    images = tiny.setting.images[:5]
    torch.testing.assert_close(router.difficulty(images), tiny.setting.router.difficulty(images))


def test_trying_out_measures_and_keeps_nothing(tiny):
    study = tiny_study()
    images = load_cloud(study)
    before = copied_state(tiny.setting.family.networks[0])
    config = study.cloud.model_copy(update={"subnets": (SubnetSpec(resolution=24), SubnetSpec(width=0.5)), "steps": 0})
    table = cloud.try_out(study, tiny.backbone, images, config)
    assert list(table["cut"]) == list(table["aligned"])  # no steps: nothing was aligned
    assert table["relative_macs"].between(0, 1).all()
    aligned = cloud.try_out(study, tiny.backbone, images, config.model_copy(update={"steps": 3}))
    assert list(aligned["cut"]) == list(table["cut"])
    assert list(aligned["aligned"]) != list(table["aligned"])
    assert same_tensors(before, copied_state(tiny.setting.family.networks[0]))


def with_subnets(overrides, *subnets):
    study = tiny_study(overrides)
    return study.model_copy(update={"cloud": study.cloud.model_copy(update={"subnets": subnets})})


def test_a_wrong_set_is_refused_before_anything_is_aligned(tiny, monkeypatch):
    monkeypatch.setattr(cloud, "align", forbidden)
    study = with_subnets("", SubnetSpec(width=0.5), SubnetSpec(width=0.5, resolutions=(24, 16), common=("layer9",)))
    with pytest.raises(ValueError, match="common: no block's name begins with layer9"):
        cloud.generate_family(study, tiny.backbone, load_cloud(study))


def test_a_specifications_turns_reach_the_alignment(tiny, monkeypatch):
    """Batch norm counts the batches that it learns from."""
    study = with_subnets(
        "cloud.steps=6 cloud.loss.frozen_statistics=0",
        SubnetSpec(width=0.5, resolutions=(24, 16), every=(1, 3)), SubnetSpec(width=0.75, every=(2,)),
    )
    family, _ = cloud.generate_family(study, tiny.backbone, load_cloud(study))
    batches = [next(buffer.item() for name, buffer in network.named_buffers() if name.endswith("num_batches_tracked"))
               for network in family.networks]
    places = [(facts.width, facts.resolution) for facts in family.manifest.subnets]
    assert {place: count - batches[0] for place, count in zip(places, batches)} == {
        (1, 32): 0, (0.5, 24): 6, (0.5, 16): 2, (0.75, 32): 3,
    }
    given = []
    monkeypatch.setattr(cloud, "align", lambda *_, every: given.append(every))
    cloud.try_out(study, tiny.backbone, load_cloud(study), study.cloud)
    assert given == [[1, 3, 2]]
