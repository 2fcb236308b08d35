"""The audit of routes: what each way of choosing an image's prefix is worth, at the same budget and over many seeds.

Every variant is a method, or one with other routing parameters, and is trained by the one training loop. Only the
latents come from elsewhere: each network runs once over all images, in the augmented regime over all that a seed shows
of them, and afterwards its latents are looked up. So accuracies and counts of passes are those of real runs, but for
the rounding that depends on which images share a pass, and seconds are not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Optional, Union

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .config import KEEP_LATENTS, Study
from .costs import Stopwatch
from .crops import RandomViews
from .engines import Runner
from .experiment import open_experiment, split_accuracy, training_views
from .latents import LatentSource
from .methods import REGISTRY, Setting, fixed
from .methods.setting import (
    ROUTER_BATCH,
    cached_route,
    cheap_route,
    expected_cost,
    relative_router_cost,
    shared_plan,
)
from .router import Router
from .routing import NO_PAIRS, Choice
from .subnets import Family
from .training import Outcome, Plan, fit

DIFFICULTY = 1.0  # its weight beside the loss, if the study gives it none


@dataclass(frozen=True)
class Variant:
    """A way of choosing each image's prefix.

    Attributes:
        name: in the field's words.
        method: of the registry; the variant has its learning rate.
        plan: makes the plan; default: the method's own.
        difficulty: whether the router's difficulty has a weight.
        measures: whether difficulty is measured, where the study does.
        switched: with the correction where the study does without, and without where it corrects.
        choice: of the images that get the original.
    """

    name: str
    method: str
    plan: Optional[Callable[[Setting], Plan]] = None
    difficulty: bool = False
    measures: bool = True
    switched: bool = False
    choice: Choice = "highest"

    def study(self, study: Study) -> Study:
        """The study with this variant's routing parameters."""
        weight = study.routing.difficulty if self.difficulty else 0.0
        correction = study.routing.correction != self.switched
        measured = study.routing.measured_difficulty if self.measures else 0.0
        update = {
            "choice": self.choice, "correction": correction, "difficulty": weight, "measured_difficulty": measured,
        }
        return study.model_copy(update={"routing": study.routing.model_copy(update=update)})


REFERENCE = "highest priority"  # PieBridge's own routes
VARIANTS = (
    Variant("original", "pet"),
    Variant("best subnet", "fixed"),
    Variant("best subnet, correction switched", "fixed", switched=True),
    Variant("cheap subnet", "fixed", lambda setting: fixed.plan(setting, cheap_route(setting))),
    Variant("drawn uniformly", "random"),
    Variant("lowest similarity", "oracle"),
    Variant(REFERENCE, "piebridge"),
    Variant("highest priority, correction switched", "piebridge", switched=True),
    Variant("highest loss", "piebridge", measures=False),
    Variant("highest loss, latents kept", "piebridge_cached"),
    Variant("drawn by loss", "piebridge", choice="drawn", measures=False),
    Variant(
        "highest predicted difficulty", "piebridge", lambda setting: shared_plan(setting, permanent=True),
        difficulty=True,
    ),
    Variant("highest loss and predicted difficulty", "piebridge", difficulty=True, measures=False),
)


def variants_of(study: Study) -> list[Variant]:
    """Those that the study's regime allows."""
    plain = study.training.regime == "plain"
    return [variant for variant in VARIANTS if plain or variant.method not in KEEP_LATENTS]


def audit(study: Study, seeds: Sequence[int]) -> pd.DataFrame:
    """Train with every variant that the regime allows and every seed.

    Learning rates are the study's (`training.learning_rate`) of the method that a variant belongs to, or else the best
    of `training.learning_rates` on the validation split, by training on the training split alone. The oracle's is
    PieBridge's, unless the study names one.

    Args:
        study: with a family and its router.
        seeds: of heads, orders and draws.

    Returns:
        A row a variant and seed: study, dataset, backbone, variant, seed, cost (of a latent on average, relative to
        the original's: every pass of a member, and the router's), learning_rate, test_accuracy (percent, after the
        last epoch).

    Raises:
        StudyError, DataError, WeightsError, FamilyError: what the study needs is not there.
        ValueError: the budget does not pay for the cheap subnet.
    """
    runs = _Runs(study)
    rates = runs.learning_rates()
    variants, rows = variants_of(study), {}
    for seed, variant in tqdm(list(product(seeds, variants)), desc=study.name, unit="run"):
        plan, outcome = runs.train(variant, seed, rates[variant.method], "test")
        rows[variant, seed] = {
            "study": study.name, "dataset": study.data.name, "backbone": study.backbone.name, "variant": variant.name,
            "seed": seed, "cost": round(runs.cost(plan, outcome), 4), "learning_rate": rates[variant.method],
            "test_accuracy": round(outcome.history["accuracy"].iloc[-1], 4),
        }
    return pd.DataFrame([rows[key] for key in product(variants, seeds)])


