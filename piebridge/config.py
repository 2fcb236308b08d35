"""A study: every parameter of an experiment, its type, unit, range and default, in one place.

A study is a YAML file in `params/` that holds only its differences from the defaults below. An unknown key, a wrong
type or a value out of range is a `StudyError` that names the key and says what would be right.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator


class StudyError(ValueError):
    """A study cannot be read or holds something it must not; the message names the file and the key."""


class Section(BaseModel):
    """A part of a study: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class DataConfig(Section):
    """The target task: which images the device learns from."""

    name: Literal["digits", "caltech101", "caltech256", "dtd", "dogs_vs_cats", "folder"] = Field(
        "digits", description="Data set; `folder` is any folder of one's own photos, one sub-folder a class."
    )
    root: Optional[Path] = Field(
        None, description="Where the data lie; default: the folder that the variable PIEBRIDGE_DATA names."
    )
    download: bool = Field(False, description="Let torchvision download the data set into `root` if it is absent.")
    train_per_class: Optional[PositiveInt] = Field(
        None, description="Images a class for training and validation together; default: all that the split gives."
    )
    test_per_class: Optional[PositiveInt] = Field(
        None, description="At most this many test images a class; default: all the others."
    )
    test_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.3, description="Share of each class tested on, where the data set has no split of its own."
    )
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.17, description="Share of the training images that tuning holds out, class by class."
    )
    on_corrupt: Literal["error", "skip"] = Field(
        "error", description="What to do with an image that cannot be decoded: stop, or leave it out and say so."
    )
    memory_mib: PositiveInt = Field(
        2048, description="Decoded images are kept in memory up to this size (MiB), beyond it in a memory-mapped file."
    )


class BackboneConfig(Section):
    """The pretrained network that is deployed, and the resolution it is used at."""

    name: Literal[
        "embedded", "resnet18", "resnet34", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
        "deit_tiny_patch16_224", "vit_tiny_patch16_224",
    ] = Field("embedded", description="Architecture; `embedded` is the small ResNet that the notebooks pretrain.")
    resolution: Annotated[int, Field(ge=16, le=512)] = Field(32, description="Side of the square input, pixels.")
    weights: str = Field(
        "auto",
        description="`auto` (the file <name>.safetensors in PIEBRIDGE_WEIGHTS if that is set, else the library's own "
        "pretrained weights), `random` (for tests), or the path of a safetensors file.",
    )


class PetConfig(Section):
    """What is trained: the kind of parameter-efficient training decides the cut."""

    kind: Literal["head", "last_k", "adapter", "lora"] = Field("head", description="Trainable module.")
    blocks: PositiveInt = Field(2, description="last_k, adapter, lora: how many of the last blocks are concerned.")
    bottleneck: PositiveInt = Field(32, description="adapter: channels of the bottleneck.")
    rank: PositiveInt = Field(8, description="lora: rank of the update.")


