"""Layers rearranged so that a GPU runs them faster, with the same weights and the same results.

A first convolution on blocks of pixels (space to depth): tensor cores multiply many channels and an image has three;
with strides of 3 and 4 cuDNN is slower still. So each stride x stride block of pixels becomes one pixel of stride² as
many channels, and the kernel, with zeros about it, one of stride 1.

A batch norm whose statistics are frozen as part of the convolution before it: as a layer of its own it reads and writes
all maps again, forwards and backwards, and is bound by memory.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class FoldedConvolution(nn.Conv2d):
    """A convolution of square images that is computed on blocks of pixels."""

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(*in_blocks(images, weight, self.stride[0], self.padding[0]), bias)


def fold_stem(network: nn.Module) -> None:
    """Let a network's first convolution work on blocks of pixels, in place; its weights stay the same tensors.

    Nothing is done to a convolution of stride 1 or of groups, or if there is none.
    """
    name, layer = _first_convolution(network)
    if type(layer) is nn.Conv2d and layer.stride[0] > 1 and layer.groups == 1:
        network.set_submodule(name, _like(layer, FoldedConvolution))


def unfold_stem(network: nn.Module) -> None:
    """Undo `fold_stem`, keeping the weights."""
    name, layer = _first_convolution(network)
    if isinstance(layer, FoldedConvolution):
        network.set_submodule(name, _like(layer, nn.Conv2d))


def in_blocks(images: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """Images and a kernel such that convolving them with stride 1, unpadded, is convolving the given ones.

    Args:
        images: shape (B, C, S, S).
        weight: shape (D, C, K, K).
        stride, padding: of the convolution, pixels.

    Returns:
        Images (B, C * stride², S', S') and a kernel (D, C * stride², K', K'), both channels-last.
    """
    size, kernel = images.shape[-1], weight.shape[-1]
    before = math.ceil(padding / stride) * stride  # so the kernel starts with a whole block, some zeros in front
    zeros = before - padding
    blocks = math.ceil((zeros + kernel) / stride)
    outputs = (size + 2 * padding - kernel) // stride + 1
    after = (outputs - 1 + blocks) * stride - before - size
    images = functional.pad(images, 2 * (before, after))
    weight = functional.pad(weight, 2 * (zeros, blocks * stride - zeros - kernel))
    return _space_to_depth(images, stride), _space_to_depth(weight, stride)


def _space_to_depth(maps: Tensor, side: int) -> Tensor:
    maps = maps.permute(0, 2, 3, 1).unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return maps.transpose(2, 3).flatten(3).permute(0, 3, 1, 2)


def _first_convolution(network: nn.Module) -> tuple[str, nn.Module | None]:
    return next(((name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)), ("", None))


def _like(layer: nn.Conv2d, kind: type[nn.Conv2d]) -> nn.Conv2d:
    with torch.device("meta"):
        other = kind(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                     bias=layer.bias is not None)
    other.weight, other.bias = layer.weight, layer.bias
    return other


class NormedConvolution(nn.Module):
    """A convolution and the batch norm behind it with its running statistics, as one convolution, trained as both.

    Args:
        convolution, norm: the layers, kept.
        norm_name: of the norm in the network.
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d, norm_name: str) -> None:
        super().__init__()
        self.convolution, self.norm, self.norm_name = convolution, norm, norm_name

    def forward(self, maps: Tensor) -> Tensor:
        layer, norm = self.convolution, self.norm
        with torch.autocast(maps.device.type, enabled=False):
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            weight = layer.weight * scale.view(-1, 1, 1, 1)
            bias = norm.bias - norm.running_mean * scale
            if layer.bias is not None:
                bias = bias + layer.bias * scale
        return layer._conv_forward(maps, weight, bias)


def fold_norms(network: nn.Module) -> None:
    """Let a network's convolutions do the work of the batch norms behind them, in place, with the running statistics.

    All tensors stay the same objects. Pairs are those of neighbours in the order of registration, as torchvision writes
    its networks; others are left as they are.
    """
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, kinds)]
    for (name, layer), (norm_name, norm) in itertools.pairwise(layers):
        pair = isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        if pair and norm.num_features == layer.out_channels:
            network.set_submodule(name, NormedConvolution(layer, norm, norm_name))
            network.set_submodule(norm_name, nn.Identity())


def unfold_norms(network: nn.Module) -> None:
    """Undo `fold_norms` on the same network, keeping the weights."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, NormedConvolution):
            network.set_submodule(name, layer.convolution)
            network.set_submodule(layer.norm_name, layer.norm)
