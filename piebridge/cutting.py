"""Cutting subnets out of a frozen prefix: lower resolution, fewer blocks, fewer channels."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional

from .backbones import Input, TokenEmbedding
from .config import CloudConfig, SubnetSpec


class MatchLatents(nn.Module):
    """Resizes a lower-resolution member's maps or patch tokens to the original's number of positions.

    Args:
        shape: of the original's latents, without the batch.
        leading_tokens: class tokens, kept as they are.
    """

    def __init__(self, shape: torch.Size, leading_tokens: int = 1) -> None:
        super().__init__()
        self.shape, self.leading_tokens = shape, leading_tokens

    def forward(self, latents: Tensor) -> Tensor:
        if latents.shape[1:] == self.shape:
            return latents
        if latents.dim() == 4:
            return functional.interpolate(latents, self.shape[1:], mode="bilinear", antialias=True)
        leading, patches = latents[:, : self.leading_tokens], latents[:, self.leading_tokens :]
        side = round(patches.shape[1] ** 0.5)
        wanted = round((self.shape[0] - self.leading_tokens) ** 0.5)
        maps = patches.transpose(1, 2).unflatten(2, (side, side))
        maps = functional.interpolate(maps, (wanted, wanted), mode="bilinear", antialias=True)
        return torch.cat((leading, maps.flatten(2).transpose(1, 2)), dim=1)


class LatentMap(nn.Module):
    """Pooled latents plus a linear map of them: a few weights behind the last layer, for next to no time.

    The map is zero at first, so that a subnet just cut out is what it would be without.

    Args:
        size: channels of the latents, shape (B, size).
        rank: of the map; from `size` on it is one full matrix.
    """

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(size, rank, bias=False) if rank < size else nn.Identity()
        self.up = nn.Linear(min(rank, size), size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, latents: Tensor) -> Tensor:
        return latents + self.up(self.down(latents))


def removable_blocks(prefix: nn.Sequential) -> list[str]:
    """Blocks that a residual shortcut bridges without change of shape: the network still runs without them."""
    from timm.models.vision_transformer import Block
    from torchvision.models import mobilenetv2, mobilenetv3, resnet

    def bridged(block: nn.Module) -> bool:
        if isinstance(block, (resnet.BasicBlock, resnet.Bottleneck)):
            return block.downsample is None
        if isinstance(block, (mobilenetv2.InvertedResidual, mobilenetv3.InvertedResidual)):
            return block.use_res_connect
        return isinstance(block, Block)

    return [name for name, block in prefix.named_children() if bridged(block)]


def cut_subnet(
    prefix: nn.Sequential, spec: SubnetSpec, images: Tensor, config: Optional[CloudConfig] = None
) -> tuple[nn.Sequential, tuple[str, ...]]:
    """Cut a subnet out of a prefix: lower resolution, fewer blocks, fewer channels; not aligned yet.

    Blocks: those go first whose removal changes the latents least on `images`. Channels: groups of channels that
    depend on each other (Torch-Pruning, Fang et al. 2023), the least important ones, the latents' own channels kept.

    Args:
        prefix: the original; stays untouched.
        spec: what to keep.
        images: uint8, shape (B, 3, H, W), on which blocks are compared and channels valued.
        config: importance, ratios, round_to; default: those of `CloudConfig`.

    Returns:
        The subnet, uint8 images to latents of the original's shape, in evaluation mode, and the blocks removed. What
        alignment may train of it requires a gradient.

    Raises:
        ValueError: `spec` names a block that is not there or cannot be removed, a stride for a transformer, or a
            latent map for latents that are not pooled.
    """
    config = config or CloudConfig()
    with torch.no_grad():
        latents = prefix(images)
    subnet = copy.deepcopy(prefix)
    _change_input(subnet, spec)
    candidates = removable_blocks(prefix)
    unknown = sorted(set(spec.without) - set(candidates))
    if unknown:
        raise ValueError(f"subnet without {unknown[0]!r}: blocks that can be removed: {', '.join(candidates)}")
    names = [name for name, _ in prefix.named_children()]
    for start in spec.widths:
        if not any(name.startswith(start) for name in names):
            raise ValueError(f"widths: no block's name begins with {start!r}; blocks: {', '.join(names)}")
    removed = list(spec.without)
    wanted = round((1 - spec.depth) * len(candidates))
    for _ in range(min(wanted, len(candidates) - len(removed))):
        removed.append(_least_needed(prefix, candidates, removed, images, latents))
    kept = [(name, block) for name, block in subnet.named_children() if name not in removed]
    subnet = nn.Sequential(OrderedDict(kept))
    if spec.width < 1 or spec.widths:
        _prune_channels(subnet, spec, images, config)
    if latents.dim() > 2:
        subnet.add_module("match", MatchLatents(latents.shape[1:]))
    if spec.latent_map:
        if latents.dim() > 2:
            raise ValueError(
                f"latent_map: latents of shape {tuple(latents.shape[1:])} are maps or tokens; only pooled ones, right "
                "before the head, can have one"
            )
        subnet.add_module("map", LatentMap(latents.shape[1], spec.latent_map).to(latents.device))
    subnet.requires_grad_(True).eval()
    for name in shared_tensors(subnet, spec.shared):
        subnet.get_parameter(name).requires_grad_(False)
    return subnet, tuple(removed)


def shared_tensors(subnet: nn.Sequential, blocks: Sequence[str]) -> list[str]:
    """Names of the weights of dense convolutions and of a latent map in these blocks.

    Batch norms, depthwise convolutions and biases are not in it.

    Raises:
        ValueError: the subnet has no such block.
    """
    children = dict(subnet.named_children())
    unknown = sorted(set(blocks) - set(children))
    if unknown:
        raise ValueError(f"shared block {unknown[0]!r}: the subnet's blocks: {', '.join(children)}")
    return [
        ".".join(part for part in (block, name, "weight") if part)
        for block in blocks for name, layer in children[block].named_modules()
        if (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        or (isinstance(layer, nn.Linear) and isinstance(children[block], LatentMap))
    ]


@dataclass(frozen=True)
class Cut:
    """A subnet that was cut out, not aligned yet.

    Attributes:
        spec: how it differs from the original, at one resolution.
        network: uint8 images (B, 3, H, W) to latents of the original's shape.
        removed: blocks left out.
        leader: the network whose dense convolutions in the blocks `shared` are also its own; None: it shares none.
        shared: blocks.
        every: in one of how many steps it is aligned.
    """

    spec: SubnetSpec
    network: nn.Sequential
    removed: tuple[str, ...]
    leader: Optional[nn.Sequential] = None
    shared: tuple[str, ...] = ()
    every: int = 1


def cut_set(
    prefix: nn.Sequential, spec: SubnetSpec, images: Tensor, config: Optional[CloudConfig] = None
) -> list[Cut]:
    """The subnets that a specification asks for: one, or one a resolution, led by the first.

    Args, Raises: as `cut_subnet`; also a ValueError if `common` fits no block.
    """
    specs = one_a_side(spec)
    leader, removed = cut_subnet(prefix, specs[0], images, config)
    cuts = [Cut(specs[0], leader, removed, prefix if spec.shared else None, spec.shared, *specs[0].every)]
    blocks = _common_blocks(leader, spec)
    for other in specs[1:]:
        network = copy.deepcopy(leader)
        _change_input(network, other)
        tie(network, leader, shared_tensors(network, blocks))
        cuts.append(Cut(other, network, removed, leader, blocks, *other.every))
    for cut in cuts:  # last, so that each is resampled from the backbone's own kernel
        for side in cut.spec.stem_kernels:
            set_stem_kernel(cut.network, side)
    return cuts


def cut_sibling(member: nn.Sequential, spec: SubnetSpec, blocks: Sequence[str]) -> nn.Sequential:
    """A copy of an aligned subnet for another side, stride or kernel, not aligned to it yet.

    Args:
        member: stays untouched.
        spec: its resolution, stem_strides and stem_kernels are used, where given.
        blocks: whose dense convolutions and latent map stay as they are: alignment may train all else.

    Raises:
        ValueError: `spec` asks for other channels or blocks than the member's.
    """
    own = spec.model_dump(exclude_defaults=True).keys() - {"resolution", "stem_strides", "stem_kernels"}
    if own:
        raise ValueError(
            f"{min(own)}: a subnet that is added has the channels and blocks of the one it is like; give sides, "
            "stem_strides, stem_kernels and what is in common, and nothing else"
        )
    sibling = copy.deepcopy(member).requires_grad_(True)
    _change_input(sibling, spec)
    for name in shared_tensors(sibling, blocks):
        sibling.get_parameter(name).requires_grad_(False)
    for side in spec.stem_kernels:
        set_stem_kernel(sibling, side)
    return sibling


def one_a_side(spec: SubnetSpec) -> list[SubnetSpec]:
    """A specification for each of the sides that one asks for."""
    own = {key: [(value,) for value in getattr(spec, key)] or [()] * len(spec.resolutions)
           for key in ("stem_strides", "stem_kernels", "every")}
    return [
        spec.model_copy(update={"resolution": side, "resolutions": (), "common": ()} | dict(zip(own, values)))
        for side, *values in zip(spec.resolutions, *own.values())
    ] or [spec]


def _common_blocks(leader: nn.Sequential, spec: SubnetSpec) -> tuple[str, ...]:
    """Names of the blocks that a set has in common; where kernels are given, each member has its own stem."""
    names = [name for name, _ in leader.named_children()]
    blocks = tuple(name for name in names if name.startswith(spec.common or ("",)))
    if spec.stem_kernels:
        stem = first_convolution(leader)
        blocks = tuple(name for name in blocks if stem not in set(leader.get_submodule(name).modules()))
    if not blocks:
        own = "; with stem_kernels each member has a stem of its own" if spec.stem_kernels else ""
        raise ValueError(
            f"common: no block's name begins with {' or '.join(spec.common)}; blocks: {', '.join(names)}{own}"
        )
    return blocks


def _change_input(subnet: nn.Sequential, spec: SubnetSpec) -> None:
    if spec.resolution is not None:
        subnet.input = subnet.input.at(spec.resolution)
    for stride in spec.stem_strides:
        set_stem_stride(subnet, stride)


def set_stem_stride(subnet: nn.Sequential, stride: int) -> None:
    """Give the first convolution another stride, in place.

    Raises:
        ValueError: the network is a transformer, whose first convolution cuts patches.
    """
    _refuse_transformer(subnet, "stem_strides")
    first_convolution(subnet).stride = (stride, stride)


def set_stem_kernel(subnet: nn.Sequential, side: int) -> None:
    """Resample the first convolution's kernel to another side, in place.

    Args:
        subnet: its first convolution has a kernel of odd side, padded by half of it.
        side: pixels, odd.

    Raises:
        ValueError: the network is a transformer, whose first convolution cuts patches.
    """
    _refuse_transformer(subnet, "stem_kernels")
    first = first_convolution(subnet)
    gain = (first.kernel_size[0] / side) ** 2  # fewer samples, the same sum
    kernel = functional.interpolate(first.weight.detach(), (side, side), mode="bilinear", antialias=True)
    first.weight = nn.Parameter(gain * kernel)
    first.kernel_size, first.padding = (side, side), (side // 2, side // 2)


def _refuse_transformer(network: nn.Sequential, key: str) -> None:
    if any(isinstance(block, TokenEmbedding) for block in network):
        raise ValueError(f"{key}: a transformer's patches keep their size; give lower resolutions instead")


def first_convolution(subnet: nn.Sequential) -> nn.Conv2d:
    """The layer that sees the pixels."""
    return next(layer for layer in subnet.modules() if isinstance(layer, nn.Conv2d))


def tie(network: nn.Module, leader: nn.Module, names: Sequence[str]) -> None:
    """Make these parameters of a network those of another, in place: one tensor, trained and kept once."""
    for name in names:
        module, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(module), attribute, leader.get_parameter(name))


def _least_needed(
    prefix: nn.Sequential, candidates: list[str], removed: list[str], images: Tensor, latents: Tensor
) -> str:
    """The block without which, besides those removed, the latents stay nearest to the original's."""
    similarity = {}
    with torch.no_grad():
        for name in candidates:
            if name not in removed:
                left = [block for other, block in prefix.named_children() if other not in (*removed, name)]
                near = functional.cosine_similarity(nn.Sequential(*left)(images).flatten(1), latents.flatten(1))
                similarity[name] = near.mean().item()
    return max(similarity, key=similarity.get)


