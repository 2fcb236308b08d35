"""What a method is given, and what several methods prepare in the same way."""

from __future__ import annotations

import bisect
import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from .. import costs
from ..backbones import Backbone
from ..config import Study, SubnetSpec
from ..cutting import cut_subnet
from ..engines import Runner, prepare
from ..pet import Split, split
from ..router import Router
from ..routing import (
    Budget,
    Choice,
    FixedRoute,
    MeasuredDifficulty,
    SharedRoute,
    cached_shares,
    original_share,
    ranks,
)
from ..subnets import Family
from ..training import Plan

ROUTER_BATCH = 64
TIMED_BATCHES = 2  # on which subnet and original are compared


@dataclass(frozen=True)
class Setting:
    """A task on a device, ready for any method.

    Attributes:
        study: parameters.
        backbone: pretrained and frozen.
        images: uint8, shape (N, 3, H, W): the training images, on the CPU, as they are tested: never cropped at random.
        classes: how many.
        seed: of this run.
        family: subnets of the backbone's prefix; None if no method of the study needs them.
        router: of the family; None if the study gives difficulty no weight.
        side: of the input that the budget pays for, pixels, see `choose_side`; None: not chosen yet.
        side_seconds: what choosing it took, counted likewise.
    """

    study: Study
    backbone: Backbone
    images: Tensor
    classes: int
    seed: int
    family: Optional[Family] = None
    router: Optional[Router] = None
    side: Optional[int] = None
    side_seconds: float = 0.0

    @property
    def by_clock(self) -> bool:
        """Whether budgets go by what passes take on this device."""
        return self.study.routing.costs == "measured"

    def split(self) -> Split:
        """The network, cut as the study's PET kind asks."""
        return split(self.backbone, self.study.pet, self.classes, self.seed)

    def runners(self, networks: dict[int, nn.Module]) -> tuple[dict[int, Runner], float]:
        """Prefixes made ready by the study's engine, by their index in the family, and the seconds that took."""
        training = self.study.training
        example = self.images[: training.prefix_batch].to(training.device)
        start = time.perf_counter()
        runners = {
            index: prepare(network.to(training.device), training.engine, example) for index, network in networks.items()
        }
        return runners, time.perf_counter() - start


def frozen_plan(setting: Setting, cached: bool) -> Plan:
    """PET on the original prefix, with or without a cache of its latents."""
    parts = setting.split()
    networks = {0: parts.prefix}
    runners, seconds = setting.runners(networks)
    return Plan(parts, networks, runners, FixedRoute(0), cached=cached, seconds={"engine": seconds})


