"""An experiment: all methods and seeds of a study, one after the other, each finished run kept at once.

A run that was killed leaves the finished ones before it and a checkpoint of its last finished epoch: the next call
continues there.
"""

from __future__ import annotations

import gc
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import costs, records
from .backbones import Backbone, WeightsError
from .channel_pruning import drop_channels
from .checkpoints import Checkpoint
from .cloud import obtain_backbone, obtain_family, obtain_router
from .config import PetConfig, Study, study_folder
from .crops import RandomViews
from .data import Task, load_task
from .engines import prepare
from .methods import NEEDS_FAMILY, REGISTRY, Setting, choose_side
from .pet import split, split_all
from .records import Record
from .subnets import latents_of
from .training import Outcome, Plan, accuracy, fit

MEASURED = ("side", "side_seconds")  # fields of a setting


@dataclass
class Experiment:
    """A study made ready: data decoded, backbone, family and router at hand.

    Attributes:
        study: parameters.
        task: the decoded target task.
        backbone: pretrained and frozen.
        setting: what methods are given, for the final runs: training and validation images together.
        folder: where runs are kept.
    """

    study: Study
    task: Task
    backbone: Backbone
    setting: Setting
    folder: Path

    def __post_init__(self) -> None:
        self._test_latents: dict[str, Tensor] = {}  # by cut: latents of the original prefix, for evaluation only


def open_experiment(study: Study) -> Experiment:
    """Load and make everything that a study's runs need.

    Raises:
        StudyError, DataError, WeightsError, FamilyError: see there.
    """
    torch.set_num_threads(study.training.threads or os.cpu_count() or 1)
    folder = study_folder(study)
    folder.mkdir(parents=True, exist_ok=True)
    task = load_task(study, folder)
    backbone = obtain_backbone(study)
    family = router = None
    if NEEDS_FAMILY & set(study.training.methods):
        family = obtain_family(study, backbone)
        if study.routing.difficulty:
            router = obtain_router(study, backbone, family)
    indices = torch.cat([task.splits["train"], task.splits["validation"]])
    setting = Setting(study, backbone, task.images[indices], len(task.classes), study.seed, family, router)
    return Experiment(study, task, backbone, _with_side(setting, folder), folder)


def _with_side(setting: Setting, folder: Path) -> Setting:
    """The setting with the side of the method `resolution`, if the study has it; kept, so that its runs share it."""
    path, asked = folder / "side.json", _surroundings(setting.study)
    if "resolution" not in setting.study.training.methods:
        return setting
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["asked"] == asked:
            return replace(setting, **content["measured"])
    setting = choose_side(setting)
    measured = {name: getattr(setting, name) for name in MEASURED}
    records.write_atomically(path, json.dumps({"asked": asked, "measured": measured}, indent=1))
    return setting


def _surroundings(study: Study) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    on_gpu = torch.device(study.training.device).type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else records.processor_name()
    return {"code": records.code_fingerprint(), "device": device, "threads": torch.get_num_threads(),
            "torch": torch.__version__}


def run(experiment: Experiment) -> pd.DataFrame:
    """Run all methods and seeds that are not done yet; writes records.csv and history.csv into the study's folder.

    Returns:
        The records, one row a run, in the order of the study's methods.
    """
    study, runs = experiment.study, experiment.folder / "runs"
    finished: list[Record] = []
    histories = []
    rates = learning_rates(experiment)
    for method in study.training.methods:
        for seed in study.training.seeds:
            place = runs / f"{method}-seed{seed}"
            record = _finished(place)
            if record is None:
                gc.collect()  # what the last run left behind would count in this one's peak memory
                record = _run_one(experiment, method, seed, rates[method], place)
            else:
                print(f"{method}, seed {seed}: done before, on {record.started_at}")
            finished.append(record)
            history = pd.read_csv(place / "history.csv")
            histories.append(history.assign(method=method, seed=seed))
    table = records.to_table(finished)
    records.write_table(experiment.folder / "history.csv", pd.concat(histories, ignore_index=True))
    records.write_table(experiment.folder / "records.csv", table)
    return table


