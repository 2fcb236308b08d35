"""The cloud side: made once, found again, never mixed up."""

import dataclasses
import shutil

import pytest
import torch
from tiny import check_saved, copied_state, random_backbone, same_tensors, tiny_study

from piebridge import cloud
from piebridge.cloud import family_folder, free_family, learn_router, obtain_backbone, obtain_family, obtain_router
from piebridge.config import SubnetSpec
from piebridge.cutting import shared_tensors
from piebridge.data import load_cloud
from piebridge.subnets import FamilyError, fidelity, in_common, latents_of, load_family, save_family


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


LATE = ("layer2", "layer3")


@pytest.fixture(scope="module")
def family_of_three(tiny):
    """A pair that has its late layers in common, and one alone; nothing aligned."""
    study = with_subnets(
        "cloud.steps=0", SubnetSpec(width=0.5, resolutions=(32, 24), common=LATE), SubnetSpec(width=0.4, resolution=24)
    )
    return cloud.generate_family(study, tiny.backbone, load_cloud(study))[0]


def test_an_extended_family_keeps_its_own_members(tiny, family_of_three, tmp_path):
    family, before = family_of_three, [copied_state(network) for network in family_of_three.networks]
    study = with_subnets("cloud.steps=12", SubnetSpec(resolutions=(20, 16), common=("layer3",)))
    larger, history = cloud.extend_family(study, tiny.backbone, load_cloud(study), family, like=2)
    assert set(history["member"]) == {1, 2}
    assert [same_tensors(copied_state(network), state) for network, state in zip(family.networks, before)] == [True] * 4
    places = [larger.networks.index(network) for network in family.networks]
    assert places == sorted(places)
    assert larger.relative_macs == sorted(larger.relative_macs, reverse=True)
    members = list(zip(larger.manifest.subnets, larger.networks))
    added = [facts for facts, network in members if network not in family.networks]
    assert [(facts.width, facts.resolution, facts.shares_with) for facts in added] == [(0.5, 20, 1), (0.5, 16, 1)]
    assert {block[:6] for facts in added for block in facts.shared} == {"layer3"}
    for facts, network in members:
        if facts in added:
            leader, start = dict(larger.networks[1].named_parameters()), dict(family.networks[2].named_parameters())
            common = set(shared_tensors(network, facts.shared))
            assert common
            for name, weight in network.named_parameters():
                assert torch.equal(weight, leader[name]) if name in common else not torch.equal(weight, start[name])
            assert not any(weight.requires_grad for weight in network.parameters())
    extension, = larger.manifest.provenance["extensions"]
    assert (extension["like"], extension["replaced"], extension["steps"]) == (2, [], 12)
    save_family(larger, tmp_path / "family")
    check_saved(larger, load_family(tmp_path / "family", tiny.backbone, "head"), tiny.setting.images[:3])


def test_an_extended_family_is_nearer_than_copies(tiny):
    family = tiny.setting.family
    reached = {}
    for steps in (0, 30):
        study = with_subnets(f"cloud.steps={steps}", SubnetSpec(resolution=24))
        larger, _ = cloud.extend_family(study, tiny.backbone, load_cloud(study), family, like=1)
        assert [facts.resolution for facts in larger.manifest.subnets] == [32, 32, 24, 16]
        reached[steps] = larger.manifest.subnets[2].fidelity
    assert reached[30] > reached[0] + 0.05


def test_an_added_subnet_takes_the_place_of_another(tiny, family_of_three):
    study = with_subnets("cloud.steps=0", SubnetSpec(resolution=20))
    larger, _ = cloud.extend_family(study, tiny.backbone, load_cloud(study), family_of_three, like=1, replaced=[2])
    assert family_of_three.networks[2] not in larger.networks and len(larger) == len(family_of_three)
    places = {facts.resolution: place for place, facts in enumerate(larger.manifest.subnets)}
    assert larger.manifest.subnets[places[20]].shares_with == 1
    assert larger.manifest.provenance["extensions"][0]["replaced"] == [2]
    again, _ = cloud.extend_family(study, tiny.backbone, load_cloud(study), larger, like=1)
    assert len(again.manifest.provenance["extensions"]) == 2


def test_a_subnet_alone_has_all_in_common_with_what_is_added(family_of_three):
    blocks = tuple(name for name, _ in family_of_three.networks[3].named_children())
    assert in_common(family_of_three, 3) == (3, blocks)
    late = tuple(name for name in blocks if name.startswith(LATE))
    assert in_common(family_of_three, 1) == in_common(family_of_three, 2) == (1, late)


@pytest.mark.parametrize(
    ("spec", "like", "replaced", "message"),
    [
        ({"resolution": 16}, 0, [], "no subnet 0 in the family: its subnets are 1 to 3"),
        ({"resolution": 16}, 4, [], "no subnet 4"),
        ({"resolution": 16}, 1, [0], "no subnet 0"),
        ({"resolution": 16}, 3, [1], "subnet 1 cannot be left out"),
        ({"resolution": 16}, 3, [3], "subnet 3 cannot be left out"),
        ({"resolution": 32}, 2, [], r"no cheaper than subnet 1 .*smaller side"),
        ({"resolution": 16, "width": 0.3}, 2, [], "width: a subnet that is added"),
        ({"resolutions": (16,), "common": ("layer1",)}, 2, [], "common: layer1; what there can be.*layer3_0"),
    ],
)
def test_an_extension_that_does_not_fit_is_refused_before_the_work(
    tiny, family_of_three, monkeypatch, spec, like, replaced, message
):
    monkeypatch.setattr(cloud, "align", forbidden)
    study = with_subnets("", SubnetSpec(**spec))
    with pytest.raises(ValueError, match=message):
        cloud.extend_family(study, tiny.backbone, load_cloud(study), family_of_three, like, replaced)
