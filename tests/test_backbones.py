"""Every backbone of the registry: taken apart, cut, put together again; and what wrong weights lead to."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import BACKBONES, SIDE, random_backbone, random_images

from piebridge.backbones import Input, WeightsError, load_backbone, take_apart
from piebridge.config import BackboneConfig
from piebridge.embedded import SmallResNet


@pytest.mark.parametrize("name", BACKBONES)
def test_prefix_and_suffix_are_the_whole(name):
    backbone, images = random_backbone(name), random_images(2)
    with torch.no_grad():
        whole = backbone.blocks(images)
        for cut in ("head", backbone.body[0], backbone.body[-1]):
            prefix, suffix = backbone.cut(cut)
            assert torch.equal(suffix(prefix(images)), whole)
            assert next(iter(dict(suffix.named_children()))) == cut
    assert len(whole) == 2
    assert len(whole.unique()) > 2


@pytest.mark.parametrize("name", BACKBONES)
def test_blocks_are_the_librarys_network(name):
    """Against the library's own forward pass, on images normalised by hand."""
    import timm
    import torchvision

    torch.manual_seed(0)
    if name == "embedded":
        model = SmallResNet()
    elif "patch16" in name:
        model = timm.create_model(name, pretrained=False, dynamic_img_size=True)
    else:
        model = torchvision.models.get_model(name, weights=None)
    model.eval()
    images = random_images(2)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if hasattr(model, "pretrained_cfg"):
        mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    normalised = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = model(normalised)
        logits = take_apart(model, name, SIDE).blocks(images)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_is_frozen_and_evaluates(name):
    backbone = random_backbone(name)
    assert not any(parameter.requires_grad for parameter in backbone.blocks.parameters())
    assert not any(module.training for module in backbone.blocks.modules())
    assert next(iter(dict(backbone.blocks.named_children()))) == "input"
    assert set(backbone.body) < set(dict(backbone.blocks.named_children()))


def test_input_normalises_and_resizes():
    images = torch.full((1, 3, 40, 40), 255, dtype=torch.uint8)
    output = Input(32, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))(images)
    assert output.shape == (1, 3, 32, 32)
    torch.testing.assert_close(output[0, :, 5, 5], torch.tensor([2.0, 3.0, 7.0]))


def test_input_of_another_side_stays_on_its_device():
    original = Input(32, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)).to("meta")
    smaller = original.at(16)
    assert (smaller.resolution, original.resolution) == (16, 32)
    assert {rows.device.type for rows in smaller.buffers()} == {"meta"}
    assert [rows.shape for rows in smaller.buffers()] == [(48,), (48,)]


def test_unknown_block_cannot_be_cut_at():
    with pytest.raises(ValueError, match="nonsense"):
        random_backbone("embedded").cut("nonsense")


# --------------------------------------------------------------------------------------------- weights


def weights_of(model):
    return {key: value.contiguous() for key, value in model.state_dict().items()}


def load_embedded(path):
    return load_backbone(BackboneConfig(name="embedded", resolution=SIDE, weights=str(path)))


@pytest.fixture
def model():
    torch.manual_seed(1)
    return SmallResNet().eval()


def test_weights_are_loaded(tmp_path, model):
    save_file(weights_of(model), tmp_path / "w.safetensors")
    backbone, expected = load_embedded(tmp_path / "w.safetensors"), take_apart(model, "embedded", SIDE)
    assert torch.equal(backbone.blocks(random_images(2)), expected.blocks(random_images(2)))
    assert backbone.fingerprint == expected.fingerprint


def test_fingerprints_follow_the_weights(tmp_path, model):
    before = take_apart(model, "embedded", SIDE).fingerprint
    model.fc.bias.data[0] += 1e-3
    after = take_apart(model, "embedded", SIDE).fingerprint
    assert before != after
    assert take_apart(model, "embedded", 16).fingerprint == after  # the resolution is no weight
    assert len(after) == 16
    assert int(after, 16) >= 0


def test_half_precision_file_becomes_float32(tmp_path, model):
    halves = {key: value.half() if value.is_floating_point() else value for key, value in weights_of(model).items()}
    save_file(halves, tmp_path / "half.safetensors")
    backbone = load_embedded(tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in backbone.blocks.parameters()} == {torch.float32}
    assert torch.equal(backbone.blocks.head.weight, model.fc.weight.half().float())


def test_missing_weights_file(tmp_path):
    with pytest.raises(WeightsError, match=r"absent\.safetensors: no such file"):
        load_embedded(tmp_path / "absent.safetensors")


def test_file_of_another_kind(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"this is a text, not a safetensors file")
    with pytest.raises(WeightsError, match=r"w\.safetensors: not a safetensors file"):
        load_embedded(tmp_path / "w.safetensors")


def test_cut_off_file(tmp_path, model):
    save_file(weights_of(model), tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=r"w\.safetensors"):
        load_embedded(tmp_path / "w.safetensors")


def test_weights_of_another_architecture(tmp_path, model):
    save_file(weights_of(model), tmp_path / "w.safetensors")
    config = BackboneConfig(name="mobilenet_v2", resolution=SIDE, weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(WeightsError, match=r"w\.safetensors: not weights of mobilenet_v2: tensor '"):
        load_backbone(config)


def test_tensor_missing_from_the_file(tmp_path, model):
    tensors = weights_of(model)
    del tensors["layer2.0.conv1.weight"]
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"w\.safetensors.*'layer2\.0\.conv1\.weight' is missing"):
        load_embedded(tmp_path / "w.safetensors")


def test_tensor_of_another_shape(tmp_path):
    save_file(weights_of(SmallResNet(num_classes=7)), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"w\.safetensors.*'fc\.(weight|bias)' has shape \(7"):
        load_embedded(tmp_path / "w.safetensors")


def test_variable_leads_to_the_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("PIEBRIDGE_WEIGHTS", str(tmp_path))
    config = BackboneConfig(name="resnet18", resolution=SIDE)
    with pytest.raises(WeightsError, match=r"resnet18\.safetensors: no such file; unset PIEBRIDGE_WEIGHTS"):
        load_backbone(config)
    import torchvision

    model = torchvision.models.resnet18(weights=None)
    save_file(weights_of(model), tmp_path / "resnet18.safetensors")
    assert torch.equal(load_backbone(config).blocks.head.weight, model.fc.weight)


@pytest.mark.parametrize("resolution", [32, 20])
def test_pixels_do_not_depend_on_the_layout_of_images(resolution):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    layer = Input(resolution, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    pixels = layer(images)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(images.contiguous(memory_format=torch.channels_last)), pixels)
