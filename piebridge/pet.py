"""Parameter-efficient training: what is trained decides where the network is cut.

Everything below the first trainable module is the frozen *prefix*, everything from it on the *suffix*. Both stay in
evaluation mode also while training: with batches of four, batch statistics would be noise (the same for all methods).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .backbones import Backbone
from .config import PetConfig


@dataclass(frozen=True)
class Split:
    """A network cut in two.

    Attributes:
        cut: name of the suffix's first block, as the backbone calls it.
        prefix: uint8 images (B, 3, H, W) to latents; frozen, shared with the backbone.
        suffix: latents to logits (B, classes); a copy of its own, `requires_grad` says what is trained.
    """

    cut: str
    prefix: nn.Sequential
    suffix: nn.Sequential


class Adapter(nn.Module):
    """Residual bottleneck adapter: x + up(relu(down(x))), the identity at first (Houlsby et al. 2019).

    Args:
        channels: of the maps (B, C, H, W) or tokens (B, N, C) it adapts.
        bottleneck: channels in between.
        maps: whether the input is a map (1x1 convolutions) or tokens (linear layers).
    """

    def __init__(self, channels: int, bottleneck: int, maps: bool) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, bottleneck, 1) if maps else nn.Linear(channels, bottleneck)
        self.up = nn.Conv2d(bottleneck, channels, 1) if maps else nn.Linear(bottleneck, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, latents: Tensor) -> Tensor:
        return latents + self.up(torch.relu(self.down(latents)))


def split(backbone: Backbone, pet: PetConfig, classes: int, seed: int) -> Split:
    """Cut a backbone for a kind of parameter-efficient training, with a new head.

    Args:
        backbone: stays untouched.
        pet: the kind and its sizes.
        classes: outputs of the new head.
        seed: of the initial values of what is new.

    Raises:
        ValueError: more blocks asked for than the backbone has.
    """
    cut = cut_of(backbone, pet)
    prefix, original = backbone.cut(cut)
    suffix = copy.deepcopy(original)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        suffix.head = nn.Linear(original.head.in_features, classes)
        if pet.kind == "adapter":
            suffix = _with_adapters(backbone, prefix, suffix, pet)
        elif pet.kind == "lora":
            _inject_lora(suffix, [name for name in backbone.body if hasattr(suffix, name)], pet.rank)
        elif pet.kind == "last_k":
            suffix.requires_grad_(True)
    suffix.head.requires_grad_(True)
    return Split(cut, prefix, suffix.eval())


def split_all(backbone: Backbone, classes: int, seed: int) -> Split:
    """Full training: an empty prefix, and every parameter in the suffix, trained."""
    suffix = copy.deepcopy(backbone.blocks)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        suffix.head = nn.Linear(backbone.blocks.head.in_features, classes)
    return Split("input", nn.Sequential(), suffix.requires_grad_(True).eval())


def cut_of(backbone: Backbone, pet: PetConfig) -> str:
    """Name of the first block of the suffix.

    Raises:
        ValueError: more blocks asked for than the backbone has.
    """
    if pet.kind == "head":
        return "head"
    if pet.blocks > len(backbone.body):
        raise ValueError(f"pet.blocks: {pet.blocks} asked for, {backbone.name} has {len(backbone.body)}")
    return backbone.body[-pet.blocks]


def _with_adapters(backbone: Backbone, prefix: nn.Sequential, suffix: nn.Sequential, pet: PetConfig) -> nn.Sequential:
    shape = prefix(backbone.example().to(next(prefix.buffers()).device)).shape
    latents = torch.zeros(shape, device=next(suffix.parameters()).device)  # training may have moved the prefix alone
    parts: list[tuple[str, nn.Module]] = []
    for name, block in suffix.named_children():
        if name in backbone.body:
            channels = latents.shape[1] if latents.dim() == 4 else latents.shape[-1]
            parts.append((f"adapter_{name}", Adapter(channels, pet.bottleneck, maps=latents.dim() == 4)))
        if name != "head":
            latents = block(latents)
        parts.append((name, block))
    return nn.Sequential(OrderedDict(parts))


def _inject_lora(suffix: nn.Sequential, blocks: list[str], rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    targets = [
        name
        for name, module in suffix.named_modules()
        if name.split(".")[0] in blocks
        and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), suffix)
