"""Subnets are cheaper and keep the latents' shape; families survive saving and notice damage."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import BACKBONES, check_saved, copied_state, random_backbone, random_images, same_tensors

from piebridge import costs
from piebridge.config import CloudConfig, SubnetSpec
from piebridge.cutting import (
    Cut,
    MatchLatents,
    cut_set,
    cut_sibling,
    cut_subnet,
    removable_blocks,
    set_stem_kernel,
    shared_tensors,
)
from piebridge.subnets import (
    FamilyError,
    extended,
    fidelity,
    latents_of,
    load_family,
    make_family,
    read_manifest,
    save_family,
)


def cuts_of(name):
    """The head's cut, whose latents are vectors, and a deep one, whose latents are maps or tokens."""
    backbone = random_backbone(name)
    return {"head": "head", "deep": backbone.body[-2]}


def specs_of(prefix):
    return {
        "width": SubnetSpec(width=0.5), "depth": SubnetSpec(depth=0.5), "resolution": SubnetSpec(resolution=16),
        "without": SubnetSpec(without=(removable_blocks(prefix)[0],)),
        "all": SubnetSpec(width=0.6, depth=0.7, resolution=24 if "stem" in dict(prefix.named_children()) else 16),
    }


@pytest.mark.parametrize("depth", ["head", "deep"])
@pytest.mark.parametrize("name", BACKBONES)
def test_cut_subnets_are_cheaper_and_keep_the_latents_shape(name, depth):
    backbone, images = random_backbone(name), random_images(3)
    prefix, suffix = backbone.cut(cuts_of(name)[depth])
    before, wanted = copied_state(prefix), latents_of(prefix, images)
    whole = costs.macs(prefix, images)
    for kind, spec in specs_of(prefix).items():
        subnet, removed = cut_subnet(prefix, spec, images)
        latents = latents_of(subnet, images)
        assert latents.shape == wanted.shape, kind
        assert latents.isfinite().all()
        assert not torch.equal(latents, wanted)
        assert costs.macs(subnet, images) < whole
        assert latents_of(suffix, latents).shape == (3, backbone.blocks.head.out_features)
        assert len(removed) == (len(spec.without) or round((1 - spec.depth) * len(removable_blocks(prefix))))
        assert not set(removed) & set(dict(subnet.named_children()))
        assert not any(module.training for module in subnet.modules())
    assert same_tensors(copied_state(prefix), before)


def test_the_original_itself_is_a_subnet():
    prefix, _ = random_backbone("resnet18").cut("head")
    subnet, removed = cut_subnet(prefix, SubnetSpec(), random_images(2))
    assert removed == ()
    assert torch.equal(latents_of(subnet, random_images(2)), latents_of(prefix, random_images(2)))


def test_width_keeps_about_that_share_of_the_channels():
    prefix, _ = random_backbone("resnet18").cut("head")
    subnet, _ = cut_subnet(prefix, SubnetSpec(width=0.5), random_images(2))
    assert subnet.stem[0].out_channels == 32
    assert subnet.layer2_0.conv1.weight.shape[:2] == (64, 32)
    assert subnet.layer4_1.conv2.out_channels == 512  # the latents' own channels


def test_widths_of_single_stages():
    prefix, _ = random_backbone("resnet18").cut("head")
    subnet, _ = cut_subnet(prefix, SubnetSpec(widths={"layer4": 0.25, "layer2": 0.5}), random_images(2))
    assert subnet.layer1_0.conv1.out_channels == 64
    assert subnet.layer2_0.conv1.out_channels == subnet.layer2_1.conv2.out_channels == 64
    assert subnet.layer3_0.conv1.weight.shape[:2] == (256, 64)
    assert subnet.layer4_0.conv1.out_channels == 128
    assert subnet.layer4_1.conv2.weight.shape[:2] == (512, 128)


def test_widths_of_a_block_that_is_not_there():
    prefix, _ = random_backbone("resnet18").cut("head")
    with pytest.raises(ValueError, match=r"begins with 'layer9'; blocks: input, stem"):
        cut_subnet(prefix, SubnetSpec(widths={"layer9": 0.5}), random_images(2))