def learning_rates(experiment: Experiment) -> dict[str, float]:
    """The learning rate of each method: the study's, or else the best of `training.learning_rates` on validation.

    With a single candidate nothing is tuned. Tuning trains on the training split alone, with every candidate the same
    number of epochs, and keeps its table as tuning.csv in the study's folder.
    """
    study = experiment.study
    chosen = dict(study.training.learning_rate)
    rows = []
    candidates = study.training.learning_rates
    for method in study.training.methods:
        if method in chosen:
            continue
        if len(candidates) == 1:
            chosen[method] = candidates[0]
            continue
        reached = {}
        for rate in candidates:
            place = experiment.folder / "tuning" / f"{method}-{rate:g}"
            record = _finished(place) or _run_one(experiment, method, study.seed, rate, place, hold_out=True)
            reached[rate] = record.val_accuracy
            rows.append(
                {"study": study.name, "method": method, "learning_rate": rate, "val_accuracy": reached[rate]}
            )
        chosen[method] = max(reached, key=reached.get)
    if rows:
        records.write_table(experiment.folder / "tuning.csv", pd.DataFrame(rows))
    return chosen


def _finished(place: Path) -> Optional[Record]:
    """The record of a run that the present code finished."""
    path = place / "record.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return Record.model_validate(content["record"]) if content["code"] == records.code_fingerprint() else None


def _run_one(
    experiment: Experiment, method: str, seed: int, learning_rate: float, place: Path, hold_out: bool = False
) -> Record:
    """Train with one method and seed; what it leaves in `place` counts once record.json is there."""
    study, task = experiment.study, experiment.task
    provenance = records.provenance()
    splits = ("train",) if hold_out else ("train", "validation")
    indices = torch.cat([task.splits[name] for name in splits])
    images = task.images[indices] if hold_out else experiment.setting.images
    seen = images if task.larger is None else training_views(experiment, seed, splits)
    (place / "record.json").unlink(missing_ok=True)
    place.mkdir(parents=True, exist_ok=True)
    setting = replace(experiment.setting, images=images, seed=seed)
    torch.manual_seed(seed)
    plan = REGISTRY[method](setting)
    if hold_out and plan.networks and study.training.regime == "plain":
        # nobody times a tuning run, and kept latents are the same ones, computed once; so they say nothing of costs
        plan.cached, plan.prices = True, {}

    def evaluate(suffix: nn.Module) -> dict[str, float]:
        if hold_out:
            return {"val_accuracy": split_accuracy(experiment, plan, suffix, "validation")}
        return {"test_accuracy": split_accuracy(experiment, plan, suffix, "test")}

    description = f"{method}, {'tuning ' + format(learning_rate, 'g') if hold_out else f'seed {seed}'}"
    about = {name: getattr(setting, name) for name in MEASURED} | _surroundings(study)
    prices = {str(index): price for index, price in plan.prices.items()}
    about |= {"learning_rate": learning_rate, "variant": plan.policy.describe(), "prices": prices}
    checkpoint = Checkpoint(place / "checkpoint.safetensors", run=about)
    outcome = fit(
        plan, seen, task.labels[indices], study.training, learning_rate, seed, evaluate, study.data.memory_mib,
        experiment.folder, description, checkpoint,
    )
    record = _record(experiment, method, seed, learning_rate, plan, outcome, len(images), provenance)
    _keep(experiment, plan, outcome, record, place)
    checkpoint.remove()
    return record


def training_views(
    experiment: Experiment, seed: int, splits: tuple[str, ...] = ("train", "validation")
) -> RandomViews:
    """What a run of this seed sees of the images of these splits, in the augmented regime."""
    study, task = experiment.study, experiment.task
    indices = torch.cat([task.splits[name] for name in splits])
    return RandomViews(task.larger, indices, study.backbone.resolution, study.training.crop_area, seed)


def split_accuracy(experiment: Experiment, plan: Plan, suffix: nn.Module, split: str) -> float:
    """Percent of a split's images that a trained suffix classifies rightly.

    On the original network, always; `prune` alone trains, and is tested with, a smaller one.
    """
    task, device = experiment.task, experiment.study.training.device
    indices = task.splits[split]
    if len(plan.split.prefix):
        key = f"{plan.split.cut} {split}"
        if key not in experiment._test_latents:
            images = task.images[indices]
            runner = prepare(plan.split.prefix, "eager", images[:1].to(device))
            parts = [latents_of(runner, batch.to(device)).cpu() for batch in images.split(64)]
            experiment._test_latents[key] = torch.cat(parts)
        known = experiment._test_latents[key]
        return accuracy(suffix, lambda chosen: known[chosen].to(device), task.labels[indices], torch.arange(len(known)))
    return accuracy(suffix, lambda chosen: task.images[chosen].to(device), task.labels, indices)


