"""A family of subnets, cheaper approximations of a frozen prefix: facts, measurements, saving and loading."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from . import costs
from .backbones import Backbone, load_backbone
from .config import Study, SubnetSpec
from .cutting import Cut, LatentMap, MatchLatents, first_convolution, set_stem_stride, shared_tensors, tie
from .records import write_atomically

LATENCY_ROUNDS = 9
PREFIX_BATCH = 16  # images a pass when latencies are measured: the window's usual group


class FamilyError(ValueError):
    """A family is absent, incomplete, damaged, or belongs to another network; the message names the file."""


class SubnetFacts(BaseModel):
    """What is known of a subnet. Relative figures are ratios to subnet 0, the original."""

    model_config = ConfigDict(extra="forbid")

    file: Optional[str]  # None for the original: its weights are the backbone's
    sha256: Optional[str]
    width: float
    widths: dict[str, float] = {}  # of blocks whose names begin so, where they differ
    depth: float
    resolution: int
    stem_stride: Optional[int] = None  # of the first convolution; None: the backbone's
    removed: tuple[str, ...]  # blocks left out
    shared: tuple[str, ...] = ()  # blocks whose dense convolutions are another subnet's, and not in this one's file
    shares_with: Optional[int] = None  # that subnet's index, lower than its own; 0 is the original
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


# --------------------------------------------------------------------------------------------------------- measuring


def latents_of(network: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """Latents of many uint8 images, computed without gradients, shape (N, ...), on the images' device."""
    with torch.inference_mode():
        return torch.cat([network(batch) for batch in images.split(batch_size)])