class SubnetSpec(Section):
    """How one subnet differs from the original; 1.0, 1.0 and no resolution is the original itself."""

    width: Annotated[float, Field(ge=0.05, le=1.0)] = Field(1.0, description="Share of channels kept in every layer.")
    widths: dict[str, Annotated[float, Field(ge=0.05, le=1.0)]] = Field(
        {}, description="Other shares of channels for the blocks whose names begin so, e.g. {layer4: 0.25}."
    )
    depth: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        1.0, description="Share kept of the blocks that can be removed; those least needed go first."
    )
    without: tuple[str, ...] = Field((), description="Blocks removed by name, besides those that depth removes.")
    resolution: Optional[Annotated[int, Field(ge=8, le=512)]] = Field(
        None, description="Side of the subnet's input, pixels; default: the backbone's."
    )
    resolutions: tuple[Annotated[int, Field(ge=8, le=512)], ...] = Field(
        (), description="Several sides instead: a subnet for each, which have their dense convolutions in common and "
        "batch norms of their own."
    )
    stem_strides: tuple[Annotated[int, Field(ge=1, le=8)], ...] = Field(
        (), description="Strides of the first convolution, one for each side: a larger one on a larger input sees "
        "finer detail at the same cost. Default: the backbone's."
    )
    stem_kernels: tuple[Annotated[int, Field(ge=1, le=15)], ...] = Field(
        (), description="Sides of the first convolution's kernel, odd, one for each resolution: on a smaller image, or "
        "at a larger stride, a smaller one takes less time; it is not in common. Default: the backbone's."
    )
    common: tuple[str, ...] = Field(
        (), description="resolutions: only the blocks whose names begin so have their convolutions, or their latent "
        "map, in common, for example [layer3, layer4], with most weights and little time; default: all."
    )
    every: tuple[Annotated[int, Field(ge=1, le=100)], ...] = Field(
        (), description="In one of how many steps of alignment a subnet takes part, one for each side: those that take "
        "turns cost less time and leave more of what is in common to the others. Default: in every step."
    )
    latent_map: Annotated[int, Field(ge=0)] = Field(
        0, description="Rank of a linear map that is added to pooled latents, the block `map`, aligned with the rest: "
        "from their number of channels on one full matrix, 0 none."
    )
    shared: tuple[str, ...] = Field(
        (), description="Blocks whose dense convolutions stay the original's, neither aligned nor stored; width 1 only."
    )

    @model_validator(mode="after")
    def _shareable(self) -> SubnetSpec:
        if self.shared and (self.width < 1 or self.widths):
            raise ValueError("shared blocks keep all their channels: give width 1, or leave shared out")
        if "map" in self.shared:
            raise ValueError("shared blocks stay the original's, which has no map: leave map out of shared")
        if self.resolutions and (self.shared or self.resolution is not None):
            raise ValueError("resolutions go neither with resolution nor with shared")
        if self.stem_kernels and self.shared:
            raise ValueError("shared blocks stay the original's, and so do kernels: leave stem_kernels or shared out")
        sides = len(self.resolutions) or 1
        for key in ("stem_strides", "stem_kernels", "every"):
            given = getattr(self, key)
            if given and len(given) != sides:
                raise ValueError(f"{key}: {len(given)} given; give one for each of {sides} sides")
        even = [side for side in self.stem_kernels if side % 2 == 0]
        if even:
            raise ValueError(f"stem_kernels: {even[0]} is even and has no centre; give odd sides")
        if self.common and not self.resolutions:
            raise ValueError("common says what several resolutions have in common: give resolutions, or leave it out")
        return self


class AlignmentLoss(Section):
    """What a subnet's latents are told while they are aligned: weights of the loss's terms."""

    space: Literal["plain", "centred", "whitened"] = Field(
        "centred", description="Where latents are compared: as they are, less the original's mean latent, or also "
        "with the original's covariance made the identity."
    )
    cosine: Annotated[float, Field(ge=0)] = Field(1.0, description="Weight of 1 - cosine similarity.")
    mse: Annotated[float, Field(ge=0)] = Field(1.0, description="Weight of the squared error over the variance.")
    kl: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Weight of the KL divergence of the class probabilities that the original's classifier reads."
    )
    features: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of the squared error of attention maps at the end of each stage."
    )
    frozen_statistics: Share = Field(
        0.2, description="Share of the steps, the last ones, in which batch norm uses its running statistics."
    )


class CloudConfig(Section):
    """The cloud side: public data, subnets, alignment."""

    family: str = Field(
        "generate",
        description="`generate` (prune and align in this study), `auto` (the family shipped in params/families if it "
        "was made for exactly these weights, else full-width members at lower resolutions, which need no alignment), "
        "or the path of a family's folder.",
    )
    data: Union[Literal["characters"], Path, tuple[Path, ...]] = Field(
        "characters",
        description="Public images: `characters` (rendered from fonts), or a folder or several, searched recursively, "
        "of Parquet files with columns image and label or of photos.",
    )
    copies: tuple[PositiveInt, ...] = Field(
        (), description="How many times the training images of each folder in `data` count; default: once."
    )
    images: PositiveInt = Field(8000, description="characters: how many training images are rendered.")
    held_out: PositiveInt = Field(
        1000, description="Images on which fidelity is measured, never trained on: of the files named validation-*, "
        "or else drawn from the first folder."
    )
    backbone_epochs: PositiveInt = Field(4, description="embedded: epochs of pretraining on the characters.")
    subnets: tuple[SubnetSpec, ...] = Field(
        (
            SubnetSpec(width=0.75), SubnetSpec(width=0.75, resolution=24), SubnetSpec(width=0.5),
            SubnetSpec(width=0.5, resolution=24), SubnetSpec(width=0.4, depth=0.5, resolution=24),
        ),
        description="The members of the family besides the original.",
    )
    importance: Literal["magnitude", "taylor"] = Field(
        "magnitude", description="What says which channels are needed: their weights' magnitude, or the first-order "
        "change of the latents of public images without them."
    )
    ratios: Literal["uniform", "global"] = Field(
        "uniform", description="The same share of channels pruned in every layer, or the least important of them all."
    )
    round_to: PositiveInt = Field(8, description="Channel counts are multiples of this: what the processor likes.")
    steps: Annotated[int, Field(ge=0)] = Field(300, description="Alignment steps; 0 leaves the members unaligned.")
    batch_size: PositiveInt = Field(64, description="Images an alignment step.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-3, description="Peak learning rate, one-cycle.")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: dense convolutions and linear layers follow Muon, scaled to AdamW's steps."
    )
    loss: AlignmentLoss = AlignmentLoss()
    device: str = Field(
        "cpu", description="Torch device of the cloud side; under torchrun each process takes a device of this kind."
    )
    crop_area: Annotated[float, Field(gt=0, le=1)] = Field(
        0.7, description="Share of an image that a random crop shows at least while aligning."
    )
    mixed: Share = Field(
        0.0, description="Share of the crops in which a rectangle comes from another image (CutMix without labels)."
    )
    settled_crop_area: Optional[Annotated[float, Field(gt=0, le=1)]] = Field(
        None, description="While batch norm is frozen, at the end, crops show at least this share and none are mixed: "
        "nearer to the whole images of use. Default: crops stay as before."
    )

    @model_validator(mode="after")
    def _a_number_for_each_folder(self) -> CloudConfig:
        folders = len(self.data) if isinstance(self.data, tuple) else 1
        if self.copies and len(self.copies) != folders:
            raise ValueError(f"copies: {len(self.copies)} numbers for {folders} folders in data; give one for each")
        return self


