"""PruneTrain: full training that empties channels and rebuilds a smaller dense network (Lym et al. 2019, 1901.09290).

Algorithm. The weights that make a channel of a layer, and those that read one, each form a group.

1. To the loss of each step is added the group lasso, the sum over all groups of sqrt(sum of squares + 1e-8), times a
   weight that is fixed once, at the first step, so that the lasso is a given share of the total.
2. Every few epochs, channels whose weights have all fallen below a threshold are dropped, and training goes on with the
   smaller network; the momenta of what is kept are kept.

Channels that a residual sum or a depthwise convolution couples are dropped together, and only if all layers that make
or read them have let go of them. What is dropped is therefore read by nobody: the smaller network computes the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .backbones import Input
from .config import PruneConfig

LEAST = 2  # channels that stay; a depthwise convolution of one channel would no longer be told from an ordinary one

OUTPUTS, INPUTS = 0, 1  # dimensions of a weight


def penalised_dimensions(network: nn.Module) -> dict[nn.Module, tuple[int, ...]]:
    """The layers under the lasso, and of each the dimensions of its weight along which the groups lie.

    Convolutions and linear layers; not the first one's inputs (the image), not the last one's outputs (the classes),
    and no depthwise or otherwise grouped convolution.
    """
    layers = [
        module for module in network.modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    dimensions: dict[nn.Module, tuple[int, ...]] = dict.fromkeys(layers, (OUTPUTS, INPUTS))
    dimensions[layers[0]] = (OUTPUTS,)
    dimensions[layers[-1]] = (INPUTS,)
    return dimensions


def group_lasso(dimensions: dict[nn.Module, tuple[int, ...]]) -> Tensor:
    """Sum over all groups of sqrt(sum of squares + 1e-8); a scalar with gradients."""
    norms = []
    for layer, groups in dimensions.items():
        squares = layer.weight.square().flatten(2).sum(2) if layer.weight.dim() == 4 else layer.weight.square()
        norms += [(squares.sum(1 - dimension) + 1e-8).sqrt().sum() for dimension in groups]
    return torch.stack(norms).sum()


def empty_channels(network: nn.Sequential, images: Tensor, threshold: float) -> dict[str, list[int]]:
    """Channels that no layer uses any more.

    Args:
        network: its blocks, from `input` to `head`; every parameter requires a gradient.
        images: uint8, shape (B, 3, H, W), to trace the network with.
        threshold: a weight below it in magnitude counts as none.

    Returns:
        Channels, ascending, by the name of the layer that makes them (of those coupled, the first); no empty lists.
    """
    dimensions = penalised_dimensions(network)
    names = {module: name for name, module in network.named_modules()}
    graph, found = _dependencies(network, images), {}
    for group in graph.get_all_groups(ignored_layers=[list(dimensions)[-1]]):
        root = group[0].dep.target.module
        count = graph.get_out_channels(root)
        if not all(_keeps_order(item, count) for item in group):
            continue
        largest = torch.zeros(count, device=images.device)
        for item in group:
            layer = item.dep.target.module
            dimension = OUTPUTS if graph.is_out_channel_pruning_fn(item.dep.handler) else INPUTS
            if dimension in dimensions.get(layer, ()):
                largest = largest.maximum(layer.weight.detach().abs().transpose(0, dimension).flatten(1).amax(1))
        weakest = largest.argsort()[: count - LEAST]
        channels = weakest[largest[weakest] < threshold].sort().values
        if len(channels):
            found[names[root]] = channels.tolist()
    return found


def drop_channels(network: nn.Sequential, channels: dict[str, list[int]], images: Tensor) -> None:
    """Rebuild a network without some channels, in place; gradients, where there are any, are cut like their tensors.

    Args:
        network: as for `empty_channels`.
        channels: by the name of the layer that makes them; layers coupled with it follow.
        images: uint8, shape (B, 3, H, W), to trace the network with.
    """
    modules = dict(network.named_modules())
    graph = _dependencies(network, images)
    for name, dropped in channels.items():
        pruner = graph.get_pruner_of_module(modules[name])
        graph.get_pruning_group(modules[name], pruner.prune_out_channels, dropped).prune()
    network.to(memory_format=torch.channels_last)


def _dependencies(network: nn.Sequential, images: Tensor):
    """Torch-Pruning's dependency graph (Fang et al. 2023) of all blocks behind the input."""
    import torch_pruning

    body = nn.Sequential(*[block for block in network if not isinstance(block, Input)])
    return torch_pruning.DependencyGraph().build_dependency(body, network.input(images))


def _keeps_order(item, count: int) -> bool:
    """Whether a member of a group has the root's channels one by one, so that one can go without changing the others.

    Not so where channels are normalised together or split into attention heads.
    """
    from torch_pruning.ops import _ElementWiseOp, _ReshapeOp

    harmless = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, _ElementWiseOp, _ReshapeOp)
    return isinstance(item.dep.target.module, harmless) and list(item.idxs) == list(range(count))


class ChannelPruning:
    """The group lasso of a network, and its rebuilding between epochs.

    Args:
        network: its blocks, from `input` to `head`; changed in place.
        config: lasso_share, threshold, interval.

    Attributes:
        weight: of the lasso, fixed at the first step.
        rebuilds: what `drop_channels` was given, in order.
    """

    def __init__(self, network: nn.Sequential, config: PruneConfig) -> None:
        self.network, self.config = network, config
        self.dimensions = penalised_dimensions(network)
        self.weight: float | None = None
        self.rebuilds: list[dict[str, list[int]]] = []

    def penalty(self, loss: Tensor) -> Tensor:
        """What is added to a batch's mean loss, a scalar that needs no gradient."""
        lasso = group_lasso(self.dimensions)
        if self.weight is None:
            share = self.config.lasso_share
            self.weight = (share / (1 - share) * loss / lasso.detach()).item()
        return self.weight * lasso

    def state(self) -> dict[str, Any]:
        """The lasso's weight and what was dropped, for a checkpoint."""
        return {"weight": self.weight, "rebuilds": self.rebuilds}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave: rebuild the network, still whole, as it was; its weights come later."""
        self.weight = state["weight"]
        side, device = self.network.input.resolution, next(self.network.parameters()).device
        images = torch.zeros(2, 3, side, side, dtype=torch.uint8, device=device)
        for channels in state["rebuilds"]:
            drop_channels(self.network, channels, images)
            self.rebuilds.append(channels)

    def before_epoch(self, epoch: int, optimizer: torch.optim.SGD, images: Tensor, labels: Tensor) -> None:
        """Every `interval` epochs, but not before the first (0): drop what is empty, from network and optimizer."""
        if epoch == 0 or epoch % self.config.interval:
            return
        channels = empty_channels(self.network, images[:2], self.config.threshold)
        if not channels:
            return
        for parameter in self.network.parameters():  # as gradients, the momenta are cut with their tensors
            parameter.grad = optimizer.state[parameter].get("momentum_buffer")
        drop_channels(self.network, channels, images[:2])
        self.rebuilds.append(channels)
        optimizer.state.clear()
        optimizer.param_groups[0]["params"] = list(self.network.parameters())
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                optimizer.state[parameter]["momentum_buffer"] = parameter.grad
            parameter.grad = None