def _record(
    experiment: Experiment, method: str, seed: int, learning_rate: float, plan: Plan, outcome: Outcome, count: int,
    provenance: dict,
) -> Record:
    study, training = experiment.study, experiment.study.training
    trainable, in_suffix = costs.parameter_counts(plan.split.suffix)
    in_prefix = costs.parameter_counts(plan.split.prefix)[1]
    history, seconds = outcome.history, outcome.seconds
    tests = history.get("test_accuracy", pd.Series([float("nan")]))
    return Record(
        study=study.name, dataset=study.data.name, backbone=study.backbone.name, resolution=study.backbone.resolution,
        regime=training.regime, method=method, variant=plan.policy.describe(), seed=seed, epochs=training.epochs,
        batch_size=training.batch_size, learning_rate=learning_rate, train_images=count,
        test_images=len(experiment.task.splits["test"]), test_accuracy=tests.iloc[-1], best_test_accuracy=tests.max(),
        val_accuracy=history["val_accuracy"].iloc[-1] if "val_accuracy" in history else None,
        **{f"{item}_seconds": seconds.get(item, 0.0) for item in (
            "train", "prefix", "suffix", "router", "correction", "cache", "engine", "data", "eval")},
        original_share=history["original_share"].mean(), trainable_params=trainable,
        total_params=in_prefix + in_suffix, train_gmacs=_training_gmacs(experiment, plan, outcome),
        peak_memory_mib=outcome.peak_memory_mib, energy_j=outcome.energy_j,
        device=_surroundings(study)["device"], threads=torch.get_num_threads(), **provenance,
    )


def _training_gmacs(experiment: Experiment, plan: Plan, outcome: Outcome) -> float:
    """Multiply-accumulates of the whole training: every prefix pass that was run, and the suffix's both ways."""
    device = experiment.study.training.device
    example = experiment.backbone.example().to(device)
    total = sum(outcome.computed[index] * costs.macs(network, example) for index, network in plan.networks.items())
    return (total + outcome.suffix_macs) / 1e9


def _keep(experiment: Experiment, plan: Plan, outcome: Outcome, record: Record, place: Path) -> None:
    """Write history, trained tensors and, last, the record: only with it the run counts as finished."""
    records.write_table(place / "history.csv", outcome.history)
    trained = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in plan.split.suffix.named_parameters()
        if parameter.requires_grad
    }
    notes = {
        "study": experiment.study.model_dump_json(), "method": record.method,
        "classes": json.dumps(experiment.task.classes),
        "weights_fingerprint": experiment.backbone.fingerprint, "rebuilds": json.dumps(plan.rebuilds),
    }
    partial = place / ".trained.safetensors"
    save_file(trained, partial, metadata=notes)
    partial.replace(place / "trained.safetensors")
    content = {"code": records.code_fingerprint(), "record": record.model_dump()}
    records.write_atomically(place / "record.json", json.dumps(content, indent=1))


def load_trained(path: Path) -> tuple[nn.Module, list[str], int]:
    """The original network with the modules that a run trained.

    Args:
        path: trained.safetensors of a run.

    Returns:
        The network, uint8 images (B, 3, H, W) to logits, in evaluation mode; the class names; the side that images
        are to be resized to, pixels.

    Raises:
        WeightsError: not such a file, or the backbone's weights are not those it was trained with.
    """
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata()
        study, classes = Study.model_validate_json(notes["study"]), json.loads(notes["classes"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: not what a run saved as trained.safetensors ({error})") from error
    backbone = obtain_backbone(study)
    if backbone.fingerprint != notes["weights_fingerprint"]:
        raise WeightsError(f"{path}: trained with other weights of {backbone.name} than those found now")
    if notes["method"] in ("full", "elastic", "prune"):
        parts = split_all(backbone, len(classes), seed=0)
        for dropped in json.loads(notes.get("rebuilds", "[]")):
            drop_channels(parts.suffix, dropped, backbone.example(2))
    elif notes["method"] == "last_k":
        parts = split(backbone, PetConfig(kind="last_k", blocks=study.training.last_k), len(classes), seed=0)
    else:
        parts = split(backbone, study.pet, len(classes), seed=0)
    parts.suffix.load_state_dict(load_file(path), strict=False)
    return nn.Sequential(parts.prefix, parts.suffix).eval(), classes, backbone.resolution
