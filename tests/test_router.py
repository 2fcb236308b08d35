"""The router draws nothing in use, keeps to its cost and survives saving."""

import numpy as np
import pytest
import torch
from tiny import random_images
from torch.nn import functional

from piebridge.config import RouterConfig
from piebridge.router import Router, load_router, member_losses, save_router, train_router
from piebridge.subnets import FamilyError

COSTS = [1.0, 0.5, 0.1]


def learn(target_cost=0.35, seed=0, steps=120):
    """Bright images lose nothing with a cheap member, dark ones much."""
    images = random_images(200, side=16)
    hardness = 1 - images.float().mean((1, 2, 3)).argsort().argsort() / 200
    losses = torch.stack([torch.zeros(200), 0.5 * hardness, hardness], dim=1)
    config = RouterConfig(steps=steps, batch_size=64, channels=4, target_cost=target_cost)
    return images, train_router(images, losses, COSTS, config, seed), config


def test_router_draws_nothing_in_use():
    images, router, _ = learn(steps=5)
    torch.manual_seed(0)
    one = router.difficulty(images)
    torch.manual_seed(1)
    assert torch.equal(router.difficulty(images), one)
    parts = torch.cat([router.difficulty(batch) for batch in images.split(7)])
    torch.testing.assert_close(parts, one)
    assert one.min() > 0
    assert one.max() <= 1
    assert not any(parameter.requires_grad for parameter in router.parameters())


def test_training_follows_the_seed_alone():
    (images, one, _), (_, same, _), (_, other, _) = learn(steps=5), learn(steps=5), learn(steps=5, seed=1)
    assert torch.equal(one(images), same(images))
    assert not torch.equal(one(images), other(images))


def test_target_cost_pulls_the_mean_cost():
    spent = {}
    for target in (0.2, 0.7):
        images, router, _ = learn(target)
        spent[target] = router.difficulty(images).mean().item()
        assert abs(spent[target] - target) < 0.15
    assert spent[0.7] > spent[0.2] + 0.3


def test_images_that_lose_more_get_more():
    images, router, _ = learn(0.5, steps=250)
    darkness = -images.float().mean((1, 2, 3)).numpy()
    assert np.corrcoef(darkness, router.difficulty(images).numpy())[0, 1] > 0.3


def test_router_survives_saving(tmp_path):
    images, router, config = learn(steps=5)
    save_router(router, config, tmp_path / "family")
    loaded = load_router(tmp_path / "family")
    assert torch.equal(loaded.difficulty(images), router.difficulty(images))
    assert [path.name for path in (tmp_path / "family").iterdir()] == ["router.safetensors"]


@pytest.mark.parametrize("content", [None, b"", b"text", b"cut off"])
def test_unusable_router_is_named(tmp_path, content):
    if content == b"cut off":
        save_router(Router(16, 4, COSTS), RouterConfig(channels=4), tmp_path)
        content = (tmp_path / "router.safetensors").read_bytes()[:-9]
    if content is not None:
        (tmp_path / "router.safetensors").write_bytes(content)
    with pytest.raises(FamilyError, match=r"router\.safetensors: no usable router"):
        load_router(tmp_path)


def test_member_losses_against_their_definition():
    generator = torch.Generator().manual_seed(0)
    original, member = (torch.randn(300, 6, generator=generator) for _ in range(2))
    tail = torch.nn.Linear(6, 4)
    losses = member_losses([original, member], tail)
    assert losses.shape == (300, 2)
    assert (losses[:, 0] == 0).all()
    mean = original.mean(0)
    cosine = functional.cosine_similarity(member - mean, original - mean)
    wanted, given = tail(original).softmax(1), tail(member).softmax(1)
    divergence = (wanted * (wanted / given).log()).sum(1)
    torch.testing.assert_close(losses[:, 1], (1 - cosine + divergence).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(member_losses([original, original], tail)[:, 1], torch.zeros(300), atol=1e-5, rtol=0)
