"""Routing: which prefix an image gets in each epoch, and the correction of what the cheap one gives.

Algorithm (importance routing). Let c be the cheap subnet's relative cost and C the budget.

1. First epoch: the first P images of the shuffled order go through the original and the subnet; a ridge map from the
   subnet's latents to the original's is fitted on these pairs. All others get the subnet, corrected by the map. (If
   all images are pairs and look the same in every epoch, the map need not generalise, see `Correction`.)
2. Every later epoch: the share q of the images with the highest priority goes to the original, the rest to the
   subnet. An image's priority is the rank of its last loss, plus `UNSEEN` if the original has not seen it yet, plus
   `difficulty` times the rank of the difficulty that the router read off it. Both ways are open in every epoch: an
   image whose loss falls becomes cheap again. (An alternative draws images with odds in proportion to their loss.)
   Where difficulty is measured (`measured_difficulty`), all images are pairs in the first epoch, and the rank of how
   little an image's two latents resemble each other is added: what no router has to predict any more.
3. Some of the originals' images go through the subnet as well, and the map is refitted. Where images are augmented at
   random, all of them do, and what the corrected subnet missed of each is remembered: when the image next gets the
   subnet, in another view, it gets a part of it back.
4. q is what the budget leaves after the subnet's passes, the pairs and the router.

Where latents are kept, an original is bought once, and what is bought by its loss has paid for the subnet already. So
`FIRST` of what the budget leaves buys originals at the very first, drawn at random, whose images never see the subnet;
the rest is bought by priority in the epochs that follow. These are pairs for nothing, and when the last of them is
bought, the map is fitted and the subnet's kept latents are corrected, once.

The artifact compared a batch's loss with its moving average and only ever made routes cheaper; each image's own last
loss serves better (the book has the figures).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch
from sklearn.linear_model import Ridge, RidgeCV
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

Choice = Literal["drawn", "highest", "random"]
SHRINKAGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the ridge, relative to the first pairs' summed variance
IN_SAMPLE = 1e-6  # likewise, where the pairs are all that will be corrected: against rounding only
FIRST = 2 / 3  # of what a cached run spends on originals, before any loss is known
UNSEEN = 0.3  # what an image that the original has not seen is ahead of others, in ranks of the loss (0 to 1)
POSITIONS = 16  # of a map or token sequence, drawn for each pair when a correction is fitted


class Correction:
    """Ridge maps from subnets' latents to the original's, shrunk towards the identity.

    A map acts on the channels: on vectors (B, C), on each position of maps (B, C, H, W), on each token (B, N, C).
    It is fitted anew when there are half as many pairs again as in its last fit, which bounds what fitting takes.
    Its strength is chosen by generalised cross-validation over the first pairs (scikit-learn's RidgeCV) and kept: what
    the pairs must overrule does not grow with their number.

    Where the latents to come are those of the pairs themselves, nothing has to be generalised: the nearer the map
    brings them to the original's, the better, and least squares brings them nearest.

    Args:
        seed: of the positions that are drawn.
        in_sample: the pairs are all that will be corrected. Maps and sequences, of which only some positions are
            seen, are corrected as ever.
    """

    def __init__(self, seed: int, in_sample: bool = False) -> None:
        self.in_sample = in_sample
        self.generator = torch.Generator().manual_seed(seed)
        self.pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.maps: dict[int, tuple[Tensor, Tensor]] = {}
        self.strengths: dict[int, float] = {}
        self.fitted: dict[int, int] = {}  # on how many pairs

    def add(self, route: int, cheap: Tensor, original: Tensor) -> None:
        """Keep pairs of latents, shape (B, ...), of the same images."""
        if self.in_sample and route in self.maps:
            return  # fitted to all that there is
        cheap, original = _channels_last(cheap), _channels_last(original)
        if cheap.dim() == 3:
            self.in_sample = False
            drawn = [torch.randperm(cheap.shape[1], generator=self.generator)[:POSITIONS] for _ in cheap]
            positions = torch.stack(drawn).unsqueeze(2).to(cheap.device)
            cheap, original = (side.take_along_dim(positions, 1).flatten(0, 1) for side in (cheap, original))
        self.pairs.setdefault(route, []).append((cheap.float().cpu(), original.float().cpu()))

    def fit(self, route: int) -> None:
        """Fit the map of one subnet on all its pairs so far, if they have grown by half; with fewer than two, none."""
        count = sum(len(cheap) for cheap, _ in self.pairs.get(route, []))
        if count < 1.5 * self.fitted.get(route, 1):
            return
        self.fitted[route] = count
        cheap, original = (torch.cat(side) for side in zip(*self.pairs[route]))
        # regressing the difference shrinks the map to the identity
        if self.in_sample:  # small singular values count here
            cheap, original = cheap.double(), original.double()
        inputs, difference = cheap.numpy(), (original - cheap).numpy()
        with threadpool_limits(1, user_api="blas"):  # helpers of the BLAS would spin on into the passes that follow
            if route not in self.strengths:
                scale = max(len(cheap) * cheap.var(0).mean().item(), 1e-12)
                self.strengths[route] = IN_SAMPLE * scale
                if not self.in_sample:
                    chosen = RidgeCV(alphas=[share * scale for share in SHRINKAGES]).fit(inputs, difference)
                    self.strengths[route] = float(chosen.alpha_)
            ridge = Ridge(self.strengths[route], solver="cholesky").fit(inputs, difference)
        weight = torch.from_numpy(ridge.coef_).float().T + torch.eye(cheap.shape[1])
        self.maps[route] = (weight, torch.from_numpy(ridge.intercept_).float())
        if self.in_sample:
            del self.pairs[route]  # no image's latents are to be kept

    def state(self) -> dict[str, Any]:
        """Pairs, maps and generator, for a checkpoint; maps in the layout they have, on which rounding depends."""
        state: dict[str, Any] = {"generator": self.generator.get_state()}
        for route, pairs in self.pairs.items():
            state[f"cheap.{route}"], state[f"original.{route}"] = (torch.cat(side) for side in zip(*pairs))
        for route, (weight, offset) in self.maps.items():
            transposed = not weight.is_contiguous()
            state |= {f"weight.{route}": weight.T if transposed else weight, f"offset.{route}": offset,
                      f"transposed.{route}": transposed, f"strength.{route}": self.strengths[route],
                      f"fitted.{route}": self.fitted[route]}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.generator.set_state(state["generator"])
        for name in state:
            kind, _, route = name.partition(".")
            if kind == "cheap":
                self.pairs[int(route)] = [(state[name], state[f"original.{route}"])]
            if kind == "weight":
                weight = state[name].T if state[f"transposed.{route}"] else state[name]
                self.maps[int(route)] = (weight, state[f"offset.{route}"])
                self.strengths[int(route)] = state[f"strength.{route}"]
                self.fitted[int(route)] = state[f"fitted.{route}"]

    def apply(self, route: int, latents: Tensor) -> Tensor:
        """The corrected latents, in the shape given; unchanged while no map is fitted."""
        if route not in self.maps:
            return latents
        weight, offset = (part.to(latents.device) for part in self.maps[route])
        if latents.dim() == 4:
            return torch.einsum("bchw,cd->bdhw", latents, weight) + offset.view(1, -1, 1, 1)
        return latents @ weight + offset


def _channels_last(latents: Tensor) -> Tensor:
    """(B, C) stays, maps become (B, H*W, C)."""
    return latents.flatten(2).transpose(1, 2) if latents.dim() == 4 else latents


class Residuals:
    """What the corrected subnet missed of each image when the original last saw it, and how much of it to give back.

    Under random augmentation two views of an image miss something alike. The share given back is the slope of the
    regression of new residuals on remembered ones, over all images that the original has seen again so far.

    Args:
        count: training images, N.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept: Optional[Tensor] = None  # (N, ...), zero where nothing is known
        self.agreement, self.energy = 0.0, 0.0

    @property
    def share(self) -> float:
        """Of a remembered residual that is given back, in [0, 1]; 0 until an image was seen twice."""
        return min(1.0, max(0.0, self.agreement / self.energy)) if self.energy else 0.0

    def learn(self, indices: Tensor, residuals: Tensor) -> None:
        """Remember residuals, shape (B, ...), of images, int64 (B,): original less corrected latents."""
        if self.kept is None:
            self.kept = torch.zeros((self.count, *residuals.shape[1:]), dtype=residuals.dtype)
        residuals, before = residuals.cpu(), self.kept[indices]
        again = before.flatten(1).any(1)
        self.agreement += (before[again] * residuals[again]).sum().item()
        self.energy += before[again].square().sum().item()
        self.kept[indices] = residuals

    def apply(self, indices: Tensor, latents: Tensor) -> Tensor:
        """Corrected latents, shape (B, ...), of images, int64 (B,), with their share of what was missed before."""
        return latents if not self.share else latents + self.share * self.kept[indices].to(latents.device)

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        known = {} if self.kept is None else {"kept": self.kept}
        return {"agreement": self.agreement, "energy": self.energy} | known

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.agreement, self.energy, self.kept = state["agreement"], state["energy"], state.get("kept")


class MeasuredDifficulty:
    """How little each image's latent from the cheap subnet resembles the original's, once an image has had both.

    Args:
        count: training images, N.
        weight: beside the rank of the loss.
    """

    def __init__(self, count: int, weight: float) -> None:
        self.weight = weight
        self.values = torch.full((count,), torch.nan)  # one less the cosine similarity, 0 to 2; NaN where not known
        self.seen, self.total = 0, 0.0  # originals' latents and their sum, to centre by their mean

    def learn(self, indices: Tensor, cheap: Tensor, original: Tensor) -> None:
        """Remember the difficulty of images, int64 (B,), by their latents of both networks, shape (B, ...).

        Both are centred by the mean of the original's latents so far.
        """
        cheap, original = cheap.flatten(1), original.flatten(1)
        self.seen, self.total = self.seen + len(original), self.total + original.sum(0)
        mean = self.total / self.seen
        self.values[indices] = 1 - functional.cosine_similarity(cheap - mean, original - mean).cpu()

    def priority(self) -> Tensor:
        """What is added to the rank of the loss, shape (N,)."""
        return self.weight * ranks(self.values)

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {"values": self.values, "seen": self.seen} | ({"total": self.total} if self.seen else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.values, self.seen, self.total = state["values"], state["seen"], state.get("total", 0.0)


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch does.

    Attributes:
        routes: int64, shape (N,): the subnet of each training image, 0 is the original.
        pairs: int64, shape (P,): images that go through the original and the cheap subnet, to fit the correction.
        settled: where latents are kept: with this epoch's originals the last ones are bought.
    """

    routes: Tensor
    pairs: Tensor
    settled: bool = False


NO_PAIRS = torch.empty(0, dtype=torch.int64)


class FixedRoute:
    """Every image gets the same subnet in every epoch; with pairs in the first, if the latents are corrected.

    Args:
        route: the subnet.
        pairs: images paired in the first epoch; 0 for the original or without correction.
        name: what `describe` says; default: the subnet.
    """

    def __init__(self, route: int, pairs: int = 0, name: str = "") -> None:
        self.route, self.pairs = route, pairs
        self.name = name or ("original" if route == 0 else f"subnet {route}")

    def plan(self, epoch: int, order: Tensor) -> EpochPlan:
        """The routes of an epoch, given its shuffled order, int64 (N,)."""
        routes = torch.full((len(order),), self.route)
        pairs = order[: self.pairs] if epoch == 0 else NO_PAIRS
        routes[pairs] = 0
        return EpochPlan(routes, pairs)

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Losses, shape (B,), of the images that were just trained on; a fixed route does not care."""

    def account(self, spent: float, prices: dict[int, float]) -> None:
        """What latents have cost so far; a fixed route does not care."""

    def state(self) -> dict[str, Any]:
        """Nothing changes from epoch to epoch."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing was kept."""

    def describe(self) -> str:
        return self.name


class SharedRoute:
    """A cheap subnet for most images, the original for a share of them that changes from epoch to epoch.

    Args:
        count: training images, N.
        route: the cheap subnet.
        share: q, of the images that get the original in each epoch after the first; where latents are kept, of those
            that are bought after the first epoch.
        pairs: P, images paired in the first epoch.
        refit_pairs: at most so many images of the original's share are paired in every later epoch.
        choice: of the share: those of the `highest` priority, `drawn` with odds in proportion to the last loss, or at
            `random`.
        difficulty: shape (N,), of the router, already weighted: added to the rank of the loss (`highest`) or to the
            logarithm of the odds (`drawn`); None without a router.
        measured: difficulty that becomes known in the first epoch, added likewise; None: it is not measured.
        seed: of random draws and of ties.
        buy_epochs: 0: the share is chosen anew in every epoch. Else (where latents are kept and an original is paid
            once): the share grows evenly over so many epochs and an image that got the original keeps it.
        first: share of the images that get the original in the first epoch, where latents are kept.
        pass_size: images a pass: until the last of those epochs, what is bought fills whole passes.
        permanent: the highest difficulty alone decides, whatever the losses.
        budget: to be met: the share follows what latents turn out to cost, see `account`; None: it stays.
    """

    def __init__(
        self, count: int, route: int, share: float, pairs: int, refit_pairs: int = 0, choice: Choice = "highest",
        difficulty: Optional[Tensor] = None, seed: int = 0, buy_epochs: int = 0, permanent: bool = False,
        budget: Optional[Budget] = None, measured: Optional[MeasuredDifficulty] = None, pass_size: int = 1,
        first: float = 0.0,
    ) -> None:
        self.pass_size, self.first = pass_size, round(first * count / pass_size) * pass_size
        self.expected_share, self.budget, self.measured = first + share, budget, measured
        self.known_costs: Optional[tuple[float, float, float]] = None
        self.count, self.route, self.share, self.permanent = count, route, share, permanent
        self.pairs, self.refit_pairs, self.choice = min(pairs, count), refit_pairs, choice
        self.buy_epochs = buy_epochs
        self.difficulty = torch.zeros(count) if difficulty is None else difficulty
        self.losses = torch.full((count,), torch.nan)
        self.bought = torch.zeros(count, dtype=torch.bool)
        self.generator = torch.Generator().manual_seed(seed)

    def plan(self, epoch: int, order: Tensor) -> EpochPlan:
        """The routes of an epoch, given its shuffled order, int64 (N,)."""
        routes = torch.full((self.count,), self.route)
        if epoch == 0:
            pairs, bought = order[: self.pairs], order[: max(self.pairs, self.first)]
            routes[bought] = 0
            self.bought[bought] = True
            return EpochPlan(routes, pairs)
        priority = self._priority()
        if self.budget is not None and self.known_costs is not None:
            self.share = self.budget.share(epoch, *self.known_costs)
        wanted = round(self.share * self.count)
        if self.buy_epochs:
            if epoch < self.buy_epochs:
                wanted = int(wanted * epoch / self.buy_epochs) // self.pass_size * self.pass_size
            wanted += self.first
            priority[self.bought] = torch.inf
        chosen = priority.topk(min(wanted, self.count)).indices
        routes[chosen] = 0
        self.bought[chosen] = True
        if self.buy_epochs:
            return EpochPlan(routes, NO_PAIRS, settled=epoch == self.buy_epochs)
        return EpochPlan(routes, chosen[torch.randperm(len(chosen), generator=self.generator)][: self.refit_pairs])

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Remember the losses, shape (B,), of the images that were just trained on."""
        self.losses[indices] = losses

    def account(self, spent: float, prices: dict[int, float]) -> None:
        """What latents have cost so far, and each member's pass over an image, in passes of the original."""
        self.known_costs = (spent, prices[0], prices[self.route])

    def state(self) -> dict[str, Any]:
        """Losses, what was bought and generator, for a checkpoint."""
        return {"losses": self.losses, "bought": self.bought, "generator": self.generator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.losses, self.bought = state["losses"], state["bought"]
        self.generator.set_state(state["generator"])

    def describe(self) -> str:
        return f"subnet {self.route}, {100 * self.expected_share:.0f} % original"

    def _priority(self) -> Tensor:
        noise = torch.rand(self.count, generator=self.generator)
        if self.permanent:
            return self.difficulty + 1e-6 * noise
        if self.choice == "random":
            return noise
        difficulty = self.difficulty if self.measured is None else self.difficulty + self.measured.priority()
        if self.choice == "highest":
            return ranks(self.losses) + UNSEEN * ~self.bought + difficulty + 1e-6 * noise
        # the largest of log odds + Gumbel noise are a draw without replacement
        odds = self.losses.nan_to_num(nan=torch.inf).clamp(1e-6, 1e6).log() + difficulty
        return odds - (-noise.clamp(min=1e-9).log()).log()


def ranks(values: Tensor) -> Tensor:
    """Ranks of a vector, scaled to [0, 1]; NaN ranks highest."""
    order = values.nan_to_num(nan=torch.inf).argsort(stable=True)
    result = torch.empty(len(values))
    result[order] = torch.linspace(0, 1, len(values))
    return result


@dataclass(frozen=True)
class Budget:
    """What may be spent on the latents of a whole training, in passes of the original over an image.

    Attributes:
        total: of all passes, the pairs' and the router's among them.
        count: training images, N.
        epochs: of training.
        refit: at most so many images of the original's share are paired in every epoch after the first.
    """

    total: float
    count: int
    epochs: int
    refit: int

    def share(self, epoch: int, spent: float, original: float, cheap: float) -> float:
        """The share of images that may get the original in each epoch from this one on, such that the budget is met.

        Args:
            epoch: the next one, counted from 0.
            spent: so far.
            original: cost of the original's pass over an image: 1, or what it turned out to be.
            cheap: cost of the subnet's.
        """
        each = (self.total - spent) / (self.epochs - epoch) - self.count * cheap  # of an epoch, beside the subnet
        wanted = each / original
        if wanted > self.refit:  # an original saves a subnet's pass, unless it is a pair
            wanted = (each - self.refit * cheap) / max(original - cheap, 1e-9)
        return min(1.0, max(0.0, wanted / self.count))


def original_share(
    budget: float, cheap: float, router: float, count: int, epochs: int, pairs: int, refit: int
) -> float:
    """q: the share of images that get the original in each epoch after the first, if all passes cost as expected.

    Args:
        budget: mean cost of a latent over the whole training, relative to the original's.
        cheap: relative cost of the cheap subnet.
        router: relative cost of the router's one pass over an image.
        count: training images.
        epochs: of training.
        pairs: images paired in the first epoch, each costing the original and the subnet.
        refit: at most so many images of the original's share are paired in every later epoch.

    Raises:
        ValueError: the budget does not even pay for the subnet.
    """
    first = count * cheap + min(pairs, count) + router * count
    left = budget * epochs * count - first - (epochs - 1) * count * cheap
    if left < 0:
        cheaper = "a cheaper routing.subnet or fewer routing.pairs"
        raise ValueError(_too_small("routing.cost", budget, budget - left / (epochs * count), cheaper))
    return Budget(budget * epochs * count, count, max(2, epochs), refit).share(1, first, 1.0, cheap)


def cached_shares(budget: float, cheap: float, router: float) -> tuple[float, float]:
    """The shares of images whose original a cached run buys in the first epoch and later, such that a budget is met.

    The first are drawn and do without the subnet; of what the budget leaves beside the subnet they get `FIRST`.

    Args:
        budget: cost of all latents relative to one pass of the original over all images.
        cheap, router: as for `original_share`.

    Raises:
        ValueError: the budget does not even pay for the subnet.
    """
    left = budget - cheap - router
    if left < 0:
        raise ValueError(_too_small("routing.cached_cost", budget, budget - left, "a cheaper routing.cached_subnet"))
    first = min(1.0, FIRST * left / max(1.0 - cheap, 1e-9))
    return first, min(1.0 - first, (1 - FIRST) * left)


def _too_small(key: str, budget: float, needed: float, cheaper: str) -> str:
    return (
        f"{key}: {budget} does not pay for the cheap subnet, the pairs and the router, which take {needed:.2f} alone; "
        f"raise it, or choose {cheaper}"
    )