def fidelity(latents: Tensor, original: Tensor, centre: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """How near a subnet's latents are to the original's.

    Args:
        latents, original: shape (N, ...), of the same images.
        centre: shape (1, ...): the original's mean latent on public images; default: that of these images.

    Returns:
        (centred, plain), each of shape (N,): cosine similarities with and without subtracting the original's mean
        latent. Pooled ReLU latents share a large mean, which alone makes the plain cosine high.
    """
    mean = original.mean(0, keepdim=True) if centre is None else centre
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
    ratios = []
    for _ in range(LATENCY_ROUNDS):  # all in turn, each against the original of its round: slow drifts hit all alike
        seconds = [costs.latency(runner, images, repeats=3) for runner in runners]
        ratios.append([value / seconds[0] for value in seconds])
    relative = torch.tensor(ratios).median(0).values.tolist()
    facts = tuple(
        facts.model_copy(update={"relative_latency": round(value, 4)})
        for facts, value in zip(family.manifest.subnets, relative)
    )
    device = f"{processor_name()}, {torch.get_num_threads()} threads" if images.device.type == "cpu" else "cuda"
    manifest = family.manifest.model_copy(update={"subnets": facts, "latency_device": device})
    return Family(manifest, family.networks)


def measured_here(study: Study, folder: Path) -> Manifest:
    """The manifest of a family of the study's backbone, with latencies as this process measures them.

    It is not in the commands' module, since a fresh process cannot find what is in a package's `__main__`.

    Args:
        study: says which backbone, and how many threads.
        folder: the family's; stays as it is.

    Raises:
        FamilyError, WeightsError: it cannot be loaded.
    """
    torch.set_num_threads(study.training.threads or torch.get_num_threads())
    backbone = load_backbone(study.backbone)
    family = load_family(folder, backbone, read_manifest(folder).cut)
    return measure_latencies(family, backbone.example(PREFIX_BATCH)).manifest


def make_family(backbone: Backbone, cut: str, prefix: nn.Module, cuts: Sequence[Cut], provenance: dict) -> Family:
    """A family of the original and the subnets cut out of it, from dear to cheap; nothing measured yet.

    Args:
        backbone: what the prefix is of.
        cut: name of the block before which the prefix ends.
        prefix: the original.
        cuts: its subnets, in any order.
        provenance: where the family comes from, for the manifest.
    """
    example = backbone.example().to(next(prefix.buffers()).device)
    macs = {id(network): costs.macs(network, example) for network in (prefix, *(cut.network for cut in cuts))}
    original = Cut(SubnetSpec(), prefix, ())  # first even if a subnet of a larger image is dearer
    cuts = _led_by_the_dearest([original, *sorted(cuts, key=lambda cut: -macs[id(cut.network)])])
    networks = [cut.network.requires_grad_(False) for cut in cuts]
    places = {id(network): place for place, network in enumerate(networks)}
    facts = tuple(
        _facts(cut, backbone, macs[id(cut.network)] / macs[id(prefix)], places.get(id(cut.leader))) for cut in cuts
    )
    manifest = Manifest(
        backbone=backbone.name, weights_fingerprint=backbone.fingerprint, cut=cut, resolution=backbone.resolution,
        subnets=facts, provenance=provenance,
    )
    return Family(manifest, networks)


def _facts(cut: Cut, backbone: Backbone, relative_macs: float, shares_with: Optional[int]) -> SubnetFacts:
    return SubnetFacts(
        file=None, sha256=None, width=cut.spec.width, widths=cut.spec.widths, depth=cut.spec.depth,
        resolution=cut.spec.resolution or backbone.resolution,
        stem_stride=next(iter(cut.spec.stem_strides), None), removed=cut.removed, shared=cut.shared,
        shares_with=shares_with, relative_macs=relative_macs,
    )


def in_common(family: Family, index: int) -> tuple[int, tuple[str, ...]]:
    """What a subnet that is added beside another one would share: the index of the leader, and the blocks.

    Args:
        family: stays untouched.
        index: of a subnet; what it has in common with its own leader, or with those it leads, or, if it stands alone,
            all dense convolutions.

    Raises:
        ValueError: there is no such subnet, or it is the original.
    """
    _refuse_unknown(family, index)
    members = family.manifest.subnets
    if members[index].shares_with:
        return members[index].shares_with, members[index].shared
    led = next((facts.shared for facts in members if facts.shares_with == index), None)
    return index, led or tuple(name for name, _ in family.networks[index].named_children())


def _refuse_unknown(family: Family, index: int) -> None:
    if not 0 < index < len(family):
        raise ValueError(f"no subnet {index} in the family: its subnets are 1 to {len(family) - 1}")


def extended(family: Family, cuts: Sequence[Cut], replaced: Sequence[int], backbone: Backbone) -> Family:
    """A family with more subnets, whose own ones stay as they are but for their places.

    Args:
        family: stays untouched; on the CPU.
        cuts: to be added; each one's leader is a network of the family, and its weights in `shared` are the leader's.
        replaced: indices of subnets that are left out.
        backbone: what the family is of.

    Raises:
        ValueError: one that is left out is not there or leads others, or one that is added is no cheaper than its
            leader.
    """
    members, example = family.manifest.subnets, backbone.example()
    for index in replaced:
        _refuse_unknown(family, index)
    left = [index for index in range(len(members)) if index not in replaced]
    leaders = {members[index].shares_with for index in left} | {family.networks.index(cut.leader) for cut in cuts}
    for index in replaced:
        if index in leaders:
            raise ValueError(f"subnet {index} cannot be left out: its file has layers that others share with it")
    original = costs.macs(family.networks[0], example)
    entries = [(members[index], family.networks[index], members[index].shares_with) for index in left]
    for cut in cuts:
        leader = family.networks.index(cut.leader)
        relative_macs = costs.macs(cut.network, example) / original
        if relative_macs >= members[leader].relative_macs:
            raise ValueError(
                f"at {relative_macs:.3f} of the original's MACs a subnet is no cheaper than subnet {leader} "
                f"({members[leader].relative_macs:.3f}), whose layers it would share: give a smaller side"
            )
        entries.append((_facts(cut, backbone, relative_macs, leader), cut.network, leader))
    entries[1:] = sorted(entries[1:], key=lambda entry: -entry[0].relative_macs)  # the original stays the first
    places = {index: [id(network) for _, network, _ in entries].index(id(family.networks[index])) for index in left}
    facts = tuple(
        facts.model_copy(update={"shares_with": None if leader is None else places[leader]})
        for facts, _, leader in entries
    )
    return Family(family.manifest.model_copy(update={"subnets": facts}), [network for _, network, _ in entries])


def _led_by_the_dearest(cuts: Sequence[Cut]) -> list[Cut]:
    """Sets whose first member is its leader: the others' files lack what is in common, and come after."""
    sets: dict[int, list[Cut]] = {}
    for cut in cuts:
        sets.setdefault(id(cut.leader or cut.network), []).append(cut)
    leads = {}
    for first, *others in sets.values():
        common = first.shared or next((other.shared for other in others), ())
        leads[id(first.network)] = replace(first, leader=None, shared=())
        for other in others:
            leads[id(other.network)] = replace(other, leader=first.network, shared=other.shared or common)
    return [leads[id(cut.network)] for cut in cuts]


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
            shared = shared_tensors(network, member.shared)
            tensors = {
                key: value.detach().cpu().half().contiguous()
                for key, value in network.state_dict().items()
                if value.is_floating_point() and key not in shared
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
        if facts.shares_with is not None and not 0 <= facts.shares_with < len(networks):
            raise FamilyError(f"{folder}: {facts.file} shares with subnet {facts.shares_with}, which is not before it")
        networks.append(_rebuild(networks[facts.shares_with or 0], facts, file, backbone, prefix))
    return Family(manifest, networks)


def _rebuild(
    leader: nn.Sequential, facts: SubnetFacts, file: Path, backbone: Backbone, prefix: nn.Sequential
) -> nn.Module:
    """The structure of the network it shares with, or the original's, each layer resized to the file's tensors."""
    try:
        tensors = {key: value.float() for key, value in load_file(file).items()}
    except SafetensorError as error:
        raise FamilyError(f"{file}: not a safetensors file ({error})") from error
    kept = [(name, block) for name, block in leader.named_children() if name not in facts.removed]
    subnet = copy.deepcopy(nn.Sequential(OrderedDict(kept)))
    if "map.up.weight" in tensors and not hasattr(subnet, "map"):
        subnet.add_module("map", LatentMap(*tensors["map.up.weight"].shape))
    subnet.input = subnet.input.at(facts.resolution)
    if facts.stem_stride is not None:
        set_stem_stride(subnet, facts.stem_stride)
    else:  # not that of the subnet it shares with
        first_convolution(subnet).stride = first_convolution(prefix).stride
    shared = shared_tensors(subnet, facts.shared)
    tie(subnet, leader, shared)
    for name, module in subnet.named_modules():
        for key, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            stored = tensors.pop(f"{name}.{key}", None)
            needed = old.is_floating_point() and key not in module._non_persistent_buffers_set
            if stored is None and needed and f"{name}.{key}" not in shared:
                raise FamilyError(f"{file}: tensor {name}.{key} is missing")
            if stored is not None and stored.dim() != old.dim():
                raise FamilyError(f"{file}: tensor {name}.{key} has {stored.dim()} dimensions, not {old.dim()}")
            if stored is not None and f"{name}.{key}" in shared:
                raise FamilyError(f"{file}: tensor {name}.{key} is shared, so it must not be here")
            if stored is not None:
                old.data = stored
        _match_attributes(module)
    if tensors:
        raise FamilyError(f"{file}: unknown tensor {sorted(tensors)[0]!r}")
    with torch.no_grad():
        wanted = prefix(backbone.example()).shape
        if len(wanted) > 2 and not hasattr(subnet, "match"):
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
        kernel = tuple(module.weight.shape[2:])
        if kernel != module.kernel_size:
            module.kernel_size, module.padding = kernel, tuple(side // 2 for side in kernel)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = module.weight.shape[0]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
