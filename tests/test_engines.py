"""Whatever engine runs a frozen network, the latents are the same for any batch size."""

import platform
import subprocess
import sys

import pytest
import torch
import torch.utils._python_dispatch
from tiny import copied_state, random_backbone, random_images, same_tensors

from piebridge import engines
from piebridge.config import SubnetSpec
from piebridge.cutting import cut_subnet
from piebridge.engines import prepare
from piebridge.subnets import latents_of

# Vectors, maps and tokens; a subnet of lower resolution brings its own resizing.
NETWORKS = {
    "embedded": ("embedded", "head", None),
    "embedded subnet": ("embedded", "head", SubnetSpec(width=0.5, resolution=16)),
    "embedded maps": ("embedded", "layer3_1", SubnetSpec(resolution=16)),
    "resnet18": ("resnet18", "head", None),
    "mobilenet_v2": ("mobilenet_v2", "head", None),
    "mobilenet_v3_small": ("mobilenet_v3_small", "head", None),
    "tokens": ("vit_tiny_patch16_224", "block2", None),
}


def network_of(key):
    name, cut, spec = NETWORKS[key]
    prefix, _ = random_backbone(name).cut(cut)
    return prefix if spec is None else cut_subnet(prefix, spec, random_images(2))[0]


def check(key, engine):
    network, images = network_of(key), random_images(9, seed=3)
    before, expected = copied_state(network), latents_of(network, images)
    run = prepare(network, engine, images[:4])
    for size in (1, 2, 4, 9):
        latents = torch.cat([run(batch) for batch in images.split(size)])
        assert latents.dtype == torch.float32
        torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert same_tensors(copied_state(network), before)
    assert not latents.requires_grad


@pytest.mark.parametrize("key", NETWORKS)
def test_eager(key):
    check(key, "eager")


@pytest.mark.parametrize("key", ["embedded", "embedded subnet", "embedded maps", "mobilenet_v2", "tokens"])
def test_onnxruntime(key):
    pytest.importorskip("onnxruntime")
    check(key, "onnxruntime")


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, additions, of_few_pixels, behind_them", [
    ("mobilenet_v2", 10, 0, 0), ("resnet18", 8, 7, 4),
])
def test_activations_and_additions_are_part_of_their_convolutions(name, additions, of_few_pixels, behind_them):
    prefix, _ = random_backbone(name).cut("head")
    images = random_images(2)
    run = prepare(prefix, "eager", images)
    run(images)  # lays out the weights
    with Recorder() as recorder:
        run(images)
    convolutions = [module for module in prefix.modules() if isinstance(module, torch.nn.Conv2d)]
    of_pixels = [layer for layer in convolutions if layer.kernel_size == layer.stride == (1, 1)]
    linear = len(of_pixels) + of_few_pixels
    assert recorder.names.count("_linear_pointwise") == linear
    assert recorder.names.count("_convolution_pointwise") == len(convolutions) - linear
    assert recorder.names.count("relu_") == behind_them  # oneDNN's linear map either adds or activates
    assert not {"relu", "hardtanh", "hardtanh_", "clamp", "clamp_", "add", "add_"} & set(recorder.names)
    with Recorder() as recorder:
        prefix(images)
    assert recorder.names.count("add") + recorder.names.count("add_") == additions


class Residual(torch.nn.Module):
    """A convolution, an addition and an activation."""

    def __init__(self, kernel, stride, padding, dilation, activation):
        super().__init__()
        self.main = torch.nn.Conv2d(5, 6, kernel, stride, padding, dilation)
        self.beside, self.norm = torch.nn.Conv2d(5, 6, kernel, stride, padding, dilation), torch.nn.BatchNorm2d(6)
        self.activation = activation

    def forward(self, maps):
        return self.activation(self.norm(self.main(maps)) + self.beside(maps))


