"""Costs against formulas worked out by hand."""

from types import SimpleNamespace

import pytest
import torch
from tiny import SIDE, random_backbone, random_images
from torch import nn

from piebridge import costs
from piebridge.pet import split_all


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_macs_of_a_convolution(batch, groups):
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
    assert costs.macs(layer, torch.zeros(batch, 4, 8, 10)) == (4 // groups) * 6 * 9 * (4 * 5)


def test_macs_of_a_linear_layer():
    assert costs.macs(nn.Linear(7, 5), torch.zeros(3, 7)) == 35


def test_macs_of_a_whole_resnet():
    """ResNet-18 at 32 px, layer by layer: (input channels, output channels, kernel, side of the output)."""
    layers = [(3, 64, 7, 16), *[(64, 64, 3, 8)] * 4]
    for inputs, side in ((64, 4), (128, 2), (256, 1)):
        layers += [(inputs, 2 * inputs, 3, side), (inputs, 2 * inputs, 1, side)]
        layers += [(2 * inputs, 2 * inputs, 3, side)] * 3
    expected = sum(inputs * outputs * kernel**2 * side**2 for inputs, outputs, kernel, side in layers) + 512 * 1000
    assert SIDE == 32
    assert costs.macs(random_backbone("resnet18").blocks, random_images(1)) == expected


def test_training_macs_count_both_ways():
    """Forward a + b; backward a weight gradient in each layer and the gradient that the second passes on."""
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    first, second = 24, 12
    assert costs.training_macs(network, torch.ones(5, 4)) == 2 * first + 3 * second
    network[0].requires_grad_(False)
    assert costs.training_macs(network, torch.ones(5, 4)) == first + 2 * second
    assert network[2].weight.grad is None


def test_parameter_counts():
    network = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    network[0].requires_grad_(False)
    assert costs.parameter_counts(network) == (14, 44)


def fake_clock(monkeypatch, *readings):
    times = iter(readings)
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: next(times)))


def test_stopwatch_adds_up_by_name_also_after_an_error(monkeypatch):
    fake_clock(monkeypatch, 0.0, 1.0, 5.0, 7.0, 10.0, 10.5)
    stopwatch = costs.Stopwatch()
    with stopwatch("prefix"):
        pass
    with stopwatch("suffix"):
        pass
    with pytest.raises(RuntimeError), stopwatch("prefix"):
        raise RuntimeError
    assert stopwatch.seconds == {"prefix": 1.5, "suffix": 2.0}


def test_latency_is_the_median_without_warm_up(monkeypatch):
    durations = [90.0, 80.0, 3.0, 1.0, 2.0]
    fake_clock(monkeypatch, *[reading for duration in durations for reading in (0.0, duration)])
    assert costs.latency(lambda images: images, torch.zeros(4, 3), repeats=3) == 0.5


def test_peak_memory_is_measured_anew():
    costs.reset_peak_memory("cpu")
    before = costs.peak_memory_mib("cpu")
    block = torch.ones(64 * 2**20)  # 256 MiB
    high = costs.peak_memory_mib("cpu")
    assert high > before + 200
    del block
    costs.reset_peak_memory("cpu")
    assert costs.peak_memory_mib("cpu") < high - 200


def test_energy_is_the_sum_of_the_packages(tmp_path):
    for name, microjoules in (("intel-rapl:0", 1_500_000), ("intel-rapl:0:0", 700_000), ("intel-rapl:1", 2_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{microjoules}\n")
    assert costs.energy_counter_j(tmp_path) == 3.5


def test_energy_is_none_where_the_device_does_not_tell(tmp_path):
    assert costs.energy_counter_j(tmp_path) is None
    assert costs.energy_counter_j(tmp_path / "absent") is None
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("unreadable")
    assert costs.energy_counter_j(tmp_path) is None


def trained_blocks(kind):
    backbone = random_backbone("resnet18")
    blocks = split_all(backbone, 3, seed=0).suffix
    if kind == "head":
        blocks.requires_grad_(False)
        blocks.head.requires_grad_(True)
    return blocks


def test_profile_of_head_training():
    rows = costs.profile_blocks(trained_blocks("head"), random_images(2), repeats=1)
    assert [row["block"] for row in rows if row["trained"]] == ["head"]
    assert [row["block"] for row in rows if row["backward_ms"] > 0] == ["head"]
    assert [row["block"] for row in rows if row["activation_mib"] > 0] == ["head"]
    assert all(row["forward_ms"] > 0 for row in rows)


def test_profile_of_full_training():
    blocks = trained_blocks("full")
    rows = costs.profile_blocks(blocks, random_images(2), repeats=1)
    assert [row["block"] for row in rows if not row["backward_ms"] > 0] == ["input"]
    assert sum(row["gmacs"] for row in rows) == pytest.approx(costs.macs(blocks, random_images(1)) * 2 / 1e9)
    assert sum(row["parameters"] for row in rows) == costs.parameter_counts(blocks)[1]
    assert all(parameter.grad is None for parameter in blocks.parameters())


def test_profile_counts_what_a_linear_layer_keeps():
    """The weight's gradient needs the layer's input: 8 images of 1024 float32 values."""
    rows = costs.profile_blocks(nn.Sequential(nn.Linear(1024, 2)), torch.ones(8, 1024), repeats=1)
    assert rows[0]["activation_mib"] == 8 * 1024 * 4 / 2**20
