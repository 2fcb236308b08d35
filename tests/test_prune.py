"""PruneTrain: the lasso is what it says, what is dropped is used by nobody, the momentum stays with its channels."""

import copy
import dataclasses
import json
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import bare_setting, copied_state, random_backbone, random_images, same_tensors, tiny_study
from torch import nn

from piebridge import costs
from piebridge.backbones import Input, Pool
from piebridge.channel_pruning import (
    ChannelPruning,
    drop_channels,
    empty_channels,
    group_lasso,
    penalised_dimensions,
)
from piebridge.config import PruneConfig
from piebridge.experiment import load_trained, run
from piebridge.methods import REGISTRY
from piebridge.pet import split_all
from piebridge.training import fit

LABELS = torch.arange(13) % 3
CONVOLUTIONAL = ["embedded", "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small"]


def whole_network(name):
    return split_all(random_backbone(name), 3, seed=0).suffix.to(memory_format=torch.channels_last)


def small_network():
    """Two convolutions, a depthwise one between them, and a linear layer: every rule of the lasso once."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(5, 2),
    )


def forget(network, name, channels):
    """Zero, by hand, all weights that make or read some channels: those of the layers that the name's group couples."""
    layers = dict(network.named_modules())
    makers, readers = COUPLED[name]
    with torch.no_grad():
        for maker in makers:
            layers[maker].weight[channels] = 0
        for reader in readers:
            layers[reader].weight[:, channels] = 0


COUPLED = {  # by the first layer of a group: the layers that make its channels, and those that read them
    "layer2_1.conv1": (["layer2_1.conv1"], ["layer2_1.conv2"]),
    "layer2_0.downsample.0": (
        ["layer2_0.downsample.0", "layer2_0.conv2", "layer2_1.conv2"],
        ["layer2_1.conv1", "layer3_0.conv1", "layer3_0.downsample.0"],
    ),
    "block3.conv.0.0": (["block3.conv.0.0"], ["block3.conv.2"]),
    "block3.conv.2": (["block3.conv.2", "block2.conv.2"], ["block3.conv.0.0", "block4.conv.0.0"]),
    "head_of_embedded": (["layer3_0.downsample.0", "layer3_0.conv2", "layer3_1.conv2"], ["layer3_1.conv1", "head"]),
}
CASES = [
    ("embedded", "layer2_1.conv1"), ("embedded", "layer2_0.downsample.0"), ("embedded", "head_of_embedded"),
    ("resnet18", "layer2_1.conv1"), ("resnet18", "layer2_0.downsample.0"), ("mobilenet_v2", "block3.conv.0.0"),
    ("mobilenet_v2", "block3.conv.2"),
]


# ----------------------------------------------------------------------------------------------------------- lasso


def test_lasso_against_plain_loops():
    network, expected = small_network(), 0.0
    first, depthwise, second, last = (network[place].weight.detach().double().numpy() for place in (0, 1, 2, 5))
    for kernel in first:  # its inputs are the image's colours
        expected += math.sqrt((kernel**2).sum() + 1e-8)
    for kernel in second:
        expected += math.sqrt((kernel**2).sum() + 1e-8)
    for channel in range(4):
        expected += math.sqrt((second[:, channel] ** 2).sum() + 1e-8)
    for channel in range(5):  # its outputs are the classes
        expected += math.sqrt((last[:, channel] ** 2).sum() + 1e-8)
    assert depthwise.shape == (4, 1, 3, 3)
    assert group_lasso(penalised_dimensions(network)).item() == pytest.approx(expected, rel=1e-5)


def test_lasso_gradient_against_finite_differences():
    network = small_network().double()
    dimensions = penalised_dimensions(network)
    group_lasso(dimensions).backward()
    assert network[1].weight.grad is None  # depthwise
    generator = np.random.default_rng(0)
    for layer in dimensions:
        for _ in range(5):
            place = tuple(generator.integers(size) for size in layer.weight.shape)
            sides = []
            for shift in (1e-6, -1e-6):
                with torch.no_grad():
                    layer.weight[place] += shift
                    sides.append(group_lasso(dimensions).item())
                    layer.weight[place] -= shift
            assert layer.weight.grad[place].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-6)


