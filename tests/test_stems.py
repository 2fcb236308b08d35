"""Convolving blocks of pixels against convolving pixels."""

import copy

import pytest
import torch
from tiny import random_backbone, random_images
from torch import nn
from torch.nn import functional

from piebridge.stems import FoldedConvolution, fold_stem, in_blocks, unfold_stem


@pytest.mark.parametrize("size", [128, 100, 33])
@pytest.mark.parametrize(("kernel", "padding"), [(7, 3), (3, 1), (5, 0)])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_blocks_of_pixels_give_the_same_convolution(stride, kernel, padding, size):
    """Values and the gradient of the weights, against the convolution itself, in double precision."""
    images = torch.rand(2, 3, size, size, dtype=torch.double).to(memory_format=torch.channels_last)
    weight = torch.rand(5, 3, kernel, kernel, dtype=torch.double, requires_grad=True)
    expected = functional.conv2d(images, weight, stride=stride, padding=padding)
    folded, blocks = in_blocks(images, weight, stride, padding)
    assert folded.is_contiguous(memory_format=torch.channels_last)
    found = functional.conv2d(folded, blocks)
    assert torch.allclose(found, expected, rtol=1e-12)
    slope = torch.rand_like(expected)
    (gradient,), (wanted,) = (torch.autograd.grad((maps * slope).sum(), weight) for maps in (found, expected))
    assert torch.allclose(gradient, wanted, rtol=1e-12)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_folded_network_computes_the_same_with_the_same_tensors(name):
    prefix, _ = random_backbone(name).cut("head")
    network, images = copy.deepcopy(prefix), random_images(2)
    before, weights = str(network), dict(network.named_parameters())
    fold_stem(network)
    assert sum(isinstance(layer, FoldedConvolution) for layer in network.modules()) == 1
    assert all(weights[key] is value for key, value in network.named_parameters())
    with torch.no_grad():
        assert torch.allclose(network(images), prefix(images), atol=1e-5)
    unfold_stem(network)
    assert str(network) == before
    assert all(weights[key] is value for key, value in network.named_parameters())


@pytest.mark.parametrize("network", [nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Conv2d(4, 4, 3, 2, groups=2)),
                                     nn.Sequential(nn.Conv2d(3, 4, 3))])
def test_what_cannot_gain_is_left_alone(network):
    before = list(network.children())
    fold_stem(network)
    assert list(network.children()) == before