class RouterConfig(Section):
    """The offline-learned router: reads each image once and says how difficult it is."""

    resolution: Annotated[int, Field(ge=8, le=128)] = Field(16, description="Side of the router's small input, pixels.")
    channels: PositiveInt = Field(16, description="Channels of its first convolution; the second has twice as many.")
    steps: PositiveInt = Field(400, description="Training steps on cloud data.")
    batch_size: PositiveInt = Field(128, description="Images a step.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-3, description="Peak learning rate of AdamW, one-cycle.")
    target_cost: Annotated[float, Field(gt=0, le=1)] = Field(
        0.35, description="Mean relative cost that the cost term pulls the routes to."
    )
    cost_weight: Annotated[float, Field(ge=0)] = Field(20.0, description="Weight of the squared gap to target_cost.")


class RoutingConfig(Section):
    """Which prefix an image gets in each epoch on the device."""

    cost: Annotated[float, Field(gt=0, le=1)] = Field(
        0.4, description="Budget: mean cost of a latent relative to the original's, everything counted."
    )
    cached_cost: Annotated[float, Field(gt=0, le=1)] = Field(
        0.6, description="piebridge_cached's budget: cost of all latents relative to one pass of the original."
    )
    costs: Literal["measured", "macs"] = Field(
        "measured", description="Relative costs: latencies, as the family's manifest tells and then as this device "
        "turns out (not for `piebridge_cached`, whose passes are over by then); or the subnets' MACs."
    )
    subnet: Annotated[int, Field(ge=0)] = Field(
        0, description="The cheap subnet's index in the family; 0: the most faithful one for 60 % of the budget."
    )
    cached_subnet: Annotated[int, Field(ge=0)] = Field(
        0, description="piebridge_cached's cheap subnet, which each image pays once; 0: the same as the others'."
    )
    choice: Literal["drawn", "highest"] = Field(
        "highest", description="Who gets the original: the images of the highest priority, or images drawn with odds "
        "in proportion to their last loss."
    )
    difficulty: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of the router's difficulty beside the loss in who gets the original; 0: loss alone."
    )
    measured_difficulty: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight beside the loss of a difficulty that is measured, not predicted: in the first epoch "
        "each image goes through both networks, and how little its latents resemble each other is remembered; 0: not "
        "measured. Not for `piebridge_cached`."
    )
    correction: bool = Field(True, description="Correct the subnet's latents towards the original's by a ridge map.")
    cached_correction: bool = Field(
        True, description="Whether piebridge_cached corrects too, where `correction` is on: once, by those images that "
        "have had both passes by then."
    )
    pairs: Union[Annotated[int, Field(ge=2)], Literal["all"]] = Field(
        100, description="Images put through both networks in the first epoch to fit the correction; all: every "
        "training image, and in the plain regime the map then fits these as closely as it can, see `Correction`."
    )
    refit_pairs: Annotated[int, Field(ge=0)] = Field(
        0, description="New pairs gathered, at most, in every later epoch to refit the correction."
    )
    residuals: bool = Field(
        True, description="In the augmented regime, pair all images of the original's share and remember what their "
        "corrected latents missed. Never in the plain one, where the latents themselves could be kept (`cached`)."
    )

    def paired(self, count: int) -> int:
        """How many of so many training images are pairs of the correction in the first epoch; none without it."""
        if not self.correction:
            return 0
        return count if self.pairs == "all" else min(self.pairs, count)