def test_lasso_gradient_of_an_emptied_group_is_finite_and_zero():
    layer = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(layer.weight)
    group_lasso({layer: (0, 1)}).backward()
    assert torch.equal(layer.weight.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("name", [*CONVOLUTIONAL, "vit_tiny_patch16_224"])
def test_what_the_lasso_leaves_out(name):
    network = whole_network(name)
    dimensions = penalised_dimensions(network)
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert dimensions[layers[0]] == (0,)
    assert dimensions[network.head] == (1,)
    assert all(dimensions[layer] == (0, 1) for layer in list(dimensions)[1:-1])
    assert {layer for layer in layers if layer not in dimensions} == {
        layer for layer in layers if getattr(layer, "groups", 1) > 1
    }


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_lasso_has_its_share_at_the_first_step_and_keeps_its_weight(share):
    network = whole_network("embedded")
    pruning, loss = ChannelPruning(network, PruneConfig(lasso_share=share)), torch.tensor(2.5)
    penalty = pruning.penalty(loss).item()
    assert penalty / (loss.item() + penalty) == pytest.approx(share, rel=1e-5)
    weight = pruning.weight
    pruning.penalty(torch.tensor(0.1))
    assert pruning.weight == weight


def test_training_minimises_loss_and_lasso():
    """The first step of the loop against one by hand."""
    setting = bare_setting(random_backbone("embedded"), "training.epochs=1 training.batch_size=13")
    plan = REGISTRY["prune"](setting)
    other = copy.deepcopy(plan.split.suffix)
    outcome = fit(plan, setting.images, LABELS, setting.study.training, 0.01, 0, lambda suffix: {})
    loss = nn.functional.cross_entropy(other(setting.images), LABELS)
    lasso = group_lasso(penalised_dimensions(other))
    (loss + 0.25 * (loss / lasso).detach() * lasso).backward()  # 0.25 to 1 is a share of 0.2
    for before, after in zip(other.parameters(), plan.split.suffix.parameters()):
        torch.testing.assert_close(after, before - 0.01 * before.grad, rtol=1e-4, atol=1e-6)
    assert outcome.history["loss"].item() == pytest.approx(loss.item(), rel=1e-4)  # told without the lasso


# ------------------------------------------------------------------------------------------------------ rebuilding


@pytest.mark.parametrize(("name", "group"), CASES)
def test_dropping_computes_what_masking_does(name, group):
    network, images = whole_network(name), random_images(3)
    channels = [0, 2, 3, 7]
    forget(network, group, channels)
    with torch.no_grad():
        masked = network(images)
    found = empty_channels(network, images[:2], 1e-4)
    assert list(found.values()) == [channels]
    parameters, macs = costs.parameter_counts(network)[1], costs.macs(network, images)
    drop_channels(network, found, images[:2])
    with torch.no_grad():
        torch.testing.assert_close(network(images), masked, rtol=1e-4, atol=1e-5)
    assert costs.parameter_counts(network)[1] < parameters
    assert costs.macs(network, images) < macs
    assert empty_channels(network, images[:2], 1e-4) == {}


@pytest.mark.parametrize(("name", "group"), CASES)
def test_a_channel_stays_while_any_layer_of_its_group_uses_it(name, group):
    network, images = whole_network(name), random_images(2)
    forget(network, group, [1, 4])
    makers, readers = COUPLED[group]
    layers = dict(network.named_modules())
    with torch.no_grad():
        maker, reader = layers[makers[-1]].weight, layers[readers[-1]].weight
        maker[(1, 0, 0, 0)[: maker.dim()]] = 2e-4
    assert list(empty_channels(network, images, 1e-4).values()) == [[4]]
    with torch.no_grad():
        maker[1] = 0
        reader[(0, 4, 0, 0)[: reader.dim()]] = -2e-4
    assert list(empty_channels(network, images, 1e-4).values()) == [[1]]


@pytest.mark.parametrize("name", ["embedded", "resnet18", "mobilenet_v2"])
def test_several_groups_at_once(name):
    network, images = whole_network(name), random_images(3)
    groups = [group for other, group in CASES if other == name]
    for place, group in enumerate(groups):
        forget(network, group, [place, 6])
    with torch.no_grad():
        masked = network(images)
    found = empty_channels(network, images[:2], 1e-4)
    assert sorted(found.values()) == [[place, 6] for place in range(len(groups))]
    drop_channels(network, found, images[:2])
    with torch.no_grad():
        torch.testing.assert_close(network(images), masked, rtol=1e-4, atol=1e-5)


def test_everything_empty_leaves_two_channels_and_a_network_that_runs():
    for name in CONVOLUTIONAL:
        network, images = whole_network(name), random_images(2)
        drop_channels(network, empty_channels(network, images, 1e6), images)
        layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        assert all(layer.out_channels == 2 for layer in layers)
        assert network(images).shape == (2, 3)
        assert empty_channels(network, images, 1e6) == {}


def test_transformers_lose_hidden_units_of_their_perceptrons_only():
    network, images = whole_network("vit_tiny_patch16_224"), random_images(2)
    assert set(empty_channels(network, images, 1e6)) == {f"block{index}.mlp.fc1" for index in range(12)}
    with torch.no_grad():
        network.block3.mlp.fc1.weight[5:9] = 0
        network.block3.mlp.fc2.weight[:, 5:9] = 0
        masked = network(images)
    found = empty_channels(network, images, 1e-4)
    assert found == {"block3.mlp.fc1": [5, 6, 7, 8]}
    drop_channels(network, found, images)
    with torch.no_grad():
        torch.testing.assert_close(network(images), masked, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- momentum, loop


@pytest.mark.parametrize(("name", "group"), CASES)
def test_momentum_goes_with_the_kept_channels(name, group):
    """The rebuilt network's next step is the masked network's, seen from the kept channels."""
    network, images, labels = whole_network(name), random_images(4), LABELS[:4]
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, fused=True)
    nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    forget(network, group, [0, 5])
    masked = copy.deepcopy(network)
    names = [key for key, _ in network.named_parameters()]
    momenta = {key: optimizer.state[value]["momentum_buffer"].clone() for key, value in network.named_parameters()}
    pruning = ChannelPruning(network, PruneConfig(interval=1))
    pruning.before_epoch(1, optimizer, images, labels)
    assert [list(dropped.values()) for dropped in pruning.rebuilds] == [[[0, 5]]]
    assert optimizer.param_groups[0]["params"] == list(network.parameters())
    assert [key for key, _ in network.named_parameters()] == names
    assert all(value.grad is None and value.requires_grad for value in network.parameters())
    for key, value in network.named_parameters():
        kept = optimizer.state[value]["momentum_buffer"]
        expected = momenta[key]
        for dimension, (size, full) in enumerate(zip(value.shape, expected.shape)):
            if size < full:
                left = [index for index in range(full) if index not in (0, 5)]
                expected = expected.index_select(dimension, torch.tensor(left))
        assert torch.equal(kept, expected)
    nn.functional.cross_entropy(network(images), labels).backward()
    nn.functional.cross_entropy(masked(images), labels).backward()
    before = {key: value.detach().clone() for key, value in network.named_parameters()}
    optimizer.step()
    whole = dict(masked.named_parameters())
    for key, value in network.named_parameters():
        change = 1e-3 * (0.9 * momenta[key] + whole[key].grad)
        for dimension, (size, full) in enumerate(zip(value.shape, change.shape)):
            if size < full:
                left = [index for index in range(full) if index not in (0, 5)]
                change = change.index_select(dimension, torch.tensor(left))
        torch.testing.assert_close(value.detach(), before[key] - change, rtol=1e-4, atol=1e-6)


def test_rebuilt_at_each_interval_only():
    network, images, labels = whole_network("embedded"), random_images(2), LABELS[:2]
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    pruning = ChannelPruning(network, PruneConfig(interval=2))
    for epoch, rebuilt in ((0, 0), (1, 0), (2, 1), (3, 1), (4, 2)):
        forget(network, "layer2_1.conv1", [1, 2])
        pruning.before_epoch(epoch, optimizer, images, labels)
        assert len(pruning.rebuilds) == rebuilt


def test_nothing_empty_changes_nothing():
    network, images = whole_network("embedded"), random_images(2)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    before, parameters = copied_state(network), list(network.parameters())
    pruning = ChannelPruning(network, PruneConfig(interval=1))
    pruning.before_epoch(1, optimizer, images, LABELS[:2])
    assert pruning.rebuilds == []
    assert same_tensors(copied_state(network), before)
    assert all(one is other for one, other in zip(parameters, network.parameters()))


def test_the_lasso_empties_channels_that_a_simple_task_does_not_need():
    """Bright against dark images: a few channels suffice; at the published threshold, all by gradient descent."""
    torch.manual_seed(0)
    network = nn.Sequential(OrderedDict(
        input=Input(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), one=nn.Conv2d(3, 12, 3), two=nn.ReLU(),
        three=nn.Conv2d(12, 12, 3), four=nn.ReLU(), pool=Pool(), head=nn.Linear(12, 2),
    ))
    images = torch.cat([random_images(16, 8, 1) // 2, 127 + random_images(16, 8, 2) // 2])
    labels = torch.arange(32) // 16
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    pruning = ChannelPruning(network, PruneConfig(lasso_share=0.3, interval=1))
    for epoch in range(6):
        pruning.before_epoch(epoch, optimizer, images, labels)
        for _ in range(100):
            loss = nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            (loss + pruning.penalty(loss.detach())).backward()
            optimizer.step()
    assert pruning.rebuilds
    assert network.one.out_channels < 12
    assert network.three.out_channels < 12
    assert network.three.in_channels == network.one.out_channels
    assert (network(images).argmax(1) == labels).all()


def test_training_goes_on_with_the_smaller_network():
    setting = bare_setting(random_backbone("embedded"), "prune.interval=1 prune.threshold=0.12 training.epochs=3")
    plan, shapes, seen = REGISTRY["prune"](setting), [], []

    def evaluate(suffix):
        assert suffix is plan.split.suffix
        shapes.append(costs.parameter_counts(suffix)[1])
        with torch.inference_mode():
            seen.append(suffix(setting.images).shape)
        return {}

    outcome = fit(plan, setting.images, LABELS, setting.study.training, 1e-3, 0, evaluate)
    assert plan.rebuilds
    assert shapes[-1] < shapes[0] == costs.parameter_counts(REGISTRY["full"](setting).split.suffix)[1]
    assert seen == [(13, 3)] * 3
    assert all(math.isfinite(loss) for loss in outcome.history["loss"])
    full = fit(REGISTRY["full"](setting), setting.images, LABELS, setting.study.training, 1e-3, 0, lambda suffix: {})
    assert outcome.suffix_macs < full.suffix_macs
    assert 0 < outcome.seconds["engine"] < outcome.seconds["train"]


def test_a_pruned_network_loads_again(tiny):
    study = tiny_study("training.methods=[prune] prune.threshold=0.12 prune.interval=1")
    experiment = dataclasses.replace(
        tiny, study=study, setting=dataclasses.replace(tiny.setting, study=study), folder=tiny.folder / "pruned"
    )
    table = run(experiment)
    path = experiment.folder / "runs" / "prune-seed0" / "trained.safetensors"
    with safe_open(path, "pt") as file:
        rebuilds = json.loads(file.metadata()["rebuilds"])
    assert rebuilds
    network, _, _ = load_trained(path)
    assert table["total_params"].item() == costs.parameter_counts(network)[1]
    whole = REGISTRY["full"](experiment.setting).split.suffix
    assert table["total_params"].item() < costs.parameter_counts(whole)[1]
    indices = experiment.task.splits["test"]
    with torch.inference_mode():
        right = network(experiment.task.images[indices]).argmax(1) == experiment.task.labels[indices]
    assert table["test_accuracy"].item() == pytest.approx(100 * right.float().mean().item(), abs=0.01)
