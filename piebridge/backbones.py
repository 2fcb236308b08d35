"""Backbones: pretrained networks, taken apart into named blocks so that they can be cut anywhere."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from .config import BackboneConfig
from .embedded import SmallResNet

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class WeightsError(ValueError):
    """Weights are absent or do not belong to the architecture; the message names the file and the tensor."""


class Input(nn.Module):
    """From stored pixels to what the first convolution expects: resize, scale to [0, 1], normalise.

    Args:
        resolution: side of the square output, pixels.
        mean, std: a channel, of images in [0, 1].
    """

    def __init__(self, resolution: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.resolution, self.mean_and_std = resolution, (mean, std)
        # of a row of pixels, since arithmetic on three numbers at a time uses no vectors
        self.register_buffer("mean", (torch.tensor(mean) * 255).repeat(resolution), persistent=False)
        self.register_buffer("scale", (1 / (torch.tensor(std) * 255)).repeat(resolution), persistent=False)

    def at(self, resolution: int) -> Input:
        """The same, on the same device, for an output of another side, pixels."""
        return Input(resolution, *self.mean_and_std).to(self.mean.device)

    def forward(self, images: Tensor) -> Tensor:
        """float32, channels-last, shape (B, 3, resolution, resolution), of uint8 images, shape (B, 3, H, W)."""
        if images.is_contiguous(memory_format=torch.channels_last):
            pixels = images.permute(0, 2, 3, 1)
        else:  # by stacking, since the channels are interleaved several times faster so than by a change of layout
            pixels = torch.stack(images.unbind(1), dim=-1)
        if images.shape[-1] != self.resolution:
            on_cpu = images.device.type == "cpu"  # CUDA resizes floating-point images only
            pixels = functional.interpolate(
                (pixels if on_cpu else pixels.float()).permute(0, 3, 1, 2), (self.resolution, self.resolution),
                mode="bilinear", antialias=True,
            ).permute(0, 2, 3, 1).contiguous()
        rows = pixels.flatten(2)
        rows = rows - self.mean if rows.is_floating_point() else rows.float().sub_(self.mean)
        return rows.mul_(self.scale).view(pixels.shape).permute(0, 3, 1, 2)


class Pool(nn.Module):
    """Mean over the map: (B, C, H, W) to (B, C)."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


class TokenEmbedding(nn.Module):
    """Patches and positions of a timm vision transformer: images to tokens (B, N, D)."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        transformer.blocks, transformer.norm = nn.Sequential(), nn.Identity()
        transformer.fc_norm, transformer.head = nn.Identity(), nn.Identity()
        self.transformer = transformer

    def forward(self, images: Tensor) -> Tensor:
        embedded = self.transformer._pos_embed(self.transformer.patch_embed(images))
        return self.transformer.norm_pre(self.transformer.patch_drop(embedded))


class ClassToken(nn.Module):
    """The last normalisation and the class token: (B, N, D) to (B, D)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens)[:, 0]


@dataclass(frozen=True)
class Backbone:
    """A pretrained network in evaluation mode, frozen.

    Attributes:
        name: as in the registry.
        resolution: side of its input, pixels.
        blocks: `input`, `stem` (or `embed`), the blocks, `pool`, `head`; maps uint8 images (B, 3, H, W) to logits.
        body: names of the blocks between stem and pool: what can be trained, adapted or removed.
        fingerprint: of the weights, 16 hexadecimal digits: a family of subnets belongs to exactly these.
    """

    name: str
    resolution: int
    blocks: nn.Sequential
    body: tuple[str, ...]
    fingerprint: str

    def cut(self, name: str) -> tuple[nn.Sequential, nn.Sequential]:
        """(prefix, suffix): the blocks before the named one, and from it on. The blocks are shared, not copied."""
        children = list(self.blocks.named_children())
        index = [child for child, _ in children].index(name)
        return nn.Sequential(OrderedDict(children[:index])), nn.Sequential(OrderedDict(children[index:]))

    @property
    def resolution_step(self) -> int:
        """Pixels that sides of other inputs must be multiples of, 16 where a vision transformer needs whole patches."""
        return 16 if hasattr(self.blocks, "embed") else 8

    def example(self, count: int = 1) -> Tensor:
        """Black uint8 images of the backbone's own size, shape (count, 3, resolution, resolution), channels-last."""
        images = torch.zeros(count, 3, self.resolution, self.resolution, dtype=torch.uint8)
        return images.contiguous(memory_format=torch.channels_last)


