"""The training loop: one for every method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Protocol, Union

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from . import costs
from .checkpoints import Checkpoint
from .config import TrainingConfig
from .crops import RandomViews
from .engines import Runner
from .latents import LatentSource
from .pet import Split
from .progress import Memory, Progress, part_of, restore, state_of
from .routing import Correction, EpochPlan, MeasuredDifficulty, Residuals

HEAD_BLOCK = 128  # images whose steps a linear head takes together, see `_head_steps`; 64 or 256 take as long


class Policy(Memory, Protocol):
    """Says each epoch which member an image gets: see `routing`."""

    route: int

    def plan(self, epoch: int, order: Tensor) -> EpochPlan: ...

    def observe(self, indices: Tensor, losses: Tensor) -> None: ...

    def account(self, spent: float, prices: dict[int, float]) -> None: ...

    def describe(self) -> str: ...


@dataclass
class Plan:
    """What a method does, for the one loop.

    Attributes:
        split: the network, cut.
        networks: the frozen prefixes that routes point to, by index in the family; none in full training.
        runners: what runs them.
        policy: routes.
        cached: keep latents.
        corrected: correct those of subnets.
        remembers: give each image back a part of what its corrected latents missed before.
        measured: difficulty that is measured on pairs, for the policy; None: it is not.
        prices: expected cost of each network's pass over an image relative to the original's, where the policy keeps
            to a budget.
        by_clock: keep to the budget by what passes take on this device, not by the expected prices.
        upfront: spent of the budget before training (the router's pass), in passes of the original over an image.
        seconds: what preparing cost already, by item (engine, router); counts as training time.
        before_epoch: called with the epoch (from 0), the optimizer and the epoch's first batch (latents and labels);
            may change the suffix and the optimizer. Its time is counted under `engine`.
        penalty: called in each step with the batch's mean loss, detached; what it returns is added to the loss.
        rebuilds: channels by layer that were dropped from the suffix, one entry a rebuilding, in order; needed to
            load what was trained.
        memory: what the method itself remembers from epoch to epoch; its `restore` may rebuild the suffix.
    """

    split: Split
    networks: dict[int, nn.Module]
    runners: dict[int, Runner]
    policy: Policy
    cached: bool = False
    corrected: bool = False
    remembers: bool = False
    measured: Optional[MeasuredDifficulty] = None
    prices: dict[int, float] = field(default_factory=dict)
    by_clock: bool = False
    upfront: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    before_epoch: Optional[Callable[[int, torch.optim.SGD, Tensor, Tensor], None]] = None
    penalty: Optional[Callable[[Tensor], Tensor]] = None
    rebuilds: list[dict[str, list[int]]] = field(default_factory=list)
    memory: Optional[Memory] = None


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        history: a row an epoch: epoch (from 1), train_seconds (so far), loss, original_share, and the accuracies that
            `evaluate` returned (NaN in epochs without evaluation).
        seconds: by item, and `train` for the whole without evaluation.
        computed: images run through each member, by index.
        suffix_macs: multiply-accumulates of the suffix's passes, both ways, of all images and epochs.
        peak_memory_mib: of the process or GPU while training.
        energy_j: joules, where the device tells.
    """

    history: pd.DataFrame
    seconds: dict[str, float]
    computed: dict[int, int]
    suffix_macs: float
    peak_memory_mib: float
    energy_j: Optional[float]


def fit(
    plan: Plan, images: Union[Tensor, RandomViews], labels: Tensor, config: TrainingConfig, learning_rate: float,
    seed: int, evaluate: Callable[[nn.Module], dict[str, float]], memory_mib: int = 2048,
    scratch: Optional[Path] = None, description: str = "training", checkpoint: Optional[Checkpoint] = None,
) -> Outcome:
    """Train the suffix of a plan; the prefix is never changed.

    Every image is used exactly once an epoch, the last batch may be smaller. SGD with momentum, learning rate on a
    cosine from its peak to zero.

    With a checkpoint, training goes on after the last epoch that it holds, as if it had never been stopped: seconds,
    joules and counts add up, and those that preparing the plan again took do not count. It is written outside the
    training time.

    Args:
        plan: what the method does.
        images: uint8, shape (N, 3, H, W), on the CPU; or views of N images, other ones in each epoch.
        labels: int64, shape (N,).
        config: epochs, batch_size, momentum, window, prefix_batch, device.
        learning_rate: peak.
        seed: of the order of images.
        evaluate: called with the suffix every `config.evaluate_every` epochs and after the last, outside the training
            time; returns percentages by name.
        memory_mib, scratch: limit and place of a cache of latents.
        description: of the progress bar; empty: no bar.
        checkpoint: where the state after each epoch but the last is kept; None keeps nothing.
    """
    device, count = config.device, len(images)
    suffix = plan.split.suffix.to(device).to(memory_format=torch.channels_last)
    trained = [name for name, parameter in suffix.named_parameters() if parameter.requires_grad]
    state = checkpoint.recall() if checkpoint is not None else None
    if state is not None and plan.memory is not None:
        plan.memory.restore(part_of(state, "method"))  # before the optimizer is given the parameters
    parameters = [suffix.get_parameter(name) for name in trained]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=config.momentum, fused=True)
    stopwatch = costs.Stopwatch(device)
    in_sample = plan.policy.pairs >= count and not isinstance(images, RandomViews)
    correction = Correction(seed, in_sample) if plan.corrected else None
    residuals = Residuals(count) if plan.remembers else None
    source = LatentSource(
        images, plan.runners, config.prefix_batch, device, stopwatch, plan.cached, correction, memory_mib, scratch,
        residuals, plan.prices, plan.by_clock, plan.measured,
    )
    generator = torch.Generator().manual_seed(seed)
    labels_there = labels.to(device)
    steps = config.epochs * math.ceil(count / config.batch_size)
    memories = {"policy": plan.policy, "latents": source, "correction": correction, "residuals": residuals,
                "measured": plan.measured}
    run = Progress()
    if state is not None:
        run = restore(state, suffix, trained, optimizer, generator, memories)
        stopwatch.seconds.update(run.seconds)
        plan.seconds = run.prepared
        del state
    step = len(run.history) * math.ceil(count / config.batch_size)
    # `before_epoch` may freeze a part of the head for a time
    alone = _is_head(suffix) and plan.penalty is None and plan.before_epoch is None
    together = HEAD_BLOCK // config.batch_size * config.batch_size if alone else 0  # 0: a batch is no part of a block
    costs.reset_peak_memory(device)
    energy = costs.energy_counter_j()
    done = len(run.history)
    bar = tqdm(
        total=config.epochs * count, initial=done * count, desc=description, unit="image", disable=not description
    )
    for epoch in range(done, config.epochs):
        with stopwatch("train"):
            if isinstance(images, RandomViews):
                with stopwatch("data"):
                    images.start(epoch)
            order = torch.randperm(count, generator=generator)
            if epoch and plan.prices:
                spent, prices = source.account()
                plan.policy.account(plan.upfront + spent, prices)
            epoch_plan = plan.policy.plan(epoch, order)
            if plan.cached and epoch:
                source.keep(0, order[epoch_plan.routes[order] == 0])
                if correction is not None and epoch_plan.settled:
                    with stopwatch("correction"):
                        source.correct(plan.policy.route)
            losses, paired = [], 0
            for window in _windows(order, epoch_plan, config):
                routes = epoch_plan.routes[window]
                latents = source.window(window, routes, epoch_plan.pairs, plan.policy.route)
                if not losses and plan.before_epoch is not None:  # here, for its first batch is at hand
                    with stopwatch("engine"):
                        optimizer.param_groups[0]["lr"] = _annealed(learning_rate, step, steps)
                        first = window[: config.batch_size]
                        plan.before_epoch(epoch, optimizer, latents[: len(first)], labels_there[first])
                with stopwatch("suffix"):
                    size = together or config.batch_size
                    for batch, chosen in zip(latents.split(size), window.split(size)):
                        count_of_steps = math.ceil(len(batch) / config.batch_size)
                        rates = [_annealed(learning_rate, step + i, steps) for i in range(count_of_steps)]
                        if together:
                            taken = _head_steps(
                                suffix[0], batch, labels_there[chosen], optimizer, rates, config.batch_size
                            )
                        else:
                            optimizer.param_groups[0]["lr"] = rates[0]
                            taken = _step(suffix, batch, labels_there[chosen], optimizer, plan.penalty)
                        losses.append(taken)
                        step += count_of_steps
                plan.policy.observe(window, torch.cat(losses[-math.ceil(len(window) / size) :]).cpu())
                fresh_pairs = int(torch.isin(window, epoch_plan.pairs).sum())
                paired += fresh_pairs
                if correction is not None and fresh_pairs and paired == len(epoch_plan.pairs):
                    with stopwatch("correction"):
                        correction.fit(plan.policy.route)
                bar.update(len(window))
        due = (epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs
        with stopwatch("eval"):
            run.suffix_macs += count * costs.training_macs(suffix, latents[:1])  # a suffix may change between epochs
            reached = evaluate(suffix) if due else {}
        seconds_so_far = stopwatch.seconds["train"] + sum(plan.seconds.values())
        run.history.append(
            {
                "epoch": epoch + 1, "train_seconds": seconds_so_far, "loss": torch.cat(losses).mean().item(),
                "original_share": (epoch_plan.routes == 0).float().mean().item(), **reached,
            }
        )
        if reached:
            bar.set_postfix({name: f"{value:.1f}" for name, value in reached.items()})
        run.peak_memory_mib = max(run.peak_memory_mib, costs.peak_memory_mib(device))
        if checkpoint is not None and epoch + 1 < config.epochs:
            run.seconds, run.prepared = dict(stopwatch.seconds), plan.seconds
            run.energy_j, energy = costs.add_energy_j(run.energy_j, energy)
            checkpoint.keep(state_of(run, suffix, trained, optimizer, generator, memories | {"method": plan.memory}))
            costs.reset_peak_memory(device)  # writing is no part of training
    bar.close()
    for name in trained:
        suffix.get_parameter(name).requires_grad_(True)  # also what `before_epoch` froze for a time was trained
    run.energy_j, _ = costs.add_energy_j(run.energy_j, energy)
    seconds = dict(stopwatch.seconds)
    for item, value in plan.seconds.items():
        seconds[item] = seconds.get(item, 0.0) + value
        seconds["train"] += value
    return Outcome(
        pd.DataFrame(run.history), seconds, source.computed, run.suffix_macs, run.peak_memory_mib, run.energy_j
    )


def _windows(order: Tensor, plan: EpochPlan, config: TrainingConfig) -> list[Tensor]:
    """The order in pieces; pairs at its front are pieces of their own, so that what follows is corrected already.

    A piece is a whole number of batches long, except the last: batches are the same whatever the window.
    """
    size = max(config.batch_size, config.window // config.batch_size * config.batch_size)
    front = len(plan.pairs) if torch.equal(order[: len(plan.pairs)], plan.pairs) else 0
    front = math.ceil(front / config.batch_size) * config.batch_size
    pieces = [*order[:front].split(size), *order[front:].split(size)]
    return [piece for piece in pieces if len(piece)]


def _annealed(peak: float, step: int, steps: int) -> float:
    """The learning rate of a step: on a cosine from its peak to zero."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def _step(
    suffix: nn.Module, latents: Tensor, labels: Tensor, optimizer: torch.optim.SGD,
    penalty: Optional[Callable[[Tensor], Tensor]],
) -> Tensor:
    """One step; returns the loss of each image, shape (B,), without the penalty."""
    losses = functional.cross_entropy(suffix(latents), labels, reduction="none")
    total = losses.mean()
    if penalty is not None:
        total = total + penalty(total.detach())
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    optimizer.step()
    return losses.detach()


def _is_head(suffix: nn.Sequential) -> bool:
    """Whether all of it is one linear layer with a bias, trained as a whole."""
    layers = list(suffix.children())
    if len(layers) != 1 or type(layers[0]) is not nn.Linear or layers[0].bias is None:
        return False
    return all(parameter.requires_grad for parameter in suffix.parameters())


@torch.no_grad()
def _head_steps(
    head: nn.Linear, latents: Tensor, labels: Tensor, optimizer: torch.optim.SGD, rates: list[float], batch_size: int
) -> Tensor:
    """Several of `_step` for a linear head alone, which end where they would one by one, but for rounding.

    A step moves the logits of images yet to come by what it moves the weights, times their latents. So for a block of
    images the steps are taken on its logits (B, classes) and on how its momentum moves these, through the products of
    its latents with each other (B, B), and weights and momentum are written once at the end. One by one, each step
    would read and write all weights three times over, which takes longer than the arithmetic.

    Args:
        head: to be trained.
        latents, labels: shapes (B, channels) and (B,), in the order of the batches.
        optimizer: whose momentum is used and kept.
        rates: the learning rate of each step.
        batch_size: images a step; the last may have fewer.

    Returns:
        The loss of each image before its own step, shape (B,).
    """
    momentum = optimizer.param_groups[0]["momentum"]
    weight_buffer, bias_buffer = (_momentum_buffer(optimizer, parameter) for parameter in (head.weight, head.bias))
    count, last = len(latents), len(rates) - 1
    sizes = torch.full((count, 1), float(batch_size), device=latents.device)  # of the batch that an image is in
    sizes[last * batch_size :] = count - last * batch_size
    logits, velocity = head(latents), torch.addmm(bias_buffer, latents, weight_buffer.T)
    products = (latents @ latents.T).add_(1).div_(sizes.T)  # the bias is a channel that is always one
    errors, wanted = torch.empty_like(logits), functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    for step, rate in enumerate(rates):
        start, stop = step * batch_size, min(count, (step + 1) * batch_size)
        error = torch.softmax(logits[start:stop], 1, out=errors[start:stop]).sub_(wanted[start:stop])
        coming = velocity[stop:].addmm_(products[stop:, start:stop], error, beta=momentum)
        logits[stop:].add_(coming, alpha=-rate)
    # of each step's gradient: how far it has moved the weights by the end, and how much of it is left in the momentum
    moved, left = [0.0] * len(rates), [momentum ** (last - step) for step in range(len(rates))]
    for step in reversed(range(len(rates))):
        moved[step] = rates[step] + (momentum * moved[step + 1] if step < last else 0.0)
    shares = torch.tensor([moved, left], device=latents.device).repeat_interleave(batch_size, 1)[:, :count]
    movement, remainder = (errors * (share.unsqueeze(1) / sizes) for share in shares)
    for parameter, buffer, gradients in (
        (head.weight, weight_buffer, (movement.T @ latents, remainder.T @ latents)),
        (head.bias, bias_buffer, (movement.sum(0), remainder.sum(0))),
    ):
        parameter.sub_(buffer, alpha=momentum * moved[0]).sub_(gradients[0])
        buffer.mul_(momentum ** len(rates)).add_(gradients[1])
    return functional.cross_entropy(logits, labels, reduction="none")


def _momentum_buffer(optimizer: torch.optim.SGD, parameter: nn.Parameter) -> Tensor:
    """Where `torch.optim.SGD` keeps the momentum of a parameter, zero before its first step."""
    state = optimizer.state[parameter]
    if state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    return state["momentum_buffer"]


def accuracy(suffix: nn.Module, latents: Callable[[Tensor], Tensor], labels: Tensor, indices: Tensor) -> float:
    """Percentage of images classified rightly.

    Args:
        suffix: latents to logits.
        latents: gives the latents of images by their indices.
        labels: int64, shape (N,), of all images.
        indices: int64, shape (M,): which are evaluated.
    """
    right = 0
    with torch.inference_mode():
        for chosen in indices.split(64):
            right += (suffix(latents(chosen)).argmax(1).cpu() == labels[chosen]).sum().item()
    return 100 * right / len(indices)