class ElasticConfig(Section):
    """The method elastic (ElasticTrainer): training those tensors that pay most within a time budget."""

    rho: Annotated[float, Field(gt=0, le=1)] = Field(
        0.533, description="Wanted time of a training step relative to full training's."
    )
    interval: PositiveInt = Field(4, description="Epochs from one selection of tensors to the next.")
    quanta: PositiveInt = Field(
        1000, description="Steps that the whole backward time is divided into for the dynamic program."
    )
    profiled_iterations: PositiveInt = Field(
        5, description="Iterations over which the tensors' backward times are averaged."
    )


class PruneConfig(Section):
    """The method prune (PruneTrain): full training that removes the channels which a group lasso has emptied."""

    lasso_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="Share of the group lasso in the total loss of the first step, which fixes its weight."
    )
    threshold: Annotated[float, Field(gt=0)] = Field(
        1e-4, description="A channel is empty if all weights that make or read it are smaller than this."
    )
    interval: PositiveInt = Field(2, description="Epochs from one rebuilding of the network to the next.")


METHODS = (
    "full", "pet", "last_k", "cached", "resolution", "fixed", "random", "oracle", "piebridge", "piebridge_cached",
    "elastic", "prune",
)
KEEP_LATENTS = ("cached", "piebridge_cached")  # exact only where an image looks the same in every epoch


