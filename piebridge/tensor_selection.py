"""ElasticTrainer: which tensors to train within a time budget (Huang, Yang and Gao 2023, arXiv 2312.14227).

Algorithm. Order the network's tensors from output to input. The backward pass takes, for tensor k, the time w_k of its
own gradient and the time p_k of bringing the gradient to it from the tensor before it. Training the set S therefore
takes the sum of w_k over S plus the sum of p_k down to the deepest tensor in S.

1. Once, measure w and p on this device, and the whole forward and backward pass.
2. Every few epochs take a step of the optimizer on one batch and score each tensor by how much its change lowers the
   loss; then put weights and optimizer back exactly as they were.
3. Choose S by dynamic programming: the largest sum of scores within the budget. Only S is trained until the next time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import ElasticConfig
from .costs import synchronize


@dataclass(frozen=True)
class BackwardProfile:
    """What one training step takes, in seconds.

    Attributes:
        tensors: all T parameters, from output to input in the order of execution.
        weight_seconds: shape (T,): of a tensor's own gradient, where the gradient of its layer's output is at hand.
        pass_seconds: shape (T,): of bringing the gradient to a tensor from the one before it.
        forward_seconds: of a whole forward pass.
        backward_seconds: of a whole backward pass in which every tensor is trained.
    """

    tensors: list[nn.Parameter]
    weight_seconds: np.ndarray
    pass_seconds: np.ndarray
    forward_seconds: float
    backward_seconds: float

    def share_of(self, selected: np.ndarray) -> float:
        """Share of the whole backward pass that training the selected tensors, bool (T,), takes."""
        deepest = np.flatnonzero(selected).max(initial=-1)
        seconds = self.weight_seconds[selected].sum() + self.pass_seconds[: deepest + 1].sum()
        return float(seconds / (self.weight_seconds.sum() + self.pass_seconds.sum()))


def profile_backward(network: nn.Module, batch: Tensor, labels: Tensor, iterations: int) -> BackwardProfile:
    """Measure a network on its device over some iterations, after one more to warm up.

    Means of the tensors' times are taken, and medians of whole passes.

    Layers (modules without children) are timed one by one while a pass runs through them: their backward pass for the
    input alone, then also for one tensor after the other; what a tensor adds is its own time. What happens between
    layers (residual sums, attention) is small and not itemised. Branches are put into a chain in the order of
    execution, as in the original.

    Args:
        network: every parameter requires a gradient; stays unchanged.
        batch: its input, shape (B, ...).
        labels: int64, shape (B,).
        iterations: how often everything is measured.
    """
    rounds = [_time_layers(network, batch) for _ in range(1 + iterations)][1:]
    tensors: list[nn.Parameter] = []
    weight_seconds: list[float] = []
    pass_seconds: list[float] = []
    passing = 0.0
    for calls in zip(*map(reversed, rounds)):  # the same call of every round, the network's last one first
        parameters = calls[0][0]
        totals = np.mean([seconds for _, seconds in calls], axis=0)
        for parameter, added in zip(parameters, np.diff(totals).clip(min=0)):
            tensors.append(parameter)
            weight_seconds.append(added)
            pass_seconds.append(passing)
            passing = 0.0
        passing += totals[0]
    known = set(tensors)
    for parameter in reversed(list(network.parameters())):
        if parameter not in known:  # of no layer, such as a class token: at the input, and quickly done
            tensors.append(parameter)
            weight_seconds.append(0.0)
            pass_seconds.append(passing)
            passing = 0.0
    whole = [_time_whole(network, tensors, batch, labels) for _ in range(1 + iterations)][1:]
    forward, backward = np.median(whole, axis=0)  # one hiccup of the machine must not eat up the budget
    return BackwardProfile(tensors, np.array(weight_seconds), np.array(pass_seconds), float(forward), float(backward))


def _time_layers(network: nn.Module, batch: Tensor) -> list[tuple[list[nn.Parameter], list[float]]]:
    """A row a call of a layer: its tensors, bias first; seconds backward for its input alone, then also for each."""
    rows = []

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        entry = inputs[0].detach().requires_grad_(inputs[0].requires_grad)
        parameters = list(layer.parameters())[::-1]
        again = layer.forward(entry.clone())  # not called: no hook; a copy: some layers work in place
        gradient = torch.ones_like(again)
        wanted = [entry] if entry.requires_grad else []
        seconds = [_seconds(lambda: torch.autograd.grad(again, wanted, gradient, True), batch) if wanted else 0.0]
        for parameter in parameters:
            wanted.append(parameter)
            seconds.append(_seconds(lambda: torch.autograd.grad(again, wanted, gradient, True), batch))
        rows.append((parameters, seconds))

    layers = [module for module in network.modules() if not list(module.children())]
    hooks = [layer.register_forward_hook(measure) for layer in layers]
    try:
        network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def _time_whole(network: nn.Module, tensors: list[Tensor], batch: Tensor, labels: Tensor) -> tuple[float, float]:
    losses = []
    forward = _seconds(lambda: losses.append(functional.cross_entropy(network(batch), labels)), batch)
    return forward, _seconds(lambda: torch.autograd.grad(losses[0], tensors, allow_unused=True), batch)


def _seconds(function: Callable[[], object], batch: Tensor) -> float:
    synchronize(batch.device)
    start = time.perf_counter()
    function()
    synchronize(batch.device)
    return time.perf_counter() - start


def backward_budget(rho: float, forward_seconds: float, backward_seconds: float) -> float:
    """Share of the whole backward pass that is left if a step is to take `rho` of what full training takes.

    Raises:
        ValueError: the forward pass alone takes longer.
    """
    ratio = forward_seconds / backward_seconds
    share = rho - (1 - rho) * ratio  # rho (1 + ratio) - ratio, exactly 1 where rho is
    if share <= 0:
        raise ValueError(
            f"elastic.rho: {rho} of the time of full training is less than its forward pass alone takes here "
            f"({ratio / (1 + ratio):.2f}); raise it"
        )
    return share


def importance(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Sequence[nn.Parameter], batch: Tensor,
    labels: Tensor,
) -> np.ndarray:
    """How much each tensor's change in one step of the optimizer lowers the loss of a batch, to first order.

    With w0 before and w1 after the step and g the gradient at w1, a tensor's importance is -sum(g * (w1 - w0)),
    divided by the largest magnitude of all. Weights and optimizer are afterwards bit by bit what they were.

    Args:
        network: every tensor requires a gradient.
        optimizer: of these tensors.
        tensors: T of them.
        batch, labels: the probe, shapes (B, ...) and (B,).

    Returns:
        Shape (T,), in [-1, 1]; zeros if the step changes nothing, or diverges.
    """
    before = [tensor.detach().clone() for tensor in tensors]
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad(set_to_none=True)
    functional.cross_entropy(network(batch), labels).backward()
    optimizer.step()
    loss = functional.cross_entropy(network(batch), labels)
    gradients = torch.autograd.grad(loss, list(tensors), allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        scores = [-(gradient * (now - was)).sum() for gradient, now, was in zip(gradients, tensors, before)]
        for tensor, was in zip(tensors, before):
            tensor.copy_(was)
    optimizer.zero_grad(set_to_none=True)
    optimizer.load_state_dict(state)
    values = torch.stack(scores).double().cpu().numpy()
    largest = np.abs(values).max()
    return values / largest if 0 < largest < np.inf else np.zeros_like(values)


def select(
    scores: np.ndarray, weight_seconds: np.ndarray, pass_seconds: np.ndarray, share: float, quanta: int
) -> np.ndarray:
    """The tensors of the largest summed score whose backward pass keeps to a budget, by dynamic programming.

    The deepest tensor of the best selection is one of T; given it, the way down is paid and the others form a
    knapsack of the tensors above it. One table of knapsacks, grown tensor by tensor, serves all T cases. Each time is
    rounded to whole steps, the nearest: what is selected may exceed the budget by half a step for every rounding.

    Args:
        scores, weight_seconds, pass_seconds: shape (T,), from output to input.
        share: of the whole backward time, the budget.
        quanta: steps that the whole backward time is divided into.

    Returns:
        bool, shape (T,); all False if no affordable tensor has a positive score.
    """
    scale = quanta / (weight_seconds.sum() + pass_seconds.sum())
    own = np.rint(weight_seconds * scale).astype(int)
    reach = np.rint(np.cumsum(pass_seconds) * scale).astype(int)
    budget = int(share * (own.sum() + reach[-1]))
    best = np.zeros(budget + 1)  # by steps to spend on own gradients: the largest score of the tensors so far
    taken = np.zeros((len(scores), budget + 1), dtype=bool)
    largest, deepest = 0.0, -1
    for index, score in enumerate(scores):
        left = budget - reach[index] - own[index]
        if left >= 0 and score + best[left] > largest:
            largest, deepest = score + best[left], index
        if own[index] <= budget:
            with_it = best[: budget + 1 - own[index]] + score
            taken[index, own[index] :] = with_it > best[own[index] :]
            best[own[index] :] = np.maximum(best[own[index] :], with_it)
    selected = np.zeros(len(scores), dtype=bool)
    if deepest >= 0:
        selected[deepest] = True
        left = budget - reach[deepest] - own[deepest]
        for index in reversed(range(deepest)):
            if taken[index, left]:
                selected[index] = True
                left -= own[index]
    return selected


class ElasticSelection:
    """Selects before an epoch what is trained: set `requires_grad` of exactly these tensors.

    Args:
        network: the whole network.
        config: rho, interval, quanta, profiled_iterations.
    """

    def __init__(self, network: nn.Module, config: ElasticConfig) -> None:
        self.network, self.config = network, config
        self.profile: Optional[BackwardProfile] = None

    def state(self) -> dict[str, Any]:
        """The profile and what is selected, for a checkpoint."""
        if self.profile is None:
            return {}
        places = {parameter: place for place, parameter in enumerate(self.network.parameters())}
        return {
            "order": torch.tensor([places[tensor] for tensor in self.profile.tensors]),
            "weight_seconds": torch.from_numpy(self.profile.weight_seconds),
            "pass_seconds": torch.from_numpy(self.profile.pass_seconds),
            "whole_seconds": [self.profile.forward_seconds, self.profile.backward_seconds],
            "selected": [parameter.requires_grad for parameter in places],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave: with the same measured times, and training the same tensors."""
        if not state:
            return
        parameters = list(self.network.parameters())
        self.profile = BackwardProfile(
            [parameters[place] for place in state["order"].tolist()], state["weight_seconds"].numpy(),
            state["pass_seconds"].numpy(), *state["whole_seconds"],
        )
        for parameter, selected in zip(parameters, state["selected"]):
            parameter.requires_grad_(selected)

    def before_epoch(self, epoch: int, optimizer: torch.optim.Optimizer, batch: Tensor, labels: Tensor) -> None:
        """Every `interval` epochs (the first is 0), with the epoch's first batch as the probe; profiles first of all.

        Raises:
            ValueError: rho does not even pay for the forward pass.
        """
        if epoch % self.config.interval:
            return
        self.network.requires_grad_(True)
        if self.profile is None:
            self.profile = profile_backward(self.network, batch, labels, self.config.profiled_iterations)
        profile = self.profile
        share = backward_budget(self.config.rho, profile.forward_seconds, profile.backward_seconds)
        scores = importance(self.network, optimizer, profile.tensors, batch, labels)
        selected = select(scores, profile.weight_seconds, profile.pass_seconds, share, self.config.quanta)
        if not selected.any():
            selected[0] = True  # nothing helps within the budget: the tensor nearest to the output still learns
        for tensor, chosen in zip(profile.tensors, selected):
            tensor.requires_grad_(bool(chosen))
            # tensors selected for the first time join others with a momentum; torch's fused SGD wants all or none
            optimizer.state[tensor].setdefault("momentum_buffer", torch.zeros_like(tensor))
