"""Engines: what runs a frozen network."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from .folding import fold_stem

Runner = Callable[[Tensor], Tensor]


def prepare(network: nn.Module, engine: str, example: Tensor) -> Runner:
    """Make a frozen network ready to run.

    Args:
        network: uint8 images (B, 3, H, W) to float32 latents; stays untouched.
        engine: `eager` (PyTorch, channels-last, batch norms folded into their convolutions, whose weights are laid
            out once for oneDNN on a CPU, the first convolution in blocks of pixels on a GPU) or `onnxruntime` (float32,
            on the CPU, as many threads as PyTorch has).
        example: uint8 images of the size and on the device of use.

    Returns:
        A function from uint8 images to latents on the same device, for any batch size.
    """
    if engine == "eager":
        return _eager(network, example)
    return _onnxruntime(network, example)


def _eager(network: nn.Module, example: Tensor) -> Runner:
    if not len(list(network.children())):
        return network  # full training: there is no prefix
    if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        frozen = nn.Sequential(*[block if _untraceable(block) else fuse(block) for block in network.children()])
    else:
        frozen = copy.deepcopy(network)
    frozen = frozen.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    if example.device.type == "cpu" and torch.backends.mkldnn.is_available():
        _pack_convolutions(frozen)
    if example.device.type == "cuda":
        fold_stem(frozen)

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return frozen(images)

    return run


class _PackedConvolution(nn.Module):
    """A convolution, and the ReLU behind it, as one call of oneDNN on weights that are laid out for it once.

    PyTorch lays the weights out anew in every call, a cost that does not shrink with the image. The operator is the one
    that torch.compile uses for frozen networks on CPUs; it is not a public interface of PyTorch.
    """

    def __init__(self, convolution: nn.Conv2d, activation: str, bounds: tuple[float, ...]) -> None:
        super().__init__()
        self.convolution, self.activation, self.bounds = convolution, activation, list(bounds)
        self.packed: Optional[Tensor] = None

    def forward(self, images: Tensor) -> Tensor:
        layer = self.convolution
        shape = (layer.padding, layer.stride, layer.dilation, layer.groups)
        if self.packed is None:
            weight = layer.weight.detach().to_mkldnn()
            self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *shape, list(images.shape))
        return torch.ops.mkldnn._convolution_pointwise(
            images, self.packed, layer.bias, *shape, self.activation, self.bounds, ""
        )


def _pack_convolutions(module: nn.Module) -> None:
    """Replace the convolutions in place; a ReLU that follows one in a Sequential becomes part of it."""
    names = list(module._modules)
    for name, following in zip(names, [*names[1:], None]):
        layer, after = module._modules[name], module._modules.get(following)
        if not isinstance(layer, nn.Conv2d):
            _pack_convolutions(layer)
            continue
        activation, bounds = "none", ()
        if isinstance(module, nn.Sequential) and type(after) in (nn.ReLU, nn.ReLU6):
            activation, bounds = ("relu", ()) if type(after) is nn.ReLU else ("hardtanh", (0.0, 6.0))
            module._modules[following] = nn.Identity()
        module._modules[name] = _PackedConvolution(layer, activation, bounds)


def _untraceable(block: nn.Module) -> bool:
    """Blocks whose forward depends on the image's size, which torch.fx cannot follow; they hold no batch norm."""
    return not any(isinstance(module, nn.BatchNorm2d) for module in block.modules())


def _onnxruntime(network: nn.Module, example: Tensor) -> Runner:
    import onnxruntime

    resize, body = _without_input(network)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = resize(example[:1].repeat(2, 1, 1, 1).cpu())
        batch = torch.export.Dim("batch", min=1, max=4096)
        program = torch.onnx.export(body.cpu(), (pixels,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            outputs = session.run(None, {name: resize(images.cpu()).contiguous().numpy()})
        return torch.from_numpy(outputs[0]).to(images.device)

    return run


def _without_input(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The resizing of uint8 pixels stays in PyTorch; the rest is exported."""
    children = dict(copy.deepcopy(network).named_children())
    return children.pop("input"), nn.Sequential(*children.values()).eval()
