"""What a method is given, and what several methods prepare in the same way."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from .. import costs
from ..backbones import Backbone
from ..config import Study
from ..engines import Runner, prepare
from ..pet import Split, split
from ..router import Router
from ..routing import FixedRoute, SharedRoute, cached_share, original_share, ranks
from ..subnets import Family
from ..training import Plan

ROUTER_BATCH = 64


@dataclass(frozen=True)
class Setting:
    """A task on a device, ready for any method.

    Attributes:
        study: parameters.
        backbone: pretrained and frozen.
        images: uint8, shape (N, 3, H, W): the training images, on the CPU.
        classes: how many.
        seed: of this run.
        family: subnets of the backbone's prefix; None if no method of the study needs them.
        router: of the family; None if the study gives difficulty no weight.
        relative_cost: of the cheap subnet, see `calibrate`; the same for all methods of an experiment.
        calibration_seconds: what measuring it took; counted by every method that uses it.
    """

    study: Study
    backbone: Backbone
    images: Tensor
    classes: int
    seed: int
    family: Optional[Family] = None
    router: Optional[Router] = None
    relative_cost: float = 1.0
    calibration_seconds: float = 0.0

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


def shared_plan(setting: Setting, random: bool = False, cached: bool = False) -> Plan:
    """A cheap subnet, and the original for the share of images that the budget leaves.

    Preparing the engines, timing original and subnet on this device (which the budget needs) and the router's pass
    over all images are counted.
    """
    study, routing = setting.study, setting.study.routing
    parts, seconds = setting.split(), {}
    route = cheap_route(setting)
    networks = {0: parts.prefix, route: setting.family.networks[route]}
    runners, engine_seconds = setting.runners(networks)
    seconds["engine"] = engine_seconds + setting.calibration_seconds
    difficulty, router_cost = None, 0.0
    if routing.difficulty and not random:
        start = time.perf_counter()
        read = [setting.router.difficulty(batch) for batch in setting.images.split(ROUTER_BATCH)]
        difficulty = routing.difficulty * ranks(torch.cat(read))
        seconds["router"] = time.perf_counter() - start
        example = setting.backbone.example()
        prefix_macs = costs.macs(parts.prefix, example.to(study.training.device))
        router_cost = costs.macs(setting.router.body, example) / prefix_macs
    pairs = routing.pairs if routing.correction else 0
    count, epochs = len(setting.images), study.training.epochs
    if cached:  # an original latent is paid once, and so is the subnet's
        share = cached_share(routing.cached_cost, setting.relative_cost, router_cost, count, pairs)
    else:
        share = original_share(
            routing.cost, setting.relative_cost, router_cost, count, epochs, pairs, routing.refit_pairs
        )
    policy = SharedRoute(
        count, route, share, pairs, routing.refit_pairs, random, difficulty, setting.seed,
        buy_epochs=max(1, epochs // 3) if cached else 0,
    )
    return Plan(parts, networks, runners, policy, cached, routing.correction, seconds)


def cheap_route(setting: Setting) -> int:
    """The family's index of the cheap subnet: the study's choice, else the most faithful for 60 % of the budget.

    Raises:
        ValueError: the study's choice is not in the family.
    """
    routing, family = setting.study.routing, setting.family
    if routing.subnet >= len(family):
        raise ValueError(f"routing.subnet: {routing.subnet}, but the family's subnets go from 1 to {len(family) - 1}")
    return routing.subnet or most_faithful(family, 0.6 * routing.cost)


def most_faithful(family: Family, limit: float) -> int:
    """Index of the subnet of highest fidelity whose relative cost is at most `limit`; the cheapest if none is."""
    members = list(enumerate(family.manifest.subnets))[1:]
    affordable = [member for member in members if (member[1].relative_latency or member[1].relative_macs) <= limit]
    if not affordable:
        return min(members, key=lambda member: member[1].relative_macs)[0]
    return max(affordable, key=lambda member: (member[1].fidelity or 0.0, member[1].relative_macs))[0]


def calibrate(setting: Setting) -> Setting:
    """The setting with the cheap subnet's relative cost: timed on this device now, or its MACs, as the study says.

    Original and subnet are timed in turn, so that a drift of the machine hits both.
    """
    study, start = setting.study, time.perf_counter()
    route = cheap_route(setting)
    if study.routing.costs == "macs":
        return dataclasses.replace(setting, relative_cost=setting.family.relative_macs[route])
    runners, _ = setting.runners({index: setting.family.networks[index] for index in (0, route)})
    images = setting.images[: study.training.prefix_batch].to(study.training.device)
    for runner in runners.values():
        runner(images)  # warm up
    rounds = [[_seconds(runners[index], images) for index in (0, route)] for _ in range(5)]
    original, cheap = (statistics.median(seconds) for seconds in zip(*rounds))
    return dataclasses.replace(
        setting, relative_cost=min(1.0, cheap / original), calibration_seconds=time.perf_counter() - start
    )


def _seconds(runner: Runner, images: Tensor) -> float:
    start = time.perf_counter()
    runner(images)
    costs.synchronize(images.device)
    return time.perf_counter() - start
