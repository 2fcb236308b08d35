"""What alignment minimises: the distance of latents from the original's, in a space of choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import AlignmentLoss


@dataclass(frozen=True)
class Goal:
    """Where latents are compared, and how much each term of the loss weighs.

    Attributes:
        mean: the original's mean latent, shape (1, ...); zeros in plain space.
        whitening: shape (D, D), over the latent's channels; None but in whitened space.
        variance: mean variance of the original's latents in that space.
        weights: of the terms.
    """

    mean: Tensor
    whitening: Optional[Tensor]
    variance: Tensor
    weights: AlignmentLoss

    @classmethod
    def of(cls, prefix: nn.Module, crops: Tensor, weights: AlignmentLoss) -> Goal:
        """The goal that the original's latents of some crops, shape (B, 3, R, R), set."""
        with torch.no_grad():
            latents = torch.cat([prefix(batch) for batch in crops.split(256)])
        mean, whitening = latents.mean(0, keepdim=True), None
        if weights.space == "whitened":
            channels = _channels_last(latents - mean).flatten(0, -2)
            covariance = channels.T @ channels / len(channels)
            values, vectors = torch.linalg.eigh(covariance.double())
            whitening = ((vectors / (values.clamp(min=0) + 0.01 * values.mean()).sqrt()) @ vectors.T).float()
        if weights.space == "plain":
            mean = torch.zeros_like(mean)
        goal = cls(mean, whitening, torch.ones((), device=mean.device), weights)
        variance = (goal.place(latents) - goal.place(latents).mean(0)).square().mean()
        return cls(mean, whitening, variance, weights)

    def place(self, latents: Tensor) -> Tensor:
        """Latents (B, ...) in the space where they are compared, shape (B, D)."""
        latents = latents.float() - self.mean
        if self.whitening is not None:
            latents = _channels_last(latents) @ self.whitening
        return latents.flatten(1)

    def latent_loss(self, latents: Tensor, wanted: Tensor) -> Tensor:
        """Weighted 1 - cosine and squared error of latents (B, ...) against the original's, placed: (B, D)."""
        placed = self.place(latents)
        loss = self.weights.mse * functional.mse_loss(placed, wanted) / self.variance
        return loss + self.weights.cosine * (1 - functional.cosine_similarity(placed, wanted).mean())


def _channels_last(latents: Tensor) -> Tensor:
    """Vectors (B, D) and tokens (B, N, D) as they are, maps (B, C, H, W) as (B, H, W, C)."""
    return latents.movedim(1, -1) if latents.dim() == 4 else latents


def attention(maps: Tensor, side: int) -> Tensor:
    """Where a network looks: squared activations averaged over channels, (B, C, H, W) to unit vectors (B, side²).

    Comparable between networks of different widths (Zagoruyko and Komodakis, 2017).
    """
    energy = functional.adaptive_avg_pool2d(maps.float().square().mean(1, keepdim=True), side)
    return functional.normalize(energy.flatten(1))


def stage_ends(network: nn.Sequential, images: Tensor) -> list[str]:
    """The last block before each change of the map's size, and the last of all."""
    sides: dict[str, int] = {}
    with torch.no_grad():
        for name, block in network.named_children():
            images = block(images)
            if images.dim() == 4 and name != "input":
                sides[name] = images.shape[-1]
    names = list(sides)
    return [name for name, following in zip(names, [*names[1:], None]) if sides.get(following) != sides[name]]
