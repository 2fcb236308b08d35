"""Alignment brings a subnet nearer to the original and leaves the original alone."""

import pytest
import torch
from tiny import copied_state, random_images, same_tensors, tiny_study

from piebridge.alignment import align, random_crops
from piebridge.config import SubnetSpec
from piebridge.data import load_cloud
from piebridge.subnets import cut_subnet, fidelity, latents_of


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_alignment_lowers_the_loss_and_raises_fidelity(tiny, kl_weight):
    study = tiny_study(f"cloud.steps=40 cloud.batch_size=32 cloud.kl_weight={kl_weight}")
    images = load_cloud(study)
    prefix, tail = tiny.backbone.cut("head")
    frozen = copied_state(prefix) | copied_state(tail)
    specs = (SubnetSpec(width=0.5), SubnetSpec(resolution=16))
    members = [cut_subnet(prefix, spec, images.held_out[:4])[0] for spec in specs]
    original = latents_of(prefix, images.held_out)
    before = [fidelity(latents_of(member, images.held_out), original)[0].mean() for member in members]
    history = align(members, prefix, tail, images.train, 32, study.cloud, seed=0)
    for index, member in enumerate(members, start=1):
        losses = history[history["member"] == index]["loss"].to_numpy()
        assert losses[-8:].mean() < losses[:8].mean()
        assert fidelity(latents_of(member, images.held_out), original)[0].mean() > before[index - 1] + 0.02
        assert not any(parameter.requires_grad for parameter in member.parameters())
        assert not any(module.training for module in member.modules())
    assert same_tensors(copied_state(prefix) | copied_state(tail), frozen)
    assert list(history.columns) == ["step", "seconds", "member", "loss"]
    assert history["step"].max() == 39


def test_alignment_follows_its_seed(tiny):
    study = tiny_study("cloud.steps=3 cloud.batch_size=8")
    images, (prefix, tail) = random_images(20), tiny.backbone.cut("head")

    def aligned(seed):
        member, _ = cut_subnet(prefix, SubnetSpec(width=0.5), images[:2])
        align([member], prefix, tail, images, 32, study.cloud, seed)
        return latents_of(member, images)

    torch.testing.assert_close(aligned(0), aligned(0))
    assert not torch.allclose(aligned(0), aligned(1))


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_any_number_of_steps_aligns(tiny, steps):
    study = tiny_study(f"cloud.steps={steps} cloud.batch_size=4")
    prefix, tail = tiny.backbone.cut("head")
    member, _ = cut_subnet(prefix, SubnetSpec(width=0.5), random_images(2))
    history = align([member], prefix, tail, random_images(8), 32, study.cloud, seed=0)
    assert history["step"].tolist() == list(range(steps))
    assert latents_of(member, random_images(2)).isfinite().all()


def crops(images, smallest_area=0.35, seed=0, resolution=24):
    return random_crops(images, resolution, smallest_area, torch.Generator().manual_seed(seed))


def test_crops_have_shape_range_and_layout():
    result = crops(random_images(64, side=40))
    assert result.shape == (64, 3, 24, 24)
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 255
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_crops_follow_the_seed():
    images = random_images(8)
    assert torch.equal(crops(images), crops(images))
    assert not torch.equal(crops(images), crops(images, seed=1))


def test_each_image_gets_its_own_crop():
    same = random_images(1).expand(32, -1, -1, -1)
    assert len(crops(same).flatten(1).unique(dim=0)) == 32


def slopes(smallest_area):
    """How fast a ramp of one grey a pixel rises in its crops, across; negative where flipped."""
    ramp = torch.arange(100, 164).view(1, 1, 1, 64).expand(400, 3, 64, 64).to(torch.uint8)
    result = crops(ramp, smallest_area, resolution=32)
    return (result[:, 0, 16, 24] - result[:, 0, 16, 8]) / 16


def test_crops_are_flipped_half_of_the_time():
    assert 0.4 < (slopes(0.35) < 0).float().mean() < 0.6


def test_crops_show_at_least_the_smallest_area():
    """The slope is the crop's width over its resolution (2 for the whole ramp) times the contrast of 0.7 to 1.3."""
    steepest, width_least = 2 * 1.3, (0.35 * 0.75) ** 0.5
    rises = slopes(0.35).abs()
    assert rises.max() <= steepest + 0.02
    assert rises.min() >= 2 * width_least * 0.7 - 0.02
    assert rises.min() < 2 * 0.75
    assert slopes(1.0).abs().min() >= 2 * 0.75**0.5 * 0.7 - 0.02
