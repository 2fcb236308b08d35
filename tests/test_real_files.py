"""Real data and weights, where the variables PIEBRIDGE_DATA and PIEBRIDGE_WEIGHTS lead to them."""

import os
from pathlib import Path

import pytest
import torch
from tiny import ROOT, random_images, tiny_study

from piebridge.backbones import load_backbone
from piebridge.config import BackboneConfig
from piebridge.data import load_task
from piebridge.subnets import latents_of, load_family, read_manifest

WEIGHTS = Path(os.environ.get("PIEBRIDGE_WEIGHTS", "/nowhere"))
DATA = Path(os.environ.get("PIEBRIDGE_DATA", "/nowhere"))
FAMILIES = sorted(path.parent for path in (ROOT / "params" / "families").glob("*/manifest.json"))

with_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="PIEBRIDGE_WEIGHTS is not set")


def with_data(folder):
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=f"PIEBRIDGE_DATA has no {folder}")


@with_weights
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_real_weights(name):
    backbone = load_backbone(BackboneConfig(name=name, resolution=64))
    logits = backbone.blocks(random_images(4, side=64))
    assert logits.shape == (4, 1000)
    assert logits.isfinite().all()
    assert len(logits.argmax(1).unique()) > 1


@with_weights
@pytest.mark.parametrize("folder", FAMILIES, ids=lambda folder: folder.name)
def test_shipped_family_fits_the_real_weights(folder):
    manifest = read_manifest(folder)
    backbone = load_backbone(BackboneConfig(name=manifest.backbone, resolution=manifest.resolution))
    family = load_family(folder, backbone, manifest.cut)
    images = random_images(4, side=manifest.resolution)
    original = latents_of(family.networks[0], images)
    for facts, network in zip(manifest.subnets, family.networks):
        latents = latents_of(network, images)
        assert latents.shape == original.shape
        plain = torch.nn.functional.cosine_similarity(latents.flatten(1), original.flatten(1)).mean()
        assert plain > 0.5, facts.file


def sizes_of(overrides):
    task = load_task(tiny_study(f"data.test_per_class=null backbone.resolution=16 cloud.subnets=[] {overrides}"))
    sizes = {name: len(indices) for name, indices in task.splits.items()}
    return len(task.classes), sizes["train"] + sizes["validation"], sizes["test"]


@with_data("caltech101")
def test_caltech101():
    assert sizes_of("data.name=caltech101 data.train_per_class=30") == (101, 3030, 5647)


@with_data("dtd")
def test_dtd():
    assert sizes_of("data.name=dtd data.train_per_class=null") == (10, 800, 400)


@with_data("dogs-vs-cats")
def test_dogs_vs_cats():
    assert sizes_of("data.name=dogs_vs_cats data.train_per_class=1000") == (2, 2000, 2000)
