"""The window: images and their routes in, latents out. Here engines, caches and corrections meet.

A frozen prefix is in evaluation mode, so a latent does not depend on the batch it is computed in. For a window of
coming images each route's images are therefore run together in batches that suit the machine, whatever the order in
which the suffix takes its steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor

from .costs import Stopwatch
from .crops import RandomViews
from .data import allocate
from .engines import Runner
from .routing import Correction, MeasuredDifficulty, Residuals

CORRECTED_TOGETHER = 1024  # kept latents
SMALLEST_PASS = 4  # images; a smaller group is filled up


class LatentSource:
    """Computes, remembers and corrects latents.

    Args:
        images: uint8, shape (N, 3, H, W): the training images, on the CPU; or what gives them by their numbers like
            such a tensor. `RandomViews`, which are others in each epoch, must not be cached.
        runners: what runs each member of the family that routes point to, by its index; 0 is the original.
        batch_size: images a pass; what is left of a group goes in smaller ones.
        device: where latents are wanted.
        stopwatch: seconds go to `data`, `prefix`, `cache` and `correction`.
        cached: keep every (image, member) latent and never compute it again.
        correction: of all members but the original, or None; where latents are kept, see `correct`.
        residuals: what to remember of the corrected members' errors, or None.
        prices: expected cost of each member's pass over an image, relative to the original's, for `account`.
        measured: difficulty to measure on pairs, or None.
        by_clock: whether `account` goes by what passes took, once they did; else by the expected prices.
        memory_mib: a member's cache above this size goes to a memory-mapped file in `scratch`.
    """

    def __init__(
        self, images: Union[Tensor, RandomViews], runners: dict[int, Runner], batch_size: int, device: str,
        stopwatch: Stopwatch, cached: bool = False, correction: Optional[Correction] = None, memory_mib: int = 2048,
        scratch: Optional[Path] = None, residuals: Optional[Residuals] = None,
        prices: Optional[dict[int, float]] = None, by_clock: bool = False,
        measured: Optional[MeasuredDifficulty] = None,
    ) -> None:
        self.images, self.runners, self.batch_size, self.device = images, runners, batch_size, device
        self.stopwatch, self.cached, self.correction, self.residuals = stopwatch, cached, correction, residuals
        self.memory_mib, self.scratch = memory_mib, scratch
        self.prices, self.by_clock, self.measured = prices or {}, by_clock, measured
        self.computed = dict.fromkeys(runners, 0)  # images run through each member
        self.seconds = dict.fromkeys(runners, 0.0)  # that took
        self.whole_passes: list[float] = []  # seconds an image of the original's passes of `batch_size` images
        self._stores: dict[int, tuple[Tensor, Tensor]] = {}  # member: (latents, which are there)

    def window(self, indices: Tensor, routes: Tensor, pairs: Tensor, pair_route: int) -> Tensor:
        """Latents of a window.

        Args:
            indices: int64, shape (W,): images.
            routes: int64, shape (W,): the member of each.
            pairs: int64, shape (P,): images (any) that also go through `pair_route`, to learn the correction, or their
                difficulty.
            pair_route: the member that is corrected.

        Returns:
            Shape (W, ...), on the device.
        """
        latents: Optional[Tensor] = None
        for route in routes.unique().tolist():
            places = torch.nonzero(routes == route).flatten()
            part = self._of_member(route, indices[places])
            if route == 0 and len(pairs):
                self._pair(indices[places], part, pairs, pair_route)
            if route > 0 and self.correction is not None and not self.cached:
                with self.stopwatch("correction"):
                    part = self.correction.apply(route, part)
                    if self.residuals is not None:
                        part = self.residuals.apply(indices[places], part)
            if latents is None:
                layout = torch.channels_last if part.dim() == 4 else torch.contiguous_format
                shape = (len(indices), *part.shape[1:])
                latents = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
            latents[places.to(part.device)] = part
        return latents

    def keep(self, route: int, indices: Tensor) -> None:
        """Compute and keep what a cache lacks of a member's latents of images, int64 (B,), in as few passes as can be.

        A window would split them, and its rests run in smaller and slower passes.
        """
        if len(indices):
            self._of_member(route, indices)

    def correct(self, route: int) -> None:
        """Fit a member's map on all images whose latents of both networks are kept, and correct what is kept of it.

        Once, when no more originals are bought: nothing is corrected again in each epoch.
        """
        if route not in self._stores or 0 not in self._stores:
            return
        (latents, there), (originals, bought) = self._stores[route], self._stores[0]
        for chosen in torch.nonzero(there & bought).flatten().split(self.batch_size):
            self.correction.add(route, latents[chosen], originals[chosen])
        self.correction.fit(route)
        for chosen in torch.nonzero(there & ~bought).flatten().split(CORRECTED_TOGETHER):
            latents[chosen] = self.correction.apply(route, latents[chosen])

    def account(self) -> tuple[float, dict[int, float]]:
        """What all passes have cost so far, and what each member's pass over an image costs, in the original's passes.

        By the clock, if it is to go by it, from the first passes on: no time is spent on measuring before. The unit is
        the median of the original's whole passes, as `pet` makes them; that passes are smaller or slower behind another
        network's is a cost of mixing them. Until an original has been run, its cost is inferred from another member's
        and the expected price of that one.
        """
        prices = dict(self.prices)
        each = {route: self.seconds[route] / count for route, count in self.computed.items() if count}
        if self.by_clock and each:
            known = 0 if 0 in each else next(iter(each))
            unit = statistics.median(self.whole_passes) if self.whole_passes else each[known] / prices[known]
            prices |= {route: seconds / unit for route, seconds in each.items()}
        return sum(count * prices[route] for route, count in self.computed.items()), prices

    def _pair(self, indices: Tensor, original: Tensor, pairs: Tensor, route: int) -> None:
        paired = torch.isin(indices, pairs)
        if not paired.any() or (self.correction is None and self.measured is None):
            return
        cheap, theirs = self._of_member(route, indices[paired]), original[paired.to(original.device)]
        if self.measured is not None:
            with self.stopwatch("router"):
                self.measured.learn(indices[paired], cheap, theirs)
        if self.correction is not None:
            with self.stopwatch("correction"):
                self.correction.add(route, cheap, theirs)
                if self.residuals is not None and route in self.correction.maps:
                    self.residuals.learn(indices[paired], theirs - self.correction.apply(route, cheap))

    def _of_member(self, route: int, indices: Tensor) -> Tensor:
        if not self.cached:
            return self._compute(route, indices)
        if route in self._stores:
            missing = indices[~self._stores[route][1][indices]]
        else:
            missing = indices
        if len(missing):
            fresh = self._compute(route, missing)
            with self.stopwatch("cache"):
                if route not in self._stores:
                    self._stores[route] = self._new_store(fresh)
                latents, there = self._stores[route]
                latents[missing] = fresh.cpu()
                there[missing] = True
        with self.stopwatch("cache"):
            return self._stores[route][0][indices].to(self.device)

    def state(self) -> dict[str, Any]:
        """Counts and caches, for a checkpoint; the caches themselves, not copied."""
        state: dict[str, Any] = {
            "computed": {str(route): count for route, count in self.computed.items()},
            "seconds": {str(route): seconds for route, seconds in self.seconds.items()},
            "whole_passes": self.whole_passes,
        }
        for route, (latents, there) in self._stores.items():
            state |= {f"latents.{route}": latents, f"there.{route}": there}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.computed = {int(route): count for route, count in state["computed"].items()}
        self.seconds = {int(route): seconds for route, seconds in state["seconds"].items()}
        self.whole_passes = list(state["whole_passes"])
        for name, there in state.items():
            kind, _, route = name.partition(".")
            if kind == "there":
                kept = state[f"latents.{route}"]
                store, _ = self._new_store(kept)
                self._stores[int(route)] = (store.copy_(kept), there)

    def _compute(self, route: int, indices: Tensor) -> Tensor:
        self.computed[route] += len(indices)
        parts, start = [], self.stopwatch.seconds["prefix"]
        for chosen in _passes(indices, self.batch_size):
            before = self.stopwatch.seconds["prefix"]
            with self.stopwatch("data"):
                padding = chosen[-1:].expand(max(0, min(SMALLEST_PASS, self.batch_size) - len(chosen)))
                batch = self.images[torch.cat([chosen, padding])].to(self.device)
            with self.stopwatch("prefix"):
                parts.append(self.runners[route](batch)[: len(chosen)])
            if route == 0 and len(chosen) == self.batch_size:
                self.whole_passes.append((self.stopwatch.seconds["prefix"] - before) / len(chosen))
        self.seconds[route] += self.stopwatch.seconds["prefix"] - start
        return torch.cat(parts)

    def _new_store(self, example: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(self.images), *example.shape[1:])
        dtype = np.dtype(str(example.dtype).removeprefix("torch."))
        store = torch.from_numpy(allocate(shape, dtype, self.memory_mib, self.scratch))
        return store, torch.zeros(len(self.images), dtype=torch.bool)


def _passes(indices: Tensor, size: int) -> Iterator[Tensor]:
    """Indices in pieces of `size`, the rest in halves of it, the last at most `SMALLEST_PASS` long.

    Few sizes, because a network's first pass of each size costs time and memory: oneDNN makes new kernels for it.
    """
    place = 0
    while place < len(indices):
        while size > SMALLEST_PASS and size > len(indices) - place:
            size = max(SMALLEST_PASS, size // 2)
        yield indices[place : place + size]
        place += size
