"""Whatever engine runs a frozen network, the latents are the same for any batch size."""

import pytest
import torch
from tiny import copied_state, random_backbone, random_images, same_tensors

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


def test_full_training_has_no_prefix_to_run():
    images = random_images(3)
    assert torch.equal(prepare(torch.nn.Sequential(), "eager", images)(images), images)