def load_backbone(config: BackboneConfig) -> Backbone:
    """Load a backbone by name, with its weights, on the CPU.

    For `embedded`, `weights` must be the path of a file: `cloud.obtain_backbone` makes it.

    Raises:
        WeightsError: no such file, not safetensors, or tensors that do not fit the architecture.
    """
    model = _architecture(config)
    if config.weights != "random":
        file = _weights_file(config)
        if file is not None:
            load_weights(model, file, config.name)
    return take_apart(model, config.name, config.resolution)


def _architecture(config: BackboneConfig) -> nn.Module:
    library_weights = config.weights == "auto" and _weights_file(config) is None
    if config.name == "embedded":
        return SmallResNet()
    if config.name in ("deit_tiny_patch16_224", "vit_tiny_patch16_224"):
        import timm

        return _with_weights(config, lambda: timm.create_model(
            config.name, pretrained=library_weights, dynamic_img_size=True
        ))
    weights = "DEFAULT" if library_weights else None
    return _with_weights(config, lambda: torchvision.models.get_model(config.name, weights=weights))


def _with_weights(config: BackboneConfig, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except OSError as error:  # the library could not download its weights
        raise WeightsError(
            f"backbone.weights: those of {config.name} could not be downloaded ({error}); set PIEBRIDGE_WEIGHTS to a "
            f"folder that holds {config.name}.safetensors, or backbone.weights to a file"
        ) from error


def _weights_file(config: BackboneConfig) -> Path | None:
    if config.weights != "auto":
        path = Path(config.weights).expanduser()
        if not path.is_file():
            raise WeightsError(f"backbone.weights: {path}: no such file (or write auto, or random)")
        return path
    folder = os.environ.get("PIEBRIDGE_WEIGHTS")
    path = Path(folder) / f"{config.name}.safetensors" if folder else None
    if path is not None and not path.is_file():
        raise WeightsError(f"{path}: no such file; unset PIEBRIDGE_WEIGHTS to use the library's own weights")
    return path


def load_weights(model: nn.Module, file: Path, name: str) -> None:
    """Load a safetensors file into a model, any floating-point type, every tensor and no other.

    Raises:
        WeightsError: the file is no safetensors file, or its tensors are not the architecture's.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file}: not a safetensors file ({error})") from error
    expected = model.state_dict()
    tensors = {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
    wanted = {key for key in expected if not key.endswith("num_batches_tracked")}
    odd = sorted(wanted ^ set(tensors))
    if odd:
        where = "missing from" if odd[0] in wanted else "unknown in"
        raise WeightsError(f"{file}: not weights of {name}: tensor {odd[0]!r} is {where} the file ({len(odd)} such)")
    for key, value in tensors.items():
        if value.shape != expected[key].shape:
            raise WeightsError(
                f"{file}: not weights of {name}: {key!r} has shape {tuple(value.shape)}, "
                f"the architecture's is {tuple(expected[key].shape)}"
            )
    model.load_state_dict({key: value.to(expected[key].dtype) for key, value in tensors.items()}, strict=False)


def take_apart(model: nn.Module, name: str, resolution: int) -> Backbone:
    """The named blocks of a ResNet, MobileNet or timm vision transformer, frozen and in evaluation mode."""
    fingerprint = _fingerprint(model)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if hasattr(model, "pretrained_cfg"):
        mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    if hasattr(model, "layer1"):
        stem, body, last = _resnet_parts(model)
    elif hasattr(model, "features"):
        stem, body, last = _mobilenet_parts(model)
    else:
        stem, body, last = _transformer_parts(model)
    blocks = nn.Sequential(OrderedDict([("input", Input(resolution, mean, std)), *stem, *body, *last]))
    blocks.requires_grad_(False).eval()
    return Backbone(name, resolution, blocks, tuple(name for name, _ in body), fingerprint)


def _resnet_parts(model: nn.Module):
    stem = [("stem", nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool))]
    stages = [stage for stage in ("layer1", "layer2", "layer3", "layer4") if hasattr(model, stage)]
    body = [(f"{stage}_{i}", block) for stage in stages for i, block in enumerate(getattr(model, stage))]
    return stem, body, [("pool", Pool()), ("head", model.fc)]


def _mobilenet_parts(model: nn.Module):
    features = list(model.features)
    stem = [("stem", features[0])]
    body = [(f"block{i}", block) for i, block in enumerate(features[1:], start=1)]
    hidden = [layer for layer in list(model.classifier)[:-1] if not isinstance(layer, nn.Dropout)]
    return stem, body, [("pool", nn.Sequential(Pool(), *hidden)), ("head", model.classifier[-1])]


def _transformer_parts(model: nn.Module):
    body = [(f"block{i}", block) for i, block in enumerate(model.blocks)]
    last = [("pool", ClassToken(model.norm)), ("head", model.head)]
    return [("embed", TokenEmbedding(model))], body, last


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point():
            digest.update(key.encode())
            digest.update(tensor.detach().to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
