"""The cloud side as a whole: backbone, family and router of a study, made once and found again."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import pandas as pd
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from . import costs, records
from .alignment import align
from .backbones import Backbone, load_backbone, take_apart
from .config import CloudConfig, Study, SubnetSpec, build_folder, project_root
from .cutting import Cut, cut_set, cut_sibling, one_a_side
from .data import CloudImages, load_cloud
from .embedded import SmallResNet
from .pet import cut_of
from .router import Router, load_router, member_losses, save_router, train_router
from .subnets import (
    PREFIX_BATCH,
    Family,
    FamilyError,
    extended,
    fidelity,
    in_common,
    latents_of,
    load_family,
    make_family,
    measure_latencies,
    read_manifest,
    save_family,
)

ROUTER_IMAGES = 10_000  # public images that the router learns from, at most


def obtain_backbone(study: Study) -> Backbone:
    """The study's backbone; the embedded one is pretrained on rendered characters if that was not done before."""
    config = study.backbone
    if config.name == "embedded" and config.weights == "auto":
        parts = {"seed": study.seed, "resolution": config.resolution, "images": study.cloud.images,
                 "held_out": study.cloud.held_out, "epochs": study.cloud.backbone_epochs}
        path = build_folder() / "backbones" / f"embedded-{_digest(parts)}.safetensors"
        if not path.is_file():
            _save_weights(pretrain(load_cloud(study), study), path)
        config = config.model_copy(update={"weights": str(path)})
    return load_backbone(config)