class _Runs:
    """A study made ready, each of its latents computed at most once.

    Attributes:
        methods: of the variants that the study's regime allows.
        augmented: whether that is the augmented one.
        costs: of a latent of each member that some variant needs, relative to the original's.
        router_cost: of the router's pass over an image, likewise.
    """

    def __init__(self, study: Study) -> None:
        update = {"difficulty": study.routing.difficulty or DIFFICULTY}  # some variant asks the router
        self.methods = tuple(dict.fromkeys(variant.method for variant in variants_of(study)))
        self.augmented = study.training.regime == "augmented"
        study = study.model_copy(update={
            "routing": study.routing.model_copy(update=update),
            "training": study.training.model_copy(update={
                "methods": self.methods, "evaluate_every": study.training.epochs,
            }),
        })
        self.study, self.experiment = study, open_experiment(study)
        setting = self.experiment.setting
        members = {cheap_route(setting), cached_route(setting)} | {
            fixed.best_route(replace(setting, study=variant.study(study)))
            for variant in variants_of(study) if variant.method == "fixed"
        }
        self.costs = {0: 1.0} | {member: expected_cost(setting, member) for member in sorted(members)}
        self.router_cost = relative_router_cost(setting, setting.split().prefix)
        self._settings: dict[Optional[int], _LookedUpSetting] = {}

    def setting(self, seed: int) -> _LookedUpSetting:
        """With the latents of all that this seed shows; in the plain regime that is the same for all seeds."""
        key = seed if self.augmented else None
        if key not in self._settings:
            self._settings.clear()  # a seed's views are many
            views = training_views(self.experiment, seed) if self.augmented else None
            self._settings[key] = _looked_up(
                self.experiment.setting, list(self.costs), self.experiment.folder, views
            )
        return self._settings[key]

    def learning_rates(self) -> dict[str, float]:
        """By method; those that the study does not name are tuned, each on the first of its variants."""
        training, splits = self.study.training, self.experiment.task.splits
        chosen = dict(training.learning_rate)
        missing = [method for method in self.methods if method not in chosen and method != "oracle"]
        reached: dict[str, dict[float, float]] = {method: {} for method in missing}
        tried = list(product(missing, training.learning_rates))
        for method, rate in tqdm(tried, desc=f"{self.study.name}, tuning", unit="run", disable=not tried):
            variant = next(variant for variant in VARIANTS if variant.method == method)
            _, outcome = self.train(variant, self.study.seed, rate, "validation", len(splits["train"]))
            reached[method][rate] = outcome.history["accuracy"].iloc[-1]
        chosen |= {method: max(accuracies, key=accuracies.get) for method, accuracies in reached.items()}
        return {"oracle": chosen["piebridge"]} | chosen

    def train(
        self, variant: Variant, seed: int, learning_rate: float, split: str, count: Optional[int] = None
    ) -> tuple[Plan, Outcome]:
        """Train with a variant on the first `count` images, by default all, and test on a split.

        Training images come first and those held out for validation behind them.
        """
        task = self.experiment.task
        labels = task.labels[torch.cat([task.splits["train"], task.splits["validation"]])][:count]
        known = self.setting(seed)
        setting = replace(known, study=variant.study(self.study), images=known.images[:count], seed=seed)
        torch.manual_seed(seed)
        plan = (variant.plan or REGISTRY[variant.method])(setting)

        def evaluate(suffix: nn.Module) -> dict[str, float]:
            return {"accuracy": split_accuracy(self.experiment, plan, suffix, split)}

        images = setting.images
        if self.augmented:
            images = _ViewNumbers(len(images), len(known.images))
        outcome = fit(plan, images, labels, self.study.training, learning_rate, seed, evaluate, description="")
        return plan, outcome

    def cost(self, plan: Plan, outcome: Outcome) -> float:
        """Mean cost of a latent relative to the original's: all passes, the pairs' and the router's among them."""
        count = len(self.experiment.setting.images)
        spent = sum(images * self.costs[member] for member, images in outcome.computed.items())
        spent += count * self.router_cost if "router" in plan.seconds else 0.0
        return spent / (count * self.study.training.epochs)