@pytest.mark.parametrize("size", [(2, 2), (1, 1), (1, 3), (2, 1)])
@pytest.mark.parametrize("form", [(3, 1, 1, 1), (3, 2, 1, 1), (5, 1, 2, 1), (3, 1, 2, 2), ((3, 5), (1, 2), (1, 2), 1)])
@pytest.mark.parametrize("activation", [torch.nn.ReLU(), torch.nn.ReLU6(), torch.nn.Identity()])
def test_convolutions_of_few_pixels_are_linear_maps(size, form, activation):
    torch.manual_seed(0)
    network, maps = torch.nn.Sequential(Residual(*form, activation)).eval(), 5 * torch.randn(7, 5, *size)
    run = prepare(network, "eager", maps[:4])
    with torch.no_grad():
        wanted = network(maps)
    for batch in (7, 1):
        torch.testing.assert_close(torch.cat([run(part) for part in maps.split(batch)]), wanted)
    with Recorder() as recorder:
        run(maps)
    assert recorder.names.count("_linear_pointwise") == 2 and "_convolution_pointwise" not in recorder.names


def test_convolutions_of_more_pixels_or_of_groups_stay():
    torch.manual_seed(0)
    for layer, side in ((torch.nn.Conv2d(4, 4, 3, 1, 1), 3), (torch.nn.Conv2d(4, 4, 3, 1, 1, groups=2), 2)):
        network = torch.nn.Sequential(torch.nn.Sequential(layer, torch.nn.BatchNorm2d(4), torch.nn.ReLU())).eval()
        maps = torch.randn(2, 4, side, side)
        run = prepare(network, "eager", maps)
        with torch.no_grad():
            torch.testing.assert_close(run(maps), network(maps))
        with Recorder() as recorder:
            run(maps)
        assert recorder.names.count("_convolution_pointwise") == 1 and "_linear_pointwise" not in recorder.names


class Sums(torch.nn.Module):
    """Additions that no convolution can take in: of a number, of the output to itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 1)
        self.norm, self.relu = torch.nn.BatchNorm2d(8), torch.nn.ReLU()

    def forward(self, images):
        numbered = self.relu(self.norm(self.first(images)) + 1.0)
        doubled = self.second(numbered)
        return self.relu(doubled + doubled)


class Bottleneck(torch.nn.Module):
    """A convolution of single pixels whose output is added to and then activated, as in ResNet-50."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, 8, 1, padding=1), torch.nn.Conv2d(8, 8, 1)
        self.norm, self.relu = torch.nn.BatchNorm2d(8), torch.nn.ReLU()

    def forward(self, images):
        maps = self.norm(self.first(images))
        return self.relu(maps + self.last(maps))


def test_convolutions_of_pixels_that_are_padded_or_added_to_and_activated():
    torch.manual_seed(0)
    network, images = torch.nn.Sequential(Bottleneck()).eval(), torch.randn(2, 3, 8, 8)
    run = prepare(network, "eager", images)
    with torch.no_grad():
        torch.testing.assert_close(run(images), network(images))
    with Recorder() as recorder:
        run(images)
    assert recorder.names.count("_convolution_pointwise") == 2 and "relu" not in recorder.names


def test_other_additions_stay():
    torch.manual_seed(0)
    network, images = torch.nn.Sequential(Sums()).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(prepare(network, "eager", images)(images), network(images))


@pytest.mark.parametrize("error", [RuntimeError("could not create a memory"), AttributeError("no such operator")])
def test_packed_convolutions_that_are_refused_are_done_without(monkeypatch, error):
    def refuse(*args):
        raise error

    monkeypatch.setattr(engines._PackedConvolution, "__call__", refuse)
    with pytest.warns(UserWarning, match=str(error)):
        check("mobilenet_v2", "eager")


def faults_of_a_pass(setting):
    """Page faults of one pass that makes maps of 40 MB, in a new process after eight others.

    As many, because what else lies in memory decides, and differs from process to process, in which pass (mostly the
    second, at times the fifth) the library first finds all it needs among what it kept.
    """
    code = f"""
import resource, torch
from piebridge.engines import prepare
torch.set_num_threads(1)
network = torch.nn.Sequential(torch.nn.Conv2d(3, 96, 1), torch.nn.BatchNorm2d(96), torch.nn.ReLU()).eval()
images = torch.rand(16, 3, 80, 80)
run = prepare(torch.nn.Sequential(network), "eager", images) if {setting} else network.requires_grad_(False)
for _ in range(8):
    run(images)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
run(images)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory by rules of its own")
def test_memory_is_kept_between_passes():
    assert faults_of_a_pass(False) > 5000  # 40 MB in pages of 4 kB
    assert faults_of_a_pass(True) < 500


def test_full_training_has_no_prefix_to_run():
    images = random_images(3)
    assert torch.equal(prepare(torch.nn.Sequential(), "eager", images)(images), images)
