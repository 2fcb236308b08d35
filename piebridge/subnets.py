"""Subnets: cheaper approximations of a frozen prefix, cut out of it and saved as a family."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from . import costs
from .backbones import Backbone, Input, TokenEmbedding
from .config import SubnetSpec
from .records import write_atomically

PREFIX_BATCH = 16  # images a pass when latencies are measured: the window's usual group


class FamilyError(ValueError):
    """A family is absent, incomplete, damaged, or belongs to another network; the message names the file."""


class SubnetFacts(BaseModel):
    """What is known of a subnet. Relative figures are ratios to subnet 0, the original."""

    model_config = ConfigDict(extra="forbid")

    file: Optional[str]  # None for the original: its weights are the backbone's
    sha256: Optional[str]
    width: float
    depth: float
    resolution: int
    removed: tuple[str, ...]  # blocks left out
    relative_macs: float
    relative_latency: Optional[float] = None  # batch of PREFIX_BATCH, eager; None until measured
    fidelity: Optional[float] = None  # mean cosine of centred latents with the original's, held-out cloud images
    cosine: Optional[float] = None  # the same, not centred


class Manifest(BaseModel):
    """manifest.json of a family."""

    model_config = ConfigDict(extra="forbid")

    backbone: str
    weights_fingerprint: str
    cut: str
    resolution: int
    latency_device: Optional[str] = None
    subnets: tuple[SubnetFacts, ...]
    provenance: dict[str, Any]


@dataclass
class Family:
    """The original prefix and its subnets, from dear to cheap.

    Attributes:
        manifest: facts of each member, in order; the first is the original.
        networks: as many modules, uint8 images (B, 3, H, W) to latents of the original's shape; frozen.
    """

    manifest: Manifest
    networks: list[nn.Module]

    @property
    def relative_macs(self) -> list[float]:
        return [facts.relative_macs for facts in self.manifest.subnets]

    def __len__(self) -> int:
        return len(self.networks)


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


# ---------------------------------------------------------------------------------------------------------- cutting


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


def cut_subnet(prefix: nn.Sequential, spec: SubnetSpec, images: Tensor) -> tuple[nn.Sequential, tuple[str, ...]]:
    """Cut a subnet out of a prefix: lower resolution, fewer blocks, fewer channels; not aligned yet.

    Blocks: those go first whose removal changes the latents least on `images`. Channels: Torch-Pruning's group
    magnitude (Fang et al. 2023), the same ratio in every layer, multiples of eight, the latents' own channels kept.

    Args:
        prefix: the original; stays untouched.
        spec: what to keep.
        images: uint8, shape (B, 3, H, W), with which blocks are compared.

    Returns:
        The subnet, uint8 images to latents of the original's shape, in evaluation mode, and the blocks removed.

    Raises:
        ValueError: `spec.without` names a block that cannot be removed.
    """
    with torch.no_grad():
        latents = prefix(images)
    subnet = copy.deepcopy(prefix)
    if spec.resolution is not None:
        subnet.input.resolution = spec.resolution
    candidates = removable_blocks(prefix)
    unknown = sorted(set(spec.without) - set(candidates))
    if unknown:
        raise ValueError(f"subnet without {unknown[0]!r}: blocks that can be removed: {', '.join(candidates)}")
    removed = list(spec.without)
    wanted = round((1 - spec.depth) * len(candidates))
    for _ in range(min(wanted, len(candidates) - len(removed))):
        removed.append(_least_needed(prefix, candidates, removed, images, latents))
    kept = [(name, block) for name, block in subnet.named_children() if name not in removed]
    subnet = nn.Sequential(OrderedDict(kept))
    if spec.width < 1:
        _prune_channels(subnet, 1 - spec.width, images[:2])
    if latents.dim() > 2:
        subnet.add_module("match", MatchLatents(latents.shape[1:]))
    return subnet.requires_grad_(False).eval(), tuple(removed)


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


def _prune_channels(subnet: nn.Sequential, ratio: float, images: Tensor) -> None:
    import torch_pruning

    subnet.requires_grad_(True)  # Torch-Pruning follows the autograd graph
    body = nn.Sequential(*[block for block in subnet if not isinstance(block, Input)])
    example = subnet.input(images)
    probe = _Probe(body(example)).to(images.device)
    network = nn.Sequential(body, probe)
    graph = torch_pruning.DependencyGraph().build_dependency(network, example)
    kept = [probe.layer]
    for group in graph.get_all_groups(ignored_layers=[probe.layer]):
        modules = [dependency.target.module for dependency, _ in group]
        # the latents' channels must stay; in a transformer only the hidden layer of each MLP may shrink
        if probe.layer in modules or _is_token_stream(subnet, modules):
            kept.append(modules[0])
    torch_pruning.MetaPruner(
        network, example, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2), pruning_ratio=ratio,
        ignored_layers=kept, round_to=8,
    ).step()


def _is_token_stream(subnet: nn.Sequential, modules: list[nn.Module]) -> bool:
    if not any(isinstance(block, TokenEmbedding) for block in subnet):
        return False
    hidden = {block.mlp.fc1 for block in subnet if hasattr(block, "mlp")}
    return modules[0] not in hidden


# --------------------------------------------------------------------------------------------------------- measuring


def latents_of(network: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """Latents of many uint8 images, computed without gradients, shape (N, ...), on the images' device."""
    with torch.inference_mode():
        return torch.cat([network(batch) for batch in images.split(batch_size)])