class _Probe(nn.Module):
    """Stands after the latents, so that the dependency graph shows which layers make their channels."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        maps = latents.dim() == 4
        channels = latents.shape[1] if maps else latents.shape[-1]
        self.layer = nn.Conv2d(channels, 1, 1) if maps else nn.Linear(channels, 1)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layer(latents)


def _prune_channels(subnet: nn.Sequential, spec: SubnetSpec, images: Tensor, config: CloudConfig) -> None:
    import torch_pruning

    subnet.requires_grad_(True)  # Torch-Pruning follows the autograd graph
    body = nn.Sequential(*[block for block in subnet if not isinstance(block, Input)])
    example = subnet.input(images[:2])
    probe = _Probe(body(example)).to(images.device)
    network = nn.Sequential(body, probe)
    graph = torch_pruning.DependencyGraph().build_dependency(network, example)
    kept = [probe.layer]
    for group in graph.get_all_groups(ignored_layers=[probe.layer]):
        modules = [dependency.target.module for dependency, _ in group]
        # the latents' channels must stay; in a transformer only the hidden layer of each MLP may shrink
        if probe.layer in modules or _is_token_stream(subnet, modules):
            kept.append(modules[0])
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    if config.importance == "taylor":
        importance = torch_pruning.importance.GroupTaylorImportance()
    ratios = {block: 1 - share for name, block in subnet.named_children() for start, share in spec.widths.items()
              if name.startswith(start)}
    pruner = torch_pruning.MetaPruner(
        network, example, importance=importance, pruning_ratio=1 - spec.width, pruning_ratio_dict=ratios,
        global_pruning=config.ratios == "global", max_pruning_ratio=0.95, ignored_layers=kept,
        round_to=config.round_to,
    )
    if config.importance == "taylor":
        # first-order change of the latents, in a random direction an image: their own error has no slope at zero
        latents = body(subnet.input(images))
        directions = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents.device)
        (latents * directions).sum().backward()
    pruner.step()
    network.zero_grad(set_to_none=True)


def _is_token_stream(subnet: nn.Sequential, modules: list[nn.Module]) -> bool:
    if not any(isinstance(block, TokenEmbedding) for block in subnet):
        return False
    hidden = {block.mlp.fc1 for block in subnet if hasattr(block, "mlp")}
    return modules[0] not in hidden
