"""Random crops: of many images at once on their device for alignment, image by image on the CPU for training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

LOG_ASPECT = 0.2877  # of 4/3: aspect ratios of crops go from 3/4 to 4/3


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

    area, ratio = uniform(smallest_area, 1.0), torch.exp(uniform(-LOG_ASPECT, LOG_ASPECT))
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


class RandomViews:
    """Training images of which each epoch sees other crops, mirrored half of the time; indexed like their tensor.

    How an image looks in an epoch follows from the seed, the epoch and the image alone, not from order, batch or route:
    every network and every method sees the same, and a run that was killed needs no state to go on.

    Args:
        images: uint8, shape (M, 3, S, S), channels-last, on the CPU.
        chosen: int64, shape (N,): which of them are trained on.
        resolution: side of the views, pixels.
        smallest_area: share of the image that a crop shows at least.
        seed: of the run.
    """

    def __init__(self, images: Tensor, chosen: Tensor, resolution: int, smallest_area: float, seed: int) -> None:
        self.images, self.chosen, self.resolution = images, chosen, resolution
        self.smallest_area, self.seed = smallest_area, seed
        self.start(0)

    def start(self, epoch: int) -> None:
        """From now on show the views of an epoch, counted from 0."""
        draws = np.random.default_rng([self.seed, epoch + 1]).random((len(self.images), 5)).T
        side = self.images.shape[-1]
        area = self.smallest_area + (1 - self.smallest_area) * draws[0]
        widest = np.minimum(LOG_ASPECT, -np.log(area))  # wider than this, so much area does not fit into the square
        aspect = np.exp(widest * (2 * draws[1] - 1))
        width, height = (np.minimum(side, np.ceil(side * np.sqrt(shape))) for shape in (area * aspect, area / aspect))
        left, top = (np.floor(draw * (side - size + 1)) for draw, size in ((draws[2], width), (draws[3], height)))
        self.boxes = np.stack([left, top, left + width, top + height], axis=1).astype(int).tolist()
        self.mirrored = torch.from_numpy(draws[4] < 0.5)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Views of so many of the chosen images, int64 (B,): uint8, shape (B, 3, resolution, resolution)."""
        size = (self.resolution, self.resolution)
        views = torch.empty((len(indices), 3, *size), dtype=torch.uint8, memory_format=torch.channels_last)
        images = self.chosen[indices]
        for place, image in enumerate(images.tolist()):  # resizing uint8 is fast, but takes equal boxes only
            left, top, right, bottom = self.boxes[image]
            box = self.images[image : image + 1, :, top:bottom, left:right]
            views[place] = functional.interpolate(box, size, mode="bilinear", antialias=True)[0]
        mirrored = self.mirrored[images]
        views[mirrored] = views[mirrored].flip(3)
        return views
