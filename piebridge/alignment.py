"""Alignment: the subnets learn to give the original's latents, on public images.

All members are trained together against one pass of the original. Source of the idea: pre-training-assisted latent
space alignment (PieBridge, SenSys 2024, appendix A.1); losses and schedule are this project's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from .config import CloudConfig

FROZEN_STATISTICS = 0.2  # share of the steps, at the end, in which batch norm already uses its running statistics


def align(
    members: Sequence[nn.Module], prefix: nn.Module, tail: nn.Module, images: Tensor, resolution: int,
    config: CloudConfig, seed: int,
) -> pd.DataFrame:
    """Train the members in place until their latents are near the original's.

    The loss of a member is 1 - cosine of the centred latents, plus their squared error over the original's variance,
    plus `config.kl_weight` times the KL divergence of the class probabilities that the original's `tail` reads out of
    both. Batch norm learns from batches at first and is frozen for the last fifth, so that what is aligned is what
    will be used.

    Args:
        members: subnets, uint8 or float images in [0, 255] to latents.
        prefix: the original, frozen.
        tail: the original's layers behind the cut, latents to logits, frozen.
        images: uint8, shape (N, 3, S, S), anywhere; batches are cropped on the members' device.
        resolution: side of the crops, pixels.
        config: steps, batch_size, learning_rate, kl_weight, crop_area, device.
        seed: of batches and crops.

    Returns:
        A row a logged step: step, seconds, member (index from 1), loss.
    """
    device = torch.device(config.device)
    images = images.to(device)
    networks = [network.to(device).to(memory_format=torch.channels_last) for network in (prefix, tail, *members)]
    prefix, tail, members = networks[0], networks[1], networks[2:]
    generator = torch.Generator(device).manual_seed(seed)
    parameters = [parameter for member in members for parameter in member.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.01, fused=True)
    # a warm-up of exactly one step makes OneCycleLR divide by zero, hence the 1e-9
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps, pct_start=0.1 + 1e-9)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    mean, variance = _moments(prefix, images, resolution, config, generator)
    history, start = [], time.perf_counter()
    for step in tqdm(range(config.steps), desc="aligning subnets"):
        learning_statistics = step < (1 - FROZEN_STATISTICS) * config.steps
        chosen = torch.randint(len(images), (config.batch_size,), generator=generator, device=device)
        batch = random_crops(images[chosen], resolution, config.crop_area, generator)
        with torch.no_grad(), autocast:
            target = prefix(batch).float()
            log_probabilities = tail(target).float().log_softmax(1)
        losses = []
        for member in members:
            member.train(learning_statistics)
            with autocast:
                latents = member(batch)
                logits = tail(latents) if config.kl_weight else None
            loss = _latent_loss(latents.float(), target, mean, variance)
            if config.kl_weight:
                loss = loss + config.kl_weight * functional.kl_div(
                    logits.float().log_softmax(1), log_probabilities, reduction="batchmean", log_target=True
                )
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % max(1, config.steps // 50) == 0 or step == config.steps - 1:
            seconds = time.perf_counter() - start
            history += [(step, seconds, index, loss.item()) for index, loss in enumerate(losses, start=1)]
    for member in members:
        member.requires_grad_(False).eval()
    return pd.DataFrame(history, columns=["step", "seconds", "member", "loss"])


def _latent_loss(latents: Tensor, target: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    latents, target = (latents - mean).flatten(1), (target - mean).flatten(1)
    cosine = functional.cosine_similarity(latents, target).mean()
    return 1 - cosine + functional.mse_loss(latents, target) / variance


def _moments(prefix: nn.Module, images: Tensor, resolution: int, config: CloudConfig, generator: torch.Generator):
    """Mean latent and mean variance of the original on a thousand crops."""
    chosen = torch.randint(len(images), (1024,), generator=generator, device=images.device)
    with torch.no_grad():
        crops = random_crops(images[chosen], resolution, config.crop_area, generator)
        latents = torch.cat([prefix(batch) for batch in crops.split(64)])
    mean = latents.mean(0, keepdim=True)
    return mean, (latents - mean).square().mean()


def random_crops(images: Tensor, resolution: int, smallest_area: float, generator: torch.Generator) -> Tensor:
    """Random crops, flips, brightness and contrast, each image its own, on the images' device.

    Args:
        images: uint8, shape (B, 3, S, S).
        resolution: side of the result.
        smallest_area: share of the image that a crop shows at least; aspect ratios go from 3/4 to 4/3.
        generator: on the same device.

    Returns:
        float32 in [0, 255], shape (B, 3, resolution, resolution), channels-last.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator, device=device) * (high - low) + low

    area, ratio = uniform(smallest_area, 1.0), torch.exp(uniform(-0.2877, 0.2877))
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(width)
    across = torch.stack([width * flip, zero, (1 - width) * uniform(-1, 1)], dim=1)
    down = torch.stack([zero, height, (1 - height) * uniform(-1, 1)], dim=1)
    grid = functional.affine_grid(
        torch.stack([across, down], dim=1), (count, 3, resolution, resolution), align_corners=False
    )
    crops = functional.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    contrast, brightness = uniform(0.7, 1.3).view(-1, 1, 1, 1), uniform(-30, 30).view(-1, 1, 1, 1)
    means = crops.mean((1, 2, 3), keepdim=True)
    jittered = ((crops - means) * contrast + means + brightness).clamp(0, 255)
    return jittered.contiguous(memory_format=torch.channels_last)
