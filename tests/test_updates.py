"""The update that a graph can record is the library's own: Muon for matrices, AdamW for the rest."""

import copy

import pytest
import torch
from torch import nn

from piebridge.updates import WEIGHT_DECAY, Update

RATES = (0.01, 0.02, 0.005)


def network():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 4, 1, bias=False),
        nn.Flatten(), nn.Linear(4, 6),
    )
    return layers.to(memory_format=torch.channels_last)


def gradients(weight, step):
    generator = torch.Generator().manual_seed(100 * step + weight.numel())
    return torch.randn(weight.shape, generator=generator)


def updated(optimizer):
    """A network's weights after three updates with given gradients."""
    weights = list(network().parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    update = Update(weights, optimizer)
    for step, rate in enumerate(RATES):
        for weight in weights:
            weight.grad.copy_(gradients(weight, step))
        update.learning_rate.fill_(rate)
        update()
    return weights


def expected(weight, optimizer_of):
    """A weight after the same updates by an optimizer of its own, which is given the learning rate as a number."""
    weight = copy.deepcopy(weight)
    shape = weight.shape
    parameter = nn.Parameter(weight.data.movedim(1, -1).reshape(len(weight), -1)) if weight.dim() == 4 else weight
    optimizer = optimizer_of([parameter])
    for step, rate in enumerate(RATES):
        gradient = gradients(weight, step)
        parameter.grad = gradient.movedim(1, -1).reshape(len(weight), -1) if weight.dim() == 4 else gradient
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    if weight.dim() < 4:
        return parameter
    return parameter.data.view(shape[0], shape[2], shape[3], shape[1]).movedim(-1, 1)


def adamw(parameters):
    return torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY)


def muon(parameters):
    return torch.optim.Muon(parameters, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_weight_follows_the_library_s_optimizer(optimizer):
    names = [name for name, _ in network().named_parameters()]
    by_muon = {"0.weight", "3.weight", "5.weight"} if optimizer == "muon" else set()  # 2.weight is depthwise
    for name, before, after in zip(names, network().parameters(), updated(optimizer)):
        wanted = expected(before, muon if name in by_muon else adamw)
        torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-6, check_stride=False)
        other = expected(before, adamw if name in by_muon or before.dim() < 2 else muon)
        if before.dim() >= 2:
            assert (after - other).abs().max() > 1e-4, name  # the other optimizer would have gone elsewhere


def test_making_the_update_changes_no_weight_and_keeps_moments_of_all():
    weights = list(network().parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    update = Update(weights, "muon")
    assert all(torch.equal(weight, before) for weight, before in zip(weights, network().parameters()))
    tensors = update.tensors()
    assert sum(name.endswith("momentum_buffer") for name in tensors) == 3
    assert sum(name.endswith("exp_avg") for name in tensors) == len(weights) - 3
    assert all(not tensor.any() for tensor in tensors.values())


def test_nothing_keeps_a_graph_of_the_weights():
    weights = list(network().parameters())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    update = Update(weights, "muon")
    update()
    assert len(update.before) == 3  # two dense convolutions and the linear layer
    assert not any(copied.requires_grad for copied in update.before)