def pretrain(images: CloudImages, study: Study) -> SmallResNet:
    """Train the embedded backbone to read the characters; prints its accuracy on those held out."""
    torch.manual_seed(study.seed)
    model = SmallResNet()
    blocks = take_apart(model, "embedded", study.backbone.resolution).blocks.requires_grad_(True)
    blocks.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(study.seed)
    count, size = len(images.train), min(64, len(images.train))
    steps = study.cloud.backbone_epochs * (count // size)
    optimizer = torch.optim.AdamW(blocks.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.2 + 1e-9)
    blocks.train()
    bar = tqdm(total=steps, desc="pretraining the backbone")
    for _ in range(study.cloud.backbone_epochs):
        order = torch.randperm(count, generator=generator)[: count // size * size]
        for chosen in order.split(size):
            loss = functional.cross_entropy(blocks(images.train[chosen]), images.train_labels[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            bar.update()
    bar.close()
    blocks.requires_grad_(False).eval()
    return model


def family_folder(study: Study, backbone: Backbone) -> Path:
    """Where the study's family lies or will lie.

    Raises:
        FamilyError: `cloud.family` names a folder without a family.
    """
    choice = study.cloud.family
    if choice == "auto":
        shipped = project_root() / "params" / "families" / backbone.name
        if (shipped / "manifest.json").is_file():
            manifest = read_manifest(shipped)
            cut = cut_of(backbone, study.pet)
            if (manifest.weights_fingerprint, manifest.cut, manifest.resolution) == (
                backbone.fingerprint, cut, backbone.resolution,
            ):
                return shipped
    elif choice != "generate":
        for folder in (Path(choice).expanduser(), project_root() / "params" / "families" / choice):
            if (folder / "manifest.json").is_file():
                return folder
        raise FamilyError(f"cloud.family: {choice}: neither a folder with a manifest.json nor one of params/families")
    parts = {"seed": study.seed, "weights": backbone.fingerprint, "backbone": study.backbone.model_dump(mode="json"),
             "pet": study.pet.model_dump(mode="json"), "cloud": study.cloud.model_dump(mode="json"),
             "router": study.router.model_dump(mode="json")}
    return build_folder() / "families" / f"{backbone.name}-{_digest(parts)}"


def obtain_family(study: Study, backbone: Backbone) -> Family:
    """The study's family, loaded; generated first where the study asks for that and it was not done before."""
    folder = family_folder(study, backbone)
    if not (folder / "manifest.json").is_file():
        if study.cloud.family == "auto":
            family = free_family(study, backbone)
        else:
            family, history = generate_family(study, backbone, load_cloud(study))
            records.write_table(folder / "alignment.csv", history)
        save_family(family, folder)
    return load_family(folder, backbone, cut_of(backbone, study.pet))


def free_family(study: Study, backbone: Backbone) -> Family:
    """The free rival: the original's own weights at lower resolutions, nothing pruned, nothing aligned."""
    prefix, _ = backbone.cut(cut_of(backbone, study.pet))
    shares = (0.75, 0.625, 0.5, 0.375)
    step = backbone.resolution_step
    specs = [SubnetSpec(resolution=max(16, round(share * backbone.resolution / step) * step)) for share in shares]
    cuts = [cut for spec in specs for cut in cut_set(prefix, spec, backbone.example(2))]
    family = make_family(backbone, cut_of(backbone, study.pet), prefix, cuts, {"alignment": "none"})
    return measure_latencies(family, backbone.example(PREFIX_BATCH))


def generate_family(
    study: Study, backbone: Backbone, images: CloudImages, checkpoint: Optional[Path] = None
) -> tuple[Family, pd.DataFrame]:
    """Prune, align and measure a family.

    Args:
        study, backbone, images: the cloud side's parameters, the original, its public images.
        checkpoint: file that keeps the alignment's state, from which a killed run goes on.

    Returns:
        The family (on the CPU, from dear to cheap, latencies measured on this machine's CPU) and the alignment's
        history as `align` gives it.
    """
    config, device, started = study.cloud, _cloud_device(study), records.provenance()
    original, tail = (copy.deepcopy(part).to(device) for part in backbone.cut(cut_of(backbone, study.pet)))
    sample = _spread(images.train, 64).to(device)
    cuts = [cut for spec in config.subnets for cut in cut_set(original, spec, sample, config)]
    history = align(
        [cut.network for cut in cuts], original, tail, images.train, backbone.resolution, config, study.seed,
        checkpoint, [cut.every for cut in cuts],
    )
    provenance = _provenance(study, started, images) | _throughput(history, original, cuts, sample[:1], device)
    family = make_family(backbone, cut_of(backbone, study.pet), original, cuts, provenance)
    return _measured(family, images, device), history


def extend_family(
    study: Study, backbone: Backbone, images: CloudImages, family: Family, like: int, replaced: Sequence[int] = (),
    checkpoint: Optional[Path] = None,
) -> tuple[Family, pd.DataFrame]:
    """Add subnets to a family that is there already, whose own ones stay as they are.

    Each begins as a copy of one of them at another side, stride or kernel (`cloud.subnets`). What that one has in
    common with others of its set, or of it what `common` names, stays as it is, aligned for them; the rest is aligned.

    Args:
        study, backbone, images, checkpoint: as for `generate_family`.
        family: loaded, on the CPU; stays untouched.
        like: index of the subnet that the new ones are copies of at first.
        replaced: indices of subnets that they take the place of.

    Returns:
        As `generate_family`. Latencies and fidelities of all members are measured anew, so that they are of one
        machine and of the same images.

    Raises:
        ValueError: `like` or `replaced` does not fit the family, or `cloud.subnets` asks for other channels or blocks.
    """
    config, device, started = study.cloud, _cloud_device(study), records.provenance()
    original, tail = (copy.deepcopy(part).to(device) for part in backbone.cut(family.manifest.cut))
    leader, blocks = in_common(family, like)
    facts, cuts = family.manifest.subnets[like], []
    inherited = {"width": facts.width, "widths": facts.widths, "depth": facts.depth, "resolution": facts.resolution,
                 "stem_strides": (facts.stem_stride,) if facts.stem_stride else ()}
    for spec in config.subnets:
        common = tuple(block for block in blocks if block.startswith(spec.common or ("",)))
        if not common:
            raise ValueError(f"common: {', '.join(spec.common)}; what there can be in common: {', '.join(blocks)}")
        for side in one_a_side(spec):
            sibling = cut_sibling(family.networks[like], side, common)
            whole = SubnetSpec.model_validate(inherited | side.model_dump(exclude_defaults=True))
            cuts.append(Cut(whole, sibling, facts.removed, family.networks[leader], common))
    extended(family, cuts, replaced, backbone)  # what does not fit is said before the work
    history = align(
        [cut.network for cut in cuts], original, tail, images.train, backbone.resolution, config, study.seed, checkpoint
    )
    added = {"like": like, "replaced": list(replaced)} | _provenance(study, started, images)
    added |= _throughput(history, original, cuts, _spread(images.train, 1).to(device), device)
    for cut in cuts:
        cut.network.cpu().requires_grad_(False)
    family = extended(family, cuts, replaced, backbone)
    before = family.manifest.provenance
    provenance = before | {"extensions": [*before.get("extensions", []), added]}
    family = Family(family.manifest.model_copy(update={"provenance": provenance}), family.networks)
    return _measured(family, images, device), history


def _cloud_device(study: Study) -> torch.device:
    """The device that the study names; under torchrun each process has its own GPU."""
    device = torch.device(study.cloud.device)
    return PartialState().device if device.type == "cuda" else device


def _provenance(study: Study, started: dict, images: CloudImages) -> dict:
    config = study.cloud
    on_gpu = torch.device(config.device).type == "cuda"
    return {
        **started, "study": study.name, "steps": config.steps, "batch_size": config.batch_size,
        "images": len(images.train), "held_out": len(images.held_out),
        "device": torch.cuda.get_device_name() if on_gpu else records.processor_name(),
        "devices": PartialState().num_processes,
    }


def _measured(family: Family, images: CloudImages, device: torch.device) -> Family:
    """The family on the CPU, with fidelities measured on the device and latencies on the CPU."""
    for network in family.networks:
        network.to(device)
    family = with_fidelity(family, images.held_out.to(device))
    for network in family.networks:
        network.cpu()
    return measure_latencies(family, images.held_out[:PREFIX_BATCH]) if PartialState().is_main_process else family


def try_out(study: Study, backbone: Backbone, images: CloudImages, config: CloudConfig) -> pd.DataFrame:
    """Cut subnets and align them for a while, keeping nothing: what a change of the cloud side's parameters brings.

    Args:
        study, backbone, images: as for `generate_family`.
        config: takes the place of the study's `cloud`.

    Returns:
        A row a subnet in the order of `config.subnets`; columns relative_macs, and the fidelity on the held-out images
        right after cutting (`cut`) and after alignment (`aligned`).
    """
    device = torch.device(config.device)
    original, tail = (copy.deepcopy(part).to(device) for part in backbone.cut(cut_of(backbone, study.pet)))
    held_out = images.held_out.to(device)
    sample = _spread(images.train, 64).to(device)
    cuts = [cut for spec in config.subnets for cut in cut_set(original, spec, sample, config)]
    networks = [cut.network for cut in cuts]
    wanted, example = latents_of(original, held_out), backbone.example().to(device)

    def reached() -> list[float]:
        return [fidelity(latents_of(network, held_out), wanted)[0].mean().item() for network in networks]

    table = {"relative_macs": [costs.macs(network, example) for network in networks], "cut": reached()}
    align(
        networks, original, tail, images.train, backbone.resolution, config, study.seed,
        every=[cut.every for cut in cuts],
    )
    table = pd.DataFrame(table | {"aligned": reached()})
    return table.assign(relative_macs=table["relative_macs"] / costs.macs(original, example))


def _spread(images: Tensor, count: int) -> Tensor:
    """At most so many images, at equal steps from the first on: a folder's images can be sorted by class."""
    return images[:: max(1, len(images) // count)][:count]


def _throughput(
    history: pd.DataFrame, original: nn.Module, cuts: Sequence[Cut], example: Tensor, device: torch.device
) -> dict:
    """Seconds of the alignment, images a second, and what share of the GPU's peak that means."""
    if not len(history):
        return {"alignment_seconds": 0.0}
    images_per_second = float(history["images_per_second"].median())
    facts = {"alignment_seconds": round(float(history["seconds"].max()), 1),
             "images_per_second": round(images_per_second)}
    if device.type == "cuda":
        # a forward pass of the original; forward, gradient of the weights and of the input for each member
        macs = costs.macs(original, example)
        macs += 3 * sum(costs.macs(cut.network, example) / cut.every for cut in cuts)
        processes = PartialState().num_processes
        facts["share_of_peak"] = round(2 * macs * images_per_second / processes / costs.peak_flops(device), 4)
    return facts


def with_fidelity(family: Family, held_out: Tensor) -> Family:
    """The family with each member's fidelity on held-out public images, uint8 (M, 3, R, R), on the members' device."""
    original = latents_of(family.networks[0], held_out)
    facts = []
    for member, network in zip(family.manifest.subnets, family.networks):
        centred, plain = fidelity(latents_of(network, held_out), original)
        facts.append(member.model_copy(
            update={"fidelity": round(centred.mean().item(), 4), "cosine": round(plain.mean().item(), 4)}
        ))
    return Family(family.manifest.model_copy(update={"subnets": tuple(facts)}), family.networks)


def obtain_router(study: Study, backbone: Backbone, family: Family) -> Router:
    """The router of the study's family; trained first if the family has none."""
    folder = family_folder(study, backbone)
    if not (folder / "router.safetensors").is_file():
        save_router(learn_router(study, backbone, family, load_cloud(study).train), study.router, folder)
    return load_router(folder)


def learn_router(study: Study, backbone: Backbone, family: Family, public: Tensor) -> Router:
    """Train a router for a family on public images, uint8 (N, 3, S, S), on the cloud side's device."""
    device = torch.device(study.cloud.device)
    chosen = torch.linspace(0, len(public) - 1, min(len(public), ROUTER_IMAGES)).long()  # of all folders alike
    whole = [_whole(public[part], backbone.resolution) for part in chosen.split(256)]
    latents = []
    for network in family.networks:
        network = copy.deepcopy(network).to(device)
        latents.append(torch.cat([latents_of(network, batch.to(device)).cpu() for batch in whole]))
    _, tail = backbone.cut(family.manifest.cut)
    return train_router(torch.cat(whole), member_losses(latents, tail), family.relative_macs, study.router, study.seed)


def _whole(images: Tensor, resolution: int) -> Tensor:
    if images.shape[-1] == resolution:
        return images
    return functional.interpolate(images, (resolution, resolution), mode="bilinear", antialias=True)


def _save_weights(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, partial)
    partial.replace(path)


def _digest(parts: dict) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
