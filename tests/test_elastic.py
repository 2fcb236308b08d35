"""ElasticTrainer: the selection is the best one, probing leaves no trace, only what is selected is trained."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tiny import bare_setting, copied_state, random_backbone, random_images, same_tensors, tiny_study
from torch import nn

from piebridge.config import ElasticConfig
from piebridge.methods import REGISTRY
from piebridge.pet import split_all
from piebridge.tensor_selection import (
    BackwardProfile,
    ElasticSelection,
    backward_budget,
    importance,
    profile_backward,
    select,
)
from piebridge.training import fit

LABELS = torch.arange(13) % 3


def whole_network(name):
    return split_all(random_backbone(name), 3, seed=0).suffix


def sgd(network, rate=0.01):
    return torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, fused=True)


def step(network, optimizer, images, labels):
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()


def rounding(selected, share, quanta):
    """By how much of the whole rounding may exceed a budget: half a step a time, of those selected and of all."""
    return 0.5 * (selected.sum() + 1 + share * (len(selected) + 1)) / quanta


# ------------------------------------------------------------------------------------------------ dynamic program


def whole_steps(count, largest):
    return arrays.arrays(np.int64, count, elements=st.integers(0, largest))


@st.composite
def instances(draw):
    """Scores, times that are whole steps, and a budget in steps."""
    count = draw(st.integers(1, 9))
    scores = draw(arrays.arrays(np.float64, count, elements=st.integers(-20, 20).map(lambda value: value / 20)))
    own, passing = draw(whole_steps(count, 6)), draw(whole_steps(count, 4))
    own[0] += 1  # something takes time
    total = int(own.sum() + passing.sum())
    return scores, own, passing, total, draw(st.integers(0, total))


def steps_of(selected, own, passing):
    deepest = max(index for index, chosen in enumerate(selected) if chosen)
    return sum(own[selected]) + sum(passing[: deepest + 1])


@settings(deadline=None, max_examples=400)
@given(instances())
def test_selection_against_every_subset(instance):
    scores, own, passing, total, budget = instance
    best = 0.0
    for subset in itertools.product([False, True], repeat=len(scores)):
        chosen = np.array(subset)
        if chosen.any() and steps_of(chosen, own, passing) <= budget:
            best = max(best, scores[chosen].sum())
    selected = select(scores, own * 0.001, passing * 0.001, (budget + 0.5) / total, total)
    assert scores[selected].sum() == pytest.approx(best)
    if selected.any():
        assert steps_of(selected, own, passing) <= budget


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6), count=st.integers(1, 160), share=st.floats(0.01, 1.0), quanta=st.integers(100, 2000)
)
def test_selection_keeps_to_the_budget_up_to_rounding(seed, count, share, quanta):
    generator = np.random.default_rng(seed)
    times = generator.exponential(size=(2, count))
    selected = select(generator.normal(size=count), times[0], times[1], share, quanta)
    profile = BackwardProfile([], times[0], times[1], 1.0, 1.0)
    if selected.any():
        assert profile.share_of(selected) <= share + rounding(selected, share, quanta) + 1e-9


def test_all_is_selected_where_the_budget_is_everything():
    times = np.ones(5)
    assert select(np.ones(5), times, times, 1.0, 1000).all()


def test_nothing_is_selected_where_nothing_helps_or_is_affordable():
    times = np.ones(3)
    assert not select(-np.ones(3), times, times, 1.0, 1000).any()
    assert not select(np.ones(3), times, times, 0.1, 1000).any()


def test_a_deep_tensor_pays_for_the_way_down():
    """Alone it costs 1 + 3 of 6: affordable at two thirds, not at a half."""
    own, passing, scores = np.ones(3), np.ones(3), np.array([0.2, 0.1, 1.0])
    assert select(scores, own, passing, 4 / 6 + 1e-6, 6).tolist() == [False, False, True]
    assert select(scores, own, passing, 0.5 + 1e-6, 6).tolist() == [True, False, False]


def test_budget_of_the_backward_pass():
    """Full training takes 1 + 2; 0.6 of it is 1.8; the forward pass takes 1, so 0.8 of 2 are left."""
    assert backward_budget(0.6, 1.0, 2.0) == pytest.approx(0.4)
    assert backward_budget(0.533, 1.0, 2.0) == pytest.approx((0.533 - 1 / 3) * 3 / 2)
    assert backward_budget(1.0, 0.7, 0.9) == 1.0
    with pytest.raises(ValueError, match=r"elastic\.rho: 0\.3 .* \(0\.33\); raise it"):
        backward_budget(0.3, 1.0, 2.0)


# ----------------------------------------------------------------------------------------------------- importance


def test_importance_against_a_computation_by_hand():
    """Two inputs, two classes, a linear layer, momentum from an earlier step: gradients in closed form."""
    layer, inputs, labels = nn.Linear(2, 2), torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([0, 1])
    optimizer = sgd(layer, rate=0.1)
    step(layer, optimizer, inputs, labels)
    weight, bias = (value.detach().double().numpy().copy() for value in (layer.weight, layer.bias))
    momenta = [optimizer.state[value]["momentum_buffer"].double().numpy().copy() for value in layer.parameters()]

    def gradients(weight, bias):
        scores = inputs.double().numpy() @ weight.T + bias
        shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        error = (shares - np.eye(2)) / 2
        return error.T @ inputs.double().numpy(), error.sum(0)

    changes = [-0.1 * (0.9 * momentum + now) for momentum, now in zip(momenta, gradients(weight, bias))]
    after = gradients(weight + changes[0], bias + changes[1])
    raw = np.array([-(gradient * change).sum() for gradient, change in zip(after, changes)])
    found = importance(layer, optimizer, [layer.weight, layer.bias], inputs, labels)
    np.testing.assert_allclose(found, raw / np.abs(raw).max(), rtol=1e-4)
    assert np.abs(found).max() == 1


def test_importance_of_a_step_that_changes_nothing_is_zero():
    layer = nn.Linear(2, 2)
    found = importance(layer, sgd(layer, rate=0.0), list(layer.parameters()), torch.ones(1, 2), torch.tensor([0]))
    assert found.tolist() == [0.0, 0.0]


def test_importance_of_a_step_that_diverges_is_zero():
    layer = nn.Linear(2, 2)
    before = copied_state(layer)
    found = importance(layer, sgd(layer, rate=1e39), list(layer.parameters()), torch.ones(1, 2), torch.tensor([0]))
    assert found.tolist() == [0.0, 0.0]
    assert same_tensors(copied_state(layer), before)


@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize("name", ["embedded", "mobilenet_v2", "vit_tiny_patch16_224"])
def test_probing_leaves_weights_and_optimizer_bit_identical(name, trained_before):
    network, images, labels = whole_network(name), random_images(4), LABELS[:4]
    optimizer = sgd(network)
    if trained_before:
        step(network, optimizer, images, labels)
    other = copy.deepcopy(network)
    before, state = copied_state(network), copy.deepcopy(optimizer.state_dict())
    scores = importance(network, optimizer, list(network.parameters()), images, labels)
    assert np.isfinite(scores).all()
    assert np.abs(scores).max() == 1
    assert same_tensors(copied_state(network), before)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert after["state"].keys() == state["state"].keys()
    for index, kept in state["state"].items():
        assert torch.equal(after["state"][index]["momentum_buffer"], kept["momentum_buffer"])
    assert all(parameter.grad is None for parameter in network.parameters())
    # and the next step is the one that would have been taken without the probe
    other_optimizer = sgd(other)
    other_optimizer.load_state_dict(state)
    step(network, optimizer, images, labels)
    step(other, other_optimizer, images, labels)
    assert same_tensors(copied_state(network), copied_state(other))


# --------------------------------------------------------------------------------------------------------- profile


@pytest.mark.parametrize("name", ["embedded", "mobilenet_v2", "mobilenet_v3_small", "vit_tiny_patch16_224"])
def test_profile_knows_every_tensor_from_output_to_input(name):
    network = whole_network(name)
    before = copied_state(network)
    profile = profile_backward(network, random_images(2), LABELS[:2], 1)
    names = {parameter: key for key, parameter in network.named_parameters()}
    order = [names[tensor] for tensor in profile.tensors]
    assert sorted(order) == sorted(names.values())
    assert order[:2] == ["head.bias", "head.weight"]
    assert order.index("head.weight") < len(order) - 1 == order.index(next(iter(names.values())))
    assert (profile.weight_seconds >= 0).all()
    assert (profile.pass_seconds >= 0).all()
    assert profile.pass_seconds[0] == 0  # from the loss to the output nothing is passed
    assert profile.pass_seconds[1] == 0  # bias and weight share their layer's gradient
    assert profile.forward_seconds > 0
    assert profile.backward_seconds > 0
    assert same_tensors(copied_state(network), before)
    assert not any(module._forward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_profile_puts_a_layers_way_on_before_the_next_tensor(monkeypatch):
    """A clock that counts derivatives: each one wanted takes a second."""
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2, bias=False), nn.Tanh())
    now, grad = [0.0], torch.autograd.grad

    def slow_grad(outputs, inputs, *rest, **options):
        now[0] += len(inputs)
        return grad(outputs, inputs, *rest, **options)

    monkeypatch.setattr(torch.autograd, "grad", slow_grad)
    monkeypatch.setattr("piebridge.tensor_selection.time.perf_counter", lambda: now[0])
    profile = profile_backward(network, torch.ones(2, 3), torch.tensor([0, 1]), 2)
    assert [id(tensor) for tensor in profile.tensors] == [
        id(tensor) for tensor in (network[2].weight, network[0].bias, network[0].weight)
    ]
    assert profile.weight_seconds.tolist() == [1.0, 1.0, 1.0]
    assert profile.pass_seconds.tolist() == [1.0, 2.0, 0.0]  # tanh; the upper layer and the ReLU; none
    assert profile.backward_seconds == 3.0
    assert profile.share_of(np.array([True, False, True])) == pytest.approx(5 / 6)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["embedded", "mobilenet_v2"])
def test_achieved_backward_time_against_the_budget(name, share):
    """Of a measured profile: never above the budget but for rounding, and near it where every tensor helps."""
    network = whole_network(name)
    profile = profile_backward(network, random_images(2), LABELS[:2], 2)
    scores = np.random.default_rng(0).uniform(0.1, 1.0, len(profile.tensors))
    selected = select(scores, profile.weight_seconds, profile.pass_seconds, share, 1000)
    achieved = profile.share_of(selected)
    assert achieved <= share + rounding(selected, share, 1000)
    assert selected.any()


# ------------------------------------------------------------------------------------------------------- the method


def test_only_selected_tensors_require_gradients_until_the_next_selection():
    network, images, labels = whole_network("embedded"), random_images(4), LABELS[:4]
    selection, optimizer = ElasticSelection(network, ElasticConfig(rho=0.8, interval=2)), sgd(network)
    selection.before_epoch(0, optimizer, images, labels)
    first = [parameter.requires_grad for parameter in network.parameters()]
    assert any(first)
    assert not all(first)
    profile, before = selection.profile, copied_state(network)
    share = backward_budget(0.8, profile.forward_seconds, profile.backward_seconds)
    selected = np.array([tensor.requires_grad for tensor in profile.tensors])
    assert profile.share_of(selected) <= share + rounding(selected, share, 1000)
    step(network, optimizer, images, labels)
    selection.before_epoch(1, optimizer, images, labels)
    assert [parameter.requires_grad for parameter in network.parameters()] == first
    step(network, optimizer, images, labels)
    after = copied_state(network)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    selection.before_epoch(2, optimizer, images, labels)
    assert selection.profile is profile  # measured once


def test_the_output_bias_learns_where_nothing_helps(monkeypatch):
    network = whole_network("embedded")
    monkeypatch.setattr("piebridge.tensor_selection.importance", lambda *given: -np.ones(len(given[2])))
    ElasticSelection(network, ElasticConfig(rho=1.0)).before_epoch(0, sgd(network), random_images(2), LABELS[:2])
    assert {key for key, value in network.named_parameters() if value.requires_grad} == {"head.bias"}


def test_frozen_tensors_are_bit_identical_after_training(monkeypatch):
    setting = bare_setting(random_backbone("embedded"), "elastic.interval=2 training.epochs=4")
    plan = REGISTRY["elastic"](setting)
    network, chosen = plan.split.suffix, []
    original, before_epoch = copied_state(network), plan.before_epoch

    def watched(epoch, *rest):
        before_epoch(epoch, *rest)
        chosen.append({key for key, value in network.named_parameters() if value.requires_grad})

    plan.before_epoch = watched
    outcome = fit(plan, setting.images, LABELS, setting.study.training, 0.01, 0, lambda suffix: {})
    assert chosen[0] == chosen[1]
    assert chosen[2] == chosen[3]
    after = copied_state(network)
    assert {key for key in after if not torch.equal(after[key], original[key])} == chosen[0] | chosen[2]
    assert all(parameter.requires_grad for parameter in network.parameters())  # saved as trained, all of them
    assert 0 < outcome.seconds["engine"] < outcome.seconds["train"]


def test_elastic_with_the_whole_budget_is_full_training(monkeypatch):
    setting = bare_setting(random_backbone("embedded"), "elastic.rho=1.0")
    monkeypatch.setattr("piebridge.tensor_selection.importance", lambda *given: np.ones(len(given[2])))
    states, macs = [], []
    for method in ("full", "elastic"):
        plan = REGISTRY[method](setting)
        outcome = fit(plan, setting.images, LABELS, setting.study.training, 0.01, 0, lambda suffix: {})
        states.append(copied_state(plan.split.suffix))
        macs.append(outcome.suffix_macs)
    assert same_tensors(*states)
    assert macs[0] == macs[1]


@pytest.mark.parametrize("method", ["elastic", "prune"])
def test_learning_lowers_the_loss(tiny, method):
    task, study = tiny.task, tiny_study("training.epochs=6")
    setting = dataclasses.replace(tiny.setting, study=study, images=task.images[task.splits["train"]])
    labels = task.labels[task.splits["train"]]
    outcome = fit(REGISTRY[method](setting), setting.images, labels, study.training, 0.001, 0, lambda suffix: {})
    assert outcome.history["loss"].iloc[-1] < 0.85 * outcome.history["loss"].iloc[0]


def test_fewer_multiply_accumulates_than_full_training():
    setting = bare_setting(random_backbone("embedded"), "elastic.rho=0.7")
    full, elastic = (
        fit(REGISTRY[method](setting), setting.images, LABELS, setting.study.training, 0.01, 0, lambda suffix: {})
        for method in ("full", "elastic")
    )
    assert elastic.suffix_macs < full.suffix_macs