@pytest.mark.parametrize("ratios", ["uniform", "global"])
def test_taylor_keeps_the_channels_that_matter(ratios):
    """Half of a layer's channels are made to do nothing: they go, whatever the size of their weights."""
    prefix = copy.deepcopy(random_backbone("resnet18").cut("head")[0])
    idle = torch.arange(0, 128, 2)
    with torch.no_grad():
        prefix.layer2_0.conv2.weight[:, idle] = 0
        prefix.layer2_0.conv1.weight[idle] *= 10
    config = CloudConfig(importance="taylor", ratios=ratios)
    subnet, _ = cut_subnet(prefix, SubnetSpec(widths={"layer2": 0.5}), random_images(32), config)
    kept = [i for i, row in enumerate(prefix.layer2_0.bn1.running_mean.tolist())
            if row in subnet.layer2_0.bn1.running_mean.tolist()]
    assert len(kept) > 30
    # a channel whose ReLU never opens on these images matters as little: a few may stand in for one another
    assert len(set(kept) & set(idle.tolist())) <= 0.1 * len(kept)  # half by chance


def test_channel_counts_are_multiples_of_what_the_processor_likes():
    prefix, _ = random_backbone("resnet18").cut("head")
    subnet, _ = cut_subnet(prefix, SubnetSpec(width=0.7), random_images(2), CloudConfig(round_to=32))
    assert {layer.out_channels % 32 for layer in subnet.modules() if isinstance(layer, torch.nn.Conv2d)} == {0}


def test_shared_block_that_is_not_there():
    prefix, _ = random_backbone("resnet18").cut("head")
    with pytest.raises(ValueError, match=r"shared block 'layer9_0'.*layer1_0"):
        cut_subnet(prefix, SubnetSpec(resolution=16, shared=("layer9_0",)), random_images(2))


