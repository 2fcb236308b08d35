"""Folded layers against the layers themselves."""

import copy

import pytest
import torch
from tiny import BACKBONES, random_backbone, random_images
from torch import nn
from torch.nn import functional

from piebridge.folding import (
    FoldedConvolution,
    NormedConvolution,
    fold_norms,
    fold_stem,
    in_blocks,
    unfold_norms,
    unfold_stem,
)


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


@pytest.mark.parametrize("name", BACKBONES)
def test_folded_norms_give_the_same_latents_and_gradients(name):
    """In double precision, with statistics and weights of batch norm that are not those of a new layer."""
    prefix = copy.deepcopy(random_backbone(name).cut("head")[0]).double().requires_grad_(True)
    for layer in prefix.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
                tensor.uniform_(0.5, 1.5)
    pixels, body = prefix.input(random_images(2)).double(), nn.Sequential(*list(prefix)[1:])
    before, weights = str(prefix), dict(prefix.named_parameters())

    def results():
        latents = body(pixels)
        return latents, torch.autograd.grad(latents.square().sum(), list(weights.values()))

    latents, gradients = results()
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in prefix.modules())
    fold_norms(body)
    assert sum(isinstance(layer, NormedConvolution) for layer in body.modules()) == norms
    found, found_gradients = results()
    assert torch.allclose(found, latents, rtol=1e-9)
    assert all(torch.allclose(*pair, rtol=1e-6, atol=1e-9) for pair in zip(found_gradients, gradients))
    unfold_norms(body)
    assert str(prefix) == before
    assert all(weights[key] is value for key, value in prefix.named_parameters())
