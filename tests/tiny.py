"""What many tests need: the smallest study, small random backbones, random images."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from piebridge.backbones import Backbone, load_backbone
from piebridge.config import BackboneConfig, Study, load_study
from piebridge.methods import Setting
from piebridge.subnets import Family, latents_of

ROOT = Path(__file__).resolve().parents[1]
BACKBONES = [name for name in BackboneConfig.model_fields["name"].annotation.__args__]
SIDE = 32


def tiny_study(overrides: str = "") -> Study:
    """The study in tiny.yaml, changed by overrides."""
    return load_study(ROOT / "tests" / "tiny.yaml", overrides)


@cache
def random_backbone(name: str) -> Backbone:
    """A backbone with random weights at 32 px; shared, so a test must not change it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = load_backbone(BackboneConfig(name=name, resolution=SIDE, weights="random"))
        for module in backbone.blocks.modules():  # at their first values batch norms would hide what is wrong with them
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.bias.data.normal_(std=0.1)
    return backbone


def random_images(count: int, side: int = SIDE, seed: int = 0) -> Tensor:
    """uint8 images of smooth random colours, shape (count, 3, side, side)."""
    coarse = np.random.default_rng(seed).integers(0, 256, size=(count, 3, 5, 5), dtype=np.uint8)
    return torch.nn.functional.interpolate(torch.from_numpy(coarse), (side, side), mode="bilinear")


def bare_setting(backbone: Backbone, overrides: str = "", count: int = 13) -> Setting:
    """A setting of random images without a family."""
    return Setting(tiny_study(overrides), backbone, random_images(count), 3, seed=0)


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two dictionaries hold the same names and bit-identical tensors."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check_saved(family: Family, loaded: Family, images: Tensor) -> None:
    """Assert that a family that was saved and loaded gives the latents that it gave, but for half precision."""
    assert len(family) == len(loaded)
    for before, after in zip(family.networks, loaded.networks):
        expected, given = latents_of(before, images), latents_of(after, images)
        assert given.shape == expected.shape and (given - expected).abs().max() <= 0.02 * expected.abs().max()


def copied_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """All tensors of a module, copied, also buffers that are not saved."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