@pytest.mark.parametrize("depth", ["head", "deep"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_what_subnets_share_is_stored_once(tmp_path, name, depth):
    prefix, _ = random_backbone(name).cut(cuts_of(name)[depth])
    block = [child for child, _ in prefix.named_children() if child[0] in "bl"][1]
    specs = [SubnetSpec(resolution=28, shared=(block,)), SubnetSpec(width=0.5, resolutions=(32, 24, 16))]
    family = family_of(name, depth, specs)
    save_family(family, tmp_path / "family")
    loaded = load_family(tmp_path / "family", random_backbone(name), family.manifest.cut)
    assert sorted(facts.shares_with for facts in family.manifest.subnets if facts.shares_with is not None)[0] == 0
    images = random_images(3, seed=1)
    for facts, network, before in zip(loaded.manifest.subnets, loaded.networks, family.networks):
        expected, given = latents_of(before, images), latents_of(network, images)
        assert (given - expected).abs().max() <= 0.02 * expected.abs().max()
        if facts.shares_with is not None:
            leader = loaded.networks[facts.shares_with]
            names = shared_tensors(network, facts.shared)
            assert all(network.get_parameter(key) is leader.get_parameter(key) for key in names)
            assert not set(names) & set(load_file(tmp_path / "family" / facts.file))


@pytest.mark.parametrize("common", [("layer3", "layer4"), ("layer4_1",), ()])
def test_only_the_named_blocks_are_common(common):
    prefix, _ = random_backbone("resnet18").cut("head")
    leader, follower = cut_set(prefix, SubnetSpec(width=0.5, resolutions=(32, 16), common=common), random_images(2))
    assert leader.leader is None and follower.leader is leader.network
    for name, layer in leader.network.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            same = layer.weight is follower.network.get_submodule(name).weight
            assert same == name.startswith(common or ("",)), name


def test_common_blocks_must_exist_and_need_resolutions():
    prefix, _ = random_backbone("resnet18").cut("head")
    for sides in ((32, 16), (16,)):
        with pytest.raises(ValueError, match=r"common: no block's name begins with layer9; blocks: .*layer1_0"):
            cut_set(prefix, SubnetSpec(resolutions=sides, common=("layer9",)), random_images(2))
    with pytest.raises(ValueError, match="give resolutions, or leave it out"):
        SubnetSpec(common=("layer4",))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_larger_stride_on_a_larger_input_costs_what_a_smaller_input_does(tmp_path, name):
    small, large = SubnetSpec(resolution=16), SubnetSpec(resolution=32, stem_strides=(4,))
    family = family_of(name, "head", [small, large])
    save_family(family, tmp_path / "family")
    loaded = load_family(tmp_path / "family", random_backbone(name), family.manifest.cut)
    facts = {member.resolution: member for member in loaded.manifest.subnets[1:]}
    assert facts[32].stem_stride == 4 and facts[16].stem_stride is None
    assert facts[32].relative_macs == pytest.approx(facts[16].relative_macs, rel=0.02)
    images = random_images(3, seed=1)
    for before, after in zip(family.networks, loaded.networks):
        expected, given = latents_of(before, images), latents_of(after, images)
        assert (given - expected).abs().max() <= 0.02 * expected.abs().max()
    strided = loaded.networks[[member.stem_stride for member in loaded.manifest.subnets].index(4)]
    first = next(layer for layer in loaded.networks[0].modules() if isinstance(layer, torch.nn.Conv2d))
    pixels = loaded.networks[0].input(images)
    wanted = torch.nn.functional.conv2d(pixels, first.weight, stride=4, padding=first.padding)
    given = next(layer for layer in strided.modules() if isinstance(layer, torch.nn.Conv2d))(pixels)
    torch.testing.assert_close(given, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rank", [8, 10_000])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_latent_map_starts_as_nothing_and_survives_saving(tmp_path, name, rank):
    prefix, _ = random_backbone(name).cut("head")
    images = random_images(3, seed=1)
    channels = latents_of(prefix, images).shape[1]
    plain, mapped = (
        family_of(name, "head", [SubnetSpec(width=0.5, resolutions=(32, 16), latent_map=each)]) for each in (0, rank)
    )
    for before, after in zip(plain.networks, mapped.networks):
        assert torch.equal(latents_of(before, images), latents_of(after, images))
    leader, follower = mapped.networks[1:]
    for network in (leader, follower):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            network.map.up.weight.copy_(0.1 * torch.randn(network.map.up.weight.shape, generator=generator))
            network.map.up.bias.fill_(0.5)
    save_family(mapped, tmp_path / "family")
    again = load_family(tmp_path / "family", random_backbone(name), "head").networks
    for before, base, after in zip(mapped.networks[1:], plain.networks[1:], again[1:]):
        assert after.map.up.weight.shape == (channels, min(rank, channels))
        down = before.map.down.weight if rank < channels else torch.eye(channels)
        latents = latents_of(base, images)
        wanted = latents + latents @ (before.map.up.weight @ down).T + 0.5
        torch.testing.assert_close(latents_of(before, images), wanted.detach(), rtol=1e-4, atol=1e-4)
        assert (latents_of(after, images) - wanted).abs().max() <= 0.02 * wanted.abs().max()
    assert again[1].map.up.weight is again[2].map.up.weight
    assert again[1].map.up.bias is not again[2].map.up.bias


def test_the_original_has_no_map_to_share():
    with pytest.raises(ValueError, match="leave map out of shared"):
        SubnetSpec(resolution=16, latent_map=4, shared=("map",))


def test_only_pooled_latents_can_be_mapped():
    backbone = random_backbone("resnet18")
    prefix, _ = backbone.cut(backbone.body[-2])
    with pytest.raises(ValueError, match=r"latent_map: latents of shape \(\d+, \d+, \d+\) are maps or tokens"):
        cut_subnet(prefix, SubnetSpec(width=0.5, latent_map=4), random_images(2))


def test_a_set_is_led_by_its_dearest_member_whatever_comes_first(tmp_path):
    family = family_of("resnet18", "head", [
        SubnetSpec(width=0.5, resolutions=(16, 32, 24), common=("layer3", "layer4")),
        SubnetSpec(resolution=16, shared=("layer4_0",)), SubnetSpec(resolution=24, shared=("layer3_1", "layer4_1")),
    ])
    facts = family.manifest.subnets
    led = {(member.width, member.resolution): (member.shares_with, member.shared) for member in facts[1:]}
    dearest = [(member.width, member.resolution) for member in facts].index((0.5, 32))
    late = ("layer3_0", "layer3_1", "layer4_0", "layer4_1")
    assert led == {
        (0.5, 32): (None, ()), (0.5, 24): (dearest, late), (0.5, 16): (dearest, late),
        (1.0, 16): (0, ("layer4_0",)), (1.0, 24): (0, ("layer3_1", "layer4_1")),
    }
    save_family(family, tmp_path / "family")
    loaded = load_family(tmp_path / "family", random_backbone("resnet18"), "head")
    check_saved(family, loaded, random_images(3, seed=1))


def test_strides_are_one_for_each_side():
    prefix, _ = random_backbone("resnet18").cut("head")
    cuts = cut_set(prefix, SubnetSpec(resolutions=(32, 32, 16), stem_strides=(2, 4, 2)), random_images(2))
    assert [cut.network.stem[0].stride for cut in cuts] == [(2, 2), (4, 4), (2, 2)]
    assert prefix.stem[0].stride == (2, 2)
    for wrong in ({"resolutions": (32, 16), "stem_strides": (4,)}, {"resolution": 32, "stem_strides": (4, 2)}):
        with pytest.raises(ValueError, match=r"stem_strides: \d given; give one for each of \d sides"):
            SubnetSpec(**wrong)


@pytest.mark.parametrize("name, side, common", [
    ("resnet18", 7, ("layer4",)), ("resnet18", 7, ()), ("mobilenet_v2", 3, ("block18",)), ("mobilenet_v2", 3, ()),
])
def test_first_kernels_are_resampled_and_survive_saving(tmp_path, name, side, common):
    family = family_of(name, "head", [
        SubnetSpec(width=0.5, resolutions=(32, 32, 16), stem_kernels=(5, side, 1), common=common),
        SubnetSpec(resolution=16, stem_kernels=(5,)),
    ])
    save_family(family, tmp_path / "family")
    loaded = load_family(tmp_path / "family", random_backbone(name), "head")
    first = [next(layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d))
             for network in loaded.networks]
    sides = {(member.width, member.resolution, layer.kernel_size[0], layer.padding[0])
             for member, layer in zip(loaded.manifest.subnets[1:], first[1:])}
    assert sides == {(0.5, 32, 5, 2), (0.5, 32, side, side // 2), (0.5, 16, 1, 0), (1.0, 16, 5, 2)}
    assert first[0].kernel_size == (side, side)
    check_saved(family, loaded, random_images(3, seed=1))


@pytest.mark.parametrize("side", [3, 5, 7, 9])
def test_a_resampled_kernel_sees_the_same(side):
    layer = torch.nn.Conv2d(3, 2, 7, padding=3)
    network, even = torch.nn.Sequential(layer), torch.rand(1, 3, 1, 1).expand(1, 3, 20, 20)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, 3, 1, 1).expand_as(layer.weight))
        before, wanted = layer.weight.clone(), layer(even)[..., 10, 10]
        set_stem_kernel(network, side)
        assert layer.weight.shape == (2, 3, side, side) and layer(even).shape == (1, 2, 20, 20)
        torch.testing.assert_close(layer(even)[..., 10, 10], wanted, rtol=1e-4, atol=1e-4)
    assert side != 7 or torch.equal(layer.weight, before)


def test_a_dearer_subnet_leads_its_set_but_the_original_stays_the_first(tmp_path):
    family = family_of("resnet18", "head", [
        SubnetSpec(width=0.5, resolutions=(16, 32, 64), stem_strides=(2, 3, 2), common=("layer4",)),
        SubnetSpec(resolution=64),
    ])
    assert family.relative_macs[1] > 1 == family.relative_macs[0]  # dearer than the original
    facts = family.manifest.subnets
    assert [(member.width, member.resolution) for member in facts[:3]] == [(1, 32), (1, 64), (0.5, 64)]
    assert [member.shares_with for member in facts] == [None, None, None, 2, 2]
    save_family(family, tmp_path / "family")
    loaded = load_family(tmp_path / "family", random_backbone("resnet18"), "head")
    check_saved(family, loaded, random_images(3, seed=1))
    for each in (family, loaded):
        strides = {(member.width, member.resolution): network.stem[0].stride[0]
                   for member, network in zip(facts, each.networks)}
        assert strides == {(1, 32): 2, (1, 64): 2, (0.5, 64): 2, (0.5, 32): 3, (0.5, 16): 2}
    spec = SubnetSpec(resolution=24)
    added = Cut(spec, cut_sibling(family.networks[1], spec, ("layer4_1",)), (), family.networks[1], ("layer4_1",))
    larger = extended(family, [added], [4], random_backbone("resnet18"))
    assert larger.networks[:2] == family.networks[:2]
    assert larger.relative_macs[1:] == sorted(larger.relative_macs[1:], reverse=True)
    place = larger.networks.index(added.network)
    assert larger.manifest.subnets[place].shares_with == 1 and larger.manifest.subnets[place].resolution == 24


def test_turns_are_one_for_each_side():
    prefix, _ = random_backbone("resnet18").cut("head")
    for given, every in (
        ({"resolutions": (32, 24, 16), "every": (1, 3, 2)}, [1, 3, 2]), ({"resolutions": (32, 16)}, [1, 1]),
        ({"resolution": 16, "shared": ("layer4_0",), "every": (4,)}, [4]),
    ):
        assert [cut.every for cut in cut_set(prefix, SubnetSpec(**given), random_images(2))] == every
    with pytest.raises(ValueError, match="every: 1 given; give one for each of 2 sides"):
        SubnetSpec(resolutions=(32, 16), every=(3,))
    with pytest.raises(ValueError, match="every: 2 given; give one for each of 1 sides"):
        SubnetSpec(resolution=32, every=(1, 3))
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        SubnetSpec(resolution=32, every=(0,))


def test_kernels_are_odd_and_one_for_each_side():
    with pytest.raises(ValueError, match="leave stem_kernels or shared out"):
        SubnetSpec(resolution=16, stem_kernels=(5,), shared=("stem",))
    for wrong in ({"resolutions": (32, 16), "stem_kernels": (5,)}, {"resolution": 32, "stem_kernels": (5, 7)}):
        with pytest.raises(ValueError, match=r"stem_kernels: \d given; give one for each of \d sides"):
            SubnetSpec(**wrong)
    with pytest.raises(ValueError, match="stem_kernels: 4 is even and has no centre; give odd sides"):
        SubnetSpec(resolution=32, stem_kernels=(4,))


def test_a_transformer_has_no_stem_to_stride_or_resample():
    prefix, _ = random_backbone("vit_tiny_patch16_224").cut("head")
    with pytest.raises(ValueError, match="stem_strides: a transformer's patches keep their size"):
        cut_subnet(prefix, SubnetSpec(stem_strides=(4,)), random_images(2))
    with pytest.raises(ValueError, match="stem_kernels: a transformer's patches keep their size"):
        cut_set(prefix, SubnetSpec(stem_kernels=(5,)), random_images(2))


def test_sharing_with_a_later_subnet_is_refused(folder):
    text = json.loads((folder / "manifest.json").read_text())
    text["subnets"][1]["shares_with"] = 2
    (folder / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(FamilyError, match="shares with subnet 2, which is not before it"):
        load(folder)


@pytest.mark.parametrize("name", BACKBONES)
def test_removable_blocks_keep_the_shape(name):
    prefix, _ = random_backbone(name).cut("head")
    latents, inside = random_images(1), {}
    with torch.no_grad():
        for block, module in prefix.named_children():
            entry, latents = latents, module(latents)
            inside[block] = entry.shape == latents.shape
    removable = removable_blocks(prefix)
    assert len(removable) > 1
    assert all(inside[block] for block in removable)


def test_unknown_block_is_answered_with_the_removable_ones():
    prefix, _ = random_backbone("resnet18").cut("head")
    with pytest.raises(ValueError, match=r"layer4_0.*layer1_0"):
        cut_subnet(prefix, SubnetSpec(without=("layer4_0",)), random_images(2))


def test_least_needed_block_goes_first():
    """Against trying every block."""
    prefix, _ = random_backbone("embedded").cut("head")
    images = random_images(8)
    wanted = latents_of(prefix, images)
    near = {}
    for name in removable_blocks(prefix):
        others = torch.nn.Sequential(*[block for other, block in prefix.named_children() if other != name])
        near[name] = torch.nn.functional.cosine_similarity(latents_of(others, images), wanted).mean().item()
    _, removed = cut_subnet(prefix, SubnetSpec(depth=1 - 1 / len(near)), images)
    assert removed == (max(near, key=near.get),)


def test_everything_removable_can_be_removed():
    prefix, _ = random_backbone("embedded").cut("head")
    blocks = removable_blocks(prefix)
    _, removed = cut_subnet(prefix, SubnetSpec(depth=0.0, without=(blocks[1],)), random_images(2))
    assert sorted(removed) == sorted(blocks)


def test_matching_keeps_constant_latents_and_class_tokens():
    maps = MatchLatents(torch.Size((4, 6, 6)))(torch.full((2, 4, 3, 3), 2.0))
    assert maps.shape == (2, 4, 6, 6)
    torch.testing.assert_close(maps, torch.full_like(maps, 2.0))
    tokens = torch.full((2, 1 + 4, 3), 2.0)
    tokens[:, 0] = 7.0
    matched = MatchLatents(torch.Size((1 + 16, 3)))(tokens)
    assert matched.shape == (2, 17, 3)
    assert (matched[:, 0] == 7).all()
    torch.testing.assert_close(matched[:, 1:], torch.full((2, 16, 3), 2.0))
    same = torch.randn(2, 17, 3)
    assert torch.equal(MatchLatents(torch.Size((17, 3)))(same), same)


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 2, 2)])
def test_fidelity_is_the_centred_cosine(shape):
    generator = np.random.default_rng(0)
    latents, original = generator.normal(3, 1, shape), generator.normal(3, 1, shape)
    centred, plain = fidelity(torch.from_numpy(latents), torch.from_numpy(original))

    def cosines(one, other):
        one, other = one.reshape(len(one), -1), other.reshape(len(other), -1)
        return (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1))

    mean = original.mean(0)
    np.testing.assert_allclose(centred.numpy(), cosines(latents - mean, original - mean))
    np.testing.assert_allclose(plain.numpy(), cosines(latents, original))
    assert plain.mean() > centred.abs().mean()