# ----------------------------------------------------------------------------------------------------- looking up


class _LookedUpSetting(Setting):
    """A setting whose images are their numbers, int64 (N,), and whose networks look up what is known of them.

    In the augmented regime view i of epoch e, from 0, has the number (e + 1) N + i.
    """

    by_clock = False  # looking up takes no time

    def runners(self, networks: dict[int, nn.Module]) -> tuple[dict[int, Runner], float]:
        return {index: self.family.networks[index] for index in networks}, 0.0


class _AllViews:
    """All that a seed shows, by number: the images as they are tested, uint8 (N, 3, H, W), then each epoch's views."""

    def __init__(self, images: Tensor, views: RandomViews, epochs: int) -> None:
        self.images, self.views, self.epochs, self.shown = images, views, epochs, 0

    def __len__(self) -> int:
        return (1 + self.epochs) * len(self.images)

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """Those of one epoch, int64 (B,)."""
        epoch = int(numbers[0]) // len(self.images)
        if not epoch:
            return self.images[numbers]
        if self.shown != epoch:
            self.shown = epoch
            self.views.start(epoch - 1)
        return self.views[numbers % len(self.images)]


class _ViewNumbers(RandomViews):
    """In the views' place: their numbers.

    Args:
        count: images that are trained on, the first ones.
        total: images, N.
    """

    def __init__(self, count: int, total: int) -> None:
        self.count, self.total = count, total
        self.start(0)

    def start(self, epoch: int) -> None:
        self.first = (epoch + 1) * self.total

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.first + indices


class _KnownMember(nn.Module):
    """In a member's place: numbers of images or views, int64 (B,), to the member's latents."""

    def __init__(self, source: LatentSource, route: int) -> None:
        super().__init__()
        self.source, self.route = source, route

    def forward(self, indices: Tensor) -> Tensor:
        indices = indices.cpu()
        return self.source.window(indices, torch.full_like(indices, self.route), NO_PAIRS, self.route)


class _KnownRouter:
    """In the router's place: numbers of images, int64 (B,), to their difficulties."""

    def __init__(self, router: Router, images: Tensor) -> None:
        self.body = router.body
        self.known = torch.cat([router.difficulty(batch) for batch in images.split(ROUTER_BATCH)])

    def difficulty(self, indices: Tensor) -> Tensor:
        return self.known[indices]


def _looked_up(
    setting: Setting, members: list[int], folder: Path, views: Optional[RandomViews] = None
) -> _LookedUpSetting:
    """The setting with latents of these members computed for all of its images, and for all views that are shown.

    Latents above `data.memory_mib` a member are kept in a file in `folder`.
    """
    study, training, family = setting.study, setting.study.training, setting.family
    networks = {0: setting.split().prefix} | {index: family.networks[index] for index in members if index}
    runners, _ = setting.runners(networks)
    seen: Union[Tensor, _AllViews] = setting.images
    if views is not None:
        seen = _AllViews(setting.images, views, training.epochs)
    source = LatentSource(
        seen, runners, training.prefix_batch, training.device, Stopwatch(training.device), cached=True,
        memory_mib=study.data.memory_mib, scratch=folder,
    )
    known = [_KnownMember(source, index) for index in range(len(family))]
    indices = torch.arange(len(setting.images))
    epochs = torch.arange(len(seen)).split(len(indices))
    windows = [window for epoch in epochs for window in epoch.split(training.window)]
    passes = list(product(members, windows))
    for member, window in tqdm(passes, desc=f"{study.name}, latents", unit="window"):
        known[member](window)
    kept = {"images": indices, "family": Family(family.manifest, known)}
    router = _KnownRouter(setting.router, setting.images)
    return _LookedUpSetting(**vars(setting) | kept | {"router": router})
