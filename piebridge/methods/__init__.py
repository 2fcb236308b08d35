"""The methods that are compared, by name. Each is a function from a `Setting` to a `Plan` for the one training loop."""

from __future__ import annotations

from collections.abc import Callable

from ..training import Plan
from . import (
    cached,
    elastic,
    fixed,
    full,
    last_k,
    oracle,
    pet,
    piebridge,
    piebridge_cached,
    prune,
    random,
    resolution,
)
from .setting import Setting, choose_side

REGISTRY: dict[str, Callable[[Setting], Plan]] = {
    "full": full.plan,
    "pet": pet.plan,
    "last_k": last_k.plan,
    "cached": cached.plan,
    "resolution": resolution.plan,
    "fixed": fixed.plan,
    "random": random.plan,
    "oracle": oracle.plan,
    "piebridge": piebridge.plan,
    "piebridge_cached": piebridge_cached.plan,
    "elastic": elastic.plan,
    "prune": prune.plan,
}

NEEDS_FAMILY = {"fixed", "random", "oracle", "piebridge", "piebridge_cached"}

__all__ = ["NEEDS_FAMILY", "REGISTRY", "Setting", "choose_side"]
