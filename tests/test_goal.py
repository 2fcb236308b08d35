"""What alignment minimises, against plain formulas."""

import numpy as np
import pytest
import torch
from torch import nn

from piebridge.config import AlignmentLoss
from piebridge.goal import Goal, attention, stage_ends


def crops(count=200, shape=(6,)):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    values = torch.randn(count, *shape[1:], 6, generator=generator) @ mixing + 2
    return values.movedim(-1, 1) if len(shape) == 3 else values


def goal_of(latents, **weights):
    return Goal.of(nn.Identity(), latents, AlignmentLoss(**weights))


def test_centred_loss_is_cosine_and_relative_squared_error():
    latents, near = crops(), crops() + 0.3 * torch.randn(200, 6)
    goal = goal_of(latents, cosine=0.7, mse=0.2)
    wanted = (latents - latents.mean(0)).numpy()
    given = (near - latents.mean(0)).numpy()
    cosine = (wanted * given).sum(1) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(given, axis=1)
    expected = 0.7 * (1 - cosine.mean()) + 0.2 * ((wanted - given) ** 2).mean() / (wanted**2).mean()
    assert goal.latent_loss(near, goal.place(latents)).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("space", ["plain", "centred", "whitened"])
@pytest.mark.parametrize("shape", [(6,), (6, 3, 3)])
def test_equal_latents_have_no_loss_and_others_have(space, shape):
    latents = crops(50, shape)
    goal = goal_of(latents, space=space)
    assert goal.latent_loss(latents, goal.place(latents)).item() == pytest.approx(0, abs=1e-5)
    assert goal.latent_loss(latents.flip(0), goal.place(latents)).item() > 0.1


def test_whitened_latents_have_nearly_the_identity_as_covariance():
    latents = crops(4000)
    placed = goal_of(latents, space="whitened").place(latents)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(placed.T))
    assert eigenvalues.max() < 1.01
    assert eigenvalues.median() > 0.8


def test_plain_latents_keep_their_mean():
    latents = crops()
    torch.testing.assert_close(goal_of(latents, space="plain").place(latents), latents)


def test_attention_is_where_the_activations_are():
    maps = torch.zeros(1, 5, 4, 4)
    maps[0, :, 0, 0] = 3.0
    torch.testing.assert_close(attention(maps, 2), torch.tensor([[1.0, 0, 0, 0]]))


def test_stage_ends_come_before_each_change_of_size(tiny):
    prefix, _ = tiny.backbone.cut("head")
    sides, images = {}, torch.zeros(1, 3, 32, 32)
    for name, block in prefix.named_children():
        images = block(images)
        if images.dim() == 4:
            sides[name] = images.shape[-1]
    ends = stage_ends(prefix, torch.zeros(1, 3, 32, 32))
    assert [sides[name] for name in ends] == sorted({side for name, side in sides.items() if name != "input"})[::-1]
    assert len(ends) > 2
