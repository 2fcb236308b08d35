"""Views of training images: what is drawn, what it shows, and what it does not depend on."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_backbone, random_images
from torch import nn

from piebridge.config import TrainingConfig
from piebridge.crops import RandomViews
from piebridge.pet import Split
from piebridge.routing import FixedRoute
from piebridge.training import Plan, fit

SIDE, RESOLUTION, COUNT = 160, 128, 400
EVERY = torch.arange(COUNT)


def views_of(images, area=0.5, seed=0, resolution=RESOLUTION, chosen=None):
    return RandomViews(images, torch.arange(len(images)) if chosen is None else chosen, resolution, area, seed)


def drawn_boxes(area):
    """Boxes read off views of ramps: left, top, width and height in pixels, and whether mirrored; shapes (COUNT,)."""
    across = torch.arange(SIDE, dtype=torch.uint8).expand(SIDE, SIDE)
    ramps = torch.stack([across, across.T, across]).expand(COUNT, -1, -1, -1)
    views = views_of(ramps, area)[EVERY].double()
    places, found = np.arange(RESOLUTION) + 0.5, []
    for line in (views[:, 0].mean(1), views[:, 1].mean(2)):
        slope, start = np.polyfit(places[8:-8], line[:, 8:-8].T.numpy(), 1)
        start, end = start + 0.5, start + 0.5 + slope * RESOLUTION
        found.append((np.minimum(start, end), np.abs(end - start), slope < 0))
    (left, width, mirrored), (top, height, upside_down) = found
    assert not upside_down.any()
    return left, top, width, height, mirrored


@pytest.mark.parametrize("area", [0.2, 0.5, 0.9])
def test_crops_are_boxes_of_the_image_of_the_shape_that_was_asked_for(area):
    left, top, width, height, _ = drawn_boxes(area)
    for start, size in ((left, width), (top, height)):
        assert start.min() > -0.5
        assert (start + size).max() < SIDE + 0.5
    share, aspect = width * height / SIDE**2, width / height
    assert area - 0.01 < share.min() < area + 0.02
    assert 0.98 < share.max() < 1.01
    assert share.mean() == pytest.approx((1 + area) / 2, abs=0.02)
    assert 0.73 < aspect.min() < max(0.79, area + 0.02)
    assert min(1.27, 1 / area - 0.02) < aspect.max() < 1.37
    middle = (left + width / 2).mean(), (top + height / 2).mean()
    assert middle == pytest.approx((SIDE / 2, SIDE / 2), abs=3)


def test_half_of_the_views_are_mirrored():
    *_, mirrored = drawn_boxes(0.5)
    assert 0.42 < mirrored.mean() < 0.58


def test_views_are_what_pillow_cuts_out():
    images = random_images(40, side=50)
    views = views_of(images, area=0.3, resolution=32)
    for image, view, box, mirrored in zip(images, views[torch.arange(40)], views.boxes, views.mirrored):
        cut = Image.fromarray(image.permute(1, 2, 0).numpy()).crop(box).resize((32, 32), Image.Resampling.BILINEAR)
        wanted = np.asarray(cut)[:, ::-1] if mirrored else np.asarray(cut)
        difference = np.abs(view.permute(1, 2, 0).numpy().astype(int) - wanted)
        assert difference.max() <= 1


def test_whole_images_are_only_mirrored():
    images = random_images(60, side=32)
    views = views_of(images, area=1.0, resolution=32)[torch.arange(60)]
    kept = (views == images).flatten(1).all(1)
    assert torch.equal(views[~kept], images[~kept].flip(3))
    assert 15 < kept.sum() < 45


def test_views_are_images_in_the_layout_of_networks():
    views = views_of(random_images(9, side=40), resolution=32)[torch.tensor([3, 1, 3])]
    assert views.shape == (3, 3, 32, 32)
    assert views.dtype == torch.uint8
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(views[0], views[2])


def test_views_follow_seed_and_epoch():
    images, indices = random_images(1, side=SIDE).expand(30, -1, -1, -1), torch.arange(30)
    views, shown = views_of(images, resolution=32), {}
    for epoch in (0, 1, 2):
        views.start(epoch)
        shown[epoch] = views[indices]
        assert len(shown[epoch].flatten(1).unique(dim=0)) == 30  # each image has its own
    other = views_of(images, resolution=32, seed=1)
    assert torch.equal(views_of(images, resolution=32)[indices], shown[0])
    seen = torch.cat([*shown.values(), other[indices]])
    assert len(seen.flatten(1).unique(dim=0)) == 4 * 30
    views.start(1)
    assert torch.equal(views[indices], shown[1])


def test_a_view_does_not_depend_on_what_else_is_seen():
    images = random_images(20, side=40)
    whole = views_of(images, resolution=32)[torch.arange(20)]
    chosen = torch.tensor([4, 17, 2, 9])
    some = views_of(images, resolution=32, chosen=chosen)
    assert len(some) == 4
    assert torch.equal(some[torch.tensor([2, 0, 1])], whole[[2, 4, 17]])


def test_training_sees_each_epochs_views_once_and_in_the_networks_size():
    images, seen = random_images(13, side=40), []
    views, suffix = views_of(images, resolution=32), nn.Sequential()
    suffix.add_module("head", nn.Linear(3, 3))

    def latents_of(batch):
        seen.append(batch)
        return batch.float().mean((2, 3))

    plan = Plan(Split("head", nn.Sequential(), suffix), {}, {0: latents_of}, FixedRoute(0))
    config = TrainingConfig(epochs=3, prefix_batch=13)  # one pass: a rest would be filled up
    outcome = fit(plan, views, torch.arange(13) % 3, config, 0.01, 0, lambda suffix: {})
    for epoch, batches in enumerate(torch.cat(seen).split(13)):
        expected = views_of(images, resolution=32)
        expected.start(epoch)
        wanted = expected[torch.arange(13)]
        assert (batches[:, None] == wanted[None]).flatten(2).all(2).sum(0).tolist() == [1] * 13
    assert outcome.seconds["data"] > 0


def test_networks_take_views():
    views = views_of(random_images(5, side=40), resolution=32)
    assert random_backbone("embedded").blocks(views[torch.arange(5)]).isfinite().all()