# -------------------------------------------------------------------------------------------- families


def family_of(name, depth, specs):
    backbone = random_backbone(name)
    cut = cuts_of(name)[depth]
    prefix, _ = backbone.cut(cut)
    cuts = [cut for spec in specs for cut in cut_set(prefix, spec, random_images(2))]
    return make_family(backbone, cut, prefix, cuts, {})


@pytest.mark.parametrize("depth", ["head", "deep"])
@pytest.mark.parametrize("name", BACKBONES)
def test_families_survive_saving(tmp_path, name, depth):
    prefix, _ = random_backbone(name).cut(cuts_of(name)[depth])
    specs = specs_of(prefix)
    family = family_of(name, depth, [specs["all"], specs["without"]])
    save_family(family, tmp_path / "family")
    loaded = load_family(tmp_path / "family", random_backbone(name), family.manifest.cut)
    images = random_images(3, seed=1)
    assert len(loaded) == len(family) == 3
    assert loaded.relative_macs == family.relative_macs
    assert torch.equal(latents_of(loaded.networks[0], images), latents_of(family.networks[0], images))
    for network, saved in zip(loaded.networks[1:], family.networks[1:]):
        expected, given = latents_of(saved, images), latents_of(network, images)
        assert (given - expected).abs().max() < 0.02 * expected.abs().max()  # half precision
        assert costs.macs(network, images) == costs.macs(saved, images)
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families") / "embedded"
    save_family(family_of("embedded", "head", [SubnetSpec(width=0.5), SubnetSpec(width=0.25, resolution=16)]), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(saved, tmp_path / "family")


def load(folder, name="embedded", cut="head"):
    return load_family(folder, random_backbone(name), cut)


def test_whole_family_loads(folder):
    assert len(load(folder)) == 3
    names = ["manifest.json", "subnet_1.safetensors", "subnet_2.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_manifest_missing(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(FamilyError, match=r"manifest\.json: no family here"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"backbone": "embedded"}'])
def test_manifest_invalid(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(FamilyError, match=r"manifest\.json: not a valid manifest"):
        load(folder)


def change_manifest(folder, change):
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize("position", [0, 100, -1])
def test_damaged_file_is_named(folder, position):
    path = folder / "subnet_2.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(FamilyError, match=r"subnet_2\.safetensors: damaged"):
        load(folder)


def test_missing_file_is_named(folder):
    (folder / "subnet_1.safetensors").unlink()
    with pytest.raises(FamilyError, match=r"subnet_1\.safetensors: no such file"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["subnets"][1].update(removed=["layer1_1"]), r"subnet_1\.safetensors: unknown tensor"),
        (lambda content: content["subnets"][1].update(file=None), r"manifest\.json"),
        (lambda content: content["subnets"].clear(), r"manifest\.json"),
    ],
)
def test_manifest_that_does_not_fit_its_files(folder, change, message):
    change_manifest(folder, change)
    with pytest.raises(FamilyError, match=message):
        load(folder)


def test_manifest_with_the_files_exchanged(folder):
    """Files and hashes agree, but a width-0.25 network stands where the structure is still consistent: it loads."""
    def exchange(content):
        first, second = content["subnets"][1:]
        for key in ("file", "sha256"):
            first[key], second[key] = second[key], first[key]

    plain = load(folder).networks[1]
    change_manifest(folder, exchange)
    assert load(folder).networks[1].stem[0].out_channels < plain.stem[0].out_channels


def test_family_of_other_weights(folder):
    change_manifest(folder, lambda content: content.update(weights_fingerprint="0" * 16))
    with pytest.raises(FamilyError, match=f"{folder}: made for weights_fingerprint {'0' * 16}"):
        load(folder)


def test_family_of_another_backbone_cut_or_resolution(folder):
    with pytest.raises(FamilyError, match=f"{folder}: made for backbone embedded, not resnet18"):
        load(folder, "resnet18")
    with pytest.raises(FamilyError, match=f"{folder}: made for cut head, not layer3_1"):
        load(folder, cut="layer3_1")
    change_manifest(folder, lambda content: content.update(resolution=64))
    with pytest.raises(FamilyError, match=f"{folder}: made for resolution 64, not 32"):
        load(folder)


def test_saving_replaces_an_older_family_and_keeps_other_files(folder):
    (folder / "alignment.csv").write_text("step\n")
    save_family(family_of("embedded", "head", [SubnetSpec(width=0.75)]), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["alignment.csv", "manifest.json", "subnet_1.safetensors"]
    assert len(load(folder)) == 2


def test_failed_saving_leaves_the_older_family(folder, monkeypatch):
    import piebridge.subnets

    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(piebridge.subnets, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_family(family_of("embedded", "head", [SubnetSpec(width=0.75)]), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_read_manifest_knows_the_files(saved):
    manifest = read_manifest(saved)
    assert [facts.file for facts in manifest.subnets] == [None, "subnet_1.safetensors", "subnet_2.safetensors"]
    assert manifest.subnets[0].relative_macs == 1