def shared_plan(
    setting: Setting, choice: Optional[Choice] = None, cached: bool = False, difficulty: Optional[Tensor] = None,
    permanent: bool = False,
) -> Plan:
    """A cheap subnet, and the original for the share of images that the budget leaves.

    Preparing the engines and the router's pass over all images are counted. What passes cost on this device the loop
    reads off the first epoch.

    Args:
        setting: what methods are given.
        choice: of the images that get the original; default: the study's.
        cached: keep every latent.
        difficulty: shape (N,): known already, and all that decides; default: the loss, and the router's difficulty.
        permanent: the router's difficulty alone decides, whatever the losses.
    """
    study, routing = setting.study, setting.study.routing
    parts, seconds = setting.split(), {}
    route = cached_route(setting) if cached else cheap_route(setting)
    networks = {0: parts.prefix, route: setting.family.networks[route]}
    runners, seconds["engine"] = setting.runners(networks)
    cheap = expected_cost(setting, route)
    permanent, router_cost = permanent or difficulty is not None, 0.0
    count, epochs = len(setting.images), study.training.epochs
    measured = None
    if routing.measured_difficulty and not (cached or permanent or choice == "random"):
        measured = MeasuredDifficulty(count, routing.measured_difficulty)
    if routing.difficulty and choice != "random" and difficulty is None:
        start = time.perf_counter()
        read = [setting.router.difficulty(batch) for batch in setting.images.split(ROUTER_BATCH)]
        difficulty = routing.difficulty * ranks(torch.cat(read))
        seconds["router"] = time.perf_counter() - start
        router_cost = relative_router_cost(setting, parts.prefix)
    corrected = routing.correction and (routing.cached_correction or not cached)
    remembers = corrected and routing.residuals and study.training.regime == "augmented"
    pairs, refit = (routing.paired(count), routing.refit_pairs) if corrected and not cached else (0, 0)
    if measured is not None:
        pairs = count
    if remembers:  # what is remembered is a pair
        refit = count
    first = 0.0
    if cached:  # an original latent is paid once, and so is the subnet's
        first, share = cached_shares(routing.cached_cost, cheap, router_cost)
    else:
        share = original_share(routing.cost, cheap, router_cost, count, epochs, pairs, refit)
    policy = SharedRoute(
        count, route, share, pairs, refit, choice or routing.choice, difficulty, setting.seed,
        buy_epochs=max(1, epochs // 3) if cached else 0, permanent=permanent,
        budget=None if cached else Budget(routing.cost * epochs * count, count, epochs, refit), measured=measured,
        pass_size=study.training.prefix_batch, first=first,
    )
    return Plan(
        parts, networks, runners, policy, cached, corrected, remembers, measured,
        prices={0: 1.0, route: cheap}, by_clock=setting.by_clock and not cached,
        upfront=router_cost * count, seconds=seconds,
    )


def relative_router_cost(setting: Setting, prefix: nn.Module) -> float:
    """Multiply-accumulates of the router's pass over an image, relative to those of the original prefix."""
    example = setting.backbone.example()
    prefix_macs = costs.macs(prefix, example.to(next(prefix.parameters()).device))
    return costs.macs(setting.router.body, example) / prefix_macs


def cheap_route(setting: Setting) -> int:
    """The family's index of the cheap subnet: the study's choice, else the most faithful for 60 % of the budget.

    Raises:
        ValueError: the study's choice is not in the family.
    """
    routing = setting.study.routing
    return _chosen(setting, "routing.subnet", routing.subnet) or most_faithful(setting.family, 0.6 * routing.cost)


def cached_route(setting: Setting) -> int:
    """The same where latents are kept, and each image pays the subnet once: the study's choice for that, or the other.

    Raises:
        ValueError: the study's choice is not in the family.
    """
    routing = setting.study.routing
    return _chosen(setting, "routing.cached_subnet", routing.cached_subnet) or cheap_route(setting)


def _chosen(setting: Setting, key: str, index: int) -> int:
    if index >= len(setting.family):
        raise ValueError(f"{key}: {index}, but the family's subnets go from 1 to {len(setting.family) - 1}")
    return index


def expected_cost(setting: Setting, route: int) -> float:
    """A subnet's relative cost as the family tells it: latency where that was measured, or MACs."""
    facts = setting.family.manifest.subnets[route]
    latency = facts.relative_latency if setting.study.routing.costs == "measured" else None
    return latency or facts.relative_macs


def most_faithful(family: Family, limit: float) -> int:
    """Index of the subnet of highest fidelity whose relative cost is at most `limit`; the cheapest if none is."""
    members = list(enumerate(family.manifest.subnets))[1:]
    affordable = [member for member in members if (member[1].relative_latency or member[1].relative_macs) <= limit]
    if not affordable:
        return min(members, key=lambda member: member[1].relative_macs)[0]
    return max(affordable, key=lambda member: (member[1].fidelity or 0.0, member[1].relative_macs))[0]


def choose_side(setting: Setting) -> Setting:
    """The setting with the largest input, smaller than the backbone's own, whose latents the budget pays for.

    Sides are multiples of 8 px, of 16 for transformers. The cost is measured on this device or in MACs, as the study
    says; the pairs of the correction are paid from the budget too, as in the routed methods.

    Raises:
        ValueError: the budget does not even pay for the smallest.
    """
    study, start = setting.study, time.perf_counter()
    routing, backbone, count = study.routing, setting.backbone, len(setting.images)
    prefix = setting.split().prefix.to(study.training.device)
    example = backbone.example().to(study.training.device)

    def relative_cost(side: int) -> float:
        network = lower_prefix(setting, prefix, side)
        if routing.costs == "macs":
            return costs.macs(network, example) / costs.macs(prefix, example)
        return _timed_cost(setting, prefix, network)[1]

    sides = range(backbone.resolution_step, backbone.resolution, backbone.resolution_step)
    paired = routing.paired(count) / (study.training.epochs * count)
    affordable = bisect.bisect_right(sides, routing.cost - paired, key=relative_cost)
    if not affordable:
        raise ValueError(
            f"routing.cost: {routing.cost} does not pay for an input of {backbone.resolution_step} px and the pairs; "
            "raise it, or choose fewer routing.pairs"
        )
    return dataclasses.replace(
        setting, side=sides[affordable - 1], side_seconds=time.perf_counter() - start
    )


def lower_prefix(setting: Setting, prefix: nn.Sequential, side: int) -> nn.Module:
    """The prefix with its own weights on images of another side, pixels; latents of the original's shape."""
    example = setting.backbone.example().to(next(prefix.buffers()).device)
    return cut_subnet(prefix, SubnetSpec(resolution=side), example)[0].requires_grad_(False)


def _timed_cost(setting: Setting, original: nn.Module, cheap: nn.Module) -> tuple[float, float]:
    """Seconds of the original's pass over an image, and of a cheap network's relative to that, at most 1.

    Both are timed in turn on batches of other images, as in training; medians over the batches.
    """
    runners, _ = setting.runners({0: original, 1: cheap})
    size = setting.study.training.prefix_batch
    batches = setting.images[: (1 + TIMED_BATCHES) * size].to(setting.study.training.device).split(size)
    rounds = []
    for batch in batches:
        whole, part = (_seconds(runner, batch) for runner in runners.values())
        rounds.append((whole / len(batch), part / whole))
    seconds, relative = zip(*(rounds[1:] or rounds))  # the first batch warms up
    return statistics.median(seconds), min(1.0, statistics.median(relative))


def _seconds(runner: Runner, images: Tensor) -> float:
    start = time.perf_counter()
    runner(images)
    costs.synchronize(images.device)
    return time.perf_counter() - start