class TrainingConfig(Section):
    """The device side: one loop for every method."""

    regime: Literal["plain", "augmented"] = Field(
        "plain", description="What training sees of an image: the same centre square in every epoch, or each time "
        "another random crop of it, mirrored or not."
    )
    crop_area: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="augmented: share of an image that a random crop shows at least."
    )
    methods: tuple[Literal[METHODS], ...] = Field(
        METHODS, min_length=1, description="Methods to run, in this order; default: all that the regime allows."
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1, description="One run a method and seed.")
    epochs: PositiveInt = Field(12, description="Passes over the training images.")
    batch_size: PositiveInt = Field(4, description="Images a step of the suffix.")
    learning_rate: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Peak learning rate of SGD a method; a method without one is tuned on the validation split."
    )
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.003, 0.01, 0.03), min_length=1, description="What tuning tries, for every method alike."
    )
    evaluate_every: PositiveInt = Field(
        1, description="Epochs from one evaluation (outside the training time) to the next; the last always is."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Momentum of SGD.")
    window: PositiveInt = Field(256, description="Coming images whose latents are computed together.")
    prefix_batch: PositiveInt = Field(32, description="Images a pass of a frozen prefix.")
    last_k: PositiveInt = Field(1, description="Blocks that the method last_k trains besides the head.")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="CPU threads; 0: as many as the machine has cores.")
    device: str = Field("cpu", description="Torch device of training.")
    engine: Literal["eager", "onnxruntime"] = Field(
        "eager", description="What runs a frozen prefix: PyTorch, on a CPU with batch norms folded and convolutions "
        "packed once; or ONNX Runtime, on the CPU."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_methods(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("regime") == "augmented":
            return {"methods": [method for method in METHODS if method not in KEEP_LATENTS]} | values
        return values

    @field_validator("methods")
    @classmethod
    def _exact_in_the_regime(cls, methods: tuple[str, ...], others: ValidationInfo) -> tuple[str, ...]:
        inexact = [method for method in methods if method in KEEP_LATENTS]
        if inexact and others.data.get("regime") == "augmented":
            raise ValueError(
                f"{inexact[0]} keeps latents, but in the augmented regime an image looks different in every epoch: "
                f"leave {' and '.join(inexact)} out, or set training.regime to plain"
            )
        return methods

    @field_validator("learning_rate")
    @classmethod
    def _known_methods(cls, rates: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(rates) - set(METHODS))
        if unknown:
            raise ValueError(f"unknown method {unknown[0]!r}; methods: {', '.join(METHODS)}")
        return rates


class Study(Section):
    """One experiment, fully specified."""

    name: str = Field(description="The study's name: the stem of its file.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of the cloud side and of the split.")
    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    pet: PetConfig = PetConfig()
    cloud: CloudConfig = CloudConfig()
    router: RouterConfig = RouterConfig()
    routing: RoutingConfig = RoutingConfig()
    elastic: ElasticConfig = ElasticConfig()
    prune: PruneConfig = PruneConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        for spec in self.cloud.subnets:
            largest = max((spec.resolution or 0, *spec.resolutions))
            if largest > self.backbone.resolution:
                raise ValueError(
                    f"cloud.subnets: resolution {largest} exceeds the backbone's {self.backbone.resolution}"
                )
        if self.cloud.data == "characters" and self.backbone.name != "embedded" and self.cloud.family == "generate":
            raise ValueError(
                f"cloud.data: rendered characters suit the embedded backbone only; give {self.backbone.name} a folder "
                "of photos, or cloud.family a family that exists"
            )
        return self

    def fingerprint(self) -> str:
        """Eight hexadecimal digits that differ between studies of one name with different parameters."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def project_root() -> Path:
    """The nearest folder from here upwards that holds `params/` and `notebooks/`; else the working folder."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "params").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return here


def build_folder() -> Path:
    """Where everything that is made goes: `_build` of the project, or where the variable PIEBRIDGE_BUILD says."""
    return Path(os.environ.get("PIEBRIDGE_BUILD", project_root() / "_build"))


def study_folder(study: Study) -> Path:
    """Where a study's runs, records and executed notebooks go: `_build/studies/<name>-<fingerprint>`."""
    return build_folder() / "studies" / f"{study.name}-{study.fingerprint()}"


def load_study(source: str | Path, overrides: str = "") -> Study:
    """Read and validate a study.

    Args:
        source: the path of a YAML file, or the name of one in `params/`.
        overrides: blank-separated `key=value` pairs with dotted keys, values in YAML, for example
            `"training.epochs=3 seed=1"`.

    Raises:
        StudyError: the file is absent or no YAML mapping, or a key or value is not valid.
    """
    path = _find(source)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise StudyError(f"{path}: a study is a mapping of sections, not a {type(values).__name__}")
    try:
        pairs = shlex.split(overrides)
    except ValueError as error:
        raise StudyError(f"overrides {overrides!r}: {error}") from error
    for pair in pairs:
        _override(values, pair)
    values.setdefault("name", path.stem)
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise StudyError(_explain(path, overrides, error)) from error


def _find(source: str | Path) -> Path:
    candidates = [Path(source), project_root() / "params" / f"{source}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(path.stem for path in (project_root() / "params").glob("*.yaml"))
    raise StudyError(f"no study {str(source)!r}: neither a file nor one of params/ ({', '.join(known) or 'empty'})")


def _override(values: dict[str, Any], pair: str) -> None:
    key, equals, text = pair.partition("=")
    if not equals or not key:
        raise StudyError(f"override {pair!r}: write key=value with a dotted key, for example training.epochs=3")
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise StudyError(f"override {pair!r}: {section!r} is a value, not a section")
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise StudyError(f"override {pair!r}: the value is not valid YAML: {error}") from error


def _explain(path: Path, overrides: str, error: ValidationError) -> str:
    lines = [f"{path}{f' with overrides {overrides!r}' if overrides else ''}: not a valid study"]
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "study"
        if problem["type"] == "extra_forbidden":
            known = ", ".join(_fields_at(problem["loc"][:-1]))
            lines.append(f"  {key}: no such parameter; there are: {known}")
        else:
            lines.append(f"  {key}: {problem['msg']} (got {problem['input']!r})")
    return "\n".join(lines)


def _fields_at(location: tuple) -> list[str]:
    model: Any = Study
    for part in location:
        if isinstance(part, int):
            model = SubnetSpec  # the only list of sections there is
        else:
            model = model.model_fields[part].annotation
    return sorted(model.model_fields)


def notebook_study(namespace: dict[str, Any]) -> Study:
    """The study that a notebook's parameters ask for; call it with `globals()` right after the parameters cell.

    A notebook knows two parameters: `study` (a name in params/ or a path) and `overrides`. Papermill would only warn
    about others and go on with the defaults, so any further name defined so far is an error here.

    Run again in a live session, when the notebook's own names are there, it only reads the parameters again.

    Raises:
        StudyError: an unknown parameter, or anything `load_study` objects to.
    """
    first_call = "_study_was_read" not in namespace
    namespace["_study_was_read"] = True
    notebook_names = {"In", "Out", "exit", "quit", "open", "get_ipython", "notebook_study"}
    given = {name for name in namespace if not name.startswith("_") and name not in notebook_names}
    unknown = sorted(given - {"study", "overrides"})
    if unknown and first_call:
        raise StudyError(
            f"unknown notebook parameter {unknown[0]!r}: a notebook takes `study` and `overrides`; other values go "
            f"into overrides, for example overrides=\"training.epochs=3\""
        )
    return load_study(namespace["study"], namespace["overrides"])
