"""The loop: every image once an epoch, batches that no window changes, a schedule that ends at zero."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import bare_setting, random_backbone, random_images, tiny_study
from torch import nn

from piebridge.config import TrainingConfig
from piebridge.methods import REGISTRY
from piebridge.pet import Split
from piebridge.routing import NO_PAIRS, EpochPlan, FixedRoute
from piebridge.training import Plan, _head_steps, _is_head, _step, _windows, accuracy, fit

LABELS = torch.arange(13) % 3


class Watched:
    """A policy that remembers which images were trained on, in order, and their losses."""

    def __init__(self, policy):
        self.policy, self.route, self.pairs = policy, policy.route, policy.pairs
        self.seen, self.losses, self.epochs = [], [], []

    def plan(self, epoch, order):
        self.seen.append([])
        self.epochs.append(epoch)
        return self.policy.plan(epoch, order)

    def observe(self, indices, losses):
        self.seen[-1] += indices.tolist()
        self.losses += losses.tolist()
        self.policy.observe(indices, losses)

    def describe(self):
        return self.policy.describe()


def train(setting, method, labels=LABELS, evaluate=lambda suffix: {}, rate=0.05):
    plan = REGISTRY[method](setting)
    plan.policy = Watched(plan.policy)
    outcome = fit(plan, setting.images, labels, setting.study.training, rate, 0, evaluate)
    return plan, outcome


def trained_of(plan):
    return {name: value for name, value in plan.split.suffix.named_parameters() if value.requires_grad}


def assert_same_training(one, other):
    assert one[0].policy.seen == other[0].policy.seen
    for name, value in trained_of(one[0]).items():
        torch.testing.assert_close(trained_of(other[0])[name], value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one[0].policy.losses, other[0].policy.losses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, 13, 20])
def test_every_image_once_an_epoch_also_in_a_ragged_batch(batch_size):
    setting = bare_setting(random_backbone("embedded"), f"training.batch_size={batch_size}")
    plan, outcome = train(setting, "pet")
    assert [sorted(epoch) for epoch in plan.policy.seen] == [list(range(13))] * 3
    assert plan.policy.seen[0] != plan.policy.seen[1]
    assert outcome.computed == {0: 39}
    assert outcome.history["epoch"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(("window", "prefix_batch"), [(1, 1), (5, 3), (256, 32)])
@pytest.mark.parametrize("method", ["pet", "cached", "full"])
def test_windows_change_nothing(method, window, prefix_batch):
    backbone = random_backbone("embedded")
    one = train(bare_setting(backbone), method)
    other = train(bare_setting(backbone, f"training.window={window} training.prefix_batch={prefix_batch}"), method)
    assert_same_training(one, other)


@pytest.mark.parametrize("method", ["pet", "cached"])
@pytest.mark.parametrize("kind", ["adapter", "lora", "last_k"])
def test_windows_change_nothing_at_a_deep_cut(method, kind):
    backbone = random_backbone("embedded")
    one = train(bare_setting(backbone, f"pet.kind={kind}"), method, rate=0.01)
    overrides = f"pet.kind={kind} training.window=4 training.prefix_batch=2"
    other = train(bare_setting(backbone, overrides), method, rate=0.01)
    assert_same_training(one, other)


def test_originals_of_a_cache_come_in_whole_passes_whatever_the_windows(tiny):
    task, study = tiny.task, tiny_study(
        "training.epochs=9 training.window=8 training.prefix_batch=8 routing.correction=false routing.cached_cost=0.95"
    )
    setting = dataclasses.replace(tiny.setting, study=study, images=task.images[task.splits["train"]])
    plan, sizes = REGISTRY["piebridge_cached"](setting), []
    original = plan.runners[0]
    plan.runners[0] = lambda images: sizes.append(len(images)) or original(images)
    labels = task.labels[task.splits["train"]]
    outcome = fit(plan, setting.images, labels, study.training, 0.01, 0, lambda suffix: {})
    bought = outcome.computed[0]
    assert bought >= 24  # of 90 images: more than three windows' worth
    assert sizes[: bought // 8 - 1] == [8] * (bought // 8 - 1)
    assert len(sizes) <= bought // 8 + 2  # what is left goes in halves of a pass


@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_cached_is_pet(kind):
    setting = bare_setting(random_backbone("resnet18"), f"pet.kind={kind} pet.blocks=1")
    images, reached = random_images(30, seed=5), []

    def evaluate(suffix):
        prefix, _ = setting.backbone.cut(plan_of_cut)
        reached.append(accuracy(suffix, lambda chosen: prefix(images[chosen]), torch.arange(30) % 3, torch.arange(30)))
        return {"test_accuracy": reached[-1]}

    plan_of_cut = setting.split().cut
    pet, cached = train(setting, "pet", evaluate=evaluate), train(setting, "cached", evaluate=evaluate)
    assert_same_training(pet, cached)
    assert reached[:3] == reached[3:]
    assert pet[1].computed == {0: 39}
    assert cached[1].computed == {0: 13}


def test_training_follows_the_seed_alone():
    setting = bare_setting(random_backbone("embedded"))
    one = train(setting, "pet")
    torch.manual_seed(99)
    assert_same_training(one, train(setting, "pet"))
    other = train(dataclasses.replace(setting, seed=1), "pet")
    assert not torch.equal(trained_of(one[0])["head.weight"], trained_of(other[0])["head.weight"])


def test_head_training_against_plain_sgd():
    """A linear layer trained by hand: softmax gradients, momentum, cosine from the peak to zero."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10, 3, 2, 2), dtype=torch.uint8, generator=generator)
    labels, suffix = torch.arange(10) % 2, nn.Sequential()
    suffix.add_module("head", nn.Linear(3, 2))
    weight, bias = (value.detach().double().numpy().copy() for value in (suffix.head.weight, suffix.head.bias))
    config = TrainingConfig(epochs=3, batch_size=4, momentum=0.9, window=8)
    policy = Watched(FixedRoute(0))

    def latents_of(batch):
        return batch.float().mean((2, 3)) / 255

    plan = Plan(Split("head", nn.Sequential(), suffix), {}, {0: latents_of}, policy)
    fit(plan, images, labels, config, 0.5, 0, lambda suffix: {})
    latents, steps, step = latents_of(images).double().numpy(), 9, 0
    velocity_w, velocity_b = np.zeros_like(weight), np.zeros_like(bias)
    for order in policy.seen:
        for start in range(0, 10, 4):
            chosen = order[start : start + 4]
            scores = latents[chosen] @ weight.T + bias
            share = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
            error = (share - np.eye(2)[labels[chosen].numpy()]) / len(chosen)
            rate = 0.25 * (1 + math.cos(math.pi * step / steps))
            velocity_w = 0.9 * velocity_w + error.T @ latents[chosen]
            velocity_b = 0.9 * velocity_b + error.sum(0)
            weight, bias, step = weight - rate * velocity_w, bias - rate * velocity_b, step + 1
    np.testing.assert_allclose(suffix.head.weight.detach().numpy(), weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(suffix.head.bias.detach().numpy(), bias, rtol=1e-4, atol=1e-5)


def test_evaluation_is_called_after_every_epoch_with_the_suffix():
    calls = []

    def evaluate(suffix):
        calls.append(suffix)
        return {"test_accuracy": float(len(calls))}

    plan, outcome = train(bare_setting(random_backbone("embedded")), "pet", evaluate=evaluate)
    assert calls == [plan.split.suffix] * 3
    assert outcome.history["test_accuracy"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("every", "evaluated"), [(2, [2, 3]), (3, [3]), (5, [3])])
def test_evaluation_every_few_epochs_and_after_the_last(every, evaluated):
    setting = bare_setting(random_backbone("embedded"), f"training.evaluate_every={every}")
    _, outcome = train(setting, "pet", evaluate=lambda suffix: {"test_accuracy": 1.0})
    history = outcome.history
    assert history["epoch"].tolist() == [1, 2, 3]
    assert history.loc[history["test_accuracy"].notna(), "epoch"].tolist() == evaluated


def test_seconds_count_preparation_and_not_evaluation():
    setting = bare_setting(random_backbone("embedded"))
    plan = REGISTRY["pet"](setting)
    plan.seconds = {"engine": 1000.0, "router": 500.0}
    outcome = fit(plan, setting.images, LABELS, setting.study.training, 0.01, 0, lambda suffix: {})
    assert 1500 < outcome.seconds["train"] < 1600
    assert outcome.seconds["engine"] == 1000
    assert outcome.history["train_seconds"].iloc[0] > 1500
    assert outcome.history["train_seconds"].is_monotonic_increasing
    parts = [value for name, value in outcome.seconds.items() if name not in ("train", "eval")]
    assert sum(parts) <= outcome.seconds["train"]


def test_learning_lowers_the_loss(tiny):
    task, study = tiny.task, tiny_study("training.epochs=6")
    setting = dataclasses.replace(tiny.setting, study=study, images=task.images[task.splits["train"]])
    _, outcome = train(setting, "pet", task.labels[task.splits["train"]], rate=0.03)
    assert outcome.history["loss"].iloc[-1] < 0.7 * outcome.history["loss"].iloc[0]
    assert isinstance(outcome.history, pd.DataFrame)


@settings(deadline=None)
@given(
    count=st.integers(1, 60), batch_size=st.integers(1, 9), window=st.integers(1, 40), pairs=st.integers(0, 60),
    in_front=st.booleans(),
)
def test_windows_are_whole_batches_in_order(count, batch_size, window, pairs, in_front):
    order = torch.randperm(count)
    paired = order[:pairs] if in_front else order.flip(0)[:pairs]
    plan = EpochPlan(torch.zeros(count, dtype=torch.int64), paired if pairs else NO_PAIRS)
    pieces = _windows(order, plan, TrainingConfig(batch_size=batch_size, window=window))
    assert torch.equal(torch.cat(pieces), order)
    assert all(len(piece) % batch_size == 0 for piece in pieces[:-1])
    assert all(0 < len(piece) <= max(batch_size, window) for piece in pieces)
    if in_front and 0 < pairs < count:
        ends = np.cumsum([len(piece) for piece in pieces])
        assert min(count, math.ceil(pairs / batch_size) * batch_size) in ends


def test_accuracy_is_the_share_that_is_right():
    latents = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1] * 30)]
    labels = torch.tensor([0, 1, 2, 1, 1] * 30)
    assert accuracy(nn.Identity(), lambda chosen: latents[chosen], labels, torch.arange(150)) == 80.0
    assert accuracy(nn.Identity(), lambda chosen: latents[chosen], labels, torch.tensor([3, 0])) == 50.0


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("sizes", [(4, 4, 4, 3), (4, 1), (4,), (3,), (4,) * 30], ids=str)
def test_steps_taken_together_are_those_of_autograd(momentum, sizes):
    """Two blocks of batches: the second starts with the momentum of the first."""
    generator = torch.Generator().manual_seed(0)
    blocks = [[torch.randn(size, 12, generator=generator) for size in sizes] for _ in range(2)]
    rates = [0.3 / (1 + step) for step in range(len(sizes))]
    reached = []
    for together in (False, True):
        torch.manual_seed(0)
        suffix = nn.Sequential(nn.Linear(12, 5))
        optimizer = torch.optim.SGD(suffix.parameters(), lr=1.0, momentum=momentum, fused=True)
        losses = []
        for block in blocks:
            labels = [torch.arange(len(batch)) % 5 for batch in block]
            if together:
                inputs = torch.cat(block), torch.cat(labels)
                losses.append(_head_steps(suffix[0], *inputs, optimizer, rates, sizes[0]))
                continue
            for batch, wanted, rate in zip(block, labels, rates):
                optimizer.param_groups[0]["lr"] = rate
                losses.append(_step(suffix, batch, wanted, optimizer, None))
        reached.append([torch.cat(losses), *(parameter.detach() for parameter in suffix.parameters())])
    for one, other in zip(*reached):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method, block, taken", [("pet", 128, "_head_steps"), ("pet", 3, "_step"), ("full", 128, "_step")]
)
def test_a_head_takes_its_steps_together(monkeypatch, method, block, taken):
    """Unless a batch is larger than a block, or more than a head is trained."""
    called = set()
    for name, step in (("_head_steps", _head_steps), ("_step", _step)):
        def watched(*arguments, name=name, step=step):
            called.add(name)
            return step(*arguments)
        monkeypatch.setattr(f"piebridge.training.{name}", watched)
    monkeypatch.setattr("piebridge.training.HEAD_BLOCK", block)
    train(bare_setting(random_backbone("embedded")), method)
    assert called == {taken}


@pytest.mark.parametrize("suffix, alone", [
    (nn.Sequential(nn.Linear(3, 2)), True),
    (nn.Sequential(nn.Linear(3, 2), nn.ReLU()), False),
    (nn.Sequential(nn.Linear(3, 2, bias=False)), False),
    (nn.Sequential(nn.Conv2d(3, 2, 1)), False),
    (nn.Sequential(nn.Linear(3, 2).requires_grad_(False)), False),
    (nn.Sequential(), False),
])
def test_only_a_lone_trained_linear_layer_is_a_head(suffix, alone):
    assert _is_head(suffix) == alone