def fidelity(latents: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """How near a subnet's latents are to the original's.

    Args:
        latents, original: shape (N, ...), of the same images.

    Returns:
        (centred, plain), each of shape (N,): cosine similarities with and without subtracting the original's mean
        latent. Pooled ReLU latents share a large mean, which alone makes the plain cosine high.
    """
    mean = original.mean(0, keepdim=True)
    centred = functional.cosine_similarity((latents - mean).flatten(1), (original - mean).flatten(1))
    return centred, functional.cosine_similarity(latents.flatten(1), original.flatten(1))


def measure_latencies(family: Family, images: Tensor) -> Family:
    """The family with each member's latency, relative to the original's, measured on this device.

    Args:
        family: stays untouched.
        images: uint8, shape (PREFIX_BATCH, 3, H, W), on the device.
    """
    from .engines import prepare
    from .records import processor_name

    runners = [prepare(network, "eager", images) for network in family.networks]
    rounds = [[costs.latency(runner, images, repeats=5) for runner in runners] for _ in range(3)]
    seconds = [sorted(member)[1] for member in zip(*rounds)]  # rounds in turn: slow drifts hit all members alike
    facts = tuple(
        facts.model_copy(update={"relative_latency": round(value / seconds[0], 4)})
        for facts, value in zip(family.manifest.subnets, seconds)
    )
    device = f"{processor_name()}, {torch.get_num_threads()} threads" if images.device.type == "cpu" else "cuda"
    manifest = family.manifest.model_copy(update={"subnets": facts, "latency_device": device})
    return Family(manifest, family.networks)


def facts_of(
    network: nn.Module, removed: tuple[str, ...], spec: SubnetSpec, backbone: Backbone, original_macs: float
) -> SubnetFacts:
    """Facts of a member that follow from its structure."""
    return SubnetFacts(
        file=None, sha256=None, width=spec.width, depth=spec.depth, resolution=spec.resolution or backbone.resolution,
        removed=removed, relative_macs=costs.macs(network, backbone.example().to(_device(network))) / original_macs,
    )


def _device(network: nn.Module) -> torch.device:
    return next(network.buffers()).device


# ---------------------------------------------------------------------------------------------- saving and loading


def save_family(family: Family, folder: Path) -> None:
    """Save the members as float16 safetensors, one file a subnet, beside manifest.json.

    The folder appears whole or not at all; files of an older family in it are replaced.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        facts = [family.manifest.subnets[0]]
        for index, (member, network) in enumerate(zip(family.manifest.subnets[1:], family.networks[1:]), start=1):
            file = staged / f"subnet_{index}.safetensors"
            tensors = {
                key: value.detach().cpu().half().contiguous()
                for key, value in network.state_dict().items()
                if value.is_floating_point()
            }
            save_file(tensors, file)
            file.chmod(0o644)  # the library makes files that only their owner can read
            facts.append(member.model_copy(update={"file": file.name, "sha256": _sha256(file)}))
        write_manifest(family.manifest.model_copy(update={"subnets": tuple(facts)}), staged)
        for other in folder.glob("*") if folder.is_dir() else ():
            if other.name not in {path.name for path in staged.iterdir()} and not other.name.startswith("subnet_"):
                shutil.copy2(other, staged / other.name)
        staged.chmod(0o755)
        if folder.is_dir():
            shutil.rmtree(folder)
        staged.rename(folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write manifest.json into a family's folder, whole or not at all."""
    write_atomically(folder / "manifest.json", json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read a family's manifest.

    Raises:
        FamilyError: absent or not valid.
    """
    path = folder / "manifest.json"
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FamilyError(f"{path}: no family here ({error.strerror})") from error
    except ValidationError as error:
        raise FamilyError(f"{path}: not a valid manifest: {error}") from error
    if not manifest.subnets or any(facts.file is None for facts in manifest.subnets[1:]):
        raise FamilyError(f"{path}: not a valid manifest: a subnet without a file")
    return manifest


def load_family(folder: Path, backbone: Backbone, cut: str) -> Family:
    """Load a family, checked against the backbone it shall approximate.

    Raises:
        FamilyError: it belongs to other weights, another cut or resolution, or a file is absent or damaged.
    """
    manifest = read_manifest(folder)
    asked = {"backbone": backbone.name, "weights_fingerprint": backbone.fingerprint, "cut": cut,
             "resolution": backbone.resolution}
    for key, value in asked.items():
        if getattr(manifest, key) != value:
            raise FamilyError(
                f"{folder}: made for {key} {getattr(manifest, key)}, not {value}; generate a family for this network "
                "(cloud.family=generate), or set cloud.family=auto"
            )
    prefix, _ = backbone.cut(cut)
    networks: list[nn.Module] = [prefix]
    for facts in manifest.subnets[1:]:
        file = folder / facts.file
        if not file.is_file():
            raise FamilyError(f"{file}: no such file, though the manifest names it")
        if _sha256(file) != facts.sha256:
            raise FamilyError(f"{file}: damaged, its hash is not the manifest's")
        networks.append(_rebuild(prefix, facts, file, backbone))
    return Family(manifest, networks)


def _rebuild(prefix: nn.Sequential, facts: SubnetFacts, file: Path, backbone: Backbone) -> nn.Module:
    """The original's structure, with every layer resized to the shapes of the tensors in the file."""
    try:
        tensors = {key: value.float() for key, value in load_file(file).items()}
    except SafetensorError as error:
        raise FamilyError(f"{file}: not a safetensors file ({error})") from error
    subnet = copy.deepcopy(prefix)
    subnet = nn.Sequential(
        OrderedDict((name, block) for name, block in subnet.named_children() if name not in facts.removed)
    )
    subnet.input.resolution = facts.resolution
    for name, module in subnet.named_modules():
        for key, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            stored = tensors.pop(f"{name}.{key}", None)
            if stored is None and old.is_floating_point() and key not in module._non_persistent_buffers_set:
                raise FamilyError(f"{file}: tensor {name}.{key} is missing")
            if stored is not None and stored.dim() != old.dim():
                raise FamilyError(f"{file}: tensor {name}.{key} has {stored.dim()} dimensions, not {old.dim()}")
            if stored is not None:
                old.data = stored
        _match_attributes(module)
    if tensors:
        raise FamilyError(f"{file}: unknown tensor {sorted(tensors)[0]!r}")
    with torch.no_grad():
        wanted = prefix(backbone.example()).shape
        if len(wanted) > 2:
            subnet.add_module("match", MatchLatents(wanted[1:]))
        if subnet(backbone.example()).shape != wanted:
            raise FamilyError(f"{file}: its latents do not have the original's shape {tuple(wanted[1:])}")
    return subnet.requires_grad_(False).eval()


def _match_attributes(module: nn.Module) -> None:
    """A layer's own notes of its size, brought in line with its tensors."""
    if isinstance(module, nn.Conv2d):
        depthwise = module.groups > 1 and module.groups == module.in_channels
        module.out_channels = module.weight.shape[0]
        module.groups = module.out_channels if depthwise else module.groups
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = module.weight.shape[0]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
