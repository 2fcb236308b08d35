"""Random crops of many images at once, on the images' device: the augmentation of alignment."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def random_crops(
    images: Tensor, resolution: int, smallest_area: float, generator: torch.Generator, mixed: float = 0.0,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Random crops, flips, brightness and contrast, each image its own, on the images' device.

    Args:
        images: uint8, shape (B, 3, S, S).
        resolution: side of the result.
        smallest_area: share of the image that a crop shows at least; aspect ratios go from 3/4 to 4/3.
        generator: on the same device.
        mixed: share of the crops in which a rectangle comes from the neighbour's crop (CutMix, Yun et al. 2019).
        part: (index, count): only this one of `count` equal parts of the batch, drawn as in the whole.

    Returns:
        float32 in [0, 255], shape (B or B / count, 3, resolution, resolution), channels-last.
    """
    count, device = len(images), images.device
    index, parts = part
    kept = slice(index * count // parts, (index + 1) * count // parts)

    def uniform(low: float, high: float) -> Tensor:
        return (torch.rand(count, generator=generator, device=device) * (high - low) + low)[kept]

    area, ratio = uniform(smallest_area, 1.0), torch.exp(uniform(-0.2877, 0.2877))
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(width)
    across = torch.stack([width * flip, zero, (1 - width) * uniform(-1, 1)], dim=1)
    down = torch.stack([zero, height, (1 - height) * uniform(-1, 1)], dim=1)
    images = images[kept]
    grid = functional.affine_grid(
        torch.stack([across, down], dim=1), (len(images), 3, resolution, resolution), align_corners=False
    )
    crops = functional.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    contrast, brightness = uniform(0.7, 1.3).view(-1, 1, 1, 1), uniform(-30, 30).view(-1, 1, 1, 1)
    means = crops.mean((1, 2, 3), keepdim=True)
    crops = ((crops - means) * contrast + means + brightness).clamp(0, 255)
    if mixed:
        inside = _rectangles(uniform(0, 1), uniform(0, 1), uniform(0.2, 0.7), resolution)
        inside = inside & (uniform(0, 1) < mixed).view(-1, 1, 1)
        crops = torch.where(inside.unsqueeze(1), crops.roll(1, dims=0), crops)
    return crops.contiguous(memory_format=torch.channels_last)


def _rectangles(left: Tensor, top: Tensor, side: Tensor, resolution: int) -> Tensor:
    """Masks of squares, shape (B, resolution, resolution); all in shares of the image, `left` and `top` of the rest."""
    place = (torch.arange(resolution, device=left.device) + 0.5) / resolution

    def between(start: Tensor) -> Tensor:
        start = (start * (1 - side)).unsqueeze(1)
        return (place >= start) & (place < start + side.unsqueeze(1))

    return between(top).unsqueeze(2) & between(left).unsqueeze(1)
