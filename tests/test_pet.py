"""What is trained, exactly; and that what is new changes nothing at first."""

import copy

import pytest
import torch
from tiny import copied_state, random_backbone, random_images, same_tensors
from torch import nn

from piebridge.config import PetConfig
from piebridge.pet import Adapter, cut_of, split, split_all

KINDS = ("head", "last_k", "adapter", "lora")
NETWORKS = ("resnet18", "mobilenet_v2", "vit_tiny_patch16_224")
HEAD = {"head.weight", "head.bias"}
ADAPTER = ("down.weight", "down.bias", "up.weight", "up.bias")

# Names relative to the last block of each network.
LAST_BLOCK = {"resnet18": "layer4_1", "mobilenet_v2": "block18", "vit_tiny_patch16_224": "block11"}
ALL_PARAMETERS = {
    "resnet18": ["conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias"],
    "mobilenet_v2": ["0.weight", "1.weight", "1.bias"],
    "vit_tiny_patch16_224": [
        "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
        "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
    ],
}
BEHIND_THE_BODY = {"vit_tiny_patch16_224": {"pool.norm.weight", "pool.norm.bias"}}
LORA_LAYERS = {
    "resnet18": ["conv1", "conv2"],
    "mobilenet_v2": ["0"],
    "vit_tiny_patch16_224": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
}


def expected_names(name, kind):
    last = LAST_BLOCK[name]
    if kind == "head":
        return HEAD
    if kind == "last_k":
        return HEAD | {f"{last}.{part}" for part in ALL_PARAMETERS[name]} | BEHIND_THE_BODY.get(name, set())
    if kind == "adapter":
        return HEAD | {f"adapter_{last}.{part}" for part in ADAPTER}
    return HEAD | {f"{last}.{layer}.lora_{side}.default.weight" for layer in LORA_LAYERS[name] for side in "AB"}


def trained_names(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def parts_of(name, kind, blocks=1, seed=0):
    return split(random_backbone(name), PetConfig(kind=kind, blocks=blocks, bottleneck=4, rank=2), 3, seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_exactly_these_are_trained(name, kind):
    parts = parts_of(name, kind)
    assert trained_names(parts.suffix) == expected_names(name, kind)
    assert trained_names(parts.prefix) == set()


@pytest.mark.parametrize("name", NETWORKS)
def test_full_training_trains_everything(name):
    parts = split_all(random_backbone(name), 3, seed=0)
    everything = set(dict(random_backbone(name).blocks.named_parameters()))
    assert trained_names(parts.suffix) == set(dict(parts.suffix.named_parameters())) == everything
    assert len(parts.prefix) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_two_blocks_are_cut_below_the_second_last(name, kind):
    parts = parts_of(name, kind, blocks=2)
    wanted = "head" if kind == "head" else random_backbone(name).body[-2]
    assert parts.cut == cut_of(random_backbone(name), PetConfig(kind=kind, blocks=2)) == wanted
    assert wanted not in dict(parts.prefix.named_children())
    blocks = {trained.split(".")[0].removeprefix("adapter_") for trained in trained_names(parts.suffix)}
    assert blocks >= ({"head"} if kind == "head" else {"head", *random_backbone(name).body[-2:]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_new_changes_nothing_at_first(name, kind):
    """With the original's head put back, prefix and suffix give the original's logits."""
    backbone, images = random_backbone(name), random_images(2)
    parts = parts_of(name, kind, blocks=2)
    parts.suffix.head = backbone.blocks.head
    with torch.no_grad():
        torch.testing.assert_close(parts.suffix(parts.prefix(images)), backbone.blocks(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_stays_untouched(kind):
    backbone = random_backbone("mobilenet_v2")
    before = copied_state(backbone.blocks)
    parts = parts_of("mobilenet_v2", kind, blocks=2)
    with torch.no_grad():
        for parameter in parts.suffix.parameters():
            parameter.add_(1)
    assert same_tensors(copied_state(backbone.blocks), before)
    assert trained_names(backbone.blocks) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_new_values_follow_the_seed_alone(kind):
    torch.manual_seed(5)
    one = copied_state(parts_of("resnet18", kind, seed=0).suffix)
    generator = torch.get_rng_state()
    same, other = (copied_state(parts_of("resnet18", kind, seed=seed).suffix) for seed in (0, 1))
    assert same_tensors(one, same)
    assert not same_tensors(one, other)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("maps", [True, False])
def test_adapter_is_the_identity_at_first_and_learns(maps):
    adapter = Adapter(6, 2, maps)
    latents = torch.randn(2, 6, 5, 5) if maps else torch.randn(2, 7, 6)
    assert torch.equal(adapter(latents), latents)
    adapter(latents).square().sum().backward()
    assert adapter.up.weight.grad.abs().sum() > 0
    nn.init.ones_(adapter.up.weight)
    assert not torch.equal(adapter(latents), latents)


def test_more_blocks_than_there_are():
    with pytest.raises(ValueError, match=r"pet\.blocks: 9 asked for, resnet18 has 8"):
        parts_of("resnet18", "adapter", blocks=9)


def test_suffix_evaluates():
    assert not any(module.training for kind in KINDS for module in parts_of("resnet18", kind).suffix.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_whose_prefix_is_on_another_device_is_cut_alike(kind):
    backbone = copy.deepcopy(random_backbone("resnet18"))
    pet = PetConfig(kind=kind, blocks=1)
    before = split(backbone, pet, 5, seed=0).suffix
    backbone.cut(cut_of(backbone, pet))[0].to("meta")  # as training moves the prefix, and only that, to a GPU
    after = split(backbone, pet, 5, seed=0).suffix
    assert same_tensors(after.state_dict(), before.state_dict())
